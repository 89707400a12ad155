"""The last step of guidance: every hypothesis is moved in the plane of the picture to where the heatmaps' peaks are.

DAT moves hypotheses as far as the denoiser finds likely, which leaves keypoints beside peaks that are certain. What is
left of the way is closed here, in metres at the keypoint's depth, the further the surer the peak is, and the surface
goes with the keypoints near it; depth stays. A body is fitted afterwards, so that what comes out is one. Ours; what it
gives is in LOG.md. B people, N hypotheses, P points, J keypoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Crop

ROUNDS = 2  # neighbours pull at the same surface, and the place fits anew
REACH = 0.03  # of the body's height: how far a keypoint takes the surface along
FARTHEST = 0.08  # of the crop's side: a peak beyond it is taken for a false one, or for another mode than this


def moved_to_peaks(
    points: Tensor,  # (B, N, P, 3) metres, the camera's axes
    keypoints: Tensor,  # (B, N, J, 3) of these points
    translation: Tensor,  # (B, N, 3) metres: where they are
    peaks: Tensor,  # (B, J, 2) photo pixels
    confidence: Tensor,  # (B, J) 0..1; 0: the keypoint stays
    crop: Crop,  # of the same people, upright, with the camera
    nearness: Tensor,  # (P, J) of every point to every keypoint; a row sums to 1 (`hypotheses.keypoint_nearness`)
    share: float = 1.0,  # of the way
) -> Tensor:  # (B, N, P, 3)
    """The points, moved along the camera's x and y."""
    placed = keypoints + translation[:, :, None]
    seen = perspective_projection(placed, crop.focal[:, None], crop.principal_point[:, None])
    way = peaks[:, None] - seen
    near = way.norm(dim=-1) < FARTHEST * crop.side[:, None, None]
    weight = share * confidence.clamp(0, 1).sqrt()[:, None] * near  # chosen on `val`, for the 2D distance
    metres = way * (weight * placed[..., 2] / crop.focal[:, None, None])[..., None]
    moved = nearness @ metres
    return points + torch.cat([moved, torch.zeros_like(moved[..., :1])], -1)
