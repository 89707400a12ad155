"""`Crop`: conversions between crop coordinates and photo pixels are inverse, also when rotated."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from small import people_block, small_pipeline

from hmdiff.errors import UserError
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Crop, Heatmaps


def turned(count: int = 3) -> Crop:
    return Crop.of(
        torch.tensor([[300.0, 250], [640, 360], [100, 500]])[:count],
        torch.tensor([200.0, 400, 150])[:count],
        torch.tensor([0.3, -2.0, math.pi])[:count],
        (1280, 720),
        900.0,
        torch.tensor([600.0, 380.0]),
    )


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("between", [(), (5,), (2, 5)])
def test_points_come_back(count: int, between: tuple[int, ...]) -> None:
    crop = turned(count)
    points = torch.rand(count, *between, 2) * 2 - 1
    torch.testing.assert_close(crop.from_photo(crop.to_photo(points)), points, rtol=0, atol=1e-5)


def test_a_quarter_turn_puts_the_head_to_the_right() -> None:
    crop = Crop.of(torch.tensor([[100.0, 100]]), torch.tensor([80.0]), torch.tensor([math.pi / 2]))
    torch.testing.assert_close(crop.to_photo(torch.tensor([[0.0, -1]])), torch.tensor([[140.0, 100]]))


def test_the_affine_map_agrees_with_the_points() -> None:
    crop, size = turned(), 64
    photo = np.zeros((720, 1280), np.uint8)
    point = crop.to_photo(torch.tensor([[[0.25, -0.5]], [[0.0, 0.5]], [[-0.5, -0.25]]]))
    for index in range(3):
        x, y = point[index, 0].tolist()
        cv2.circle(photo, (round(x), round(y)), 3, 255, -1)
        affine = np.array(crop.affine(index, size))
        found = affine @ [x, y, 1]
        expected = (crop.from_photo(point)[index, 0] + 1) * size / 2
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)


def test_what_is_not_known_has_a_default() -> None:
    crop = Crop.of(torch.tensor([[50.0, 40.0]]), torch.tensor([30.0]))
    assert crop.photo_size.tolist() == [[100, 80]] and crop.principal_point.tolist() == [[50, 40]]
    assert crop.focal.item() == pytest.approx(math.hypot(100, 80)) and crop.rotation.item() == 0
    known = crop.with_camera(torch.tensor([[300.0, 400.0]]))
    assert known.focal.item() == 500 and known.principal_point.tolist() == [[150, 200]]
    assert crop.with_camera(focal=torch.tensor([7.0])).focal.item() == 7
    k = turned().intrinsics
    assert k.shape == (3, 3, 3) and k[0].tolist() == [[900, 0, 600], [0, 900, 380], [0, 0, 1]]
    with pytest.raises(UserError, match="focal"):
        dataclasses.replace(crop, focal=torch.tensor([float("nan")]))


def test_a_crop_turned_with_the_photo_turns_the_body() -> None:
    """The photo rotated about its principal point shows the body rotated about the camera's axis."""
    pipe, sample = small_pipeline(), people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    upright = dataclasses.replace(turned(2), rotation=torch.zeros(2))
    maps = Heatmaps(sample.heatmaps[:2], sample.heatmap_valid[:2], upright)
    angle = torch.tensor([0.7, math.pi])
    spun = dataclasses.replace(upright, rotation=angle)
    offset = (upright.center - upright.principal_point)[..., None]
    spun = dataclasses.replace(spun, center=(spun.turn() @ offset)[..., 0] + upright.principal_point)
    before = pipe(heatmaps=maps, num_hypotheses=2, num_inference_steps=2)
    after = pipe(heatmaps=Heatmaps(maps.values, maps.valid, spun), num_hypotheses=2, num_inference_steps=2)
    turn = spun.turn_3d()[:, None]
    torch.testing.assert_close(after.vertices, before.vertices @ turn.mT, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        after.translation, (before.translation[:, :, None] @ turn.mT)[:, :, 0], rtol=1e-4, atol=1e-4
    )
    assert before.log_likelihood is not None and after.log_likelihood is not None
    torch.testing.assert_close(after.log_likelihood, before.log_likelihood, rtol=1e-3, atol=1e-3)
    assert before.keypoints is not None and after.keypoints is not None
    seen = [
        perspective_projection(
            each.keypoints + each.translation[:, :, None], each.focal[:, None], each.principal_point[:, None]
        )
        for each in (before, after)
    ]
    in_crop = [crop.from_photo(pixels) for crop, pixels in zip((upright, spun), seen, strict=True)]
    torch.testing.assert_close(in_crop[0], in_crop[1], rtol=0, atol=1e-3)
