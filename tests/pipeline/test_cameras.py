"""The frames of a call: the crop's z axis is the ray through its centre; fitted parameters rotate with the vertices."""

from __future__ import annotations

import pytest
import torch

from hmdiff.body.fitting import FittedBodies
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.heatmaps import Crop
from hmdiff.pipeline.cameras import CropCamera


def crops(rotation: float) -> Crop:
    center = torch.tensor([[900.0, 120.0], [200.0, 500.0]])
    return Crop.of(center, torch.tensor([150.0, 240.0]), torch.full((2,), rotation), (1280.0, 720.0), 1100.0)


@pytest.mark.parametrize("rotation", [0.0, 0.7])
def test_the_crops_axis_is_the_ray_through_its_centre(rotation: float) -> None:
    crop = crops(rotation)
    frames = CropCamera.of(crop, crop_frame=True)
    axis = torch.tensor([0.0, 0.0, 1.0]).expand(2, 1, 1, 3)
    seen = frames.back(frames.to_camera(axis))[:, 0, 0]
    ray = torch.cat([crop.center - crop.principal_point, crop.focal[:, None]], -1)
    torch.testing.assert_close(seen, ray / ray.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert torch.equal(CropCamera.of(crop, crop_frame=False).to_camera(axis), axis)


def test_a_fitted_root_turns_as_the_vertices_do() -> None:
    frames = CropCamera.of(crops(0.7), crop_frame=False)
    pose, point = torch.randn(2, 3, 4, 3), torch.randn(2, 3, 1, 3)
    fitted = FittedBodies(pose, torch.randn(2, 3, 10), torch.zeros(2, 3, 3), torch.zeros(2, 3))
    found = frames.back_fitted(fitted)
    before, after = (axis_angle_to_matrix(bodies.pose[:, :, 0]) for bodies in (fitted, found))
    torch.testing.assert_close(point @ after.mT, frames.back(point @ before.mT), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.pose[:, :, 1:], pose[:, :, 1:]) and frames.is_turned
