"""Interpolation of a grid by its cubic spline, which preserves the position of peaks.

From 16 to 64 pixels, bilinear interpolation moves a Gaussian's peak by up to one of our pixels towards a source pixel;
the spline by at most 0.05, if sigma is at least one and a half source pixels and half of ours
(`tests/heatmaps/test_resampling.py`). Narrower peaks fall between our pixels. Our choice.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def spline_weights(
    size: int,  # S values, at positions 0 to S - 1
    places: Tensor,  # (..., n) in pixels from the first value
) -> Tensor:  # (..., n, S) float32, on the device of `places`
    """Interpolation weights: the values at `places` are ``weights @ values``. Zero beyond the outer edges."""
    at = places.detach().cpu().double().numpy()
    inside = (at > -0.5) & (at < size - 0.5)
    at = at.clip(0, size - 1)
    left = np.floor(at).astype(np.int64).clip(0, max(size - 2, 0))
    right, after = np.minimum(left + 1, size - 1), (at - left)[..., None]
    before, unit, bend = 1 - after, np.eye(size), _second_derivatives(size)
    weights = before * unit[left] + after * unit[right]
    weights += ((before**3 - before) * bend[left] + (after**3 - after) * bend[right]) / 6
    return torch.from_numpy(weights * inside[..., None]).float().to(places.device)


@functools.lru_cache(maxsize=16)
def _second_derivatives(
    size: int,
) -> np.ndarray:  # (S, S) for the spline through each unit vector (a column), at every value
    """Second derivatives of the not-a-knot cubic spline (de Boor, 1978), as in scipy's `make_interp_spline`.

    Solved here because importing scipy.interpolate takes longer than everything else between a file and its heatmaps.
    """
    if size < 3:
        return np.zeros((size, size))
    if size == 3:  # a parabola has a constant second derivative
        return np.tile([1.0, -2.0, 1.0], (3, 1))
    system, bend = np.zeros((size, size)), np.zeros((size, size))
    inner = np.arange(1, size - 1)
    system[inner, inner - 1] = system[inner, inner + 1] = 1
    system[inner, inner] = 4
    bend[inner, inner - 1] = bend[inner, inner + 1] = 6
    bend[inner, inner] = -12
    system[0, :3] = system[-1, -3:] = 1, -2, 1  # continuous third derivative at the second and second-last knots
    found: np.ndarray = np.linalg.solve(system, bend)
    return found
