"""A pipeline over a split: PVE, MPJPE, PA-MPJPE and PA-PVE of one hypothesis, of their mean, and of the best.

Protocol of the synthetic splits (ours, nearest to the METRO lineage's): the 14 joints of `skeletons.J14`, regressed
from predicted and true mesh by the same regressor; root = the middle of the hips; millimetres; PA = similarity
Procrustes. A single posterior sample is expected to be worse than the mean: compare the mean with a regressor, and the
oracle beside. *selected* is the hypothesis chosen without the ground truth. The oracle rewards
hypotheses that spread too little at few steps and too much at many, so calibration and coverage stand beside it.
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
from hmdiff.evaluate.hypothesis_rows import COUNTS, rows_of
from hmdiff.evaluate.measured import Measured, summary
from hmdiff.evaluate.metrics import (
    mesh_errors,
    oracle_curve,
    root_of,
)
from hmdiff.evaluate.plausibility import BodyWatch
from hmdiff.evaluate.visibility_bands import BandWatch
from hmdiff.heatmaps import Crop, Heatmaps
from hmdiff.pipeline import HMDiffPipeline, MeshOutput

ROOT = ("left_hip", "right_hip")
KINDS = ("first", "mean", "oracle")  # of every report
WEIGHTED = "weighted"  # the mean, those that agree with the heatmaps counting more (`hypotheses.weighted_mean`)
AGGREGATED = "aggregated"  # of pipelines that have the MLP from N hypotheses to one mesh, for all that were drawn
PHOTO = 64.0  # side of the photo that synthetic crops are said to be from, in crop half-sides; any size would do
MESHES_AT_ONCE = 800  # people times hypotheses whose full meshes are in memory: bounds it, changes no result
_J14 = joint_indices(J14, HALPE26)


def split_batches(
    data: PeopleSource,
    split: str,
    people: int,
) -> Iterator[Sample]:
    """The first `people` people of a split, block by block; the last block is cut."""
    for number in range((people + data.block_size - 1) // data.block_size):
        keep = min(data.block_size, people - number * data.block_size)
        yield data.block(split, number).map(lambda tensor, keep=keep: tensor[:keep])  # type: ignore[misc]


def measure(
    pipeline: HMDiffPipeline,
    samples: Iterable[Sample],  # with the full mesh
    sampling: SamplingConfig,
    counts: Sequence[int] = (),  # numbers of hypotheses, the first ones of those that are drawn; none: all
    progress: Callable[[int], None] | None = None,  # called with the number of people done
    *,
    clock: Callable[[], float] = time.perf_counter,
    batch: int | None = None,  # people a call, at most; None: as the samples come
    observe: Callable[[Sample, MeshOutput], None] | None = None,  # called with every batch and its hypotheses
) -> dict[int, Measured]:  # by count
    """The errors of every person. Hypotheses, guided ones too, are nested by seed: one run serves several counts."""
    counts, direct = sorted({*counts, sampling.num_hypotheses}), pipeline.model.config.mode == "direct"
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    true: list[Tensor] = []
    calls: list[tuple[int, float]] = []
    for answer in answers(pipeline, samples, sampling, batch, clock):
        sample, output = answer.sample, answer.output
        calls.append((len(output.vertices), answer.seconds))
        assert output.keypoints is not None and sample.keypoints_3d is not None and sample.vertices is not None
        place = output.vertices.device
        predicted, target = output.keypoints[:, :, _J14], sample.keypoints_3d[:, _J14].to(place)
        vertices = sample.vertices.to(place)
        each = mesh_errors(output.vertices, predicted, vertices[:, None], target[:, None], J14, ROOT)
        origin = root_of(predicted, J14, ROOT)

        def mean_of(
            count: int,
            meshes: Tensor = output.vertices - origin,
            joints: Tensor = predicted - origin,
            truth: tuple[Tensor, Tensor] = (vertices, target),
        ) -> dict[str, Tensor]:
            return mesh_errors(meshes[:, :count].mean(1), joints[:, :count].mean(1), *truth, J14, ROOT)

        for count in counts:
            errors = rows_of(each, count, mean_of, answer.select)
            seen = answer.seen(count)
            whole = {
                WEIGHTED: None
                if direct or count == 1 or seen is None
                else weighted_mean(output.vertices[:, :count], seen),
                AGGREGATED: output.aggregated_vertices if count == counts[-1] else None,
            }
            for kind, one in whole.items():
                if one is not None:
                    keypoints = pipeline.body.keypoints(one)[:, _J14]
                    errors[kind] = mesh_errors(one, keypoints, vertices, target, J14, ROOT)
            found[count].append(
                {
                    "errors": {metric: {kind: values[metric] for kind, values in errors.items()} for metric in each},
                    "best_of": {
                        metric: oracle_curve(errors[:, :count], (*COUNTS, count)) for metric, errors in each.items()
                    },
                    "joints": (predicted - origin)[:, :count],
                    "guidance": _guidance_report(output, count),
                    **({"temperatures": output.temperature} if output.calibrated_spread else {}),
                }
            )
        true.append((target - root_of(target, J14, ROOT)).cpu())
        if observe is not None:
            observe(sample, output)
        if progress is not None:
            progress(len(target))
    return {
        count: Measured(
            **_joined(parts), true_joints=torch.cat(true), calls=tuple(calls) if count == counts[-1] else ()
        )
        for count, parts in found.items()
    }


class Answer(NamedTuple):
    """Some people of a data set, and what the pipeline recovered."""

    sample: Sample
    output: MeshOutput
    seconds: float

    def seen(self, count: int) -> Reprojection | None:
        """How far the first so many hypotheses project from the heatmaps' peaks."""
        reprojection = self.output.reprojection
        return None if reprojection is None else reprojection.first(count)

    def select(self, count: int) -> Tensor:  # (B,)
        """Which of the first so many hypotheses is chosen without the truth."""
        output = self.output
        likely, regressed = (
            None if values is None else values[:, :count]
            for values in (output.log_likelihood, output.rle_log_likelihood)
        )
        roots = output.joints[:, :count, 0]
        return select(output.vertices[:, :count], roots, likely, regressed, self.seen(count))


def answers(
    pipeline: HMDiffPipeline,
    samples: Iterable[Sample],
    sampling: SamplingConfig,
    batch: int | None = None,  # people a call, at most; None: as the samples come
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Answer]:
    """The people through the pipeline, so many at once that the memory of their meshes is bounded."""
    at_once = max(1, MESHES_AT_ONCE // sampling.num_hypotheses)
    size = at_once if batch is None else min(batch, at_once)
    for whole in samples:
        for first in range(0, len(whole), size):
            sample = whole.map(lambda tensor, first=first: tensor[first : first + size])  # type: ignore[misc]
            heatmaps = as_heatmaps(sample)
            started = clock()
            output = ask(pipeline, sample, heatmaps, sampling)
            yield Answer(sample, output, clock() - started)


def ask(
    pipeline: HMDiffPipeline,
    sample: Sample,
    heatmaps: Heatmaps | None,
    sampling: SamplingConfig,
) -> MeshOutput:
    """One call of the pipeline; people are numbered by their place in the split. Returns when the device is done."""
    people = None if sample.index is None else sample.index.tolist()
    given = photo_of(sample) | depth_of(pipeline, sample)
    output: MeshOutput = pipeline(sample.image, heatmaps, sampling, people=people, **given)
    if output.vertices.is_cuda:
        torch.cuda.synchronize(output.vertices.device)
    return output


def _guidance_report(output: MeshOutput, count: int) -> dict[str, Tensor]:  # (B,) each
    told = output.guidance
    if told is None:
        return {}
    return {
        "gap_before": told.gap_before[:, :count].mean(1),
        "gap_after": told.gap_after[:, :count].mean(1),
        "active": told.active.float().mean(0),  # share of the steps, over all hypotheses that were drawn
        "fell_back": told.fell_back[:, :count].float().mean(1),  # share of the hypotheses
    }


def _joined(parts: list[Any]) -> Any:
    """Nested dictionaries of (B, ...) tensors, joined along B."""
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
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
    bands: bool = False,  # also report["bands"], see `evaluate.visibility_bands`; the data needs pictures or maps
) -> dict[str, Any]:
    """Errors with 95 % bootstrap intervals over people: report["errors"][metric][kind] = {value, low, high} in mm.

    People are numbered by their place in the split, so that the result does not depend on how they are batched.
    """
    if not data.full_mesh:
        raise UserError("evaluation needs the full mesh of its people: build the data with full_mesh=True")
    samples: Iterable[Sample] = split_batches(data, split, people)
    if estimate is not None:
        samples = (with_estimate(sample, estimate) for sample in samples)
    watch, bodies = BandWatch() if bands else None, BodyWatch(pipeline.body)

    def observe(sample: Sample, output: MeshOutput) -> None:
        bodies(sample, output)
        if watch is not None:
            watch(sample, output)

    measured = measure(pipeline, samples, sampling, progress=progress, observe=observe)[sampling.num_hypotheses]
    return {
        "split": split,
        "people": people,
        **asked(pipeline, sampling),
        "protocol": "J14 regressed from the mesh, root mid-hip, mm",
        **summary(measured, pipeline.model.config.mode == "diffusion"),
        "bodies": bodies.report(),
        **({} if watch is None else {"bands": watch.report(measured)}),
    }


def asked(pipeline: HMDiffPipeline, sampling: SamplingConfig) -> dict[str, Any]:
    """The settings as a report of a split holds them."""
    return {
        "num_hypotheses": sampling.num_hypotheses,
        "num_inference_steps": sampling.num_inference_steps or pipeline.num_inference_steps,
        "sampler": sampling.scheduler or "as saved",
        "seed": sampling.seed,
        "surface": sampling.surface,
        "upright": sampling.upright,
    }


def with_estimate(
    sample: Sample,  # with pictures
    estimate: Callable[[Tensor], Tensor],  # (B, 3, S, S) RGB 0..1 -> (B, 26, 64, 64)
) -> Sample:
    """The sample with a pose estimator's heatmaps in place of its own."""
    if sample.image is None:
        raise UserError("a pose estimator reads pictures, and these people have none: give the data an image size")
    values = estimate(sample.image).detach().float().clamp_min(0).to(sample.image.device)
    return dataclasses.replace(sample, heatmaps=values, heatmap_valid=values.new_ones(values.shape[:2]).bool())


def as_heatmaps(sample: Sample) -> Heatmaps | None:
    """A sample's heatmaps as the pipeline's input; the unit of its photo is the crop's half-side."""
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
    center = values.new_full((count, 2), PHOTO / 2)
    if sample.principal_point is not None:
        center = center - sample.principal_point
    names = HAND21 if values.shape[1] == len(HAND21) else HALPE26
    return Heatmaps(values, sample.heatmap_valid, Crop.of(center, values.new_full((count,), 2.0)), names)


def photo_of(sample: Sample) -> dict[str, Any]:
    """What the pipeline is told of the photo that the crops are from, as a photo's user knows it."""
    if sample.principal_point is None or sample.focal is None or sample.heatmaps is None:
        return {}
    return {"photo_sizes": torch.full((len(sample.focal), 2), PHOTO), "focal": sample.focal}


def depth_of(pipeline: HMDiffPipeline, sample: Sample) -> dict[str, Any]:
    """The depth maps, for a pipeline that reads them; NaN all over where the data has none."""
    if not pipeline.model.config.depth_map:
        return {}
    if sample.depth_input is not None and sample.depth_input.isfinite().any():
        return {"depth": sample.depth_input}
    _say_once("people without a depth map: scored without the depth path, so this is no figure of D2A-HMR")
    return {"depth": torch.full((len(sample), 2, 2), float("nan"))}


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)
