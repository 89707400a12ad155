"""Any value of any label file replaced: the result is correct, or one line names the file."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin_tables as tables
import standins as s

from hmdiff.data.readers import open_reader
from hmdiff.data.readers.labels import RowReader, naming
from hmdiff.data.record import Record
from hmdiff.errors import UserError

TRIES = 40  # per file
IN_PLACE_OF: tuple[Any, ...] = (None, "x", [], {}, float("nan"), -1, 10**400, 1e300, True, [[1, 2], [3]], [None])


def damaged(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """A copy with one entry at a random depth replaced."""
    inner = value.tolist() if isinstance(value, np.ndarray) else value
    if depth and (draw.random() < 0.25 or not isinstance(inner, dict | list) or not inner):
        return draw.choice(IN_PLACE_OF)
    if isinstance(inner, dict):
        key = draw.choice(sorted(inner, key=str))
        if draw.random() < 0.1:
            return {name: each for name, each in inner.items() if name != key}
        return {**inner, key: damaged(inner[key], draw, depth + 1)}
    place = draw.randrange(len(inner))
    if draw.random() < 0.1:
        return inner[:place]
    return [damaged(each, draw, depth + 1) if number == place else each for number, each in enumerate(inner)]


def of_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), draw)))


def of_pickle(path: Path, draw: random.Random) -> None:
    path.write_bytes(pickle.dumps(damaged(pickle.loads(path.read_bytes(), encoding="latin1"), draw), 2))


def of_npz(path: Path, draw: random.Random) -> None:
    with np.load(path, allow_pickle=True) as found:
        arrays = {name: found[name] for name in found.files}
    name = draw.choice(sorted(arrays))
    column = np.empty(len(arrays[name]), object)
    for row, value in enumerate(damaged(list(arrays[name]), draw, 0)[: len(column)]):
        column[row] = value
    np.savez(path, **{**arrays, name: column})


Damage = Callable[[Path, random.Random], None]
FILES: dict[str, tuple[str, Callable[[Path], Any], str, Damage]] = {
    "3dpw": ("3dpw", s.make_3dpw, "sequenceFiles/test/downtown_bus_00.pkl", of_pickle),
    "cameras": ("human36m", lambda f: tables.make_human36m(f, "mmpose"), "annotation_body3d/cameras.pkl", of_pickle),
    "mmpose": (
        "human36m",
        lambda f: tables.make_human36m(f, "mmpose"),
        "annotation_body3d/fps10/h36m_test.npz",
        of_npz,
    ),
    **{
        f"h36m {name}": (
            "human36m",
            lambda f: tables.make_human36m(f, "json"),
            f"annotations/Human36M_subject9_{name}.json",
            of_json,
        )
        for name in ("data", "camera", "joint_3d", "smpl_param")
    },
    "spin": ("spin", tables.make_spin, "coco_2014_train.npz", of_npz),
    "hmr2": ("hmr2", tables.make_hmr2, "3dpw_test.npz", of_npz),
    "coco": ("coco", tables.make_coco, "annotations/person_keypoints_val2017.json", of_json),
    "3doh": ("3doh", tables.make_3doh, "testset/annots.json", of_json),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_any_damage_is_one_line_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.delenv("HMDIFF_BODY_DIR", raising=False)
    name, make, file, damage = FILES[kind]
    make(tmp_path)
    path = tmp_path / file
    whole, refused = path.read_bytes(), 0
    with np.errstate(all="ignore"):
        for number in range(TRIES):
            path.write_bytes(whole)
            damage(path, random.Random(f"{kind} {number}"))
            try:
                list(open_reader(name, tmp_path).records())
            except UserError as error:
                refused += 1
                assert path.name in str(error) and "\n" not in str(error), f"{number}: {error}"
                assert len(str(error)) < 600, str(error)
    assert refused > TRIES // 8  # otherwise too little was damaged to test anything


def test_a_row_that_fails_is_named() -> None:
    reader = RowReader("a", [3], lambda row: {}["pose"], location=lambda row: f"labels.npz, row {row}")  # type: ignore[index]
    with pytest.raises(UserError, match=r"labels\.npz, row 3: damaged \(KeyError: 'pose'\)"):
        list(reader.records())
    with pytest.raises(MemoryError), naming("a"):  # errors other than damage are not hidden
        raise MemoryError


def test_a_picture_s_name_that_no_file_system_takes_is_a_missing_picture(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 5000 + ".jpg")
    with pytest.raises(UserError, match=r"row 4: its image .{1,400} is missing"):
        Record("a", np.array([50.0, 50]), 80.0, "row 4", image=long).check()
    with (
        pytest.raises(UserError, match=r"labels\.json, image 2: .*the name is too long"),
        naming("labels.json, image 2"),
    ):
        long.read_bytes()
