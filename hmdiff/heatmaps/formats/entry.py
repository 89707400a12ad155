"""`Entry`, a person as parsed from a file, and its conversion to `PersonKeypoints`.

All numeric checks are here, so that every family has the same: a joint at exactly (0, 0) is missing; sizes that
contradict the photo's; joints far outside the photo; boxes in the other notation or unusable.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.boxes import choose_box
from hmdiff.heatmaps.formats.joint_names import BY_COUNT
from hmdiff.heatmaps.keypoints import PersonKeypoints
from hmdiff.heatmaps.photo import PhotoInfo, label_map, turn_point

# COCO's visibility flags as confidence, our choice: not labelled, labelled but occluded, visible.
VISIBILITY = (0.0, 0.5, 1.0)
LEAST_EXTENT = 8.0  # pixels; smaller extents mean no person, or normalised coordinates
FARTHEST = 1e9  # bound on every value, so that squares do not overflow
FAR_OUTSIDE = 0.5  # relative to the photo's longer side: joints farther outside count as missing
CONFIDENCE, FLAGS, EITHER = "confidence", "visibility", "either"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One person of a file, with the file's raw numbers."""

    keypoints: Any  # flat or nested: x, y and optionally a third value, J times
    names: Sequence[str] | None = None  # J canonical names; None: by the number of joints
    scores: Any = None  # J confidences, if not in the third value
    third: str = EITHER  # of the third value: CONFIDENCE, COCO's FLAGS 0, 1, 2, or EITHER (inferred)
    box: Any = None  # four numbers
    box_form: str = "xywh"
    size: tuple[float, float] | None = None  # size of the image that the numbers refer to; (1, 1): normalised
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # annotation, track, ...
    expected: str = ""  # replaces the list of supported value counts in the error


def person_of(
    path: Path,
    entry: Entry,
    photo: PhotoInfo | None,
    notes: list[str],  # corrections are appended here
) -> PersonKeypoints:
    """Validate one person and convert to photo pixels. Raises `UserError` for unusable input."""
    points, names = _points(path, entry)
    missing = (points[:, :2] == 0).all(1)  # the usual value of undetected joints
    points[missing, 2] = 0
    box = _four(entry.box)
    if entry.size == (1.0, 1.0) and photo is None:
        raise UserError(f"{path}: normalised coordinates: they need the photo; give it too")
    if photo is not None:
        scale, orientation, note = label_map(photo, entry.size, str(path))
        if note:
            notes.append(note)
        if box is not None:  # scaled and rotated by its corners, in either notation
            box = _moved_box(box, entry.box_form, scale, orientation, photo)
        places = [turn_point(x * scale[0], y * scale[1], photo, orientation) for x, y, _ in points.tolist()]
        points = torch.cat([torch.tensor(places, dtype=torch.float32).reshape(-1, 2), points[:, 2:]], 1)
        _leave_out_far(path, points, names, photo, notes)
    chosen = None
    if box is not None and (points[:, 2] > 0).any():
        chosen, note = choose_box(box, entry.box_form, points, photo)
        if note:
            notes.append(f"{path}: {note}")
    return PersonKeypoints(points, tuple(names), chosen, dict(entry.identity))


def _leave_out_far(path: Path, points: Tensor, names: Sequence[str], photo: PhotoInfo, notes: list[str]) -> None:
    margin = FAR_OUTSIDE * max(photo.size)
    limit = torch.tensor([photo.width, photo.height]) + margin
    found = points[:, 2] > 0
    far = found & ((points[:, :2] < -margin) | (points[:, :2] > limit)).any(1)
    if far.any() and not far[found].all():
        listed = ", ".join(names[index] for index in far.nonzero()[:, 0].tolist())
        notes.append(f"{path}: {listed} far outside the {photo.width} x {photo.height} photo: left out")
        points[far, 2] = 0


def check_extent(path: Path, index: int, person: PersonKeypoints, photo: PhotoInfo | None) -> None:
    """Raises `UserError` if the joints are all in one place, or all outside the photo."""
    xy = person.points[person.points[:, 2] > 0, :2]
    if photo is not None:
        if not ((xy >= 0).all(-1) & (xy[:, 0] <= photo.width) & (xy[:, 1] <= photo.height)).any():
            raise UserError(
                f"{path}: all keypoints of person {index} lie outside the {photo.width} x {photo.height} photo; "
                "give the keypoints that were found in this photo at this size"
            )
        _check_turn(path, xy, photo)
    extent = (xy.amax(0) - xy.amin(0)).amax().item()
    if extent < LEAST_EXTENT:
        raise UserError(
            f"{path}: the {len(xy)} keypoints of person {index} span only {extent:.2g} pixels; photo pixels are "
            "expected, not normalised coordinates, and at least two joints apart from each other"
        )


def _check_turn(path: Path, xy: Tensor, photo: PhotoInfo) -> None:
    """Joints that fit the stored but not the displayed photo refer to the stored one."""
    stored = photo.stored_size
    if stored == photo.size or len(xy) < 3:
        return
    slack = 0.02 * max(stored)
    outside = ((xy < -slack) | (xy > torch.tensor(photo.size) + slack)).any()
    if outside and ((xy >= -slack) & (xy <= torch.tensor(stored) + slack)).all():
        raise UserError(
            f"{path}: its keypoints fit the photo as it is stored ({stored[0]} x {stored[1]}), not as its EXIF tag "
            f"shows it ({photo.width} x {photo.height}); save the photo without the tag, or find them in it as shown"
        )


def _points(path: Path, entry: Entry) -> tuple[Tensor, Sequence[str]]:  # (J, 3), J names
    flat = numbers(path, entry.keypoints)
    scores = None if entry.scores is None else numbers(path, entry.scores)
    width = 3 if scores is None else _width(len(flat), len(scores))
    names = entry.names if entry.names is not None else BY_COUNT.get(len(flat) // width)
    if names is None or len(flat) != width * len(names):
        raise UserError(f"{path}: {_expected(entry, width)}, got {len(flat)}")
    if scores is not None and len(scores) != len(names):
        raise UserError(f"{path}: {len(names)} keypoints but {len(scores)} scores; give one for each")
    for position, number in enumerate(flat):
        if not abs(number) < FARTHEST:
            what = "a value too large for any photo" if math.isfinite(number) else "NaN or infinite value"
            raise UserError(
                f"{path}: {what} in keypoint {names[position // width]!r}; write 0, 0, 0 for a joint that was not found"
            )
    points = torch.tensor(flat, dtype=torch.float32).reshape(-1, width)
    third = points[:, 2] if scores is None else torch.tensor(scores, dtype=torch.float32)
    return torch.cat([points[:, :2], confidence(path, third, entry.third)[:, None]], 1), names


def _width(values: int, scores: int) -> int:
    return 3 if scores and values == 3 * scores else 2


def _expected(entry: Entry, width: int) -> str:
    if entry.expected:
        return f"{entry.expected} expected"
    if entry.names is not None:
        count, more = len(entry.names), ""
    else:
        count, more = 17, f"; or {', '.join(str(width * other) for other in sorted(BY_COUNT)[1:])}"
    what = "x, y, confidence" if width == 3 else "x, y"
    return f"{width * count} values expected ({count} {what}{more})"


def numbers(path: Path, value: Any) -> list[float]:
    """Flatten nested lists. Raises `UserError` for anything that is not a number."""
    flat: list[float] = []
    for item in as_list(path, value, "keypoints"):
        if isinstance(item, list):
            flat.extend(numbers(path, item))
        elif isinstance(item, int | float) and not isinstance(item, bool):
            flat.append(float(item))
        else:
            raise UserError(f"{path}: keypoints must be numbers, {json.dumps(item)[:40]} found")
    return flat


def as_list(path: Path, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{path}: {what} must be a list, {type(value).__name__} found")
    return value


def confidence(path: Path, third: Tensor, kind: str) -> Tensor:
    """Confidence 0..1. A value of 2 identifies flags 0, 1, 2; detectors' confidences may slightly exceed 1."""
    whole = torch.isin(third, torch.tensor([0.0, 1.0, 2.0])).all()
    if whole and (kind == FLAGS or (kind == EITHER and third.amax() == 2)):
        return torch.tensor(VISIBILITY)[third.long()]
    if not third.isfinite().all():
        raise UserError(f"{path}: NaN or infinite confidence found; write 0 for a joint that was not found")
    if third.amin() < 0 or third.amax() > 1.5:
        worst = third[(third - 0.5).abs().argmax()].item()
        raise UserError(f"{path}: confidence {worst:.4g} found; COCO's visibility 0, 1, 2 or 0..1 is expected")
    return third.clamp_max(1)


def _four(value: Any) -> list[float] | None:
    """Four numbers, also as [[x, y, x, y]] or {x1, y1, x2, y2}; None for anything else."""
    if isinstance(value, dict):
        value = [value.get(key) for key in ("x1", "y1", "x2", "y2")]
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list) or len(value) < 4:
        return None
    four = value[:4]
    usable = all(isinstance(number, int | float) and math.isfinite(number) for number in four)
    return [float(number) for number in four] if usable else None


def _moved_box(
    box: list[float], form: str, scale: tuple[float, float], orientation: int, photo: PhotoInfo
) -> list[float]:
    x, y, right, bottom = box
    if form == "xywh":
        right, bottom = x + right, y + bottom
    first = turn_point(x * scale[0], y * scale[1], photo, orientation)
    last = turn_point(right * scale[0], bottom * scale[1], photo, orientation)
    x, right = sorted((first[0], last[0])) if orientation != 1 else (first[0], last[0])
    y, bottom = sorted((first[1], last[1])) if orientation != 1 else (first[1], last[1])
    return [x, y, right - x, bottom - y] if form == "xywh" else [x, y, right, bottom]
