"""Rotates the crops of people who are rotated in their photos: lying, hanging, upside down, or in a rolled image.

The crop is rotated until the torso, from hips to shoulders, points up; `Crop.rotation` stores the rotation, and the
pipeline applies the inverse to the result. Our choice; LOG.md has the measured gain. B people, J keypoints (HALPE26).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.heatmaps.crop import Crop
from hmdiff.heatmaps.distribution import KEYPOINT_PADDING, Heatmaps, crop_from_keypoints, heatmap_peaks

LEAST_TURN = math.radians(60)  # bending or leaning people are rotated less, and models handle them
LEAST_TORSO = 0.15  # crop half-sides: shorter torsos are foreshortened, without a reliable direction
LEAST_CONFIDENCE = 0.25  # required of each of the four joints

_TORSO = [HALPE26.index(f"{side}_{joint}") for joint in ("hip", "shoulder") for side in ("left", "right")]


def torso_turn(
    heatmaps: Heatmaps,
) -> Tensor:  # (B,) radians clockwise in the crop, 0 if the torso is unknown or nearly upright
    """Rotation of the torso in its crop."""
    points, confidence = heatmap_peaks(heatmaps.values[:, _TORSO])
    up = points[:, 2:].mean(1) - points[:, :2].mean(1)
    angle = torch.atan2(up[:, 0], -up[:, 1])
    known = (confidence >= LEAST_CONFIDENCE).all(1) & (up.norm(dim=-1) >= LEAST_TORSO)
    return torch.where(known & (angle.abs() >= LEAST_TURN), angle, torch.zeros_like(angle))


def turned_upright(
    heatmaps: Heatmaps,
) -> Heatmaps:
    """The same people in crops in which their torsos are upright; unchanged if already upright or uncertain.

    Hands are unchanged: they appear in all orientations.
    """
    if heatmaps.names != HALPE26:
        return heatmaps
    angle = torso_turn(heatmaps)
    if not angle.any():
        return heatmaps
    old = heatmaps.crop
    turn = dataclasses.replace(old, rotation=old.rotation + angle)
    # Bounding box of the joints in the rotated frame.
    points, confidence = heatmap_peaks(heatmaps.values)
    seen = turn.from_photo(old.to_photo(points))
    center, side = crop_from_keypoints(seen, torch.where(confidence >= 0.1, confidence, 0.0), KEYPOINT_PADDING)
    half = (side / 2).clamp(0.3, 1.5)  # relative to the old crop; a single joint does not span a box
    known = (confidence >= 0.1).any(1)
    center = torch.where(known[:, None], center, torch.zeros_like(center))
    moved = dataclasses.replace(
        turn, center=turn.to_photo(center[:, None])[:, 0], side=torch.where(known, old.side * half, old.side)
    )
    values = torch.where(angle[:, None, None, None] != 0, _resampled(heatmaps.values, old, moved), heatmaps.values)
    stays = angle == 0
    center = torch.where(stays[:, None], old.center, moved.center)
    crop = dataclasses.replace(moved, center=center, side=torch.where(stays, old.side, moved.side))
    return Heatmaps(values, heatmaps.valid, crop)


def _resampled(
    values: Tensor,  # (B, J, H, W) over the old crop
    old: Crop,
    new: Crop,
) -> Tensor:  # (B, J, H, W) over the new one; 0 outside the old
    size = values.shape[-1]
    line = (torch.arange(size, device=values.device) + 0.5) * (2 / size) - 1
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)  # (H W, 2) x, y
    places = old.from_photo(new.to_photo(grid.expand(len(values), -1, -1)))
    return F.grid_sample(
        values, places.unflatten(1, (size, size)).to(values), mode="bilinear", padding_mode="zeros", align_corners=False
    )
