"""FreiHAND's metrics (Zimmermann et al., ICCV 2019, arXiv 1909.04349): Procrustes with reflections, F-score, AUC.

As in the data set's evaluation code: orthogonal Procrustes with scale (R may have determinant -1), distances strictly
below the threshold for F, at most the threshold for the AUC. Metres in, millimetres or 0..1 out.
"""

from __future__ import annotations

import torch
from torch import Tensor

MILLIMETRES = 1000.0
AUC_LIMIT = 0.05  # metres
AUC_STEPS = 100


def orthogonal_align(
    source: Tensor,  # (..., P, 3)
    target: Tensor,  # (..., P, 3)
) -> Tensor:  # (..., P, 3) source, moved onto target
    """Least-squares alignment by scale, translation and any orthogonal matrix: a mirror image aligns with error 0."""
    mean_source, mean_target = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    centred_source, centred_target = source - mean_source, target - mean_target
    u, singular, vh = torch.linalg.svd(centred_target.mT @ centred_source)
    scale = singular.sum(-1) / centred_source.square().sum((-2, -1)).clamp_min(1e-12)
    return scale[..., None, None] * centred_source @ (u @ vh).mT + mean_target


def f_score(
    predicted: Tensor,  # (..., P, 3) metres
    target: Tensor,  # (..., Q, 3); leading dimensions broadcast
    thresholds: tuple[float, ...] = (0.005, 0.015),  # metres
) -> Tensor:  # (T, ...) 0..1
    """Harmonic mean of precision (predicted points near any target point) and recall (the converse)."""
    shape = torch.broadcast_shapes(predicted.shape[:-2], target.shape[:-2])
    predicted = predicted.expand(*shape, -1, -1).reshape(-1, *predicted.shape[-2:])
    target = target.expand(*shape, -1, -1).reshape(-1, *target.shape[-2:])
    scores = []
    for points, truth in zip(predicted, target, strict=True):
        # The matrix product variant of cdist is off by tenths of a millimetre, which matters near the thresholds.
        distance = torch.cdist(points[None], truth[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
        to_truth, to_points = distance.amin(1), distance.amin(0)
        recall = torch.stack([(to_truth < limit).double().mean() for limit in thresholds])
        precision = torch.stack([(to_points < limit).double().mean() for limit in thresholds])
        scores.append(2 * recall * precision / (recall + precision).clamp_min(1e-12))
    return torch.stack(scores, 1).reshape(len(thresholds), *shape)


def curve_area(
    predicted: Tensor,  # (..., P, 3) metres
    target: Tensor,  # (..., P, 3)
    limit: float = AUC_LIMIT,
    steps: int = AUC_STEPS,
) -> Tensor:  # (...) 0..1
    """Area under the curve of the share of points within t of their target, t from 0 to `limit`, by the trapezoid rule.

    FreiHAND averages over points the AUC of each point over all people; with no missing points, the mean over people of
    this AUC is the same.
    """
    distance = (predicted - target).norm(dim=-1).double()
    thresholds = torch.linspace(0, limit, steps, dtype=torch.float64, device=distance.device)
    within = torch.stack([(distance <= t).double().mean(-1) for t in thresholds])
    return torch.trapezoid(within, thresholds, dim=0) / limit
