"""Mesh images: over the photo, from a second view, and several hypotheses together.

Rendered with `hmdiff.viz.renderer` on the CPU with supersampling, for smooth outlines. No display is needed. Images are
as in `hmdiff.viz.canvas`, whose functions are re-exported. Vertices are in the camera frame (x right, y down, z
forward), metres. Colours are RGB 0..1. Visual design is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.viz.canvas import (
    as_tensor,
    colour_bar,
    contact_sheet,
    draw_keypoints,
    heat_colours,
    read_picture,
    save_picture,
    to_bytes,
)
from hmdiff.viz.mesh_layer import Colour, mesh_layer, shadow

__all__ = [
    "PALETTE",
    "colour_bar",
    "contact_sheet",
    "draw_keypoints",
    "heat_colours",
    "overlay",
    "overlay_all",
    "read_picture",
    "save_picture",
    "turntable_view",
    "view_all",
]

# Colours of the hypotheses, in order; distinct in hue, similar in lightness.
PALETTE: tuple[Colour, ...] = (
    (0.53, 0.66, 0.96),
    (0.98, 0.60, 0.49),
    (0.47, 0.82, 0.68),
    (0.98, 0.78, 0.40),
    (0.77, 0.61, 0.93),
    (0.44, 0.79, 0.92),
    (0.96, 0.58, 0.74),
    (0.72, 0.82, 0.44),
)


def overlay(
    photo: np.ndarray,  # (H, W, 3) uint8
    vertices: ArrayLike | Tensor,  # (V, 3) metres, relative to the pelvis
    faces: ArrayLike | Tensor,  # (F, 3)
    camera_translation: ArrayLike | Tensor,  # (3,) metres: the pelvis in the photo's camera
    focal: float,  # pixels
    principal_point: ArrayLike | Tensor,  # (2,) pixels
    colour: Colour | ArrayLike | Tensor = PALETTE[0],  # one colour, or (V, 3) e.g. from `heat_colours`
    opacity: float = 0.92,
) -> np.ndarray:  # (H, W, 3) uint8
    """Draw the mesh over the photo. Renders only the region that it covers."""
    points = as_tensor(vertices).float() + as_tensor(camera_translation).float()
    height, width = photo.shape[:2]
    box = _box(points, focal, principal_point)
    if box is None:
        return photo.copy()
    left, top = max(0, int(box[0]) - 2), max(0, int(box[1]) - 2)
    right, bottom = min(width, int(box[2]) + 3), min(height, int(box[3]) + 3)
    if left >= right or top >= bottom:
        return photo.copy()
    size = (bottom - top, right - left)
    centre = as_tensor(principal_point).tolist()
    layer, alpha = mesh_layer(
        points,
        as_tensor(faces).long(),
        (2 * focal / size[1], 2 * focal / size[0]),
        (2 * (centre[0] - left) / size[1] - 1, 2 * (centre[1] - top) / size[0] - 1),
        size,
        colour if isinstance(colour, tuple) else as_tensor(colour).float(),
        _finer(size),
    )
    result = photo.copy()
    region = result[top:bottom, left:right]
    # A soft dark halo outside the outline separates the mesh from a busy photo.
    halo = cv2.GaussianBlur(alpha, (0, 0), max(1.0, min(size) / 90)) * (1 - alpha) * 0.45
    behind = region / 255.0 * (1 - halo[..., None])
    region[:] = to_bytes(behind * (1 - opacity * alpha[..., None]) + opacity * layer)
    return result


def overlay_all(
    photo: np.ndarray,  # (H, W, 3) uint8
    bodies: ArrayLike | Tensor,  # (N, V, 3) metres, relative to the pelvis
    faces: ArrayLike | Tensor,  # (F, 3)
    translations: ArrayLike | Tensor,  # (N, 3) metres
    focal: float,  # pixels
    principal_point: ArrayLike | Tensor,  # (2,) pixels
    colours: Sequence[Colour | ArrayLike | Tensor],  # one per body, each a single colour or (V, 3)
    opacity: float = 0.4,  # of each body
) -> np.ndarray:  # (H, W, 3) uint8
    """Draw several translucent meshes over the photo, denser where they agree. The order does not matter."""
    height, width = photo.shape[:2]
    centre = as_tensor(principal_point).tolist()
    lens = ((2 * focal / width, 2 * focal / height), (2 * centre[0] / width - 1, 2 * centre[1] / height - 1))
    faces = as_tensor(faces).long()
    layers = []
    for body, shift, colour in zip(as_tensor(bodies).float(), as_tensor(translations).float(), colours, strict=True):
        tint = colour if isinstance(colour, tuple) else as_tensor(colour).float()
        layers.append(mesh_layer(body + shift, faces, *lens, (height, width), tint, 2))
    return to_bytes(_blended(photo / 255.0, layers, opacity))


def _blended(
    picture: np.ndarray,  # (H, W, 3) 0..1
    layers: Sequence[tuple[np.ndarray, np.ndarray]],  # from `mesh_layer`
    opacity: float,
) -> np.ndarray:  # (H, W, 3) 0..1
    """Blend translucent bodies with their mean colour, so that none hides another (McGuire and Bavoil, JCGT 2013)."""
    through, weight = np.ones((*picture.shape[:2], 1)), np.full((*picture.shape[:2], 1), 1e-6)
    total = np.zeros(picture.shape)
    for layer, alpha in layers:
        through = through * (1 - opacity * alpha[..., None])
        total, weight = total + layer, weight + alpha[..., None]
    blended: np.ndarray = picture * through + (1 - through) * total / weight
    return blended


def _finer(size: tuple[int, int]) -> int:
    return 2 if max(size) <= 1400 else 1


def _box(
    points: Tensor,  # (V, 3) metres, absolute
    focal: float,
    principal_point: ArrayLike | Tensor,
) -> tuple[float, float, float, float] | None:  # left, top, right, bottom in pixels; None if all is behind the camera
    points = points[points[:, 2] > 0.05]
    if len(points) == 0:
        return None
    pixels = points[:, :2] / points[:, 2:] * focal + as_tensor(principal_point).float()
    (left, top), (right, bottom) = pixels.amin(0).tolist(), pixels.amax(0).tolist()
    return left, top, right, bottom


def turntable_view(
    vertices: ArrayLike | Tensor,  # (V, 3) metres, camera frame (relative or absolute)
    faces: ArrayLike | Tensor,  # (F, 3)
    degrees: float = 90.0,  # about the vertical axis; 0 is the camera's view, 90 the person's side
    size: int | tuple[int, int] = 320,
    colour: Colour | ArrayLike | Tensor = PALETTE[0],
    extent: float | None = None,  # metres from the centre to the nearer edge; set it to compare bodies
    centre: ArrayLike | Tensor | None = None,  # (3,) look-at point; None: the middle of the body
) -> np.ndarray:  # (H, W, 3) uint8
    """A view from slightly above, on a light ground with the body's shadow at its lowest point."""
    return _studio([as_tensor(vertices)], faces, degrees, size, [colour], extent, centre, 1.0)


def view_all(
    bodies: ArrayLike | Tensor,  # (N, V, 3) metres
    faces: ArrayLike | Tensor,  # (F, 3)
    degrees: float,
    size: int | tuple[int, int],
    colours: Sequence[Colour | ArrayLike | Tensor],  # one per body, each a single colour or (V, 3)
    extent: float | None = None,
    centre: ArrayLike | Tensor | None = None,  # (3,)
    opacity: float = 0.4,  # of each body
) -> np.ndarray:  # (H, W, 3) uint8
    """`turntable_view` of several translucent bodies."""
    return _studio(list(as_tensor(bodies).float()), faces, degrees, size, list(colours), extent, centre, opacity)


def _studio(
    bodies: Sequence[Tensor],  # each (V, 3)
    faces: ArrayLike | Tensor,
    degrees: float,
    size: int | tuple[int, int],
    colours: Sequence[Colour | ArrayLike | Tensor],
    extent: float | None,
    centre: ArrayLike | Tensor | None,
    opacity: float,
) -> np.ndarray:
    height, width = (size, size) if isinstance(size, int) else size
    everything = torch.cat(list(bodies)).float()
    low, high = everything.amin(0), everything.amax(0)
    middle = (low + high) / 2 if centre is None else as_tensor(centre).float()
    if extent is None:
        extent = 0.56 * float((high - low).max())
    turn = axis_angle_to_matrix(torch.tensor([0.0, math.radians(degrees), 0.0]))
    tilt = axis_angle_to_matrix(torch.tensor([math.radians(10.0), 0.0, 0.0]))
    distance = 5.0 * extent

    def placed(points: Tensor) -> Tensor:
        return (points - middle) @ (tilt @ turn).mT + torch.tensor([0.0, 0.0, distance])

    shorter = min(height, width)
    focal = (5.0 * shorter / width, 5.0 * shorter / height)
    faces = as_tensor(faces).long()
    ground = float(high[1] - middle[1])
    picture = _ground(tilt, distance, ground, focal, (height, width), extent)

    finer = _finer((height, width)) if len(bodies) == 1 else 2
    shadows = np.zeros((height, width), np.float32)
    for body in bodies:
        flat = body.float().clone()
        flat[:, 1] = middle[1] + ground
        shadows = np.maximum(shadows, shadow(placed(flat), focal, (height, width)))
    near, wide = (cv2.GaussianBlur(shadows, (0, 0), shorter / softness) for softness in (60, 22))
    picture = picture * (1 - 0.34 * (0.6 * near + 0.4 * wide)[..., None])
    layers = []
    for body, colour in zip(bodies, colours, strict=True):
        tint = colour if isinstance(colour, tuple) else as_tensor(colour).float()
        layers.append(mesh_layer(placed(body.float()), faces, focal, (0.0, 0.0), (height, width), tint, finer))
    return to_bytes(_blended(picture, layers, opacity))


def _ground(
    tilt: Tensor,  # (3, 3)
    distance: float,
    ground: float,  # metres below the look-at point
    focal: tuple[float, float],
    size: tuple[int, int],
    extent: float,
) -> np.ndarray:  # (H, W, 3) 0..1
    """A light backdrop, and a floor with half-metre lines that fade with distance."""
    height, width = size
    x = (np.arange(width) + 0.5) * (2 / width) - 1
    y = (np.arange(height) + 0.5) * (2 / height) - 1
    ray = np.stack(np.broadcast_arrays(x[None] / focal[0], y[:, None] / focal[1], 1.0), -1) @ tilt.numpy()
    origin = -np.array([0.0, 0.0, distance]) @ tilt.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        far = (ground - origin[1]) / ray[..., 1]
    floor = (ray[..., 1] > 1e-6) & (far > 0)
    point = origin + ray * np.where(floor, far, 0)[..., None]
    # Lines of constant screen width: distance to the nearest line divided by the size of a pixel there.
    pixel = np.maximum(np.abs(far) * 2 / (width * focal[0]), 1e-6)
    slant = np.maximum(np.abs(ray[..., 1]), 1e-3)
    near_x = np.abs((point[..., 0] / 0.5 + 0.5) % 1 - 0.5) * 0.5 / pixel
    near_z = np.abs((point[..., 2] / 0.5 + 0.5) % 1 - 0.5) * 0.5 / (pixel / slant)
    line = np.maximum(1 - near_x, 1 - near_z).clip(0, 1)
    radius = np.hypot(point[..., 0], point[..., 2]) / extent
    fade = np.exp(-((radius / 1.3) ** 2)) * floor
    backdrop = np.array([0.965, 0.968, 0.975]) - 0.05 * (y[:, None, None] * 0.5 + 0.5)
    picture = np.broadcast_to(backdrop, (height, width, 3))
    return picture - (0.035 * fade + 0.13 * line * fade)[..., None]


def reach_of(
    bodies: Tensor,  # (N, V, 3) metres
    size: tuple[int, int],
) -> tuple[Tensor, float]:  # (3,) the middle of all bodies; metres to the nearer edge of a view of them
    low, high = bodies.amin((0, 1)), bodies.amax((0, 1))
    reach = 0.58 * (high - low)
    return (low + high) / 2, max(float(reach[[0, 2]].max()), float(reach[1]) * min(1.0, size[1] / size[0]))


def person_crop(
    photo: np.ndarray,  # (H, W, 3) uint8
    bodies: Tensor,  # (N, V, 3) metres, absolute: all must be visible
    focal: float,  # pixels
    principal_point: ArrayLike | Tensor,  # (2,) pixels
    height: int,  # height of the result
) -> tuple[np.ndarray, np.ndarray, float, tuple[float, float]]:
    """The photo around a person: the crop, the principal point in it, its scale, and its upper left corner (x, y)."""
    found = [_box(body, focal, principal_point) for body in bodies]
    boxes = [box for box in found if box is not None]
    photo_height, photo_width = photo.shape[:2]
    region = (0.0, 0.0, float(photo_width), float(photo_height))
    if boxes:
        union = np.array(boxes)
        region = (*union[:, :2].min(0).tolist(), *union[:, 2:].max(0).tolist())
    # A margin of a tenth; width between 0.7 and 1.4 of the height.
    middle_x, middle_y = (region[0] + region[2]) / 2, (region[1] + region[3]) / 2
    tall, wide = 1.2 * (region[3] - region[1]), 1.25 * (region[2] - region[0])
    tall = max(tall, wide / 1.4, 16.0)
    wide = max(wide, 0.7 * tall)
    scale = height / tall
    width = round(wide * scale)
    # Inside the photo if possible, else centred on the person with grey padding.
    left, top = middle_x - wide / 2, middle_y - tall / 2
    left = min(max(left, 0.0), photo_width - wide) if wide <= photo_width else left
    top = min(max(top, 0.0), photo_height - tall) if tall <= photo_height else top
    affine = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    # warpAffine's origin is the centre of the first pixel, ours its corner.
    affine[:, 2] += 0.5 * scale - 0.5
    shrink = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
    base = photo if scale >= 0.5 else cv2.GaussianBlur(photo, (0, 0), 0.4 / scale)
    crop = cv2.warpAffine(base, affine, (width, height), flags=shrink, borderValue=(238, 239, 242))
    centre = (as_tensor(principal_point).double().numpy() - [left, top]) * scale
    return crop, centre, scale, (left, top)
