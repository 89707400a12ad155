"""Values on a grid at places between them, by the cubic spline through them: what keeps a peak where it was.

Bilinear steps draw the peak of a Gaussian towards a pixel of the coarser grid, by up to a whole one of ours from 16
pixels to 64; the spline leaves 0.05 of ours or less where its sigma is one and a half pixels or more of the source and
half of ours (`tests/heatmaps/test_resampling.py`). Finer peaks than that are between our pixels. Our choice.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def spline_weights(
    size: int,  # S values, at the places 0 to S - 1
    places: Tensor,  # (..., n) in pixels from the first
) -> Tensor:  # (..., n, S) float32, on the device of `places`
    """The weights of the values at each place: the value there is ``weights @ values``. None beyond the outer edges."""
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
) -> np.ndarray:  # (S, S) of the spline through each unit vector (a column), at every value
    """Of the cubic spline without a knot next to its ends (de Boor, 1978), as scipy's `make_interp_spline`.

    Solved here since scipy.interpolate takes longer to import than everything else between a file and its heatmaps.
    """
    if size < 3:
        return np.zeros((size, size))
    if size == 3:  # a parabola bends alike everywhere
        return np.tile([1.0, -2.0, 1.0], (3, 1))
    system, bend = np.zeros((size, size)), np.zeros((size, size))
    inner = np.arange(1, size - 1)
    system[inner, inner - 1] = system[inner, inner + 1] = 1
    system[inner, inner] = 4
    bend[inner, inner - 1] = bend[inner, inner + 1] = 6
    bend[inner, inner] = -12
    system[0, :3] = system[-1, -3:] = 1, -2, 1  # the third derivative does not jump at the last knots but one
    found: np.ndarray = np.linalg.solve(system, bend)
    return found
