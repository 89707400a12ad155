"""Training data of the pose estimator: augmented crops of rendered people and target heatmaps. Our choice.

The rendered pictures already vary in framing, light, colour and camera. Here the crop is rotated, scaled, shifted and
mirrored, filled with black outside the photo as in mmpose, and each channel is multiplied by a gain. B pictures of
N x N pixels, J keypoints (HALPE26).

Joints outside the crop have target weight 0, as in mmpose. Occluded joints inside the crop have weight 1, as in COCO;
under the squared error the optimal prediction is the mean heatmap: broad and low, or with several peaks, where the
position is uncertain.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, mirror_permutation
from hmdiff.estimators.pose_network import grid_shift
from hmdiff.heatmaps.distribution import gaussian_heatmaps


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Strength of the augmentation. `scale` is the new crop's side over the old one's."""

    rotation: float = 15.0  # degrees, standard deviation, clipped at twice that
    rotated: float = 0.4  # share of crops that are rotated
    scale: tuple[float, float] = (0.8, 1.25)
    shift: float = 0.06  # of the side, uniform either way
    mirrored: float = 0.5
    gain: float = 0.2  # of each channel, uniform either way


def jitter_crops(
    images: Tensor,  # (B, 3, N, N) RGB 0..1
    points: Tensor,  # (B, J, 2) crop coordinates
    generator: torch.Generator,  # CPU
    values: Jitter = Jitter(),
) -> tuple[Tensor, Tensor]:  # images, points in the new crops
    """Randomly re-crop each picture with its keypoints; mirroring exchanges left and right keypoints."""
    count = len(images)
    draw = torch.rand(count, 9, generator=generator).to(images.device)
    normal = torch.randn(count, generator=generator).to(images.device)
    low, high = values.scale
    side = low * (high / low) ** draw[:, 0]
    shift = 2 * values.shift * (2 * draw[:, 1:3] - 1)
    angle = math.radians(values.rotation) * normal.clamp(-2, 2) * (draw[:, 3] < values.rotated)
    mirrored = draw[:, 4] < values.mirrored

    # From new to old crop coordinates: A p + shift.
    cos, sin = side * angle.cos(), side * angle.sin()
    flip = torch.where(mirrored, -1.0, 1.0)
    matrix = torch.stack([torch.stack([flip * cos, -sin], -1), torch.stack([flip * sin, cos], -1)], 1)
    grid = F.affine_grid(torch.cat([matrix, shift[..., None]], -1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    images = (images * (1 + values.gain * (2 * draw[:, 5:8] - 1))[..., None, None]).clamp(0, 1)

    points = (points - shift[:, None]) @ torch.linalg.inv(matrix).transpose(1, 2)
    exchanged = points[:, torch.tensor(mirror_permutation(HALPE26), device=points.device)]
    return images, torch.where(mirrored[:, None, None], exchanged, points)


def target_heatmaps(
    points: Tensor,  # (B, J, 2) crop coordinates
    image_size: int,  # N
    heatmap_size: int,  # M
    sigma: float,  # heatmap pixels
) -> tuple[Tensor, Tensor]:  # (B, J, M, M), weights (B, J)
    """Batched equivalent of mmpose's `MSRAHeatmap.encode` with `unbiased=True`, on the tensors' device."""
    weights = (points.abs() <= 1).all(-1).to(points.dtype)
    return gaussian_heatmaps(points - grid_shift(image_size, heatmap_size), weights, sigma, heatmap_size), weights
