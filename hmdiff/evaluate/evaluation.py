"""Evaluation of a pipeline on a split: PVE, MPJPE, PA-MPJPE and PA-PVE of one hypothesis, the mean, and the oracle.

Protocol of the synthetic splits (our choice, closest to METRO's): the 14 joints of `skeletons.J14`, regressed from
predicted and ground truth mesh by the same regressor; root: mid-hip; millimetres; PA: similarity Procrustes. A single
posterior sample is worse than the mean in expectation, so compare a regressor with the mean. *selected* is the
hypothesis chosen without ground truth. The oracle rewards miscalibrated spread, so calibration error and coverage are
reported with it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, HAND21, J14, joint_indices
from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.diffusion.hypotheses import Reprojection, select, weighted_mean
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.hypothesis_rows import COUNTS, reduce_hypotheses
from hmdiff.evaluate.measured import Measured, summary
from hmdiff.evaluate.metrics import (
    mesh_errors,
    oracle_curve,
    root_of,
)
from hmdiff.evaluate.plausibility import PlausibilityCollector
from hmdiff.evaluate.visibility_bins import VisibilityCollector
from hmdiff.heatmaps import Crop, Heatmaps
from hmdiff.pipeline import HMDiffPipeline, MeshOutput

ROOT = ("left_hip", "right_hip")
KINDS = ("first", "mean", "oracle")  # in every report
WEIGHTED = "weighted"  # mean weighted by agreement with the heatmaps (`hypotheses.weighted_mean`)
AGGREGATED = "aggregated"  # one mesh from all hypotheses, for pipelines with the aggregation MLP
PHOTO = 64.0  # nominal side of the photo of synthetic crops, in crop half-sides; does not affect results
MESHES_AT_ONCE = 800  # people times hypotheses with full meshes in memory: bounds memory, does not affect results
_J14 = joint_indices(J14, HALPE26)


def split_batches(
    data: PeopleSource,
    split: str,
    people: int,
) -> Iterator[Sample]:
    """The first `people` people of a split, block by block; the last block is truncated."""
    for number in range((people + data.block_size - 1) // data.block_size):
        keep = min(data.block_size, people - number * data.block_size)
        yield data.block(split, number).map(lambda tensor, keep=keep: tensor[:keep])  # type: ignore[misc]


def measure(
    pipeline: HMDiffPipeline,
    samples: Iterable[Sample],  # with the full mesh
    sampling: SamplingConfig,
    counts: Sequence[int] = (),  # also evaluate the first n hypotheses, for each of these n
    progress: Callable[[int], None] | None = None,  # called with the number of people done
    *,
    clock: Callable[[], float] = time.perf_counter,
    batch: int | None = None,  # maximum people per call; None: the samples' own batches
    on_batch: Callable[[Sample, MeshOutput], None] | None = None,  # called with each batch and its output
) -> dict[int, Measured]:  # by count
    """Errors of every person. The first n of N hypotheses equal n drawn alone (guided or not): one run, all counts."""
    counts, direct = sorted({*counts, sampling.num_hypotheses}), pipeline.model.config.mode == "direct"
    parts_by_count: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    true_joints: list[Tensor] = []
    calls: list[tuple[int, float]] = []
    for batch_prediction in predict_batches(pipeline, samples, sampling, batch, clock):
        sample, output = batch_prediction.sample, batch_prediction.output
        calls.append((len(output.vertices), batch_prediction.seconds))
        assert output.keypoints is not None and sample.keypoints_3d is not None and sample.vertices is not None
        device = output.vertices.device
        predicted, target = output.keypoints[:, :, _J14], sample.keypoints_3d[:, _J14].to(device)
        vertices = sample.vertices.to(device)
        per_hypothesis = mesh_errors(output.vertices, predicted, vertices[:, None], target[:, None], J14, ROOT)
        origin = root_of(predicted, J14, ROOT)

        def mean_of(
            count: int,
            meshes: Tensor = output.vertices - origin,
            joints: Tensor = predicted - origin,
            truth: tuple[Tensor, Tensor] = (vertices, target),
        ) -> dict[str, Tensor]:
            return mesh_errors(meshes[:, :count].mean(1), joints[:, :count].mean(1), *truth, J14, ROOT)

        for count in counts:
            errors = reduce_hypotheses(per_hypothesis, count, mean_of, batch_prediction.select)
            reprojection = batch_prediction.reprojection(count)
            combined = {
                WEIGHTED: None
                if direct or count == 1 or reprojection is None
                else weighted_mean(output.vertices[:, :count], reprojection),
                AGGREGATED: output.aggregated_vertices if count == counts[-1] else None,
            }
            for kind, mesh in combined.items():
                if mesh is not None:
                    keypoints = pipeline.body.keypoints(mesh)[:, _J14]
                    errors[kind] = mesh_errors(mesh, keypoints, vertices, target, J14, ROOT)
            parts_by_count[count].append(
                {
                    "errors": {
                        metric: {kind: values[metric] for kind, values in errors.items()} for metric in per_hypothesis
                    },
                    "best_of": {
                        metric: oracle_curve(errors[:, :count], (*COUNTS, count))
                        for metric, errors in per_hypothesis.items()
                    },
                    "joints": (predicted - origin)[:, :count],
                    "guidance": _guidance_report(output, count),
                    **({"temperatures": output.temperature} if output.calibrated_spread else {}),
                }
            )
        true_joints.append((target - root_of(target, J14, ROOT)).cpu())
        if on_batch is not None:
            on_batch(sample, output)
        if progress is not None:
            progress(len(target))
    return {
        count: Measured(
            **_concatenate(parts), true_joints=torch.cat(true_joints), calls=tuple(calls) if count == counts[-1] else ()
        )
        for count, parts in parts_by_count.items()
    }


class BatchPrediction(NamedTuple):
    """A batch of people and the pipeline's output for them."""

    sample: Sample
    output: MeshOutput
    seconds: float

    def reprojection(self, count: int) -> Reprojection | None:
        """Reprojection errors of the first `count` hypotheses."""
        reprojection = self.output.reprojection
        return None if reprojection is None else reprojection.first(count)

    def select(self, count: int) -> Tensor:  # (B,)
        """Index of the hypothesis selected without ground truth among the first `count`."""
        output = self.output
        log_likelihood, rle = (
            None if values is None else values[:, :count]
            for values in (output.log_likelihood, output.rle_log_likelihood)
        )
        roots = output.joints[:, :count, 0]
        return select(output.vertices[:, :count], roots, log_likelihood, rle, self.reprojection(count))


def predict_batches(
    pipeline: HMDiffPipeline,
    samples: Iterable[Sample],
    sampling: SamplingConfig,
    batch: int | None = None,  # maximum people per call; None: the samples' own batches
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[BatchPrediction]:
    """Run the pipeline on all people, in batches bounded by `MESHES_AT_ONCE`."""
    max_people = max(1, MESHES_AT_ONCE // sampling.num_hypotheses)
    size = max_people if batch is None else min(batch, max_people)
    for block in samples:
        for first in range(0, len(block), size):
            sample = block.map(lambda tensor, first=first: tensor[first : first + size])  # type: ignore[misc]
            heatmaps = as_heatmaps(sample)
            started = clock()
            output = predict_batch(pipeline, sample, heatmaps, sampling)
            yield BatchPrediction(sample, output, clock() - started)


def predict_batch(
    pipeline: HMDiffPipeline,
    sample: Sample,
    heatmaps: Heatmaps | None,
    sampling: SamplingConfig,
) -> MeshOutput:
    """Call the pipeline once and synchronise. Random seeds depend on each person's index in the split."""
    indices = None if sample.index is None else sample.index.tolist()
    arguments = camera_arguments(sample) | depth_argument(pipeline, sample)
    output: MeshOutput = pipeline(sample.image, heatmaps, sampling, people=indices, **arguments)
    if output.vertices.is_cuda:
        torch.cuda.synchronize(output.vertices.device)
    return output


def _guidance_report(output: MeshOutput, count: int) -> dict[str, Tensor]:  # (B,) each
    guidance = output.guidance
    if guidance is None:
        return {}
    return {
        "gap_before": guidance.gap_before[:, :count].mean(1),
        "gap_after": guidance.gap_after[:, :count].mean(1),
        "active": guidance.active.float().mean(0),  # share of the steps, for all drawn hypotheses
        "fell_back": guidance.fell_back[:, :count].float().mean(1),  # share of the hypotheses
    }


def _concatenate(parts: list[Any]) -> Any:
    """Nested dictionaries of (B, ...) tensors, joined along B."""
    if isinstance(parts[0], dict):
        return {key: _concatenate([part[key] for part in parts]) for key in parts[0]}
    return torch.cat([part.cpu() for part in parts])


def evaluate(
    pipeline: HMDiffPipeline,
    data: PeopleSource,  # with the full mesh
    split: str,
    people: int,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,  # called with the number of people done
    *,
    estimate: Callable[[Tensor], Tensor] | None = None,  # a pose estimator in place of the split's own heatmaps
    visibility_bins: bool = False,  # also report["bands"]; the data needs pictures or maps
) -> dict[str, Any]:
    """Errors with 95 % bootstrap intervals over people: `report["errors"][metric][kind]` is {value, low, high} in mm.

    The result does not depend on the batch size.
    """
    if not data.full_mesh:
        raise UserError("evaluation needs the full mesh of its people: build the data with full_mesh=True")
    samples: Iterable[Sample] = split_batches(data, split, people)
    if estimate is not None:
        samples = (with_estimated_heatmaps(sample, estimate) for sample in samples)
    visibility, plausibility = VisibilityCollector() if visibility_bins else None, PlausibilityCollector(pipeline.body)

    def on_batch(sample: Sample, output: MeshOutput) -> None:
        plausibility(sample, output)
        if visibility is not None:
            visibility(sample, output)

    measured = measure(pipeline, samples, sampling, progress=progress, on_batch=on_batch)[sampling.num_hypotheses]
    return {
        "split": split,
        "people": people,
        **sampling_settings(pipeline, sampling),
        "protocol": "J14 regressed from the mesh, root mid-hip, mm",
        **summary(measured, pipeline.model.config.mode == "diffusion"),
        "bodies": plausibility.report(),
        **({} if visibility is None else {"bands": visibility.report(measured)}),
    }


def sampling_settings(pipeline: HMDiffPipeline, sampling: SamplingConfig) -> dict[str, Any]:
    """The sampling settings, as stored in a report."""
    return {
        "num_hypotheses": sampling.num_hypotheses,
        "num_inference_steps": sampling.num_inference_steps or pipeline.num_inference_steps,
        "sampler": sampling.scheduler or "as saved",
        "seed": sampling.seed,
        "surface": sampling.surface,
        "upright": sampling.upright,
    }


def with_estimated_heatmaps(
    sample: Sample,  # with pictures
    estimate: Callable[[Tensor], Tensor],  # (B, 3, S, S) RGB 0..1 -> (B, 26, 64, 64)
) -> Sample:
    """The sample with its heatmaps replaced by a pose estimator's."""
    if sample.image is None:
        raise UserError("a pose estimator reads pictures, and these people have none: give the data an image size")
    values = estimate(sample.image).detach().float().clamp_min(0).to(sample.image.device)
    return dataclasses.replace(sample, heatmaps=values, heatmap_valid=values.new_ones(values.shape[:2]).bool())


def as_heatmaps(sample: Sample) -> Heatmaps | None:
    """A sample's heatmaps as pipeline input; photo pixels are in units of crop half-sides."""
    if sample.heatmaps is None:
        return None
    assert sample.heatmap_valid is not None
    count = len(sample.heatmaps)
    values = sample.heatmaps
    # People without any detected joint are evaluated too: one faint pixel keeps the heatmaps valid.
    empty = (values.flatten(1).amax(-1) <= 0).nonzero()[:, 0]
    if len(empty):
        values = values.clone()
        values[empty, sample.heatmap_valid[empty].int().argmax(-1), 0, 0] = 1e-6
    center = values.new_full((count, 2), PHOTO / 2)
    if sample.principal_point is not None:
        center = center - sample.principal_point
    names = HAND21 if values.shape[1] == len(HAND21) else HALPE26
    return Heatmaps(values, sample.heatmap_valid, Crop.of(center, values.new_full((count,), 2.0)), names)


def camera_arguments(sample: Sample) -> dict[str, Any]:
    """Photo size and focal length as pipeline arguments; empty if the sample has no camera."""
    if sample.principal_point is None or sample.focal is None or sample.heatmaps is None:
        return {}
    return {"photo_sizes": torch.full((len(sample.focal), 2), PHOTO), "focal": sample.focal}


def depth_argument(pipeline: HMDiffPipeline, sample: Sample) -> dict[str, Any]:
    """Depth maps as a pipeline argument, if it takes them; all NaN if the data has none."""
    if not pipeline.model.config.depth_map:
        return {}
    if sample.depth_input is not None and sample.depth_input.isfinite().any():
        return {"depth": sample.depth_input}
    _warn_once("people without a depth map: scored without the depth path, so this is no figure of D2A-HMR")
    return {"depth": torch.full((len(sample), 2, 2), float("nan"))}


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr)
