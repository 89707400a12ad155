"""`PersonKeypoints`, and their conversion to Gaussian heatmaps over a crop set by the confident joints.

Files are read in `hmdiff.heatmaps.formats`. Coordinates are photo pixels. The rules for the crop are our choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, joint_indices, shared_joints
from hmdiff.errors import UserError
from hmdiff.heatmaps.crop import Crop
from hmdiff.heatmaps.distribution import (
    HEATMAP_SIZE,
    Heatmaps,
    crop_from_box,
    crop_from_keypoints,
    gaussian_heatmaps,
    joints_of_heatmaps,
)
from hmdiff.heatmaps.photo import PhotoInfo

_FAINT = 0.25  # relative to the most confident joint: fainter joints count only near the confident ones
_REACH = 0.5  # relative to the confident joints' extent: how far outside a faint joint may lie
_OUTLIER = 5.0  # times the median distance to the joints' median
_TURN_FROM = math.radians(60)  # people rotated by more than this get a rotated crop
_ALIGNED = 1.2  # minimum length of the summed unit directions of torso and legs: less means bent or sitting


@dataclasses.dataclass(frozen=True)
class PersonKeypoints:
    """The keypoints of one person."""

    points: Tensor  # (J, 3) x, y in photo pixels, confidence 0..1; 0 = missing
    names: tuple[str, ...]  # J joint names
    box: Tensor | None = None  # (4,) x0, y0, x1, y1 in photo pixels
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # annotation, track, ... in the file


def sure_joints(
    points: Tensor,  # (J, 2)
    confidence: Tensor,  # (J,)
) -> Tensor:  # (J,) bool
    """The joints that set a crop: excludes faint joints far from the others, and outliers.

    If fewer than two remain, all detected joints.
    """
    there = confidence > 0
    sure = there & (confidence >= _FAINT * confidence.amax())
    if sure.sum() >= 6:
        distance = (points - points[sure].median(0).values).norm(dim=-1)
        sure &= distance <= _OUTLIER * distance[sure].median().clamp_min(1.0)
    if sure.sum() < 2:
        return there
    low, high = points[sure].amin(0), points[sure].amax(0)
    margin = _REACH * (high - low).amax()
    near = ((points >= low - margin) & (points <= high + margin)).all(-1)
    return there & near


def body_turn(
    points: Tensor,  # (26, 2) of HALPE26, photo pixels
    confidence: Tensor,  # (26,)
) -> float:  # radians, clockwise: 0 if upright, or if torso and legs disagree
    """Rotation of a person in the photo: 90 degrees if lying, 180 if hanging upside down.

    Torso and legs must point the same way: the rotated torso of a person who bends or sits does not count.
    """
    sure = confidence >= max(0.1, _FAINT * float(confidence.amax()))

    def middle(*names: str) -> Tensor | None:
        index = [i for i in joint_indices(names, HALPE26) if sure[i]]
        return points[index].mean(0) if index else None

    shoulders = middle("left_shoulder", "right_shoulder")
    hips = middle("left_hip", "right_hip")
    feet = middle("left_ankle", "right_ankle")
    feet = middle("left_knee", "right_knee") if feet is None else feet
    if shoulders is None or hips is None:
        return 0.0
    torso = shoulders - hips
    extent = points[sure].amax(0) - points[sure].amin(0)
    if torso.norm() < 0.15 * extent.amax():  # foreshortened: no reliable direction
        return 0.0
    up = torso / torso.norm()
    if feet is not None and (hips - feet).norm() > 0.15 * extent.amax():
        up = up + (hips - feet) / (hips - feet).norm()
        if up.norm() < _ALIGNED:
            return 0.0
    turn = math.atan2(float(up[0]), -float(up[1]))
    return turn if abs(turn) > _TURN_FROM else 0.0


def on_halpe26(
    persons: Sequence[PersonKeypoints],
    names: tuple[str, ...] = HALPE26,  # J; or the names of a hand
) -> tuple[Tensor, Tensor]:  # (B, J, 3), (B, J) bool: joints that the source provides
    """Everybody's joints in canonical order."""
    points = torch.zeros(len(persons), len(names), 3)
    valid = torch.zeros(len(persons), len(names), dtype=torch.bool)
    for index, person in enumerate(persons):
        source, target = shared_joints(person.names, names)
        points[index, target] = person.points[source].to(points.dtype)
        valid[index, target] = True
    return points, valid


def heatmaps_from_keypoints(
    persons: Sequence[PersonKeypoints],
    center: Tensor | None = None,  # (B, 2) crop centres, photo pixels; None: from the boxes, else the keypoints
    side: Tensor | None = None,  # (B,)
    sigma: float = 2.0,  # heatmap pixels, the usual training target (MSRA codec)
    photo: PhotoInfo | None = None,  # the photo's size and focal length, if known
    turned: bool = True,  # rotate the crop with a person who lies or hangs
) -> Heatmaps:
    """Gaussians at the keypoints with the confidence as peak; joints are mapped by name to HALPE26, or to HAND21 if all
    are a hand's.

    Raises:
        UserError: no people, or a person without a keypoint inside the crop.
    """
    if not persons:
        raise UserError("keypoints: no person given")
    names = joints_of_heatmaps([name for person in persons for name in person.names])
    points, valid = on_halpe26(persons, names)
    turned = turned and names == HALPE26
    turns = [body_turn(joints[:, :2], joints[:, 2]) if turned else 0.0 for joints in points]
    if center is None or side is None:
        found = [_crop(person, joints, turn) for person, joints, turn in zip(persons, points, turns, strict=True)]
        center, side = torch.stack([each[0] for each in found]), torch.stack([each[1] for each in found])
    crop = Crop.of(
        center,
        side,
        torch.tensor(turns, dtype=side.dtype),
        None if photo is None else photo.size,
        None if photo is None else photo.focal,
    )
    values = gaussian_heatmaps(crop.from_photo(points[..., :2]), points[..., 2], sigma, HEATMAP_SIZE)
    return Heatmaps(values, valid, crop, names)


def _crop(person: PersonKeypoints, joints: Tensor, turn: float) -> tuple[Tensor, Tensor]:  # centre (2,), side ()
    """Around the box, else around the confident joints; a rotated crop is fitted in its own axes."""
    if turn == 0.0 and person.box is not None:
        return crop_from_box(person.box)
    sure = sure_joints(joints[:, :2], joints[:, 2])
    cos, sin = math.cos(turn), math.sin(turn)
    axes = torch.tensor([[cos, -sin], [sin, cos]])  # from the crop's axes to the photo's
    center, side = crop_from_keypoints(joints[:, :2] @ axes, joints[:, 2] * sure)
    return axes @ center, side
