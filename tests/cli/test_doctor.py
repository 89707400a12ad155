"""`hmdiff doctor`: one line per item, and a remedy for missing ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin_bodies as s
import torch
from records import ListReader, make_records

from hmdiff.cli import doctor
from hmdiff.cli.main import main
from hmdiff.data.prepare import prepare_dataset


@pytest.fixture(autouse=True)
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMDIFF_BODY_DIR", raising=False)
    monkeypatch.delenv("HMDIFF_DATA_DIR", raising=False)


def lines() -> dict[str, tuple[str, str]]:
    return {what: (state, remark) for state, what, remark in doctor.findings()}


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))


def test_where_nothing_is_set_it_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines()
    for what, words in (
        ("licensed bodies", "HMDIFF_BODY_DIR is not set"),
        ("regressors", "J_regressor_h36m_correct.npy"),
        ("data sets", "HMDIFF_DATA_DIR is not set; hmdiff prepare NAME SOURCE FOLDER"),
    ):
        assert found[what][0] == "-" and words in found[what][1]
    assert found["torch"][0] == "ok" and found["torch"][1].startswith(torch.__version__.split("+")[0])
    assert main(["doctor"]) == 0  # optional items do not count as missing
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(found) + 1 and "try: hmdiff demo" in out


def test_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"mmpose", "mmdet", "mmpretrain"} <= doctor.OPTIONAL.keys()
    without(monkeypatch, "mmpose", "mmpretrain", "mmcv", "timm")
    found = lines()
    words = "not installed (heatmaps from photos alone, without keypoints): uv sync --extra mmpose"
    assert found["mmpose"] == ("-", words)
    assert found["mmpretrain"][0] == "-" and "ViTPose" in found["mmpretrain"][1]
    assert found["timm"][0] == "MISSING" and "pip install" in found["timm"][1]
    assert main(["doctor"]) == 2
    assert "1 missing: do what the lines say" in capsys.readouterr().out


def test_mmpose_needs_its_companions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmpose")
    assert lines()["mmpose"][0] == "ok"
    without(monkeypatch, "mmcv", "xtcocotools")
    assert lines()["mmpose"][1].startswith("does not work without mmcv, xtcocotools")


def test_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU that torch can use" in lines()["device"][1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    assert lines()["device"][1].startswith("A card (cuda)")


def test_bodies_and_regressors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path / "absent"))
    assert "no such folder" in lines()["licensed bodies"][1]
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path))
    s.write_pickle(tmp_path / "smpl" / "models" / "basicmodel_f_lbs_10_207_0_v1.1.0.pkl", {})
    np.savez(tmp_path / "MANO_LEFT.npz")
    np.save(tmp_path / "J_regressor_h36m.npy", np.zeros((17, 6890)))
    np.save(tmp_path / "J_regressor_extra.npy", np.zeros((8, 6890)))
    found = lines()
    state, remark = found["body smpl female"]
    assert state == "ok" and remark.endswith(f"; hmdiff prepare licensed {tmp_path} makes it an npz")
    assert found["body mano left"] == ("ok", str(tmp_path / "MANO_LEFT.npz"))
    for what, file in (
        ("smpl neutral, male", "SMPL_NEUTRAL.pkl"),
        ("mano right", "MANO_RIGHT.pkl"),
        ("smplx neutral, female, male", "SMPLX_NEUTRAL.npz"),
    ):
        state, remark = found[f"body {what}"]
        assert state == "-" and remark.startswith(f"{file} not found") and "register at https://" in remark
    assert found["joints h36m"] == ("ok", "J_regressor_h36m.npy, 17 joints of 6890 vertices")
    assert found["joints h36m_correct"][0] == "-" and "it comes with METRO" in found["joints h36m_correct"][1]
    assert found["joints extra"][0] == "-" and "(8, 6890) found" in found["joints extra"][1]


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMDIFF_DATA_DIR", str(tmp_path / "absent"))
    assert "no such folder" in lines()["data sets"][1]
    monkeypatch.setenv("HMDIFF_DATA_DIR", str(tmp_path))
    assert lines()["data sets"][1].startswith(f"none in {tmp_path}")
    records = make_records(tmp_path, 4, photos=False)
    for name in ("whole", "stopped", "changed", "damaged"):
        prepare_dataset(ListReader(records), tmp_path / name, shard_records=2)
    index: dict[str, Any] = json.loads((tmp_path / "stopped" / "index.json").read_text())
    (tmp_path / "stopped" / "index.json").write_text(json.dumps(index | {"complete": False}))
    (tmp_path / "changed" / "shard_00001.arrow").write_bytes(b"short")
    (tmp_path / "damaged" / "index.json").write_text("{")
    found = lines()
    assert found["data whole"] == ("ok", "4 people in 2 shards") and "data sets" not in found
    assert found["data stopped"][0] == "-" and "the same command goes on" in found["data stopped"][1]
    assert found["data changed"][0] == "-" and "shard_00001.arrow: not of the size" in found["data changed"][1]
    assert found["data damaged"][0] == "-" and "prepare it again" in found["data damaged"][1]
