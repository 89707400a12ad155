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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, J14, joint_indices
from hmdiff.data.sample import PeopleSource, Sample, concatenate
from hmdiff.diffusion.hypotheses import select, weighted_mean
from hmdiff.errors import UserError
from hmdiff.evaluate.measured import Measured, summary
from hmdiff.evaluate.metrics import (
    bootstrap_interval,
    hypothesis_errors,
    mesh_errors,
    multi_hypothesis,
    oracle_curve,
    root_of,
)
from hmdiff.evaluate.plausibility import BodyWatch
from hmdiff.evaluate.visibility_bands import BandWatch
from hmdiff.heatmaps import Crop, Heatmaps
from hmdiff.names import METRICS
from hmdiff.pipeline import HMDiffPipeline, MeshOutput

if TYPE_CHECKING:
    from hmdiff.diffusion.guidance import Guidance

ROOT = ("left_hip", "right_hip")
KINDS = ("first", "mean", "oracle")  # of every report
SELECTED = "selected"  # of new ones: the hypothesis chosen without the ground truth
WEIGHTED = "weighted"  # the mean, those that agree with the heatmaps counting more (`hypotheses.weighted_mean`)
AGGREGATED = "aggregated"  # of pipelines that have the MLP from N hypotheses to one mesh, for all that were drawn
COUNTS = (1, 5, 10, 25, 100)  # numbers of hypotheses that the literature reports
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
    counts: Sequence[int] = (25,),  # numbers of hypotheses; the largest is drawn, the others are its first ones
    num_inference_steps: int | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    eta: float | None = None,
    guidance: Guidance | None = None,
    progress: Callable[[int], None] | None = None,  # told how many people are done
    clock: Callable[[], float] = time.perf_counter,
    batch: int | None = None,  # people a call, at most; None: as the samples come
    observe: Callable[[Sample, MeshOutput], None] | None = None,  # shown every call's people and hypotheses
    surface: str = "body",  # of the hypotheses, as the pipeline's
    upright: bool = True,  # as the pipeline's
) -> dict[int, Measured]:  # by count
    """The errors of every person. Hypotheses, guided ones too, are nested by seed: one run serves several counts."""
    counts, direct = sorted(set(counts)), pipeline.model.config.mode == "direct"
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    true: list[Tensor] = []
    calls: list[tuple[int, float]] = []
    at_once = max(1, MESHES_AT_ONCE // counts[-1])
    for sample in _parts(samples, at_once if batch is None else min(batch, at_once)):
        heatmaps = as_heatmaps(sample)
        started = clock()
        output = ask(
            pipeline, sample, heatmaps, counts[-1], num_inference_steps, seed, scheduler, eta, guidance, surface,
            upright,
        )  # fmt: skip
        calls.append((len(output.vertices), clock() - started))
        assert output.keypoints is not None and sample.keypoints_3d is not None and sample.vertices is not None
        place = output.vertices.device
        predicted, target = output.keypoints[:, :, _J14], sample.keypoints_3d[:, _J14].to(place)
        vertices = sample.vertices.to(place)
        each, mean_of_all = hypothesis_errors(output.vertices, predicted, vertices, target, J14, ROOT)
        relative = predicted - root_of(predicted, J14, ROOT)
        for count in counts:
            likely, regressed = (
                None if values is None else values[:, :count]
                for values in (output.log_likelihood, output.rle_log_likelihood)
            )
            seen = None if output.reprojection is None else output.reprojection.first(count)
            first = output.vertices[:, :count]
            chosen, mean = select(first, output.joints[:, :count, 0], likely, regressed, seen), mean_of_all
            if count < counts[-1]:
                mean = _mean_errors(output.vertices[:, :count], predicted[:, :count], vertices, target)
            cut = {metric: errors[:, :count] for metric, errors in each.items()}
            errors = multi_hypothesis(cut, mean, chosen)
            whole = {WEIGHTED: None if seen is None or direct or count == 1 else weighted_mean(first, seen),
                     AGGREGATED: output.aggregated_vertices if count == counts[-1] else None}  # fmt: skip
            for kind, one in whole.items():
                if one is not None:
                    together = mesh_errors(one, pipeline.body.keypoints(one)[:, _J14], vertices, target, J14, ROOT)
                    for metric, values in together.items():
                        errors[metric][kind] = values
            found[count].append({
                "errors": errors,
                "best_of": {metric: oracle_curve(errors, (*COUNTS, count)) for metric, errors in cut.items()},
                "joints": relative[:, :count],
                "guidance": _guidance_report(output, count),
                **({"temperatures": output.temperature} if output.calibrated_spread else {}),
            })
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


def ask(
    pipeline: HMDiffPipeline,
    sample: Sample,
    heatmaps: Heatmaps | None,
    num_hypotheses: int,
    num_inference_steps: int | None,
    seed: int,
    scheduler: str | None,
    eta: float | None = None,
    guidance: Guidance | None = None,
    surface: str = "body",
    upright: bool = True,
) -> MeshOutput:
    """One call of the pipeline; people are numbered by their place in the split. Returns when the device is done."""
    options: dict[str, Any] = photo_of(sample) | depth_of(pipeline, sample) | {"surface": surface}
    if not upright:
        options["upright"] = False
    if eta is not None:
        options["eta"] = eta
    if guidance is not None:
        options["guidance"] = guidance
    output = pipeline(
        sample.image, heatmaps, num_hypotheses, num_inference_steps, seed, scheduler,
        people=sample.index.tolist() if sample.index is not None else None, **options,
    )  # fmt: skip
    if output.vertices.is_cuda:
        torch.cuda.synchronize(output.vertices.device)
    return output


def _mean_errors(
    vertices: Tensor,  # (B, n, V, 3)
    joints: Tensor,  # (B, n, 14, 3)
    target_vertices: Tensor,  # (B, V, 3)
    target_joints: Tensor,  # (B, 14, 3)
) -> dict[str, Tensor]:  # (B,) mm
    origin = root_of(joints, J14, ROOT)
    mean_vertices, mean_joints = (vertices - origin).mean(1), (joints - origin).mean(1)
    return mesh_errors(mean_vertices, mean_joints, target_vertices, target_joints, J14, ROOT)


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


def _parts(samples: Iterable[Sample], size: int) -> Iterator[Sample]:
    """Samples of at most so many people."""
    for sample in samples:
        for first in range(0, len(sample), size):
            yield sample.map(lambda tensor, first=first: tensor[first : first + size])  # type: ignore[misc]


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
    num_hypotheses: int = 25,
    num_inference_steps: int | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    progress: Callable[[int], None] | None = None,  # told how many people are done
    *,
    eta: float | None = None,
    guidance: Guidance | None = None,
    estimate: Callable[[Tensor], Tensor] | None = None,  # a pose estimator in place of the split's own heatmaps
    bands: bool = False,  # also report["bands"], see `evaluate.visibility_bands`; the data needs pictures or maps
    surface: str = "body",  # of the hypotheses: the nearest bodies', or the predicted "vertices"
    upright: bool = True,  # turn the crops of people who lie or are upside down
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

    measured = measure(
        pipeline, samples, (num_hypotheses,), num_inference_steps, seed, scheduler, eta, guidance, progress,
        observe=observe, surface=surface, upright=upright,
    )[num_hypotheses]  # fmt: skip
    return {
        "split": split,
        "people": people,
        "num_hypotheses": num_hypotheses,
        "num_inference_steps": num_inference_steps or pipeline.num_inference_steps,
        "sampler": scheduler or "as saved",
        "seed": seed,
        "surface": surface,
        "upright": upright,
        "protocol": "J14 regressed from the mesh, root mid-hip, mm",
        **summary(measured, pipeline.model.config.mode == "diffusion"),
        "bodies": bodies.report(),
        **({} if watch is None else {"bands": watch.report(measured)}),
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
    return Heatmaps(values, sample.heatmap_valid, Crop.of(center, values.new_full((count,), 2.0)))


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


@functools.lru_cache(maxsize=4)
def _mean_person(data: PeopleSource, people: int, split: str) -> tuple[Tensor, Tensor]:  # (V, 3), (J, 3)
    sample = concatenate(list(split_batches(data, "train", people)))
    if sample.has_vertices is not None and not sample.has_vertices.any():  # keypoints alone are trained on
        sample = data.block(split, 0)
    assert sample.vertices is not None and sample.keypoints_3d is not None
    there = slice(None) if sample.has_vertices is None else sample.has_vertices
    return sample.vertices[there].mean(0), sample.keypoints_3d[there].mean(0)


def mean_mesh_errors(
    data: PeopleSource,
    split: str,
    people: int,
    training_people: int = 512,
) -> dict[str, dict[str, float]]:  # metric -> {value, low, high} mm
    """The errors of predicting for everybody the mean mesh of training people, in the camera's frame.

    Where none of them has a mesh, the mean mesh of the split's first block.
    """
    vertices, keypoints = _mean_person(data, training_people, split)
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


def mean_mesh_error(data: PeopleSource, split: str, people: int) -> float:
    """PVE of the mean mesh, mm: what a model must beat to have learned anything."""
    return mean_mesh_errors(data, split, people)["pve"]["value"]
