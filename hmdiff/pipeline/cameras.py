"""The frames of one call: the photo's camera, the same camera rolled so that the crop is upright, the crop's own frame.

Between network and output, all computation is in the rolled camera; `CropCamera.back` rotates the result back to the
photo's camera. B people, N hypotheses.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hmdiff.body.fitting import FittedBodies
from hmdiff.geometry import (
    axis_angle_to_matrix,
    crop_rotation,
    matrix_to_axis_angle,
    perspective_translation_fit,
    weak_to_full_camera,
)
from hmdiff.heatmaps import Crop, heatmap_peaks


@dataclasses.dataclass(frozen=True)
class CropCamera:
    """Crops of B people and their frames relative to the camera."""

    crop: Crop
    turned: Crop  # upright, in the photo rotated about its principal point
    principal_in_crop: Tensor  # (B, 2) crop coordinates
    rotation: Tensor | None  # (B, 3, 3) from the crop's to the camera's frame; None for a model in the camera's frame

    @classmethod
    def of(cls, crop: Crop, crop_frame: bool) -> CropCamera:
        turned = crop.upright()
        principal = turned.from_photo(turned.principal_point[:, None])[:, 0]
        rotation = crop_rotation(principal, turned.focal * 2 / turned.side) if crop_frame else None
        return cls(crop, turned, principal, rotation)

    def to_camera(
        self,
        points: Tensor,  # (B, N, P, 3) the model's frame
    ) -> Tensor:  # (B, N, P, 3) the camera's
        return points if self.rotation is None else points @ self.rotation[:, None].mT

    def translation(
        self,
        camera: Tensor,  # (B, 3) weak perspective in the crop
        hypotheses: int,
    ) -> Tensor:  # (B, N, 3) metres
        """Pelvis position according to the camera head, the same for all hypotheses."""
        to = self.turned
        place = weak_to_full_camera(camera, to.center, to.side, to.focal, to.principal_point)
        return place[:, None].expand(-1, hypotheses, -1)

    def fitted_translation(
        self,
        keypoints: Tensor,  # (B, N, J, 3) metres
        heatmaps: Tensor,  # (B, J, H, W)
        prior: Tensor,  # (B, N, 3)
    ) -> Tensor:  # (B, N, 3) metres
        """Pelvis position of each hypothesis, fitted to the heatmaps' peaks."""
        peaks, height = heatmap_peaks(heatmaps)
        return perspective_translation_fit(
            keypoints,
            self.turned.to_photo(peaks)[:, None],
            height[:, None],
            self.turned.focal[:, None],
            self.turned.principal_point[:, None],
            prior=prior,
        )

    @property
    def is_turned(self) -> bool:
        return bool(self.crop.rotation.any())

    def back(
        self,
        points: Tensor,  # (B, N, ..., 3)
    ) -> Tensor:
        """From the rolled camera's frame to the photo's."""
        turn = self.crop.turn_3d().mT
        return points @ turn.reshape(len(turn), *[1] * (points.dim() - 3), 3, 3)

    def back_fitted(self, fitted: FittedBodies) -> FittedBodies:
        """Rotate the root joint back. The translation does not change: the rotation is about the pelvis, the origin."""
        root = self.crop.turn_3d()[:, None] @ axis_angle_to_matrix(fitted.pose[:, :, 0])
        pose = torch.cat([matrix_to_axis_angle(root)[:, :, None], fitted.pose[:, :, 1:]], 2)
        return fitted._replace(pose=pose)
