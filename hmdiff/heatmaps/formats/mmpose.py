"""Output of mmpose 1.x: `predictions/NAME.json` (a list of instances), and the demo's `instance_info`, whose
`meta_info` names the joints. Boxes are x1, y1, x2, y2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.coco import identity_of
from hmdiff.heatmaps.formats.entry import CONFIDENCE, Entry, as_list
from hmdiff.heatmaps.formats.joint_names import map_names


def recognised(data: Any) -> bool:
    if isinstance(data, dict):
        return "instance_info" in data or "predictions" in data
    while isinstance(data, list) and len(data) == 1 and isinstance(data[0], list):
        data = data[0]
    return (
        isinstance(data, list)
        and bool(data)
        and isinstance(data[0], dict)
        and ("keypoint_scores" in data[0] or "instances" in data[0])
    )


def entries(path: Path, data: Any, notes: list[str]) -> list[Entry]:
    names = None
    if isinstance(data, dict):
        meta = data.get("meta_info")
        if isinstance(meta, dict) and isinstance(meta.get("keypoint_id2name"), dict):
            named = {int(index): str(name) for index, name in meta["keypoint_id2name"].items()}
            names, unknown = map_names([named[index] for index in sorted(named)], str(path))
            if unknown:
                notes.append(f"{path}: joints {', '.join(unknown)} are not known: left out")
        data = data["instance_info"] if "instance_info" in data else data["predictions"]
    instances = _instances(path, as_list(path, data, "the instances"))
    return [
        Entry(
            each["keypoints"],
            names,
            each.get("keypoint_scores"),
            CONFIDENCE,
            each.get("bbox"),
            "xyxy",
            identity=identity_of(each),
        )
        for each in instances
    ]


def _instances(path: Path, data: list[Any]) -> list[dict[str, Any]]:
    while len(data) == 1 and isinstance(data[0], list):
        data = data[0]
    pictures = [each for each in data if isinstance(each, list) or (isinstance(each, dict) and "instances" in each)]
    if len(pictures) > 1 or any(isinstance(each, list) for each in data):
        raise UserError(f"{path}: predictions of {len(data)} pictures; give the file of this photo alone")
    _check(path, data)
    found: list[dict[str, Any]] = []
    for each in data:
        if "instances" in each:
            found += as_list(path, each["instances"], "'instances'")
        else:
            found.append(each)
    _check(path, found)
    missing = next((index for index, each in enumerate(found) if "keypoints" not in each), None)
    if missing is not None:
        raise UserError(f"{path}: instance {missing} without 'keypoints'; predictions of mmpose are expected")
    return found


def _check(path: Path, instances: list[Any]) -> None:
    for index, each in enumerate(instances):
        if not isinstance(each, dict):
            raise UserError(f"{path}: instance {index} is {each!r:.60}, a mapping with 'keypoints' is expected")
