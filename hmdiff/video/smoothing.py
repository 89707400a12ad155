"""Smoothing of hypotheses over time, with a Gaussian kernel that does not mix modes.

A hypothesis keeps its noise along a track, so its bodies are consistent over frames, except for heatmap jitter and for
jumps to another mode (an arm in front, then behind). The mean of two modes is neither. The kernel therefore has two
factors, like a bilateral filter (Tomasi and Manduchi, ICCV 1998):

    w_ts = exp(-(t - s)^2 / 2 sigma^2) exp(-d_ts^2 / 2 delta^2)

where d_ts is the distance of the root-relative joints of both frames. Rotations are averaged as matrices and projected
to rotations (the chordal mean: Hartley et al., IJCV 2013). The kernel is symmetric in time: no lag, but not for live
video. At the ends of a track, where a one-sided kernel would hold a walker back, the weights are those of a line fitted
with the kernel (local linear regression: Fan, JASA 1992). All is our choice. F frames, K joints.
"""

from __future__ import annotations

import numpy as np

SIGMA = 0.06  # seconds; minimises the acceleration error (tools/build/jitter.py)
DELTA = 0.06  # metres, root mean square over the joints
_REACH = 3.0  # sigmas


def kernel(
    times: np.ndarray,  # (F,) seconds, ascending
    joints: np.ndarray | None,  # (F, K, 3) metres, root-relative; None: weights from time only
    sigma: float = SIGMA,
    delta: float = DELTA,
) -> np.ndarray:  # (F, F) rows sum to 1
    """Weight of frame s in the smoothed frame t."""
    apart = np.abs(times[:, None] - times[None])
    weights = np.where(apart <= _REACH * sigma, np.exp(-0.5 * (apart / sigma) ** 2), 0.0)
    if joints is not None:
        flat = joints.reshape(len(joints), -1).astype(np.float64)
        square = np.square(flat).sum(-1)
        distance = np.maximum(square[:, None] + square[None] - 2 * flat @ flat.T, 0) / joints.shape[1]
        weights = weights * np.exp(-0.5 * distance / delta**2)
    np.fill_diagonal(weights, 1.0)
    weights = weights * _level(times, weights, _REACH * sigma)
    found: np.ndarray = weights / weights.sum(1, keepdims=True)
    return found


def _level(times: np.ndarray, weights: np.ndarray, reach: float) -> np.ndarray:  # (F, F)
    """Factors that move the weighted mean time of rows cut by the ends back to their own frame."""
    ahead = times[None] - times[:, None]
    first, second = (weights * ahead).sum(1), (weights * ahead**2).sum(1)
    cut = (times - times[0] < reach) | (times[-1] - times < reach)
    slope = np.where(cut & (second > 0), first / np.where(second > 0, second, 1.0), 0.0)
    found: np.ndarray = 1 - slope[:, None] * ahead
    return found


def mean_rotations(
    rotations: np.ndarray,  # (F, K, 3, 3)
    weights: np.ndarray,  # (G, F)
) -> np.ndarray:  # (G, K, 3, 3)
    """Chordal means: the rotation nearest to the weighted mean of the matrices."""
    mean = np.tensordot(weights, rotations.astype(np.float64), (1, 0))
    u, _, vh = np.linalg.svd(mean)
    sign = np.ones(u.shape[:-1])
    sign[..., -1] = np.linalg.det(u @ vh)
    found: np.ndarray = (u * sign[..., None, :]) @ vh
    return found


def filled(
    frames: np.ndarray,  # (S,) sighting frames, ascending
    values: np.ndarray,  # (S, ...)
    wanted: np.ndarray,  # (F,) frames between the first and the last
) -> np.ndarray:  # (F, ...)
    """Linear interpolation between sightings, whose values are kept."""
    right = np.searchsorted(frames, wanted).clip(1, max(len(frames) - 1, 1))
    if len(frames) == 1:
        return np.repeat(values, len(wanted), 0)
    left = right - 1
    share = ((wanted - frames[left]) / (frames[right] - frames[left])).reshape(-1, *[1] * (values.ndim - 1))
    found: np.ndarray = (1 - share) * values[left] + share * values[right]
    return found


def filled_rotations(
    frames: np.ndarray,  # (S,)
    rotations: np.ndarray,  # (S, K, 3, 3)
    wanted: np.ndarray,  # (F,)
) -> np.ndarray:  # (F, K, 3, 3)
    """As `filled`, projected to rotations."""
    mean = filled(frames, rotations, wanted)
    return mean_rotations(mean, np.eye(len(mean)))
