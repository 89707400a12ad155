"""A pipeline over a split: PVE, MPJPE, PA-MPJPE and PA-PVE of the first hypothesis, of their mean, and of the best.

Protocol of the synthetic splits (ours, nearest to the METRO lineage's): the 14 joints of `skeletons.J14`, regressed
from predicted and true mesh by the same regressor; root = the middle of the hips; millimetres; PA = similarity
Procrustes. A single posterior sample is expected to be worse than the mean: compare the mean with a regressor, and the
oracle beside.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.data.sample import Sample, concatenate
from hmdiff.data.synthetic import SyntheticHumans
from hmdiff.errors import UserError
from hmdiff.heatmaps import Heatmaps
from hmdiff.metrics import (
    bootstrap_interval,
    expected_calibration_error,
    hypothesis_errors,
    mesh_errors,
    multi_hypothesis,
)
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.skeletons import HALPE26, J14, joint_indices
from hmdiff.storage import atomic_file

ROOT = ("left_hip", "right_hip")
METRICS = {"pve": "PVE", "mpjpe": "MPJPE", "pa_mpjpe": "PA-MPJPE", "pa_pve": "PA-PVE"}
KINDS = ("first", "mean", "oracle")
_J14 = joint_indices(J14, HALPE26)


def split_batches(
    data: SyntheticHumans,
    split: str,
    people: int,
) -> Iterator[Sample]:
    """The first `people` people of a split, block by block; the last block is cut."""
    for number in range((people + data.block_size - 1) // data.block_size):
        keep = min(data.block_size, people - number * data.block_size)
        yield data.block(split, number).map(lambda tensor, keep=keep: tensor[:keep])  # type: ignore[misc]


def evaluate(
    pipeline: HMDiffPipeline,
    data: SyntheticHumans,  # with the full mesh
    split: str,
    people: int,
    num_hypotheses: int = 25,
    num_inference_steps: int | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    progress: Callable[[int], None] | None = None,  # told how many people are done
) -> dict[str, Any]:
    """Errors with 95 % bootstrap intervals over people: report["errors"][metric][kind] = {value, low, high} in mm.

    People are numbered by their place in the split, so that the result does not depend on how they are batched.
    """
    if not data.full_mesh:
        raise UserError("evaluation needs the full mesh of its people: build the data with full_mesh=True")
    collected: dict[str, dict[str, list[Tensor]]] = {metric: {kind: [] for kind in KINDS} for metric in METRICS}
    drawn, true = [], []
    for sample in split_batches(data, split, people):
        output = pipeline(
            sample.image, as_heatmaps(sample), num_hypotheses, num_inference_steps, seed, scheduler,
            people=sample.index.tolist() if sample.index is not None else None,
        )  # fmt: skip
        assert output.keypoints is not None and sample.keypoints_3d is not None and sample.vertices is not None
        predicted, target = output.keypoints[:, :, _J14].cpu(), sample.keypoints_3d[:, _J14].cpu()
        each, mean = hypothesis_errors(output.vertices.cpu(), predicted, sample.vertices.cpu(), target, J14, ROOT)
        for metric, found in multi_hypothesis(each, mean).items():
            for kind, values in found.items():
                collected[metric][kind].append(values)
        drawn.append(predicted - predicted[:, :, joint_indices(ROOT, J14)].mean(2, keepdim=True))
        true.append(target - target[:, joint_indices(ROOT, J14)].mean(1, keepdim=True))
        if progress is not None:
            progress(len(target))
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for metric, kinds in collected.items():
        errors[metric] = {}
        for kind, parts in kinds.items():
            value, low, high = bootstrap_interval(torch.cat(parts))
            errors[metric][kind] = {"value": value, "low": low, "high": high}
    report: dict[str, Any] = {
        "split": split,
        "people": people,
        "num_hypotheses": num_hypotheses,
        "num_inference_steps": num_inference_steps or pipeline.num_inference_steps,
        "sampler": scheduler or "as saved",
        "seed": seed,
        "protocol": "J14 regressed from the mesh, root mid-hip, mm",
        "errors": errors,
    }
    if num_hypotheses >= 5 and pipeline.model.config.mode == "diffusion":
        report["expected_calibration_error"] = expected_calibration_error(torch.cat(drawn), torch.cat(true))
    return report


def as_heatmaps(sample: Sample) -> Heatmaps | None:
    """A sample's heatmaps as the pipeline's input; the crop stands for the photo, two pixels a side."""
    if sample.heatmaps is None:
        return None
    assert sample.heatmap_valid is not None
    count = len(sample.heatmaps)
    values = sample.heatmaps
    # Somebody of whom the estimator found nothing at all is still a person of the split: one faint pixel says no more.
    empty = (values.flatten(1).amax(-1) <= 0).nonzero()[:, 0]
    if len(empty):
        values = values.clone()
        values[empty, sample.heatmap_valid[empty].int().argmax(-1), 0, 0] = 1e-6
    return Heatmaps(values, sample.heatmap_valid, values.new_ones(count, 2), values.new_full((count,), 2.0))


@functools.lru_cache(maxsize=4)
def _mean_person(data: SyntheticHumans, people: int) -> tuple[Tensor, Tensor]:  # (V, 3), (J, 3)
    sample = concatenate(list(split_batches(data, "train", people)))
    assert sample.vertices is not None and sample.keypoints_3d is not None
    return sample.vertices.mean(0), sample.keypoints_3d.mean(0)


def mean_mesh_errors(
    data: SyntheticHumans,
    split: str,
    people: int,
    training_people: int = 512,
) -> dict[str, dict[str, float]]:  # metric -> {value, low, high} mm
    """The errors of predicting for everybody the mean mesh of training people, in the camera's frame."""
    vertices, keypoints = _mean_person(data, training_people)
    collected: dict[str, list[Tensor]] = {metric: [] for metric in METRICS}
    for sample in split_batches(data, split, people):
        assert sample.vertices is not None and sample.keypoints_3d is not None
        errors = mesh_errors(
            vertices.expand_as(sample.vertices), keypoints[_J14].expand(len(sample.vertices), -1, -1), sample.vertices,
            sample.keypoints_3d[:, _J14], J14, ROOT,
        )  # fmt: skip
        for metric, values in errors.items():
            collected[metric].append(values)
    result = {}
    for metric, parts in collected.items():
        value, low, high = bootstrap_interval(torch.cat(parts))
        result[metric] = {"value": value, "low": low, "high": high}
    return result


def mean_mesh_error(data: SyntheticHumans, split: str, people: int) -> float:
    """PVE of the mean mesh, mm: what a model must beat to have learned anything."""
    return mean_mesh_errors(data, split, people)["pve"]["value"]


def save_report(report: dict[str, Any], path: str | Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
