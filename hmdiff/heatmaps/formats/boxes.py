"""Resolves a person's box in one of two notations by their keypoints: (x, y, width, height) or (x1, y1, x2, y2).

The family implies a notation, but some tools of a family write the other one. The rules are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.heatmaps.keypoints import sure_joints
from hmdiff.heatmaps.photo import PhotoInfo

_INSIDE = 0.7  # minimum fraction of a person's confident joints inside their box
_BETTER = 1.5  # required gain in overlap with the joints, if the stated notation leaves the photo
_FAR_BETTER = 3.0  # the same if it does not
_SLACK = 0.01  # relative to the photo's longer side: boxes may overshoot by rounding


def choose_box(
    box: list[float],
    form: str,  # the family's notation: "xywh" or "xyxy"
    points: Tensor,  # (J, 3) photo pixels, confidence
    photo: PhotoInfo | None,
) -> tuple[Tensor | None, str]:  # (4,) x1, y1, x2, y2, or None if unusable; a note on corrections, or ""
    """The box in the notation that fits its person's joints."""
    xy = points[sure_joints(points[:, :2], points[:, 2]), :2]
    stated, other = (_corners(box, each) for each in ((form, "xyxy") if form == "xywh" else (form, "xywh")))
    holds, overlap = _fit(stated, xy)
    holds_other, overlap_other = _fit(other, xy)
    ratio = _BETTER if _leaves(stated, photo) else _FAR_BETTER
    if holds_other >= 0.9 and (holds < _INSIDE or overlap_other > ratio * overlap):
        kind = "x1, y1, x2, y2" if form == "xywh" else "x, y, width, height"
        return other, f"box {_text(box)} read as {kind}: so it fits its keypoints"
    if holds >= _INSIDE:
        return stated, ""
    return None, f"box {_text(box)} does not fit its keypoints: the crop is set by the keypoints"


def _corners(box: list[float], form: str) -> Tensor | None:
    x, y, right, bottom = box
    if form == "xywh":
        right, bottom = x + right, y + bottom
    return torch.tensor([x, y, right, bottom]) if right > x and bottom > y else None


def _fit(box: Tensor | None, xy: Tensor) -> tuple[float, float]:
    """Fraction of the joints inside the box enlarged by a tenth, and its IoU with the joints' bounding box."""
    if box is None:
        return 0.0, 0.0
    size = box[2:] - box[:2]
    inside = ((xy >= box[:2] - 0.1 * size) & (xy <= box[2:] + 0.1 * size)).all(1)
    low, high = xy.amin(0), xy.amax(0)
    common = (torch.minimum(high, box[2:]) - torch.maximum(low, box[:2])).clamp_min(0).prod()
    union = size.prod() + (high - low).prod() - common
    return inside.float().mean().item(), (common / union.clamp_min(1e-6)).item()


def _leaves(box: Tensor | None, photo: PhotoInfo | None) -> bool:
    if box is None or photo is None:
        return False
    slack = _SLACK * max(photo.size)
    return bool((box[:2] < -slack).any() or (box[2:] > torch.tensor(photo.size) + slack).any())


def _text(box: list[float]) -> str:
    return "(" + ", ".join(f"{number:g}" for number in box) + ")"
