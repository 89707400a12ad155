"""Published joint regressors: the user's files, found by name, validated, their orders not mixed up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hmdiff.body.regressors import REGRESSORS, find_regressor_file, load_regressor
from hmdiff.body.skeletons import H36M17, J14, SPIN_H36M17, joint_indices
from hmdiff.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", list(REGRESSORS))
def test_found_by_name_below_the_folder(name: str, folder: Path) -> None:
    place = folder / "spin" / "data" / REGRESSORS[name].file
    place.parent.mkdir(parents=True)
    values = np.random.default_rng(0).random((REGRESSORS[name].joints, 6890))
    np.save(place, values)  # float64, as published
    assert find_regressor_file(name) == place
    found = load_regressor(name)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), values.astype(np.float32))
    others = set(REGRESSORS) - {name}
    for other in others:  # h36m's is not mistaken for h36m_correct's
        with pytest.raises(UserError, match=f"{REGRESSORS[other].file} not found: not in"):
            load_regressor(other)


def test_the_two_orders_give_the_same_fourteen_joints_each_by_its_own_map() -> None:
    """SPIN's map on SPIN's rows, METRO's on METRO's; crossed, left and right legs are exchanged."""
    spin, metro = joint_indices(J14, SPIN_H36M17), joint_indices(J14, H36M17)
    assert spin == [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]
    assert metro == [3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10]
    crossed = [SPIN_H36M17[row] for row in metro]
    assert crossed[:6] == ["left_ankle", "left_knee", "left_hip", "right_hip", "right_knee", "right_ankle"]


def test_what_is_missing_says_where_it_comes_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"J_regressor_h36m\.npy not found: not in .*it comes with the data of SPIN"):
        load_regressor("h36m")
    with pytest.raises(UserError, match=r"J_regressor_h36m_correct\.npy not found.*METRO"):
        load_regressor("h36m_correct")
    with pytest.raises(UserError, match="regressor 'h36' is not known; there are h36m, h36m_correct, extra"):
        load_regressor("h36")
    monkeypatch.delenv("HMDIFF_BODY_DIR")
    with pytest.raises(UserError, match="HMDIFF_BODY_DIR is not set"):
        load_regressor("extra")


def test_bad_files_are_named(folder: Path) -> None:
    path = folder / "J_regressor_extra.npy"
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"J_regressor_extra\.npy: not an npz or npy file"):
        load_regressor("extra")
    np.save(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="pickled Python objects"):
        load_regressor("extra")
    np.save(path, np.zeros((9, 6889)))
    with pytest.raises(UserError, match=r"float64 \(9, 6889\) found, numbers of shape \(9, 6890\) expected"):
        load_regressor("extra")
    np.save(path, np.full((9, 6890), np.nan))
    with pytest.raises(UserError, match="not finite"):
        load_regressor("extra")
    with open(path, "wb") as handle:
        np.savez(handle, a=np.zeros(2))
    with pytest.raises(UserError, match="an npz archive found"):
        load_regressor("extra")
