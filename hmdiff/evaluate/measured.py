"""Per-person measurements of a pipeline, and their summary: bootstrap intervals over people, calibration.

Intervals are 95 % percentile bootstraps over people (Efron 1979). Calibration metrics are those of
`hmdiff.evaluate.metrics`; their intervals, and averaging coverage over joints, are our choice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hmdiff.diffusion.hypotheses import apply_temperature
from hmdiff.evaluate.metrics import bootstrap_interval, calibration_error, calibration_levels, inside_quantiles

COVERAGE_LEVEL = 0.9
MIN_HYPOTHESES_TO_CALIBRATE = 5  # hypotheses


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of P people with n hypotheses each. All tensors are on the CPU."""

    errors: dict[str, dict[str, Tensor]]  # metric -> kind -> (P,) mm
    best_of: dict[str, dict[int, Tensor]]  # metric -> count -> (P,) mm, oracle of the first `count`
    joints: Tensor  # (P, n, 14, 3) metres, relative to the root
    true_joints: Tensor  # (P, 14, 3) metres
    guidance: dict[str, Tensor]  # (P,) each: gap_before, gap_after, active, fell_back; {} for unguided sampling
    calls: tuple[tuple[int, float], ...]  # (people, seconds) of each call; empty for fewer hypotheses than were drawn
    temperatures: Tensor | None = None  # (P,) fitted for these sampling settings; None: not fitted


def summary(
    measured: Measured,
    diffusion: bool = True,
) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over people, as JSON; with calibration metrics for diffusion models.

    Only "tempered" applies the temperatures; all other values are of the hypotheses as sampled.
    """
    report: dict[str, Any] = {
        "errors": {
            metric: {kind: interval(values) for kind, values in kinds.items()}
            for metric, kinds in measured.errors.items()
        }
    }
    if diffusion and measured.joints.shape[1] > 1:
        report["oracle_curve"] = {
            metric: {str(count): interval(values) for count, values in curve.items()}
            for metric, curve in measured.best_of.items()
        }
    if diffusion and measured.joints.shape[1] >= MIN_HYPOTHESES_TO_CALIBRATE:
        report |= _calibration(measured)
        if measured.temperatures is not None:
            scaled = dataclasses.replace(measured, joints=apply_temperature(measured.joints, measured.temperatures))
            report["tempered"] = {"temperature": measured.temperatures.median().item(), **_calibration(scaled)}
    if measured.guidance:
        report["guidance"] = {name: interval(values) for name, values in measured.guidance.items()}
    return report


def _calibration(measured: Measured) -> dict[str, Any]:
    value, low, high = calibration_interval(measured.joints, measured.true_joints)
    return {
        "expected_calibration_error": value,
        "expected_calibration_error_interval": {"low": low, "high": high},
        "coverage": {"level": COVERAGE_LEVEL, **interval(coverage_per_person(measured))},
    }


def interval(values: Tensor) -> dict[str, float]:  # of (P,)
    value, low, high = bootstrap_interval(values)
    return {"value": value, "low": low, "high": high}


def coverage_per_person(measured: Measured) -> Tensor:  # (P,) share of a person's joints
    """Share of each person's joints inside the ball that contains `COVERAGE_LEVEL` of the hypotheses."""
    level = measured.joints.new_tensor([COVERAGE_LEVEL])
    return inside_quantiles(measured.joints, measured.true_joints, level)[:, 0].mean(-1)


def calibration_interval(
    samples: Tensor,  # (P, S, J, 3) metres, root-relative
    target: Tensor,  # (P, J, 3)
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`metrics.expected_calibration_error` and its 95 % percentile-bootstrap interval over people.

    The error is an absolute value, which the noise of resampling biases upwards: near 0 the interval lies above the
    value. With few samples (S below about 50) even a perfect posterior has an error above 0.
    """
    levels = calibration_levels(samples)
    q, inside = levels.double(), inside_quantiles(samples, target, levels).double()  # (Q,), (P, Q, J)
    people = len(inside)
    generator = torch.Generator().manual_seed(seed)
    drawn_people = torch.randint(people, (resamples, people), generator=generator)
    weight = torch.zeros(resamples, people, dtype=inside.dtype)
    weight.scatter_add_(1, drawn_people, torch.ones_like(weight))
    frequency = (weight / people @ inside.flatten(1)).unflatten(1, inside.shape[1:])
    low, high = torch.quantile(calibration_error(frequency, q), q.new_tensor([0.025, 0.975])).tolist()
    return calibration_error(inside.mean(0), q).item(), low, high
