"""Turn the crops of people who are turned in their photos: lying, hanging, upside down, or in a rolled picture.

The crop is turned until the torso, from the hips to the shoulders, points up in it; `Crop.rotation` carries the turn,
and the pipeline turns the result back. Our choice; what it gains is in LOG.md. B people, J keypoints (HALPE26).
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

LEAST_TURN = math.radians(60)  # people who bend or lean are turned by less, and models know them
LEAST_TORSO = 0.15  # crop half-sides: a shorter one points at the camera, and its direction says nothing
LEAST_CONFIDENCE = 0.25  # of each of the four joints

_TORSO = [HALPE26.index(f"{side}_{joint}") for joint in ("hip", "shoulder") for side in ("left", "right")]


def torso_turn(
    heatmaps: Heatmaps,
) -> Tensor:  # (B,) radians clockwise as the crop is seen, 0 where the torso is not known or nearly upright
    """By how much a torso is turned in its crop."""
    points, confidence = heatmap_peaks(heatmaps.values[:, _TORSO])
    up = points[:, 2:].mean(1) - points[:, :2].mean(1)
    angle = torch.atan2(up[:, 0], -up[:, 1])
    known = (confidence >= LEAST_CONFIDENCE).all(1) & (up.norm(dim=-1) >= LEAST_TORSO)
    return torch.where(known & (angle.abs() >= LEAST_TURN), angle, torch.zeros_like(angle))


def turned_upright(
    heatmaps: Heatmaps,
) -> Heatmaps:
    """The same people in crops in which their torsos are upright; whoever is already, or may be, keeps theirs.

    Hands stay as they are: they are seen from every side alike.
    """
    if heatmaps.names != HALPE26:
        return heatmaps
    angle = torso_turn(heatmaps)
    if not angle.any():
        return heatmaps
    old = heatmaps.crop
    turn = dataclasses.replace(old, rotation=old.rotation + angle)
    # The box of what is seen, in the turned frame.
    points, confidence = heatmap_peaks(heatmaps.values)
    seen = turn.from_photo(old.to_photo(points))
    center, side = crop_from_keypoints(seen, torch.where(confidence >= 0.1, confidence, 0.0), KEYPOINT_PADDING)
    half = (side / 2).clamp(0.3, 1.5)  # of the old crop's: one joint alone is no box
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
