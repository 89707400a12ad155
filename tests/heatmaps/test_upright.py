"""Rotating crops upright: angle, selection of people, and the same result for any rotation of the photo."""

from __future__ import annotations

import math

import pytest
import torch
from small import people_block
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.heatmaps import Heatmaps, gaussian_heatmaps, heatmap_peaks
from hmdiff.heatmaps.crop import Crop
from hmdiff.heatmaps.upright import torso_turn, turned_upright


def heatmaps(degrees: float, count: int = 4, **missing: float) -> tuple[Heatmaps, Tensor, Tensor]:
    """Keypoints of upright people, with the photo rotated clockwise about their crop's centre; and confidences."""
    sample = people_block("val")
    assert sample.joints_2d is not None
    points, angle = sample.joints_2d[:count], math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = 0.6 * points @ turn.mT
    confidence = torch.ones(count, 26)
    for name, value in missing.items():
        confidence[:, HALPE26.index(name)] = value
    values = gaussian_heatmaps(points, confidence, 2.0)
    crop = Crop.of(torch.full((count, 2), 500.0), torch.full((count,), 200.0), photo_size=(1000, 1000))
    return Heatmaps(values, torch.ones(count, 26).bool(), crop), points, confidence


@pytest.mark.parametrize("degrees", [100.0, -90.0, 135.0, 180.0])
def test_the_turn_is_found_and_undone(degrees: float) -> None:
    upright, _, _ = heatmaps(0)
    turned, _, _ = heatmaps(degrees)
    tilt = torso_turn(turned) * (180 / math.pi)
    assert torso_turn(upright).abs().max() < math.radians(60)
    assert (torch.remainder(tilt - degrees + 180, 360) - 180).abs().max() < 40  # the people's own tilt
    again = turned_upright(turned)
    left = torso_turn(again)
    assert (left == 0).all() and (again.crop.rotation * (180 / math.pi) - tilt).abs().max() < 1e-3


def test_keypoints_stay_where_they_are_in_the_photo() -> None:
    turned, _, _ = heatmaps(100)
    again = turned_upright(turned)
    before, confidence = heatmap_peaks(turned.values)
    after, found = heatmap_peaks(again.values)
    there = (confidence > 0.5) & (found > 0.5)
    assert there.float().mean() > 0.8
    difference = turned.crop.to_photo(before) - again.crop.to_photo(after)
    assert difference[there].norm(dim=-1).max() < 2.5  # pixels of a crop of 200: less than one heatmap pixel


def test_upright_people_and_unknown_torsos_keep_their_crop() -> None:
    upright, _, _ = heatmaps(0)
    kept = torso_turn(upright) == 0
    assert kept.any()
    same = turned_upright(upright)
    assert torch.equal(same.values[kept], upright.values[kept])
    assert torch.equal(same.crop.center[kept], upright.crop.center[kept])
    lost, _, _ = heatmaps(90, left_hip=0.0)
    assert turned_upright(lost) is lost


def test_one_person_does_not_depend_on_the_others() -> None:
    turned, _, _ = heatmaps(90)
    together, alone = turned_upright(turned), turned_upright(turned[2:3])
    torch.testing.assert_close(together.values[2:3], alone.values, rtol=0, atol=3e-5)
    torch.testing.assert_close(together.crop.side[2:3], alone.crop.side)
