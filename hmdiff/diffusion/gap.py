"""What DAT compares: samples u_i of the estimator's heatmaps U, and where the hypotheses' keypoints are seen.

HMDiff (arXiv 2308.13369): D_k = sum_i |u_i - f(x̂_0)|², u_i drawn from U, f from a mesh to its pose. M rows (a person's
hypotheses side by side), J keypoints, H x W heatmaps. 2D in crop coordinates, -1..1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hmdiff.diffusion.guidance import Guidance
from hmdiff.errors import UserError
from hmdiff.geometry import fitted_projection, perspective_fit, weak_perspective_projection
from hmdiff.heatmaps.distribution import draw_samples, normalised, soft_argmax

_BACKGROUND = 0.1  # of the peak: what lies below is an estimator's background, wide and meaningless


@dataclasses.dataclass(frozen=True)
class Target:
    """What the hypotheses are compared with, one row each."""

    points: Tensor  # (M, J, 2) u_i, crop coordinates
    weight: Tensor  # (M, J) w, sums to 1 a row; 0 for a joint that the estimator did not see
    floor: Tensor  # (M,) what a mesh that is right leaves of D: the u_i's weighted squared distance to the mean of U
    variance: Tensor  # (M,) weighted variance of U where the u_i are drawn of it; 0 where they are its mean
    heatmaps: Tensor  # (B, J, H, W) U, each sums to 1, or is 0
    camera: Tensor  # (M, 3) the head's weak perspective
    principal_point: Tensor  # (M, 2) of the photo, crop coordinates

    @property
    def known(self) -> Tensor:  # (M,) bool: whether there is anything to compare with
        return self.weight.sum(-1) > 0


def make_target(
    guidance: Guidance,
    heatmaps: Tensor,  # (B, J, H, W) >= 0, the peak = confidence
    camera: Tensor,  # (B, 3) the head's
    generators: list[torch.Generator],  # M = B * N, a person's hypotheses side by side
    principal_point: Tensor | None = None,  # (B, 2) of the photo, crop coordinates; None: the crop's centre
) -> Target:
    """Draw the u_i. Joints whose mass lies under the floor of `normalised` are left out.

    Raises:
        UserError: `joint_weights` of another number than J.
    """
    joints, count = heatmaps.shape[1], len(generators) // len(heatmaps)
    peak = heatmaps.flatten(2).amax(-1)
    seen = normalised(heatmaps).flatten(2).amax(-1) > 0
    weight = peak.clamp(max=1) * seen
    if guidance.joint_weights is not None:
        if len(guidance.joint_weights) != joints:
            raise UserError(f"guidance joint_weights: {len(guidance.joint_weights)} numbers for {joints} keypoints")
        weight = weight * weight.new_tensor(guidance.joint_weights)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-8)
    relative = heatmaps / peak[..., None, None].clamp_min(1e-12)
    sharpened = ((relative - _BACKGROUND).clamp_min(0) / (1 - _BACKGROUND)) ** guidance.sharpness
    sharpened = sharpened * seen[..., None, None]
    distribution = sharpened / sharpened.sum((-2, -1), keepdim=True).clamp_min(1e-12)

    mean = soft_argmax(distribution)  # (B, J, 2)
    variance = (weight * _variance(distribution, mean)).sum(-1).repeat_interleave(count, 0)
    weight, means = weight.repeat_interleave(count, 0), mean.repeat_interleave(count, 0)
    if guidance.pairing == "paired":
        points = torch.cat(
            [draw_samples(distribution[row // count], 1, generator) for row, generator in enumerate(generators)]
        )
        # Of these draws, not the expected one: a single draw is off by as much as there is to be seen.
        floor = (weight * (points - means).square().sum(-1)).sum(-1)
    else:
        points, floor, variance = means, torch.zeros_like(variance), torch.zeros_like(variance)
    centre = torch.zeros_like(mean[:, 0]) if principal_point is None else principal_point
    return Target(
        points,
        weight,
        floor,
        variance,
        distribution,
        camera.repeat_interleave(count, 0),
        centre.repeat_interleave(count, 0),
    )


def _variance(distribution: Tensor, mean: Tensor) -> Tensor:  # (B, J)
    height, width = distribution.shape[-2:]
    y = (torch.arange(height, device=mean.device, dtype=mean.dtype) + 0.5) * (2 / height) - 1
    x = (torch.arange(width, device=mean.device, dtype=mean.dtype) + 0.5) * (2 / width) - 1
    across = (distribution.sum(-2) * (x - mean[..., :1]).square()).sum(-1)
    return across + (distribution.sum(-1) * (y - mean[..., 1:]).square()).sum(-1)


def project(
    guidance: Guidance,
    keypoints: Tensor,  # (M, J, 3) metres
    target: Target,
) -> Tensor:  # (M, J, 2) crop coordinates
    """f: the keypoints in the crop, by a camera fitted to the targets or by the head's."""
    if guidance.projection == "camera":
        return weak_perspective_projection(keypoints, target.camera)
    fitted = perspective_fit(keypoints, target.points, target.weight, target.principal_point)
    return fitted_projection(keypoints, fitted, target.principal_point)


def distribution_gap(
    guidance: Guidance,
    projected: Tensor,  # (M, J, 2)
    target: Target,
) -> Tensor:  # (M,) squared crop half-sides, a weighted mean over the joints
    """D_k. By `likelihood`: -2 sigma² log U(f), sigma² the variance of a joint's peak, so that both have one unit."""
    if guidance.gap == "samples":
        return (target.weight * (projected - target.points).square().sum(-1)).sum(-1)
    people, joints = target.heatmaps.shape[:2]
    maps = target.heatmaps / target.heatmaps.flatten(2).amax(-1)[..., None, None].clamp_min(1e-12)
    grid = projected.reshape(people, -1, joints, 2).transpose(1, 2).flatten(0, 1)[:, None]  # (B*J, 1, N, 2)
    maps = maps.flatten(0, 1)[:, None]
    values = torch.nn.functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    values = values[:, 0, 0].unflatten(0, (people, joints)).transpose(1, 2).flatten(0, 1)  # (M, J)
    # A map says nothing about the way to its peak from afar: there the distance to the target has to.
    far = (projected - target.points).square().sum(-1)
    variance = target.variance[:, None].clamp_min(1e-4)
    negative = -2 * variance * values.clamp_min(1e-6).log()
    return (target.weight * torch.where(values > 1e-3, negative, negative.detach() + far)).sum(-1)
