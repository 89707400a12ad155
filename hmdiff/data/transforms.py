"""The square crop of a photo and its augmentation: one affine map for the image, its points, its camera and its 3D.

A photo pixel p maps to crop coordinates u = 2 / (scale * side) F R(angle) (p - center): a rotation about the crop's
centre, then a mirroring if F is a flip. With 3D turned by the same F R about the optical axis, the focal length divided
by the same half-side and the principal point mapped like any point, the pinhole projection holds exactly, wherever the
crop lies. Magnitudes follow SPIN and FastMETRO (flip, channel noise, rotation, scale). V points, J joints, S pixels a
side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch

from hmdiff.body.skeletons import mirror_permutation
from hmdiff.config import Augment
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One crop's augmentation. The default changes nothing."""

    flip: bool = False
    angle: float = 0.0  # radians; positive turns the image's x axis towards its y axis (clockwise on screen)
    scale: float = 1.0  # of the crop's side: above 1 the person becomes smaller
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of red, green, blue

    @property
    def linear_2d(self) -> np.ndarray:  # (2, 2)
        """F R, applied to directions in the image plane."""
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        mirror = -1.0 if self.flip else 1.0
        return np.array([[mirror * cosine, -mirror * sine], [sine, cosine]])

    @property
    def linear_3d(self) -> np.ndarray:  # (3, 3) orthogonal, of determinant -1 with a flip
        """F R about the optical axis, in 3D."""
        matrix = np.eye(3)
        matrix[:2, :2] = self.linear_2d
        return matrix


NO_AUGMENTATION = Augmentation()


def sample_augmentation(options: Augment, generator: np.random.Generator) -> Augmentation:
    """Uses a fixed number of draws, so that one option does not change the values of another."""
    flip, upright, angle, scale = generator.random(), generator.random(), generator.normal(), generator.normal()
    gains = 1 + options.noise * (2 * generator.random(3) - 1)
    degrees = 0.0 if upright < options.upright else options.rotation * float(np.clip(angle, -2, 2))
    return Augmentation(
        flip=bool(flip < options.flip),
        angle=math.radians(degrees),
        scale=1 + options.scale * float(np.clip(scale, -1, 1)),
        gains=(float(gains[0]), float(gains[1]), float(gains[2])),
    )


def crop_affine(
    center: np.ndarray,  # (2,) photo pixels
    side: float,  # photo pixels
    augmentation: Augmentation = NO_AUGMENTATION,
) -> np.ndarray:  # (2, 3): photo pixels to crop coordinates
    linear = augmentation.linear_2d * (2 / (augmentation.scale * side))
    return np.concatenate([linear, -(linear @ np.asarray(center, np.float64))[:, None]], 1)


def map_points(
    points: np.ndarray,  # (..., 2)
    affine: np.ndarray,  # (2, 3)
) -> np.ndarray:  # (..., 2)
    return points @ affine[:, :2].T + affine[:, 2]


def augment_points(
    points: np.ndarray,  # (..., 3) metres, camera frame
    augmentation: Augmentation,
) -> np.ndarray:  # (..., 3)
    return points @ augmentation.linear_3d.T


def swap_left_right(
    values: np.ndarray,  # (J, ...)
    names: Sequence[str],  # J
    augmentation: Augmentation,
) -> np.ndarray:
    """Per-joint values of the mirrored person: with a flip, left and right joints are exchanged."""
    return values[mirror_permutation(names)] if augmentation.flip else values


def augment_pose(
    pose: np.ndarray,  # (J, 3) axis-angle, the root's in the camera frame
    names: Sequence[str],  # J
    augmentation: Augmentation,
) -> np.ndarray:  # (J, 3)
    """The pose of the turned, then mirrored person. A reflection R -> F R F maps the axis (x, y, z) to (x, -y, -z).

    Exact for a mirror-symmetric body; SMPL's template is symmetric within a few millimetres.
    """
    pose = np.array(pose, np.float64)
    rotation = axis_angle_to_matrix(torch.tensor([0.0, 0.0, augmentation.angle], dtype=torch.float64))
    root = rotation @ axis_angle_to_matrix(torch.from_numpy(pose[0]))
    pose[0] = matrix_to_axis_angle(root).numpy()
    return swap_left_right(pose, names, augmentation) * np.array([1.0, -1.0, -1.0]) if augmentation.flip else pose


def crop_camera(
    intrinsics: np.ndarray,  # (3, 3) photo pixels
    affine: np.ndarray,  # (2, 3) of `crop_affine`
) -> tuple[float, np.ndarray]:  # focal length in crop half-sides, principal point (2,) in crop coordinates
    """The photo's camera for the crop. fx and fy, which differ by under 1 % in real cameras, are averaged."""
    magnification = math.sqrt(abs(np.linalg.det(affine[:, :2])))
    focal = (intrinsics[0, 0] + intrinsics[1, 1]) / 2 * magnification
    return float(focal), map_points(intrinsics[:2, 2], affine)


def warp_crop(
    picture: np.ndarray,  # (H, W, 3) uint8
    region: Sequence[float],  # x0, y0, x1, y1 photo pixels: the part of the photo that `picture` shows
    affine: np.ndarray,  # (2, 3) of `crop_affine`
    size: int,  # S
) -> np.ndarray:  # (S, S, 3) uint8, black outside the picture
    """The crop by a single warp; low-pass filtered first where it is coarser than the image, to avoid aliasing."""
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = region
    stretch = np.array([(x1 - x0) / width, (y1 - y0) / height])  # photo pixels per stored pixel
    linear = affine[:, :2] * stretch * (size / 2)
    offset = (map_points(np.array([x0, y0]), affine) + 1) * (size / 2)
    # OpenCV's origin is the centre of the first pixel, ours its corner.
    offset = offset + linear @ np.array([0.5, 0.5]) - 0.5
    scale = math.sqrt(abs(np.linalg.det(linear)))
    if scale < 0.7:
        picture = cv2.GaussianBlur(picture, (0, 0), 0.4 / scale)
    return cv2.warpAffine(picture, np.concatenate([linear, offset[:, None]], 1), (size, size), flags=cv2.INTER_LINEAR)


def scale_channels(
    picture: np.ndarray,  # (H, W, 3) uint8 RGB
    augmentation: Augmentation,
) -> np.ndarray:  # (H, W, 3) uint8 RGB
    """The channels multiplied by the change's gains, clipped at white."""
    if augmentation.gains == NO_AUGMENTATION.gains:
        return picture
    table = np.clip(np.arange(256)[:, None] * np.array(augmentation.gains), 0, 255).round().astype(np.uint8)
    return cv2.LUT(picture, table[None])
