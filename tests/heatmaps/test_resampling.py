"""Heatmaps of other sizes and crops: a Gaussian's mean and peak are preserved, unlike with bilinear interpolation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline

from hmdiff.body.skeletons import COCO17, HALPE26
from hmdiff.heatmaps import (
    HEATMAP_SIZE,
    Crop,
    gaussian_heatmaps,
    heatmap_peaks,
    load_heatmaps,
    resample_heatmaps,
    soft_argmax,
)
from hmdiff.heatmaps.resampling import spline_weights

PIXELS = HEATMAP_SIZE / 2  # our pixels per crop unit
CENTER, SIDE = torch.tensor([[205.0, 148.0]]), torch.tensor([180.0])


def places(spread: float) -> torch.Tensor:  # (1, 40, 2) crop coordinates, off every grid
    return (torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(7)) * 2 - 1) * spread


def errors(size: int, sigma: float) -> tuple[float, float, float]:
    """Largest errors of mean and peak in our pixels, and the lowest peak, for Gaussians of `sigma` source pixels."""
    # Only complete Gaussians: a truncated one has another mean.
    points = places(max(0.1, 1 - 9 * sigma / size))
    values = gaussian_heatmaps(points, torch.ones(points.shape[:2]), sigma, size)
    moved = resample_heatmaps(values, CENTER, SIDE, CENTER, SIDE)
    peaks, height = heatmap_peaks(moved)
    found = [float((there - points).abs().max()) * PIXELS for there in (soft_argmax(moved), peaks)]
    return found[0], found[1], float(height.min())


@pytest.mark.parametrize("size", [24, 32, 48, 56, 64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
def test_a_gaussian_comes_back(size: int, sigma: float) -> None:
    if sigma * HEATMAP_SIZE / size < 0.5:
        pytest.skip("narrower than our grid can hold")
    mean, peak, height = errors(size, sigma)
    assert mean < 0.05 and peak < 0.05
    between = np.exp(-0.25 / (sigma * HEATMAP_SIZE / size) ** 2)  # relative height at the centre between four pixels
    assert 0.95 * between < height < 1.02


def test_bilinear_would_not() -> None:
    """Bilinear interpolation, used before, violates the bound above at the sizes of real estimators."""
    points = places(0.6)
    values = gaussian_heatmaps(points, torch.ones(points.shape[:2]), 2.0, 48)
    ours = F.interpolate(values, (64, 64), mode="bilinear", align_corners=False)
    assert (heatmap_peaks(ours)[0] - points).abs().max() * PIXELS > 0.1


def test_weights_are_the_spline() -> None:
    values = np.random.default_rng(0).normal(size=12)
    places = torch.tensor([-0.6, -0.4, 0.0, 3.25, 7.0, 10.9, 11.4, 11.6])
    inside = places.double().clamp(0, 11).numpy()
    there = ((places > -0.5) & (places < 11.5)).numpy()
    expected = CubicSpline(np.arange(12), values, bc_type="not-a-knot")(inside) * there
    weights = spline_weights(12, places)
    np.testing.assert_allclose(weights.numpy() @ values, expected, atol=1e-5)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[4], F.one_hot(torch.tensor(7), 12).float(), rtol=0, atol=1e-6)
    assert torch.equal(spline_weights(12, places.view(2, 4)), weights.view(2, 4, 12))
    assert spline_weights(1, torch.tensor([0.2])).tolist() == [[1.0]]


def test_another_crop_of_the_same_photo() -> None:
    photo = torch.tensor([[[200.0, 150.0], [230.3, 171.7], [188.8, 120.2]]])
    other_center, other_side = torch.tensor([[199.2, 152.9]]), torch.tensor([160.0])
    values = gaussian_heatmaps(Crop.of(CENTER, SIDE).from_photo(photo), torch.ones(1, 3), 2.5, 48)
    moved = resample_heatmaps(values, CENTER, SIDE, other_center, other_side)
    for found in (soft_argmax(moved), heatmap_peaks(moved)[0]):
        pixels = (Crop.of(other_center, other_side).to_photo(found) - photo) / (other_side / HEATMAP_SIZE)
        assert pixels.abs().max() < 0.05
    assert moved.min() >= 0


def test_each_person_alone_and_in_a_batch() -> None:
    values = torch.rand(3, 2, 40, 30, generator=torch.Generator().manual_seed(1))
    center, side = torch.rand(3, 2) * 50, torch.tensor([[30.0, 40.0], [60.0, 80.0], [45.0, 60.0]])
    together = resample_heatmaps(values, center, side, center + 3, side[:, 1])
    for row in range(3):
        part = slice(row, row + 1)
        alone = resample_heatmaps(values[part], center[part], side[part], center[part] + 3, side[part, 1])
        torch.testing.assert_close(together[part], alone, rtol=0, atol=3e-6)


def test_arrays_on_disk(tmp_path: Path) -> None:
    points = places(0.6)[:, : len(COCO17)]
    values = gaussian_heatmaps(points, torch.ones(points.shape[:2]), 2.0, 48)
    np.savez(tmp_path / "h.npz", heatmaps=values.numpy(), joints=np.array(COCO17), center=CENTER, side=SIDE)
    loaded = load_heatmaps(tmp_path / "h.npz")
    found = soft_argmax(loaded.values)[:, [HALPE26.index(name) for name in COCO17]]
    assert (found - points).abs().max() * PIXELS < 0.05


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64])
def test_the_spline_is_scipys(size: int) -> None:
    from scipy.interpolate import make_interp_spline

    places = torch.linspace(0, size - 1, 41, dtype=torch.float64)
    theirs = make_interp_spline(np.arange(size), np.eye(size), k=min(3, size - 1))(places.numpy())
    np.testing.assert_allclose(spline_weights(size, places), theirs, atol=1e-6)
