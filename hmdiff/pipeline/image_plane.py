"""Last step of guidance: moves each hypothesis in the image plane towards the heatmaps' peaks.

DAT leaves a residual between projected keypoints and confident peaks. This step reduces it by a translation in x and y
at the keypoint's depth, weighted by the peak's confidence; nearby surface points move along, depth does not change.
A body is fitted to the moved points afterwards. Measured effect: see LOG.md. B people, N hypotheses, P points,
J keypoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Crop

ROUNDS = 2  # iterations: neighbouring keypoints share surface points, and the translation is refitted
REACH = 0.03  # of the body's height: radius within which surface points follow a keypoint
FARTHEST = 0.08  # of the crop's side: a peak farther away is taken as false, or as another mode


def moved_to_peaks(
    points: Tensor,  # (B, N, P, 3) metres, the camera's axes
    keypoints: Tensor,  # (B, N, J, 3) regressed from the points
    translation: Tensor,  # (B, N, 3) metres, pelvis in the camera's frame
    peaks: Tensor,  # (B, J, 2) photo pixels
    confidence: Tensor,  # (B, J) 0..1; 0: the keypoint does not move
    crop: Crop,  # of the same people, upright, with the camera
    nearness: Tensor,  # (P, J) weights of keypoints per point; rows sum to 1 (`hypotheses.keypoint_nearness`)
    share: float = 1.0,  # of the residual to remove
) -> Tensor:  # (B, N, P, 3)
    """The points, moved along the camera's x and y axes."""
    placed = keypoints + translation[:, :, None]
    seen = perspective_projection(placed, crop.focal[:, None], crop.principal_point[:, None])
    way = peaks[:, None] - seen
    near = way.norm(dim=-1) < FARTHEST * crop.side[:, None, None]
    weight = share * confidence.clamp(0, 1).sqrt()[:, None] * near  # square root: lowest 2D distance on `val`
    metres = way * (weight * placed[..., 2] / crop.focal[:, None, None])[..., None]
    moved = nearness @ metres
    return points + torch.cat([moved, torch.zeros_like(moved[..., :1])], -1)
