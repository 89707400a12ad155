"""Values on a grid at places between them, by the cubic spline through them: what keeps a peak where it was.

Bilinear steps draw the peak of a Gaussian towards a pixel of the coarser grid, by up to a whole one of ours from 16
pixels to 64; the spline leaves 0.05 of ours or less where its sigma is one and a half pixels or more of the source and
half of ours (`tests/heatmaps/test_resampling.py`). Finer peaks than that are between our pixels. Our choice.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor


def spline_weights(
    size: int,  # S values, at the places 0 to S - 1
    places: Tensor,  # (..., n) in pixels from the first
) -> Tensor:  # (..., n, S) float32, on the device of `places`
    """The weights of the values at each place: the value there is ``weights @ values``. None beyond the outer edges."""
    at = places.detach().cpu().double()
    weights = torch.from_numpy(_unit_spline(size)(at.clamp(0, size - 1).numpy()))
    inside = (at > -0.5) & (at < size - 0.5)
    return (weights * inside[..., None]).float().to(places.device)


@functools.lru_cache(maxsize=16)
def _unit_spline(size: int) -> Any:
    """The splines through each unit vector at once."""
    from scipy.interpolate import make_interp_spline

    return make_interp_spline(np.arange(size), np.eye(size), k=min(3, size - 1))
