"""Calibration: fits the temperature that matches the spread of a pipeline's hypotheses to their error.

Sampling in few steps gives too little spread. The deviations from the mean are scaled by a temperature per person: the
product of an image evidence factor (`hmdiff.diffusion.image_evidence`), fitted by maximum likelihood, and one scalar
that minimises the expected calibration error (`hmdiff.evaluate.metrics`). Both are fitted on people with ground truth.
The split `calibration` has people of all splits' kinds, and shares none with them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.data.sample import PeopleSource
from hmdiff.diffusion.confidence import MIN_PEOPLE, fit_confidence
from hmdiff.diffusion.hypotheses import apply_temperature
from hmdiff.diffusion.image_evidence import fit_evidence_factor
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.temperature import Sampling, Temperature
from hmdiff.errors import UserError
from hmdiff.evaluate.measured import COVERAGE_LEVEL
from hmdiff.evaluate.metrics import calibration_error, calibration_levels, coverage, expected_calibration_error
from hmdiff.evaluate.reliability import measure_spread
from hmdiff.files.storage import atomic_file
from hmdiff.pipeline import HMDiffPipeline

LOWEST, HIGHEST = 1 / 8, 8.0
_COARSE, _FINE = 25, 41  # temperatures of the two grids, evenly spaced in the logarithm


def fit_temperature(
    samples: Tensor,  # (B, S, J, 3) metres, root-relative
    target: Tensor,  # (B, J, 3)
) -> float:
    """The temperature of least expected calibration error, by a coarse and a fine grid search.

    Raises:
        UserError: no people, fewer than 2 samples, or all samples equal.
    """
    if len(samples) == 0 or samples.shape[1] < 2:
        raise UserError(f"temperature: {len(samples)} people with {samples.shape[1]} samples each; give more to fit it")
    if float((samples - samples.mean(1, keepdim=True)).abs().amax()) < 1e-6:
        why = "a direct baseline, or one step"  # whose result all hypotheses share
        raise UserError(f"temperature: the hypotheses are all the same ({why}?); there is nothing to scale")
    error = tempered_error(samples, target)
    best = _best(error, LOWEST, HIGHEST, _COARSE)
    step = (HIGHEST / LOWEST) ** (1 / (_COARSE - 1))
    return _best(error, best / step, best * step, _FINE)


def tempered_error(
    samples: Tensor,  # (B, S, J, 3) metres, root-relative
    target: Tensor,  # (B, J, 3)
) -> Callable[[float], float]:
    """`expected_calibration_error(apply_temperature(samples, T), target)` as a function of T, fast to evaluate.

    The coordinate-wise median and the distances from it scale linearly with T, so quantiles are computed once.
    """
    mean = samples.mean(1)  # (B, J, 3)
    q = calibration_levels(samples)
    centers, radii = [], []
    for person in samples - mean[:, None]:  # torch.quantile takes at most 16 million numbers
        center = torch.quantile(person, 0.5, dim=0)
        centers.append(center)
        radii.append(torch.quantile((person - center).norm(dim=-1), q, dim=0))
    center, radius, offset = torch.stack(centers), torch.stack(radii), target - mean

    def error(temperature: float) -> float:
        inside = temperature * radius > (offset - temperature * center).norm(dim=-1)[:, None]  # (B, Q, J)
        return calibration_error(inside.to(samples.dtype).mean(0), q).item()

    return error


def _best(error: Callable[[float], float], low: float, high: float, count: int) -> float:
    grid = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist()
    errors = [error(each) for each in grid]
    least = min(errors)
    # The error is piecewise constant: take the middle of equal minima.
    equal = [each for each, error in zip(grid, errors, strict=True) if error <= least + 1e-9]
    return equal[len(equal) // 2]


def calibrate(
    pipeline: HMDiffPipeline,
    data: PeopleSource,  # with the full mesh of `split`
    split: str,
    people: int,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,  # called with the number of people done
) -> Temperature:
    """Fit temperature and confidence for one set of sampling settings, and set them in the pipeline.

    Raises:
        UserError: a model without diffusion, a body without keypoints, or fewer than 2 hypotheses.
    """
    if pipeline.model.config.mode == "direct":
        raise UserError("temperature: a direct baseline gives one mesh; there is no spread to calibrate")
    if pipeline.body.keypoint_regressor is None:
        raise UserError(f"temperature: body {pipeline.body.name!r} has no keypoints to calibrate by")
    measured, spread = measure_spread(pipeline, data, split, people, sampling, progress)
    samples, target = measured.joints, measured.true_joints
    factor = fit_evidence_factor(samples, target, spread.evidence) if people >= MIN_PEOPLE else None
    scales = torch.ones(len(samples)) if factor is None else factor(spread.evidence)
    temperature = fit_temperature(apply_temperature(samples, scales), target)
    metadata: dict[str, Any] = {"split": split, "people": people}
    metadata |= {"num_hypotheses": sampling.num_hypotheses, "seed": sampling.seed}
    for name, scale in (("before", 1.0), ("after", temperature * scales)):
        tempered = apply_temperature(samples, scale)
        metadata[f"expected_calibration_error_{name}"] = expected_calibration_error(tempered, target)
        metadata[f"coverage_{name}"] = coverage(tempered, target, COVERAGE_LEVEL).mean().item()
    fitted = Temperature(Sampling.of(pipeline.resolved(sampling)), temperature, metadata, evidence=factor)
    if people >= MIN_PEOPLE:
        fitted = dataclasses.replace(fitted, confidence=fit_confidence(*spread.scaled_by(fitted)[:4]))
    pipeline.set_temperature(fitted)
    return fitted


def store_temperature(
    folder: str | Path,  # of a saved pipeline
    fitted: Temperature,
) -> None:
    """Write a temperature into the pipeline's hmdiff.json, atomically, replacing one for the same sampling settings.

    Raises:
        UserError: no saved pipeline, a damaged one, or a folder that cannot be written.
    """
    path = Path(folder) / "hmdiff.json"
    try:
        metadata = json.loads(path.read_text())
        older = metadata.get("temperatures", [])
        kept = [each for each in older if Temperature.from_json(each).sampling != fitted.sampling]
    except FileNotFoundError:
        raise UserError(f"{folder}: not a saved hmdiff pipeline (it has no hmdiff.json)") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: damaged ({error!r}); save the pipeline again") from None
    metadata["temperatures"] = [*kept, fitted.as_json()]
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2) + "\n")
