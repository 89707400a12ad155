"""Confidence in 0..1: calibrated probability that a point of the mean mesh is within 50 or 100 mm of the ground truth.

Platt scaling (Platt 1999) of the hypothesis spread: P(|e| < r) = logistic(a + b log(s / UNIT) + c log(S / UNIT)), where
s is the spread at the point and S the mean spread of the person (features: our choice). a, b, c are fitted per radius,
for joints and vertices, on people with ground truth, and saved with the temperature of the same sampling settings.
Split conformal intervals of the error scaled by the spread (Lei et al., JASA 2018, sec. 5.2): |e| <= q s with
probability >= level, for people exchangeable with those of the fit. B people, K joints, V vertices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError

RADII = (50, 100)  # mm
LEVELS = (0.5, 0.9)  # coverage of the conformal intervals
KINDS = ("joints", "vertices")
UNIT = 60.0  # mm, centres the logarithms near 0
LEAST = 1.0  # mm, lower bound on a spread: that of the root is 0
MIN_PEOPLE = 10  # needed for a fit
_RIDGE = 1e-4


class Within(NamedTuple):
    """Probabilities for one radius."""

    joints: Tensor  # (B, K) 0..1
    vertices: Tensor  # (B, V) 0..1
    person: Tensor  # (B,) 0..1, expected fraction of the vertices within the radius


@dataclasses.dataclass(frozen=True)
class Confidence:
    """The fit for one set of sampling settings. Raises `UserError` for missing kinds or non-finite numbers."""

    coefficients: dict[str, dict[int, tuple[float, float, float]]]  # kind -> radius in mm -> (a, b, c)
    quantiles: dict[str, dict[float, float]]  # kind -> level -> q, interval radius in multiples of the spread

    def __post_init__(self) -> None:
        numbers = [x for kind in self.coefficients.values() for three in kind.values() for x in three]
        numbers += [q for kind in self.quantiles.values() for q in kind.values()]
        if set(self.coefficients) != set(KINDS) or not all(math.isfinite(x) for x in numbers):
            raise UserError("confidence: finite numbers for joints and for vertices are needed; fit it again")

    def within(
        self,
        radius: int,  # mm, one of RADII
        joint_spread: Tensor,  # (B, K) mm
        vertex_spread: Tensor,  # (B, V) mm
    ) -> Within:
        if radius not in self.coefficients["joints"]:
            known = ", ".join(str(each) for each in self.coefficients["joints"])
            raise UserError(f"confidence within {radius} mm was not fitted; choose one of {known}")
        person = vertex_spread.mean(-1, keepdim=True)
        joints, vertices = (
            torch.sigmoid(_features(spread, person) @ spread.new_tensor(self.coefficients[kind][radius]))
            for kind, spread in (("joints", joint_spread), ("vertices", vertex_spread))
        )
        return Within(joints, vertices, vertices.mean(-1))

    def interval(
        self,
        level: float,  # one of LEVELS
        spread: Tensor,  # (...) mm
        kind: str = "joints",
    ) -> Tensor:  # (...) mm, radius that contains the ground truth with probability >= level
        return self.quantiles[kind][level] * spread.clamp_min(LEAST)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Confidence:
        """Inverse of `as_json`. Raises `KeyError`, `TypeError`, `ValueError`, `AttributeError` or `UserError`."""
        return cls(
            {
                kind: {int(r): (float(a), float(b), float(c)) for r, (a, b, c) in radii.items()}
                for kind, radii in found["coefficients"].items()
            },
            {
                kind: {float(level): float(q) for level, q in levels.items()}
                for kind, levels in found["quantiles"].items()
            },
        )


def fit_confidence(
    joint_spread: Tensor,  # (P, K) mm, with or without temperature, as it will be at inference
    joint_error: Tensor,  # (P, K) mm, error of the hypothesis mean; NaN = no label
    vertex_spread: Tensor,  # (P, V)
    vertex_error: Tensor,  # (P, V)
) -> Confidence:
    """Raises `UserError` for fewer than `MIN_PEOPLE`."""
    if len(joint_spread) < MIN_PEOPLE:
        raise UserError(f"confidence: {len(joint_spread)} people; give at least {MIN_PEOPLE} to fit it")
    person = vertex_spread.mean(-1, keepdim=True)
    given = {"joints": (joint_spread[:, 1:], joint_error[:, 1:]), "vertices": (vertex_spread, vertex_error)}
    coefficients, quantiles = {}, {}
    for kind, (spread, error) in given.items():  # without the root joint, whose root-relative error is 0
        known = error.isfinite()
        features = _features(spread, person)[known].double()
        coefficients[kind] = {r: _logistic_fit(features, (error[known] < r).double()) for r in RADII}
        ratio = (error / spread.clamp_min(LEAST))[known].double().sort().values
        quantiles[kind] = {
            level: ratio[min(len(ratio) - 1, math.ceil(level * (len(ratio) + 1)) - 1)].item() for level in LEVELS
        }
    return Confidence(coefficients, quantiles)


def _features(spread: Tensor, person: Tensor) -> Tensor:  # (B, M), (B, 1) mm -> (B, M, 3)
    own, whole = ((values.clamp_min(LEAST) / UNIT).log() for values in (spread, person))
    return torch.stack([torch.ones_like(own), own, whole.expand_as(own)], -1)  # a, b, c


def _logistic_fit(
    features: Tensor,  # (M, 3)
    inside: Tensor,  # (M,) 0 or 1
) -> tuple[float, float, float]:
    """Maximum-likelihood coefficients; a slight ridge keeps them finite when all points are inside."""
    from scipy.optimize import minimize  # slow import, not needed to load a pipeline
    from scipy.special import expit

    x, y = features.numpy(), inside.numpy()

    def loss(found: np.ndarray) -> tuple[float, np.ndarray]:
        logit = x @ found
        value = (np.logaddexp(0, logit) - y * logit).mean() + _RIDGE / 2 * (found @ found)
        return float(value), x.T @ (expit(logit) - y) / len(y) + _RIDGE * found

    a, b, c = minimize(loss, np.zeros(x.shape[1]), jac=True, method="BFGS").x.tolist()
    return a, b, c
