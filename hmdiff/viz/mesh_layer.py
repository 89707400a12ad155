"""One softly lit mesh on a transparent background, for `overlays` to composite on photos and studio backdrops.

Gouraud shading: lighting per vertex, interpolated. A body's vertices are denser than the image's pixels, so an image
costs one interpolation instead of per-pixel lighting. Visual design is our choice.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.viz.renderer import interpolate, rasterize, vertex_normals

Colour = tuple[float, float, float]
FAR = 1e4  # metres: depth of the background, for depth differences
_AMBIENT = (0.46, 0.47, 0.50)
_LIGHTS = (  # direction towards the light in the camera frame, and its colour
    ((-0.5, -0.8, -0.8), (0.54, 0.53, 0.50)),
    ((0.9, -0.1, -0.5), (0.15, 0.16, 0.19)),
    ((0.0, 0.9, -0.3), (0.10, 0.09, 0.09)),
)
_GLOSS, _SHININESS = 0.10, 24.0


def mesh_layer(
    vertices: Tensor,  # (V, 3) metres, camera frame
    faces: Tensor,  # (F, 3)
    focal: tuple[float, float],  # crop half-sides
    principal_point: tuple[float, float],  # crop coordinates
    size: tuple[int, int],
    colours: Colour | Tensor,  # one colour, or (V, 3)
    finer: int,  # supersampling per pixel side
) -> tuple[np.ndarray, np.ndarray]:  # colour times alpha (H, W, 3), alpha (H, W), both 0..1
    """Draw the mesh. A thin shade separates a limb from the body part behind it."""
    height, width = size[0] * finer, size[1] * finer
    points = vertices.float()[None]
    drawn = rasterize(points, faces, torch.tensor([focal]), torch.tensor([principal_point]), (height, width))
    picture = interpolate(drawn, faces, lit(points[0], faces, colours)[None])[0].numpy()
    alpha = (drawn.face_index[0] >= 0).numpy().astype(np.float32)
    front = np.where(alpha > 0, drawn.depth[0].numpy(), np.float32(FAR))
    reach = 2 * finer + 1
    nearest = cv2.erode(front, np.ones((reach, reach), np.uint8))
    jump = cv2.blur(((front - nearest - 0.04) / 0.08).clip(0, 1), (reach, reach))
    picture = picture * (1 - 0.30 * jump)[..., None]
    if finer > 1:  # integer factor: the mean of the samples
        picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
        alpha = np.asarray(cv2.resize(alpha, size[::-1], interpolation=cv2.INTER_AREA), np.float32)
    return picture, alpha


def lit(
    vertices: Tensor,  # (V, 3) metres, camera frame
    faces: Tensor,  # (F, 3)
    colours: Colour | Tensor,  # one colour, or (V, 3)
) -> Tensor:  # (V, 3) RGB 0..1
    """Lambert shading, slight Blinn-Phong gloss, and darkening at grazing angles, as under a large soft light."""
    normal = vertex_normals(vertices[None], faces)[0]
    facing = -normal[:, 2:]
    to_eye = -F.normalize(vertices, dim=-1)
    # The inside of an open mesh is lit as if facing the viewer.
    normal = torch.where((normal * to_eye).sum(-1, keepdim=True) < -0.5, -normal, normal)
    radiance, gloss = torch.tensor(_AMBIENT).expand(len(vertices), 3), torch.zeros(1)
    for towards, colour in _LIGHTS:
        direction, light = F.normalize(torch.tensor(towards), dim=-1), torch.tensor(colour)
        lambert = (normal @ direction).clamp_min(0)[:, None]
        half = F.normalize(direction + to_eye, dim=-1)
        shine = (half * normal).sum(-1, keepdim=True).clamp_min(1e-6).pow(_SHININESS) * (lambert > 0)
        radiance, gloss = radiance + lambert * light, gloss + shine * light
    lit = torch.as_tensor(colours, dtype=torch.float32) * radiance + _GLOSS * gloss
    return lit.clamp(0, 1) * (1 - 0.38 * (1 - facing.clamp(0, 1)).pow(3))


def shadow(
    points: Tensor,  # (V, 3) metres, camera frame: the mesh projected onto the ground
    focal: tuple[float, float],  # crop half-sides
    size: tuple[int, int],
) -> np.ndarray:  # (H, W) float32, 0 or 1
    """Footprint of a dense mesh in the image, to be blurred: its vertices as touching dots."""
    height, width = size
    mask = np.zeros(size, np.float32)
    x = ((points[:, 0] / points[:, 2] * focal[0] + 1) * (width / 2)).long()
    y = ((points[:, 1] / points[:, 2] * focal[1] + 1) * (height / 2)).long()
    inside = (points[:, 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    mask[y[inside].numpy(), x[inside].numpy()] = 1
    reach = 2 * max(1, min(size) // 120) + 1
    return np.asarray(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8)), np.float32)
