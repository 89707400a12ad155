"""The depth map of a synthetic person: the body, the box in front of it, a wall and a floor behind it.

A real estimator's map does not reveal the silhouette, so the body is placed in a scene (our choice): two random planes
with the whole body in front of them. n people, V vertices, S pixels a side. Metres, camera frame.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.data.synthetic.draws import gaussian, grid, uniform

FARTHEST = 60.0  # metres: largest depth
_WALL = (0.05, 20.0)  # metres behind the body's farthest point, log-uniform
_FLOOR = (0.0, 0.3)  # metres under its lowest point


def compose_depth(
    body: Tensor,  # (n, S, S) metres, 0 where there is no body
    occlusion: Tensor,  # (n, S, S) bool: behind a box
    vertices: Tensor,  # (n, V, 3) metres, camera frame
    focal: Tensor,  # (n,) crop half-sides
    principal_point: Tensor,  # (n, 2) crop coordinates
    generator: torch.Generator,  # CPU
    scene: bool = True,  # False: the body alone, NaN elsewhere and behind boxes
) -> Tensor:  # (n, S, S) metres
    """The nearest surface of every pixel. A box is opaque: the body behind it does not appear."""
    n, size = body.shape[:2]
    device = body.device
    random = uniform(generator, n, 4, device=device)
    tilt = gaussian(generator, n, 3, device=device)
    is_body = body > 0
    if not scene:
        return torch.where(is_body & ~occlusion, body, torch.nan)
    x, y = grid(size, size, device)
    ray_x = (x - principal_point[:, 0, None, None]) / focal[:, None, None]
    ray_y = (y - principal_point[:, 1, None, None]) / focal[:, None, None]
    rays = torch.stack(torch.broadcast_tensors(ray_x, ray_y, torch.ones_like(ray_x)), -1)  # (n, S, S, 3)

    def plane(normal: Tensor, margin: Tensor) -> Tensor:  # normals (n, 3) away from the body -> (n, S, S) z
        normal = F.normalize(normal, dim=-1)
        offset = (vertices @ normal[:, :, None])[..., 0].amax(1) + margin
        projection = (rays @ normal[:, None, :, None])[..., 0]
        distance = offset[:, None, None] / projection.clamp_min(1e-6)
        return torch.where((projection > 1e-6) & (distance > 0), distance, FARTHEST).clamp_max(FARTHEST)

    low, high = (math.log(value) for value in _WALL)
    wall = plane(
        torch.stack([0.3 * tilt[:, 0], 0.1 * tilt[:, 1], torch.ones(n, device=device)], -1),
        torch.exp(low + (high - low) * random[:, 0]),
    )
    # Cameras look down slightly more often than up: the floor then rises with the distance.
    floor = plane(
        torch.stack([0.03 * tilt[:, 1], torch.ones(n, device=device), 0.1 + 0.15 * tilt[:, 2]], -1),
        _FLOOR[0] + (_FLOOR[1] - _FLOOR[0]) * random[:, 1],
    )
    floor = torch.where(random[:, 2, None, None] < 0.85, floor, FARTHEST)
    scene_depth = torch.where(is_body, body, torch.minimum(wall, floor))
    box_depth = vertices[..., 2].amin(1).clamp_min(0.2) * (0.5 + 0.45 * random[:, 3])
    return torch.where(occlusion, box_depth[:, None, None], scene_depth)
