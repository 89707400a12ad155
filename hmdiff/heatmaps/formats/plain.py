"""Plain JSON: an object with `keypoints_SET` (coco17, halpe26, openpose25, ...) or `keypoints`, and optional `names`
and `box_xyxy`; or bare lists of 17 times x, y, confidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmdiff.body.skeletons import JOINT_SETS
from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.coco import identity_of
from hmdiff.heatmaps.formats.entry import Entry, as_list
from hmdiff.heatmaps.formats.joint_names import map_names

_NAMES = ("names", "keypoint_names", "joint_names", "joints")
_START = "keypoints_"


def keypoints_key(data: dict[str, Any]) -> str | None:
    """The key of the keypoints; None if there is none."""
    sets = [_START + name for name in JOINT_SETS if _START + name in data]
    return sets[0] if sets else "keypoints" if "keypoints" in data else None


def entries(path: Path, data: Any, notes: list[str]) -> list[Entry]:
    if isinstance(data, dict):
        key = keypoints_key(data)
        if key is None:
            found = ", ".join(map(repr, list(data)[:6])) or "nothing"
            raise UserError(
                f"{path}: no keypoints ({found} found); one of 'annotations', 'people', 'instance_info', 'keypoints', "
                "'keypoints_coco17', 'keypoints_openpose25' is expected"
            )
        names: Sequence[str] | None = JOINT_SETS.get(key.removeprefix(_START)) if key.startswith(_START) else None
        given = next((data[each] for each in _NAMES if isinstance(data.get(each), list)), None)
        if names is None and given and all(isinstance(each, str) for each in given):
            names, unknown = map_names(given, str(path))
            if unknown:
                notes.append(f"{path}: joints {', '.join(unknown)} are not known: left out")
        people = _people(path, data[key])
        boxes = data.get("box_xyxy")
        boxes = boxes if isinstance(boxes, list) and boxes and isinstance(boxes[0], list) else [boxes] * len(people)
        return [
            Entry(person, names, box=_checked(path, box), box_form="xyxy", identity=identity_of(data))
            for person, box in zip(people, boxes, strict=False)
        ]
    return [Entry(person) for person in _people(path, as_list(path, data, "the file"))]


def _people(path: Path, value: Any) -> list[Any]:
    """Split one or several people: (J, 3), (J * 3), (P, J, 3) or (P, J * 3), as lists."""
    items = as_list(path, value, "keypoints")
    # Nested lists, or lists longer than x, y, confidence, are people.
    several = bool(items) and all(
        isinstance(item, list) and (len(item) > 4 or any(isinstance(part, list) for part in item)) for item in items
    )
    return items if several else [items] if items else []


def _checked(path: Path, box: Any) -> Any:
    """An invalid box here comes from the user: refuse it instead of replacing it as for other families."""
    if box is None:
        return None
    usable = isinstance(box, list) and len(box) == 4 and all(isinstance(number, int | float) for number in box)
    if not usable:
        raise UserError(f"{path}: a box must be four finite numbers, {str(box)[:60]} found")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f"{path}: a box without size, {str(box)[:60]}; x0 < x1 and y0 < y1 are expected")
    return box
