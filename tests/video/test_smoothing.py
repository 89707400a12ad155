"""The kernel: keeps constants, reduces noise, separates modes; gaps are filled along the shortest rotation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hmdiff.video.smoothing import filled, filled_rotations, kernel, mean_rotations

TIMES = np.arange(30) / 30


def turning(noise: float, seed: int = 0) -> np.ndarray:  # (30, 1, 3, 3)
    """Rotation about z, a radian per second."""
    angles = np.zeros((30, 3))
    angles[:, 2] = TIMES
    angles += noise * np.random.default_rng(seed).standard_normal((30, 3))
    return Rotation.from_rotvec(angles).as_matrix()[:, None]


def test_rows_of_the_kernel_sum_to_one_and_reach_no_further() -> None:
    weights = kernel(TIMES, None, 0.08)
    assert weights.sum(1) == pytest.approx(1)
    assert (weights[0, TIMES > 0.24 + 1e-9] == 0).all() and weights[0, 7] != 0
    assert weights @ TIMES == pytest.approx(TIMES)  # uniform motion is not held back, not even at the ends
    assert (weights[8:-8] >= 0).all() and weights[0, 0] < 0.8


def test_an_even_turn_stays_as_it_is() -> None:
    truth = turning(0.0)
    smooth = mean_rotations(truth, kernel(TIMES, None, 0.08))
    assert np.abs(smooth - truth)[8:-8].max() < 1e-9
    assert np.abs(smooth - truth).max() < 5e-3


def test_noise_gets_less() -> None:
    truth, noisy = turning(0.0), turning(0.1)
    smooth = mean_rotations(noisy, kernel(TIMES, None, 0.08))
    assert np.abs(smooth - truth)[8:-8].mean() < 0.55 * np.abs(noisy - truth)[8:-8].mean()
    assert np.linalg.det(smooth) == pytest.approx(1)


def test_modes_stay_apart() -> None:
    """An arm that jumps from front to back: no frame lies in between, as it would without the second factor."""
    joints = np.zeros((30, 2, 3))
    joints[:, 1, 2] = np.where(np.arange(30) < 15, -0.4, 0.4)
    apart = kernel(TIMES, joints, 0.08, 0.06) @ joints[:, 1, 2]
    blurred = kernel(TIMES, None, 0.08) @ joints[:, 1, 2]
    assert np.abs(np.abs(apart) - 0.4).max() < 1e-6
    assert np.abs(blurred[14:16]).max() < 0.2


def test_gaps_are_filled_in_between() -> None:
    frames = np.array([0, 1, 4])
    assert filled(frames, np.array([0.0, 1.0, 4.0]), np.arange(5)) == pytest.approx([0, 1, 2, 3, 4])
    assert filled(np.array([7]), np.array([3.0]), np.array([7])) == pytest.approx([3])
    turned = Rotation.from_rotvec([[0, 0, 0], [0, 0, 0.2], [0, 0, 0.8]]).as_matrix()[:, None]
    found = Rotation.from_matrix(filled_rotations(frames, turned, np.arange(5))[:, 0]).as_rotvec()
    assert found[:, 2] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.01)
