"""Spearman's rank correlation of uncertainty and error, with intervals over people.

P people, K joints. The uncertainty is RLE's σ̂ or the spread of the hypotheses. Pooled over joints, the correlation also
rewards knowing that wrists are harder than hips, which a constant per joint achieves too; so the correlation within
each joint is reported as well. The three metrics and their bootstrap are our choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor


def rank_correlation(
    uncertainty: Tensor,  # (...) any unit
    error: Tensor,  # (...) any unit
) -> float:  # -1..1; NaN if one of them is constant, or fewer than 2 pairs are finite
    """Spearman's rank correlation, with mean ranks for ties. Pairs with a NaN (unlabelled joints) are ignored."""
    first, second = (np.asarray(values.detach().double().cpu().flatten()) for values in (uncertainty, error))
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first[known], second[known]).statistic)


def uncertainty_correlations(
    uncertainty: Tensor,  # (P, K)
    error: Tensor,  # (P, K) NaN = no label
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:  # value, low, high
    """Correlations: "pooled" over all joints of all people; "within_joint" over people per joint, averaged over joints;
    "by_person" of each person's mean uncertainty and mean error. Percentile bootstrap over people, since the joints of
    a person are not independent.
    """
    uncertainty, error = uncertainty.detach().double().cpu(), error.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    resamples_of_people: Iterable[Tensor] = ()
    if len(error):
        resamples_of_people = torch.randint(len(error), (resamples, len(error)), generator=generator)
    value = _correlations(uncertainty, error)
    spread = np.array([_correlations(uncertainty[rows], error[rows]) for rows in resamples_of_people]).reshape(
        -1, len(value)
    )
    names = ("pooled", "within_joint", "by_person")
    result = {}
    for name, middle, samples in zip(names, value, spread.T, strict=True):
        samples = samples[np.isfinite(samples)]
        tails = ((1 - level) / 2, (1 + level) / 2)
        low, high = np.quantile(samples, tails).tolist() if len(samples) else (math.nan, math.nan)
        result[name] = (middle, low, high)
    return result


def _correlations(uncertainty: Tensor, error: Tensor) -> tuple[float, float, float]:
    joints = [rank_correlation(uncertainty[:, joint], error[:, joint]) for joint in range(error.shape[1])]
    known = [each for each in joints if math.isfinite(each)]
    within = sum(known) / len(known) if known else math.nan
    # Per-person means are over labelled joints only, for uncertainty and error.
    masked = torch.where(error.isfinite(), uncertainty, math.nan)
    return rank_correlation(uncertainty, error), within, rank_correlation(masked.nanmean(1), error.nanmean(1))
