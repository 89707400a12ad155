"""Per-person factor on the temperature, from three features of the image evidence.

One global temperature overestimates the error of a clearly visible person and underestimates that of an occluded or
out-of-distribution one. Features e: log of the hypothesis spread, heatmap confidence of the limb joints, log of the
reprojection distance to the peaks. The factor is exp(w · (e - m)), m the mean of e over the people of the fit
(`hmdiff.evaluate.calibration`); an unknown feature counts as its mean. Which features help: LOG.md.
B people, N hypotheses, K joints, J keypoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, joint_indices
from hmdiff.diffusion.hypotheses import spread
from hmdiff.errors import UserError

NAMES = ("log_spread", "confidence", "log_distance")
LARGEST = 4.0  # the factor is clamped to 1/4..4, against extrapolation
_SIDES = ("left", "right")
_LIMBS = tuple(f"{side}_{part}" for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle") for side in _SIDES)
_SPREAD_UNIT = 0.06  # metres, centres the logarithm near 0
_LEAST_DISTANCE = 0.0025  # crop sides; shorter distances are below the heatmap's resolution


def image_evidence(
    joints: Tensor,  # (B, N, K, 3) metres, root-relative
    confidence: Tensor | None = None,  # (B, J) of the heatmap peaks, HALPE26's order; None: no heatmaps
    distance: Tensor | None = None,  # (B,) mean distance of projected keypoints to the peaks, in crop sides
) -> Tensor:  # (B, 3) in the order of NAMES; NaN = not known
    """The three features of each person."""
    found = joints.new_full((len(joints), len(NAMES)), float("nan"))
    found[:, 0] = (spread(joints).mean(-1).clamp_min(1e-4) / _SPREAD_UNIT).log()
    if confidence is not None and confidence.shape[1] == len(HALPE26):
        found[:, 1] = confidence[:, joint_indices(_LIMBS, HALPE26)].clamp(0, 1).mean(-1)
    if distance is not None:
        found[:, 2] = (distance + _LEAST_DISTANCE).log()
    return found


@dataclasses.dataclass(frozen=True)
class EvidenceFactor:
    """The fitted factor. Raises `UserError` for a wrong count of numbers or non-finite ones."""

    weights: tuple[float, ...]  # w, in the order of NAMES
    middle: tuple[float, ...]  # m

    def __post_init__(self) -> None:
        if len(self.weights) != len(NAMES) or len(self.middle) != len(NAMES):
            raise UserError(f"evidence: {len(NAMES)} weights and means are needed; fit the temperature again")
        if not all(math.isfinite(value) for value in (*self.weights, *self.middle)):
            raise UserError("evidence: finite weights and means are needed; fit the temperature again")

    def __call__(
        self,
        evidence: Tensor,  # (B, 3) of `image_evidence`
    ) -> Tensor:  # (B,) factor on the temperature
        away = (evidence - evidence.new_tensor(self.middle)).nan_to_num(0.0)
        return (away @ evidence.new_tensor(self.weights)).exp().clamp(1 / LARGEST, LARGEST)

    @classmethod
    def from_json(cls, found: dict[str, Sequence[float]]) -> EvidenceFactor:
        """Raises `KeyError`, `TypeError`, `ValueError` or `UserError` for invalid JSON."""
        return cls(tuple(float(w) for w in found["weights"]), tuple(float(m) for m in found["middle"]))


def fit_evidence_factor(
    samples: Tensor,  # (P, S, J, 3) metres, root-relative
    target: Tensor,  # (P, J, 3)
    evidence: Tensor,  # (P, 3)
) -> EvidenceFactor:
    """Maximum-likelihood weights for joint errors that are Student-t distributed about the sample mean.

    The scale is the samples' standard deviation times exp(a + w · (e - m)); 5 degrees of freedom, for outliers. A ridge
    shrinks w on small data sets. a is discarded: the temperature covers it.
    """
    from scipy.optimize import minimize

    mean = samples.mean(1)
    squared = (mean - target).square().sum(-1).double()  # (P, J)
    variance = (samples - mean[:, None]).square().sum(-1).sum(1).double() / max(1, samples.shape[1] - 1) + 1e-8
    middle = evidence.double().nanmean(0).nan_to_num(0.0)
    away = (evidence.double() - middle).nan_to_num(0.0)  # (P, 3)
    features = torch.cat([torch.ones_like(away[:, :1]), away], 1)
    ratio = squared / variance

    def loss(found: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(found.copy()).requires_grad_()
        log_scale = (features @ weights)[:, None]
        surprise = (_FREEDOM + 3) / 2 * torch.log1p(ratio * torch.exp(-2 * log_scale) / _FREEDOM) + 3 * log_scale
        value = surprise.mean() + _RIDGE * weights[1:].square().sum()
        value.backward()
        assert weights.grad is not None
        return value.item(), weights.grad.numpy()

    found = minimize(loss, np.zeros(features.shape[1]), jac=True, method="BFGS").x.tolist()
    return EvidenceFactor(tuple(found[1:]), tuple(middle.tolist()))


_FREEDOM = 5.0
_RIDGE = 1e-3
