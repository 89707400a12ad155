"""Library outputs saved as JSON: ultralytics (`results[0].to_json()`, and the labels of `save_txt`), transformers'
ViTPose (`post_process_pose_estimation`), the Keypoint R-CNNs of Detectron2 and torchvision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hmdiff.body.skeletons import COCO17
from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.coco import identity_of
from hmdiff.heatmaps.formats.entry import CONFIDENCE, Entry, as_list, numbers

_SURE = 0.2  # Detectron2's score of a confident keypoint: the probability of one heatmap cell


def _first(data: Any) -> dict[str, Any]:
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = data[0]
    return data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}


# ---- ultralytics ----


def is_ultralytics(data: Any) -> bool:
    keypoints = _first(data).get("keypoints")
    return isinstance(keypoints, dict) and "x" in keypoints


def ultralytics_entries(path: Path, data: list[dict[str, Any]]) -> list[Entry]:
    found = []
    for each in data:
        keypoints = each.get("keypoints")
        if not isinstance(keypoints, dict):
            raise UserError(f"{path}: an object without 'keypoints'; the results of a pose model are expected")
        x, y = (numbers(path, keypoints.get(axis)) for axis in ("x", "y"))
        if len(x) != len(y):
            raise UserError(f"{path}: {len(x)} x but {len(y)} y of its keypoints; one of each is expected")
        scores = keypoints.get("visible", keypoints.get("confidence"))
        places = [[a, b] for a, b in zip(x, y, strict=True)]
        normalised = bool(places) and max(max(map(abs, x)), max(map(abs, y))) <= 1.5
        found.append(
            Entry(
                places,
                None,
                scores or [1.0] * len(x),
                CONFIDENCE,
                each.get("box"),
                "xyxy",
                (1.0, 1.0) if normalised else None,
                identity_of(each),
            )
        )
    return found


def is_label_text(path: Path, data: Any) -> bool:
    return path.suffix.lower() == ".txt" and isinstance(data, list)


def label_entries(path: Path, data: list[list[float]]) -> list[Entry]:
    """Lines of: class, box (centre x, y, width, height), 17 times x, y[, visibility], optional confidence and track."""
    found = []
    for number, line in enumerate(data):
        more = len(line) - 5
        width = 3 if more // 17 >= 3 else 2
        if more - width * 17 not in (0, 1, 2):
            raise UserError(
                f"{path}: line {number + 1} has {len(line)} numbers; a class, a box and 17 keypoints are expected"
            )
        places = line[5 : 5 + width * 17]
        x, y, wide, high = line[1:5]
        track = {"track": f"{line[-1]:g}"} if more - width * 17 == 2 else {}
        scores = None if width == 3 else [1.0] * 17
        found.append(
            Entry(places, COCO17, scores, box=[x - wide / 2, y - high / 2, wide, high], size=(1.0, 1.0), identity=track)
        )
    return found


# ---- transformers ----


def is_transformers(data: Any) -> bool:
    first = _first(data)
    return isinstance(first.get("scores"), list) and "keypoints" in first


def transformers_entries(path: Path, data: list[Any]) -> list[Entry]:
    if isinstance(data[0], list):
        if len(data) > 1:
            raise UserError(f"{path}: predictions of {len(data)} pictures; give the list of this photo alone")
        data = data[0]
    return [
        Entry(
            each.get("keypoints"),
            None,
            each.get("scores"),
            CONFIDENCE,
            each.get("bbox"),
            "xyxy",
            identity=identity_of(each),
        )
        for each in data
    ]


# ---- Keypoint R-CNN ----


def is_rcnn(data: Any) -> bool:
    return isinstance(data, dict) and (
        "pred_keypoints" in data
        or "keypoints_scores" in data
        or (isinstance(data.get("instances"), dict) and "pred_keypoints" in data["instances"])
    )


def rcnn_entries(path: Path, data: dict[str, Any]) -> list[Entry]:
    """Detectron2's score is a cell's probability, torchvision's a logit: both are mapped to 0..1 (our choice)."""
    data = data.get("instances", data)
    size = None
    if isinstance(data.get("image_size"), list):  # height, width
        size = (float(data["image_size"][1]), float(data["image_size"][0]))
    key = "pred_keypoints" if "pred_keypoints" in data else "keypoints"
    places = as_list(path, data.get(key), f"{key!r}")
    boxes = data.get("pred_boxes", data.get("boxes")) or [None] * len(places)
    found = []
    for index, person in enumerate(places):
        if "keypoints_scores" in data:
            scores = [1 / (1 + math.exp(-max(-50.0, min(50.0, s)))) for s in data["keypoints_scores"][index]]
        else:
            scores = [min(1.0, max(0.0, point[2]) / _SURE) for point in person]
        points = [point[:2] for point in person]
        found.append(Entry(points, COCO17, scores, CONFIDENCE, boxes[index], "xyxy", size))
    return found
