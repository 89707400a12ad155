"""The distribution gap D_k of DAT: samples u_i of the heatmaps U against the projected keypoints of the hypotheses.

HMDiff (arXiv 2308.13369): D_k = sum_i |u_i - f(x̂_0)|², u_i drawn from U, f: mesh -> 2D pose. M rows (the hypotheses of
a person are adjacent), J keypoints, H x W heatmaps. 2D in crop coordinates, -1..1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hmdiff.diffusion.guidance import Guidance
from hmdiff.errors import UserError
from hmdiff.geometry import fitted_projection, perspective_fit, weak_perspective_projection
from hmdiff.heatmaps.distribution import draw_samples, normalised, soft_argmax

_BACKGROUND = 0.1  # fraction of the peak; lower values are the estimator's background


@dataclasses.dataclass(frozen=True)
class Target:
    """Target of the distribution gap, one row per hypothesis."""

    points: Tensor  # (M, J, 2) u_i, crop coordinates
    weight: Tensor  # (M, J) w, rows sum to 1; 0 for a joint that was not detected
    floor: Tensor  # (M,) D of a perfect mesh: weighted squared distance of the u_i to the mean of U
    variance: Tensor  # (M,) weighted variance of U
    heatmaps: Tensor  # (B, J, H, W) U, each sums to 1 or is all 0
    camera: Tensor  # (M, 3) weak perspective of the camera head
    principal_point: Tensor  # (M, 2) of the photo, crop coordinates

    @property
    def known(self) -> Tensor:  # (M,) bool: any joint was detected
        return self.weight.sum(-1) > 0


def make_target(
    guidance: Guidance,
    heatmaps: Tensor,  # (B, J, H, W) >= 0, the peak = confidence
    camera: Tensor,  # (B, 3) of the camera head
    generators: list[torch.Generator],  # M = B * N, the hypotheses of a person adjacent
    principal_point: Tensor | None = None,  # (B, 2) of the photo, crop coordinates; None: the crop's centre
) -> Target:
    """Draw the u_i. Joints with less heatmap mass than the threshold of `normalised` get weight 0.

    Raises:
        UserError: the number of `joint_weights` is not J.
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
        # Floor of these draws, not its expectation: the variation of single draws is as large as the gap itself.
        floor = (weight * (points - means).square().sum(-1)).sum(-1)
    else:
        points, floor = means, torch.zeros_like(variance)
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
    """f: keypoints in the crop, by a camera fitted to the u_i or by the camera head."""
    if guidance.projection == "camera":
        return weak_perspective_projection(keypoints, target.camera)
    fitted = perspective_fit(keypoints, target.points, target.weight, target.principal_point)
    return fitted_projection(keypoints, fitted, target.principal_point)


def distribution_gap(
    guidance: Guidance,
    projected: Tensor,  # (M, J, 2)
    target: Target,
) -> Tensor:  # (M,) squared crop half-sides, a weighted mean over the joints
    """D_k. `likelihood`: -2 sigma² log U(f), sigma² the variance of U, which has the same unit as `samples`."""
    if guidance.gap == "samples":
        return (target.weight * (projected - target.points).square().sum(-1)).sum(-1)
    people, joints = target.heatmaps.shape[:2]
    maps = target.heatmaps / target.heatmaps.flatten(2).amax(-1)[..., None, None].clamp_min(1e-12)
    grid = projected.reshape(people, -1, joints, 2).transpose(1, 2).flatten(0, 1)[:, None]  # (B*J, 1, N, 2)
    maps = maps.flatten(0, 1)[:, None]
    values = torch.nn.functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    values = values[:, 0, 0].unflatten(0, (people, joints)).transpose(1, 2).flatten(0, 1)  # (M, J)
    # Far from the peak the likelihood has no gradient: use the distance to the target there.
    far = (projected - target.points).square().sum(-1)
    variance = target.variance[:, None].clamp_min(1e-4)
    negative = -2 * variance * values.clamp_min(1e-6).log()
    return (target.weight * torch.where(values > 1e-3, negative, negative.detach() + far)).sum(-1)
