"""Joints as objects with x and y: MediaPipe's 33 landmarks, and lists of named points (TensorFlow.js).

MediaPipe's landmarks are normalised by the photo's width and height, in a fixed order; world landmarks are in metres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.coco import identity_of
from hmdiff.heatmaps.formats.entry import CONFIDENCE, Entry
from hmdiff.heatmaps.formats.joint_names import MEDIAPIPE33, map_names

_KEYS = ("pose_landmarks", "poseLandmarks", "landmarks", "landmark", "keypoints")
_SCORES = ("visibility", "score", "confidence", "presence")


def _is_point(value: Any) -> bool:
    return isinstance(value, dict) and (("x" in value and "y" in value) or isinstance(value.get("position"), dict))


def _people(data: Any) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Each person's points, and the object that contained them."""
    if isinstance(data, list) and data and all(_is_point(each) for each in data):
        return [(data, {})]
    if isinstance(data, list):
        return [person for each in data for person in _people(each)]
    if isinstance(data, dict):
        for key in _KEYS:
            if key in data:
                return [(points, own or data) for points, own in _people(data[key])]
    return []


def recognised(data: Any) -> bool:
    return bool(_people(data))


def entries(path: Path, data: Any, notes: list[str]) -> list[Entry]:
    found = []
    for points, own in _people(data):
        spelled = [point.get("name", point.get("part", point.get("label"))) for point in points]
        if all(isinstance(name, str) for name in spelled):
            names, unknown = map_names([str(name) for name in spelled], str(path))
            if unknown:
                notes.append(f"{path}: joints {', '.join(unknown)} are not known: left out")
        elif len(points) == len(MEDIAPIPE33):
            names = MEDIAPIPE33
        else:
            raise UserError(f"{path}: {len(points)} points without names; MediaPipe's 33 landmarks are expected")
        places = [point.get("position", point) for point in points]
        xy = [[place.get("x"), place.get("y")] for place in places]
        scores = [next((point[key] for key in _SCORES if key in point), 1.0) for point in points]
        normalised = (
            all(isinstance(number, int | float) and abs(number) <= 4 for pair in xy for number in pair)
            and len(points) > 2
        )
        found.append(
            Entry(xy, names, scores, CONFIDENCE, size=(1.0, 1.0) if normalised else None, identity=identity_of(own))
        )
    return found
