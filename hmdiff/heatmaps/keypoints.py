"""Keypoints from a JSON file, and the Gaussian heatmaps they stand for.

Read are: a COCO annotation file (`images`, `annotations`; matched by the photo's file name), a list of COCO results,
OpenPose's output (`people[].pose_keypoints_2d`, 25 or 18 joints), objects with `keypoints_coco17` or
`keypoints_openpose25` and perhaps `box_xyxy`, and a bare 17 x 3 list. Coordinates are photo pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.body.skeletons import COCO17, HALPE26, OPENPOSE18, OPENPOSE25, shared_joints
from hmdiff.errors import UserError
from hmdiff.geometry import photo_to_crop
from hmdiff.heatmaps.distribution import (
    HEATMAP_SIZE,
    Heatmaps,
    crop_from_box,
    crop_from_keypoints,
    gaussian_heatmaps,
)

# COCO's visibility as a confidence, our choice: not labelled, labelled but hidden (a guess of the annotator), seen.
_VISIBILITY = (0.0, 0.5, 1.0)
_OPENPOSE = {25: OPENPOSE25, 18: OPENPOSE18}
_MINIMUM_EXTENT = 8.0  # pixels: less is no person, or normalised coordinates


@dataclasses.dataclass(frozen=True)
class PersonKeypoints:
    """The keypoints of one person."""

    points: Tensor  # (J, 3) x, y in photo pixels, confidence 0..1; 0 = not there
    names: tuple[str, ...]  # J joint names
    box: Tensor | None = None  # (4,) x0, y0, x1, y1 in photo pixels


def read_keypoints(
    path: str | Path,
    photo: str | Path | None = None,  # name of the photo, to find it in a file about many
    photo_size: tuple[int, int] | None = None,  # width, height in pixels, to check that the keypoints lie in it
) -> list[PersonKeypoints]:
    """Everyone with keypoints in the file, in the file's order.

    Raises:
        UserError: the file is missing, empty or not JSON; nobody is in it; a wrong number of values; NaN; all
            confidences zero; all keypoints outside the photo.
    """
    path = Path(path)
    persons = _parse(path, _load_json(path), photo)
    if not persons:
        raise UserError(f"{path}: no person in it; run the keypoint detector on a photo with somebody in it")
    seen = [person for person in persons if (person.points[:, 2] > 0).any()]
    if not seen:
        raise UserError(f"{path}: the confidences of all keypoints are zero; give keypoints that were found")
    for index, person in enumerate(seen):
        _check_extent(path, index, person, photo_size)
    return seen


def _check_extent(path: Path, index: int, person: PersonKeypoints, photo_size: tuple[int, int] | None) -> None:
    xy = person.points[person.points[:, 2] > 0, :2]
    extent = (xy.amax(0) - xy.amin(0)).amax().item()
    if extent < _MINIMUM_EXTENT:
        raise UserError(
            f"{path}: the {len(xy)} keypoints of person {index} span only {extent:.2g} pixels; photo pixels are "
            "expected, not normalised coordinates, and at least two joints apart from each other"
        )
    if photo_size is not None:
        width, height = photo_size
        if not ((xy >= 0).all(-1) & (xy[:, 0] <= width) & (xy[:, 1] <= height)).any():
            raise UserError(
                f"{path}: all keypoints of person {index} lie outside the {width} x {height} photo; "
                "give the keypoints that were found in this photo at this size"
            )


def _load_json(path: Path) -> Any:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; keypoints as JSON are expected")
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); COCO or OpenPose keypoints are expected") from None


def _parse(path: Path, data: Any, photo: str | Path | None) -> list[PersonKeypoints]:
    if isinstance(data, dict):
        if "annotations" in data:
            return _coco_annotations(path, data, photo)
        if "people" in data:
            people = _list(path, data["people"], "'people'")
            return [_openpose_person(path, index, person) for index, person in enumerate(people)]
        for key, names in (("keypoints_openpose25", OPENPOSE25), ("keypoints_coco17", COCO17), ("keypoints", COCO17)):
            if key in data:
                box = _box(path, data["box_xyxy"]) if "box_xyxy" in data else None
                return [
                    PersonKeypoints(points, names, box)
                    for points in _points_of_people(path, data[key], names, _confidence_or_visibility)
                ]
        found = ", ".join(map(repr, list(data)[:6])) or "nothing"
        raise UserError(
            f"{path}: no keypoints ({found} found); one of 'annotations', 'people', 'keypoints', 'keypoints_coco17', "
            "'keypoints_openpose25' is expected"
        )
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        return _coco_results(path, data, photo)
    return [
        PersonKeypoints(points, COCO17)
        for points in _points_of_people(path, _list(path, data, "the file"), COCO17, _confidence_or_visibility)
    ]


def _list(path: Path, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{path}: {what} must be a list, {type(value).__name__} found")
    return value


def _coco_annotations(path: Path, data: dict[str, Any], photo: str | Path | None) -> list[PersonKeypoints]:
    images = [image for image in _list(path, data.get("images", []), "'images'") if isinstance(image, dict)]
    annotations = _list(path, data["annotations"], "'annotations'")
    annotations = [item for item in annotations if isinstance(item, dict) and "keypoints" in item]
    if len(images) > 1 or (images and photo is not None):
        name = None if photo is None else Path(photo).name
        wanted = [image.get("id") for image in images if Path(str(image.get("file_name", ""))).name == name]
        if not wanted:
            raise UserError(f"{path}: none of its {len(images)} images is {name!r}; give the photo it is about")
        annotations = [annotation for annotation in annotations if annotation.get("image_id") == wanted[0]]
    labelled = [item for item in annotations if not item.get("iscrowd") and item.get("num_keypoints", 1)]
    return [_coco_person(path, item, _visibility) for item in labelled]


def _coco_results(path: Path, data: list[dict[str, Any]], photo: str | Path | None) -> list[PersonKeypoints]:
    results = [result for result in data if "keypoints" in result]
    if not results:
        raise UserError(f"{path}: a list of objects without 'keypoints'; COCO results are expected")
    if len({str(result.get("image_id")) for result in results}) > 1:
        # A result names its image by COCO's id, which COCO's file names spell with leading zeros, or by the name.
        stem = "" if photo is None else Path(photo).stem
        results = [r for r in results if Path(str(r.get("image_id"))).stem.lstrip("0") == stem.lstrip("0")]
        if not results:
            raise UserError(f"{path}: results of several images, none with image_id {stem!r}; keep those of one")
    return [_coco_person(path, result, _confidence_or_visibility) for result in results]


def _coco_person(path: Path, item: dict[str, Any], confidence: Callable[[Path, Tensor], Tensor]) -> PersonKeypoints:
    (points,) = _points_of_people(path, [item["keypoints"]], COCO17, confidence)
    box = None
    if isinstance(item.get("bbox"), list) and len(item["bbox"]) == 4:
        x, y, width, height = item["bbox"]
        box = _box(path, [x, y, x + width, y + height])
    return PersonKeypoints(points, COCO17, box)


def _openpose_person(path: Path, index: int, person: Any) -> PersonKeypoints:
    if not isinstance(person, dict) or "pose_keypoints_2d" not in person:
        raise UserError(f"{path}: person {index} has no 'pose_keypoints_2d'; OpenPose's body output is expected")
    flat = _numbers(path, person["pose_keypoints_2d"])
    names = _OPENPOSE.get(len(flat) // 3)
    if names is None or len(flat) % 3:
        raise UserError(f"{path}: 75 values (BODY_25) or 54 (COCO) expected in 'pose_keypoints_2d', got {len(flat)}")
    return PersonKeypoints(_points(path, flat, names, _confidence_or_visibility), names)


def _points_of_people(
    path: Path,
    value: Any,  # one person or several: (J, 3), (J * 3), (P, J, 3) or (P, J * 3), as lists
    names: Sequence[str],
    confidence: Callable[[Path, Tensor], Tensor],
) -> list[Tensor]:
    items = _list(path, value, "keypoints")
    # Lists within lists, or lists longer than x, y, confidence, are people.
    several = bool(items) and all(
        isinstance(item, list) and (len(item) > 4 or any(isinstance(part, list) for part in item)) for item in items
    )
    people = items if several else [items] if items else []
    return [_points(path, _numbers(path, person), names, confidence) for person in people]


def _numbers(path: Path, value: Any) -> list[float]:
    flat: list[float] = []
    for item in _list(path, value, "keypoints"):
        if isinstance(item, list):
            flat.extend(_numbers(path, item))
        elif isinstance(item, int | float) and not isinstance(item, bool):
            flat.append(float(item))
        else:
            raise UserError(f"{path}: keypoints must be numbers, {json.dumps(item)[:40]} found")
    return flat


def _points(
    path: Path, flat: list[float], names: Sequence[str], confidence: Callable[[Path, Tensor], Tensor]
) -> Tensor:  # (J, 3)
    expected = 3 * len(names)
    if len(flat) != expected:
        raise UserError(f"{path}: {expected} values expected ({len(names)} x, y, confidence), got {len(flat)}")
    for position, number in enumerate(flat):
        if not math.isfinite(number):
            raise UserError(
                f"{path}: NaN or infinite value in keypoint {names[position // 3]!r}; "
                "write 0, 0, 0 for a joint that was not found"
            )
    points = torch.tensor(flat, dtype=torch.float32).reshape(-1, 3)
    return torch.cat([points[:, :2], confidence(path, points[:, 2])[:, None]], 1)


def _visibility(path: Path, flags: Tensor) -> Tensor:
    if not torch.isin(flags, torch.tensor([0.0, 1.0, 2.0])).all():
        return _confidence_or_visibility(path, flags)
    return torch.tensor(_VISIBILITY)[flags.long()]


def _confidence_or_visibility(path: Path, third: Tensor) -> Tensor:
    # Flags 0, 1, 2 are told from confidences by a 2; detectors' confidences overshoot 1 by a little.
    if third.amax() == 2 and torch.isin(third, torch.tensor([0.0, 1.0, 2.0])).all():
        return torch.tensor(_VISIBILITY)[third.long()]
    if third.amin() < 0 or third.amax() > 1.5:
        worst = third[(third - 0.5).abs().argmax()].item()
        raise UserError(f"{path}: confidence {worst:.4g} found; COCO's visibility 0, 1, 2 or 0..1 is expected")
    return third.clamp_max(1)


def _box(path: Path, value: Any) -> Tensor:
    numbers = _numbers(path, value)
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{path}: a box must be four finite numbers, {json.dumps(value)[:60]} found")
    if numbers[2] <= numbers[0] or numbers[3] <= numbers[1]:
        raise UserError(f"{path}: a box without size, {json.dumps(value)[:60]}; x0 < x1 and y0 < y1 are expected")
    return torch.tensor(numbers, dtype=torch.float32)


def heatmaps_from_keypoints(
    persons: Sequence[PersonKeypoints],
    center: Tensor | None = None,  # (B, 2) centre of the crops, photo pixels; None: about the boxes, else the keypoints
    side: Tensor | None = None,  # (B,)
    sigma: float = 2.0,  # heatmap pixels, as estimators are trained with (MSRA codec)
) -> Heatmaps:
    """Gaussians at the keypoints with the confidence as their peak, joints mapped to HALPE26 by name.

    Raises:
        UserError: nobody is given, or somebody has no keypoint within the crop.
    """
    if not persons:
        raise UserError("keypoints: no person given")
    points = torch.zeros(len(persons), len(HALPE26), 3)
    valid = torch.zeros(len(persons), len(HALPE26), dtype=torch.bool)
    for index, person in enumerate(persons):
        source, target = shared_joints(person.names, HALPE26)
        points[index, target] = person.points[source].to(points.dtype)
        valid[index, target] = True
    if center is None or side is None:
        crops = [
            crop_from_keypoints(joints[:, :2], joints[:, 2]) if person.box is None else crop_from_box(person.box)
            for person, joints in zip(persons, points, strict=True)
        ]
        center, side = torch.stack([crop[0] for crop in crops]), torch.stack([crop[1] for crop in crops])
    values = gaussian_heatmaps(photo_to_crop(points[..., :2], center, side), points[..., 2], sigma, HEATMAP_SIZE)
    return Heatmaps(values, valid, center, side)
