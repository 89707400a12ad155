"""Measurements behind docs/video.md and docs/keypoints.md, on known motions and known heatmaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hmdiff.heatmaps import Crop, Heatmaps, gaussian_heatmaps
from hmdiff.video.reading import clip_info, read_frames
from tools.build.estimated_and_given import by_kind, compared, widths
from tools.build.jitter import acceleration, row
from tools.build.known_clip import pan_clip


def test_acceleration_of_a_fall() -> None:
    time = torch.arange(6, dtype=torch.float64) / 30
    joints = torch.stack([torch.zeros(6), 0.5 * 9.81 * time**2, 2 * time], -1)[:, None]
    assert acceleration(joints, 30.0)[:, 0, 1] == pytest.approx(np.full(4, 9810.0), abs=1e-3)
    assert acceleration(joints, 30.0)[:, 0, 2] == pytest.approx(np.zeros(4), abs=1e-3)


def test_rows_of_exact_hypotheses_have_no_error() -> None:
    truth = torch.randn(5, 24, 3, generator=torch.Generator().manual_seed(0))
    mean, error, apart, single, each = row(truth[None].repeat(3, 1, 1, 1), truth, 30.0)
    assert max(error / mean, apart, each) < 1e-3 and mean == pytest.approx(single) and mean > 0


@pytest.mark.parametrize("sigma", [1.0, 1.6])
def test_the_width_of_a_peak(sigma: float) -> None:
    points = torch.tensor([[[0.1, -0.2]] * 26])
    values = gaussian_heatmaps(points, torch.ones(1, 26), sigma=sigma)
    maps = Heatmaps(values, torch.ones(1, 26, dtype=torch.bool), Crop.of(torch.zeros(1, 2), torch.ones(1)))
    assert float(widths(maps)[0, 3]) == pytest.approx(sigma, rel=0.06)


def test_distances_are_of_joints_that_both_have() -> None:
    points = torch.zeros(1, 26, 2)
    values = gaussian_heatmaps(points, torch.ones(1, 26), 1.5)
    valid = torch.ones(1, 26, dtype=torch.bool)
    valid[0, 5] = False
    maps = Heatmaps(values * valid[..., None, None], valid, Crop.of(torch.full((1, 2), 50.0), torch.tensor([64.0])))
    given = torch.tensor([[53.0, 54.0, 1.0]]).repeat(26, 1)
    given[0, 2] = 0.0
    found = compared(maps, given)
    assert len(found["pixels"]) == 24 and found["pixels"] == pytest.approx(np.full(24, 5.0), abs=0.6)
    assert found["half_sides"] == pytest.approx(found["pixels"].numpy() / 32)
    assert by_kind([found])[-1][:2] == ["all", "24"]


def test_a_pan_moves_the_whole_picture(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    pan_clip(tmp_path / "pan.mp4", photo, 5, height=60)
    info = clip_info(tmp_path / "pan.mp4")
    assert info.size == (80, 60) and len(list(read_frames(info))) == 5
