"""OpenPose's output (arXiv 1812.08008): `people[].pose_keypoints_2d`, BODY_25 or the older COCO-18.

AlphaPose writes the same format (`--format open`), and `bodies[].joints` (`--format cmu`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmdiff.body.skeletons import OPENPOSE18, OPENPOSE25
from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.coco import identity_of
from hmdiff.heatmaps.formats.entry import Entry, as_list, numbers

_LAYOUTS = {25: OPENPOSE25, 18: OPENPOSE18}


def recognised(data: Any) -> bool:
    return isinstance(data, dict) and ("people" in data or "bodies" in data)


def entries(path: Path, data: dict[str, Any]) -> list[Entry]:
    group = "people" if "people" in data else "bodies"
    return [_entry(path, index, each) for index, each in enumerate(as_list(path, data[group], repr(group)))]


def _entry(path: Path, index: int, person: Any) -> Entry:
    keypoints = None
    if isinstance(person, dict):
        keypoints = person.get("pose_keypoints_2d", person.get("joints", person.get("pose_keypoints")))
    if keypoints is None:
        raise UserError(f"{path}: person {index} has no 'pose_keypoints_2d'; OpenPose's body output is expected")
    names = _LAYOUTS.get(len(numbers(path, keypoints)) // 3)
    expected = "75 values (BODY_25) or 54 (COCO)"
    if names is None:
        expected, names = "75 values (BODY_25) or 54 (COCO) expected in 'pose_keypoints_2d'", OPENPOSE25
    return Entry(keypoints, names, identity=identity_of(person), expected=expected.removesuffix(" expected"))
