"""`PersonKeypoints`, and the Gaussian heatmaps that keypoints stand for, over a crop that the sure ones set.

Reading files is `hmdiff.heatmaps.formats`. Coordinates are photo pixels. The rules of the crop are our choice.
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

_FAINT = 0.25  # of the surest joint's confidence: fainter joints count where the sure ones make them likely
_REACH = 0.5  # of the sure joints' extent: so far beyond it a faint joint still is
_OUTLIER = 5.0  # times the median distance to the joints' median
_TURN_FROM = math.radians(60)  # a person turned farther in the picture is read in a crop turned with them
_ALIGNED = 1.2  # length of the sum of the directions of torso and legs: less is somebody bent or sitting


@dataclasses.dataclass(frozen=True)
class PersonKeypoints:
    """The keypoints of one person."""

    points: Tensor  # (J, 3) x, y in photo pixels, confidence 0..1; 0 = not there
    names: tuple[str, ...]  # J joint names
    box: Tensor | None = None  # (4,) x0, y0, x1, y1 in photo pixels
    identity: dict[str, str] = dataclasses.field(default_factory=dict)  # annotation, track, ... as the file has them


def sure_joints(
    points: Tensor,  # (J, 2)
    confidence: Tensor,  # (J,)
) -> Tensor:  # (J,) bool
    """The joints that may set a crop: not faint and far from the others, and not far from everything.

    All that are there, where fewer than two would be left.
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
) -> float:  # radians, clockwise: 0 for an upright person, and for one whose parts do not agree
    """How far the whole person is turned in the picture: a quarter where they lie, half where they hang upside down.

    Only torso and legs that point one way count: who bends or sits is upright, their torso alone is not.
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
    if torso.norm() < 0.15 * extent.amax():  # seen along its length: no direction
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
    names: tuple[str, ...] = HALPE26,  # J; or those of a hand
) -> tuple[Tensor, Tensor]:  # (B, J, 3), (B, J) bool: the source has this joint at all
    """Everybody's joints in our order."""
    points = torch.zeros(len(persons), len(names), 3)
    valid = torch.zeros(len(persons), len(names), dtype=torch.bool)
    for index, person in enumerate(persons):
        source, target = shared_joints(person.names, names)
        points[index, target] = person.points[source].to(points.dtype)
        valid[index, target] = True
    return points, valid


def heatmaps_from_keypoints(
    persons: Sequence[PersonKeypoints],
    center: Tensor | None = None,  # (B, 2) centre of the crops, photo pixels; None: about the boxes, else the keypoints
    side: Tensor | None = None,  # (B,)
    sigma: float = 2.0,  # heatmap pixels, as estimators are trained with (MSRA codec)
    photo: PhotoInfo | None = None,  # the photo's size and focal length; None: not known
    turned: bool = True,  # turn the crop with a person who lies or hangs
) -> Heatmaps:
    """Gaussians at the keypoints with the confidence as their peak, joints mapped by name to HALPE26, or to HAND21
    where all are a hand's.

    Raises:
        UserError: nobody is given, or somebody has no keypoint within the crop.
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
    """About the box, else about the sure joints; a turned crop about the joints in its own axes."""
    if turn == 0.0 and person.box is not None:
        return crop_from_box(person.box)
    sure = sure_joints(joints[:, :2], joints[:, 2])
    cos, sin = math.cos(turn), math.sin(turn)
    axes = torch.tensor([[cos, -sin], [sin, cos]])  # from the crop's axes to the photo's
    center, side = crop_from_keypoints(joints[:, :2] @ axes, joints[:, 2] * sure)
    return axes @ center, side
