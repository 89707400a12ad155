"""Rotations, cameras, projections and alignments: pure, batched, differentiable functions.

Frame: OpenCV camera (x right, y down, z forward), metres. 2D points in a crop run from -1 to 1 (x right, y down).
Rotations are (..., 3, 3) and act on column vectors: ``points @ R.mT``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def axis_angle_to_matrix(
    axis_angle: Tensor,  # (..., 3) radians
) -> Tensor:  # (..., 3, 3)
    """Rodrigues' formula, smooth and differentiable at zero."""
    angle_squared = (axis_angle * axis_angle).sum(-1)[..., None, None]
    # Taylor series near zero: sin(a)/a and (1-cos(a))/a² would be 0/0 there, in the value or in the gradient.
    small = angle_squared < 1e-6
    safe = torch.where(small, torch.ones_like(angle_squared), angle_squared)
    angle = safe.sqrt()
    sine = torch.where(small, 1 - angle_squared / 6, angle.sin() / angle)
    cosine = torch.where(small, 0.5 - angle_squared / 24, (1 - angle.cos()) / safe)
    cross = skew(axis_angle)
    identity = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return identity + sine * cross + cosine * (cross @ cross)


def skew(
    vector: Tensor,  # (..., 3)
) -> Tensor:  # (..., 3, 3)
    """The matrix of the cross product: ``skew(a) @ b == a x b``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(
    matrix: Tensor,  # (..., 3, 3)
) -> Tensor:  # (..., 4) w x y z, w >= 0, unit length
    """Shepperd's method: uses the best conditioned of four formulas for each matrix."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)
    xx, yy, zz = diagonal.unbind(-1)
    plus, minus = matrix + matrix.mT, matrix - matrix.mT
    xy, yz, zx = plus[..., 0, 1], plus[..., 1, 2], plus[..., 2, 0]
    wx, wy, wz = minus[..., 2, 1], minus[..., 0, 2], minus[..., 1, 0]
    # Rows: 4 q_i q for i = w, x, y, z.
    w = torch.stack([1 + trace, wx, wy, wz], -1)
    x = torch.stack([wx, 1 + 2 * xx - trace, xy, zx], -1)
    y = torch.stack([wy, xy, 1 + 2 * yy - trace, yz], -1)
    z = torch.stack([wz, zx, yz, 1 + 2 * zz - trace], -1)
    rows = torch.stack([w, x, y, z], -2)
    best = torch.cat([trace[..., None], diagonal], -1).argmax(-1)
    quaternion = rows.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = F.normalize(quaternion, dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def matrix_to_axis_angle(
    matrix: Tensor,  # (..., 3, 3)
) -> Tensor:  # (..., 3) radians, length at most pi
    """Inverse of `axis_angle_to_matrix`, through a quaternion, stable at 0 and at pi."""
    quaternion = matrix_to_quaternion(matrix)
    vector = quaternion[..., 1:]
    sine = vector.norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[..., :1])
    # angle / sin(angle / 2) tends to 2 at zero.
    ratio = torch.where(sine < 1e-6, torch.full_like(sine, 2.0), angle / sine.clamp_min(1e-12))
    return vector * ratio


def perspective_projection(
    points: Tensor,  # (..., P, 3) metres, camera frame
    focal: Tensor,  # (...) in the unit wanted for the result
    center: Tensor,  # (..., 2) principal point, same unit
) -> Tensor:  # (..., P, 2)
    """Pinhole projection. Points must lie in front of the camera (z > 0)."""
    return points[..., :2] / points[..., 2:] * focal[..., None, None] + center[..., None, :]


def weak_perspective_projection(
    points: Tensor,  # (..., P, 3) metres, relative to the pelvis
    camera: Tensor,  # (..., 3) scale (crop half-sides per metre), tx, ty (crop units, -1..1)
) -> Tensor:  # (..., P, 2) crop coordinates, -1..1
    """Scaled orthographic projection: ``scale * xy + (tx, ty)``. (tx, ty) is where the pelvis lands."""
    return points[..., :2] * camera[..., None, :1] + camera[..., None, 1:]


def weak_perspective_fit(
    points: Tensor,  # (..., P, 3)
    target: Tensor,  # (..., P, 2) crop coordinates
    weight: Tensor,  # (..., P) >= 0
) -> Tensor:  # (..., 3) scale, tx, ty
    """The camera of least weighted squared 2D distance, in closed form, differentiable. Scale is clamped to >= 1e-3."""
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-8)
    weight = weight[..., None]
    mean_source = (weight * points[..., :2]).sum(-2, keepdim=True)
    mean_target = (weight * target).sum(-2, keepdim=True)
    source, goal = points[..., :2] - mean_source, target - mean_target
    covariance = (weight * source * goal).sum((-2, -1))
    variance = (weight * source * source).sum((-2, -1))
    scale = (covariance / variance.clamp_min(1e-8)).clamp_min(1e-3)
    translation = mean_target[..., 0, :] - scale[..., None] * mean_source[..., 0, :]
    return torch.cat([scale[..., None], translation], -1)


def perspective_fit(
    points: Tensor,  # (..., P, 3) metres
    target: Tensor,  # (..., P, 2) crop coordinates
    weight: Tensor,  # (..., P) >= 0
    principal_point: Tensor,  # (..., 2) of the photo, crop coordinates
    prior: float = 0.25,  # 1/m: 4 m away
    prior_weight: float = 1e-3,  # relative to the total weight of the points
) -> Tensor:  # (..., 4) scale, bx, by, nearness k = 1 / distance
    """Fit a pinhole camera of unknown focal length to rigid points; closed form, differentiable.

    ``(u - c)(1 + k z) = s x + b`` is linear in (s, b, k): weighted least squares (our choice). Unlike weak perspective,
    it models that a person off the photo's centre is seen from the side.
    """
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-8)
    goal = target - principal_point[..., None, :]
    one = torch.ones_like(points[..., 0])
    zero = torch.zeros_like(one)
    across = torch.stack([points[..., 0], one, zero, -points[..., 2] * goal[..., 0]], -1)
    down = torch.stack([points[..., 1], zero, one, -points[..., 2] * goal[..., 1]], -1)
    rows = torch.cat([across, down], -2)  # (..., 2P, 4)
    weighted = rows * torch.cat([weight, weight], -1)[..., None]
    ridge = torch.tensor([1e-6, 1e-6, 1e-6, prior_weight], dtype=points.dtype, device=points.device)
    normal = weighted.mT @ rows + torch.diag(ridge)
    right = (weighted.mT @ torch.cat([goal[..., 0], goal[..., 1]], -1)[..., None])[..., 0]
    right = torch.cat([right[..., :3], right[..., 3:] + prior * prior_weight], -1)
    return torch.linalg.solve(normal, right)


def fitted_projection(
    points: Tensor,  # (..., P, 3) metres
    fitted: Tensor,  # (..., 4) of `perspective_fit`
    principal_point: Tensor,  # (..., 2) crop coordinates
) -> Tensor:  # (..., P, 2) crop coordinates
    """Projection by the fitted camera; its distance is clamped to at least 1.25 m."""
    nearness = fitted[..., None, 3:].clamp(0.0, 0.8)
    depth = (1 + nearness * points[..., 2:]).clamp_min(0.1)
    return (fitted[..., None, :1] * points[..., :2] + fitted[..., None, 1:3]) / depth + principal_point[..., None, :]


def weak_to_full_camera(
    camera: Tensor,  # (..., 3) scale, tx, ty in the crop
    center: Tensor,  # (..., 2) centre of the square crop in photo pixels
    side: Tensor,  # (...) side of the crop in photo pixels
    focal: Tensor,  # (...) focal length of the photo in pixels
    principal_point: Tensor,  # (..., 2) of the photo in pixels
) -> Tensor:  # (..., 3) metres, pelvis translation in the camera frame of the full photo
    """Convert the crop's weak perspective camera to a translation for a pinhole camera of the full photo.

    One metre at the pelvis covers ``scale * side / 2`` pixels by the crop's camera and ``focal / z`` by the photo's
    (SPIN's and CLIFF's conversion, arXiv 2208.00571, eq. 3-5).
    """
    scale, offset = camera[..., 0], camera[..., 1:]
    depth = 2 * focal / (scale * side).clamp_min(1e-6)
    pixel = center + offset * side[..., None] / 2
    lateral = (pixel - principal_point) * (depth / focal)[..., None]
    return torch.cat([lateral, depth[..., None]], -1)


def perspective_translation_fit(
    points: Tensor,  # (..., P, 3) metres, relative to the pelvis
    target: Tensor,  # (..., P, 2) observed positions, in the unit of the focal length
    weight: Tensor,  # (..., P) >= 0
    focal: Tensor,  # (...)
    center: Tensor,  # (..., 2) principal point
    prior: Tensor,  # (..., 3) metres, expected pelvis position
    prior_weight: float = 0.01,  # relative to the total weight of the points
    rounds: int = 3,
) -> Tensor:  # (..., 3) metres, the pelvis in the camera frame
    """Translation of rigid points that aligns their pinhole projection with 2D targets.

    ``focal (X + t_x) = (u - c_x)(Z + t_z)`` is linear in t: weighted least squares in closed form, as SPIN's
    `estimate_translation`. The prior keeps it solvable with few visible points. Further rounds are reweighted: by the
    inverse squared depth, which turns the algebraic error into pixels, and by a Geman-McClure weight at the scale of
    the median error, against outliers (our choice). Depth is clamped to at least 0.1 m.
    """
    ray = (target - center[..., None, :]) / focal[..., None, None]  # (..., P, 2)
    shape = np.broadcast_shapes(points.shape[:-2], ray.shape[:-2])
    points, ray = points.expand(*shape, -1, -1), ray.expand(*shape, -1, -1)
    weight, prior = weight.expand(*shape, -1), prior.expand(*shape, -1)
    translation, used = prior, weight
    for round_number in range(rounds):
        depth = (points[..., 2] + translation[..., 2:]).clamp_min(0.1)
        if round_number:
            seen = (points[..., :2] + translation[..., None, :2]) / depth[..., None]
            error = (seen - ray).square().sum(-1)
            present = torch.where(weight > 0, error, torch.full_like(error, float("nan")))
            scale = present.nanmedian(-1, keepdim=True).values.nan_to_num(1.0).clamp_min(1e-10)
            used = weight * (scale * 4 / (scale * 4 + error)) ** 2
        rows = used / depth.square()
        total = rows.sum(-1)
        # Normal equations of [1, 0, -r_x; 0, 1, -r_y] t = r z - xy, with the prior on depth and place.
        offset = ray * points[..., 2:] - points[..., :2]
        normal = torch.zeros(*shape, 3, 3, dtype=points.dtype, device=points.device)
        normal[..., 0, 0] = normal[..., 1, 1] = total
        cross = (rows[..., None] * ray).sum(-2)
        normal[..., 0, 2] = normal[..., 2, 0] = -cross[..., 0]
        normal[..., 1, 2] = normal[..., 2, 1] = -cross[..., 1]
        normal[..., 2, 2] = (rows[..., None] * ray.square()).sum((-2, -1))
        lateral, along = (rows[..., None] * offset).sum(-2), -(rows[..., None] * ray * offset).sum((-2, -1))
        right = torch.cat([lateral, along[..., None]], -1)
        # The prior adds t - prior = 0, its depth row scaled by how strongly the points constrain depth.
        visible = total.clamp_min(1e-9)
        share = (normal[..., 2, 2] / visible).clamp_min(1e-6)
        pull = torch.stack([torch.ones_like(share), torch.ones_like(share), share], -1)
        pull = prior_weight * visible[..., None] * pull
        normal = normal + torch.diag_embed(pull)
        right = right + pull * prior
        translation = torch.linalg.solve(normal, right)
        translation = torch.cat([translation[..., :2], translation[..., 2:].clamp_min(0.1)], -1)
    return translation


def crop_rotation(
    principal_point: Tensor,  # (..., 2) of the photo, in crop coordinates
    focal: Tensor,  # (...) in crop half-sides
) -> Tensor:  # (..., 3, 3)
    """The smallest rotation from the crop's frame to the camera's: ``camera = crop @ R.mT``.

    The z axis of the crop's frame is the ray through the crop's centre. A crop determines a person's orientation
    relative to that ray, but not to the camera, which depends on the crop's position in the photo (CLIFF,
    arXiv 2208.00571). This rotation supplies it, as in Perspective Crop Layers (Yu et al., arXiv 2011.13607).
    """
    ray = torch.cat([-principal_point, focal[..., None].clamp_min(1e-6)], -1)  # both 0 (unknown): identity
    ray = ray / ray.norm(dim=-1, keepdim=True)
    x, y, z = ray.unbind(-1)
    # Rodrigues' formula for the rotation of (0, 0, 1) onto the ray; z > 0 since the crop is in front of the camera.
    share = 1 / (1 + z)
    rows = [1 - x * x * share, -x * y * share, x, -x * y * share, 1 - y * y * share, y, -x, -y, z]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def similarity_transform(
    source: Tensor,  # (..., P, 3)
    target: Tensor,  # (..., P, 3)
) -> tuple[Tensor, Tensor, Tensor]:  # scale (...), rotation (..., 3, 3), translation (..., 3)
    """The least-squares similarity from source to target, with a proper rotation (Umeyama, PAMI 1991)."""
    mean_source, mean_target = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    centred_source, centred_target = source - mean_source, target - mean_target
    covariance = centred_target.mT @ centred_source
    u, singular, vh = torch.linalg.svd(covariance)
    sign = torch.ones_like(singular)
    sign[..., -1] = torch.where(torch.linalg.det(u @ vh) < 0, -1.0, 1.0).to(sign.dtype)
    rotation = (u * sign[..., None, :]) @ vh
    variance = centred_source.square().sum((-2, -1)).clamp_min(1e-12)
    scale = (singular * sign).sum(-1) / variance
    translation = (mean_target - scale[..., None, None] * mean_source @ rotation.mT)[..., 0, :]
    return scale, rotation, translation


def similarity_align(
    source: Tensor,  # (..., P, 3)
    target: Tensor,  # (..., P, 3)
) -> Tensor:  # (..., P, 3) source, moved onto target
    """Procrustes alignment: `similarity_transform` applied."""
    scale, rotation, translation = similarity_transform(source, target)
    return scale[..., None, None] * source @ rotation.mT + translation[..., None, :]
