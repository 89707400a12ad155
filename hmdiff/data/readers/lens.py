"""A calibrated lens with distortion, and the best pinhole approximation for one person.

Radial and tangential distortion in Human3.6M's form: with (x, y) = (X, Y) / Z and r^2 = x^2 + y^2, (x, y) (1 + k1 r^2 +
k2 r^4 + k3 r^6 + 2 p1 y + 2 p2 x) + (p2, p1) r^2. Equal to OpenCV's (coefficients in the order k1 k2 p1 p2 k3), since 2
p1 x y + p2 (r^2 + 2 x^2) is the same sum.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Lens:
    rotation: np.ndarray  # (3, 3) world to camera
    position: np.ndarray  # (3,) metres, of the camera, world frame
    focal: np.ndarray  # (2,) pixels
    principal: np.ndarray  # (2,) pixels
    radial: np.ndarray  # (3,)
    tangential: np.ndarray  # (2,)

    def to_camera(
        self,
        points: np.ndarray,  # (P, 3) metres, world frame
    ) -> np.ndarray:  # (P, 3)
        return (points - self.position) @ self.rotation.T

    def project(
        self,
        points: np.ndarray,  # (P, 3) metres, camera frame
    ) -> np.ndarray:  # (P, 2) pixels
        normalized = points[:, :2] / points[:, 2:]
        r_squared = (normalized * normalized).sum(1)
        radial = 1 + sum(k * r_squared ** (power + 1) for power, k in enumerate(self.radial))
        tangential = 2 * normalized @ self.tangential[::-1]
        distorted = normalized * (radial + tangential)[:, None] + r_squared[:, None] * self.tangential[::-1]
        return distorted * self.focal + self.principal

    def reprojection_error(
        self,
        points: np.ndarray,  # (P, 3) metres, camera frame
        target: np.ndarray,  # (P, 2) pixels
    ) -> float:
        """Median reprojection error in pixels; infinite unless all points are in front of the camera."""
        if not (points[:, 2] > 0.1).all():
            return float("inf")
        return float(np.median(np.linalg.norm(self.project(points) - target, axis=1)))


def fit_pinhole(
    points: np.ndarray,  # (P, 3) metres, camera frame
    pixels: np.ndarray,  # (P, 2) their distorted projections
    lens: Lens,
) -> np.ndarray:  # (3, 3)
    """Least-squares fit of a magnification of the lens's focal lengths and a principal point to one person's points.

    Our choice: a record has no distortion, and over one person distortion is nearly a magnification and a shift. So the
    person's pinhole absorbs it, and the image and the 2D labels stay unchanged. Degenerate points return the lens's own
    camera.
    """
    rays = points[:, :2] / points[:, 2:] * lens.focal
    scale, principal = 1.0, lens.principal
    if np.isfinite(rays).all() and np.isfinite(pixels).all() and np.ptp(rays, 0).max() > 10:
        centred, target = rays - rays.mean(0), pixels - pixels.mean(0)
        scale = (centred * target).sum() / (centred * centred).sum()
        principal = pixels.mean(0) - scale * rays.mean(0)
    return np.array([[scale * lens.focal[0], 0, principal[0]], [0, scale * lens.focal[1], principal[1]], [0, 0, 1]])
