"""Trains the MLP that aggregates N hypotheses into one mesh (`hmdiff/models/aggregation.py`); the pipeline is frozen.

Hypotheses of synthetic training people are sampled once, with a seed that no training uses by default. The head is then
trained on random subsets of each person's hypotheses; the loss is the mean distance over the coarse vertices. The epoch
with the lowest error on `val` is kept; epoch 0 is the plain mean. No test split is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.geometry import crop_rotation
from hmdiff.models.aggregation import AggregatorSizes, HypothesisAggregator
from hmdiff.pipeline import HMDiffPipeline

SEED = 7_654_321  # seed of the training people, added to the command's seed
BATCH = 64
RATE, WEIGHT_DECAY = 3e-4, 1e-2
LEAST_HYPOTHESES = 2  # smallest random subset in a training batch


class Drawn(NamedTuple):
    """Training data of the head: P people, in diffusion units and the model's frame."""

    points: Tensor  # (P, N, points, 3) float16, to halve the memory
    truth: Tensor  # (P, points, 3)


@torch.no_grad()
def draw_hypotheses(
    pipeline: HMDiffPipeline,
    data: PeopleSource,  # with depth maps and images if the model takes them
    stream: str,
    people: int,
    num_hypotheses: int,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,  # called with the number of people done
) -> Drawn:
    """Unguided hypotheses of the first people of a stream, and their ground truth."""
    model, points, truths = pipeline.model, [], []
    for number in range(-(-people // data.block_size)):
        sample = data.block(stream, number).to(pipeline.device)
        depth = sample.depth_input if model.config.depth_map else None
        conditioning, _ = model.encode(sample.image, sample.heatmaps, sample.heatmap_valid, depth, sample.peaks)
        first = number * data.block_size
        asked = SamplingConfig(num_hypotheses, num_inference_steps, seed)
        found, _ = pipeline.denoised(conditioning, range(first, first + len(sample)), asked)
        points.append(found.half().cpu())
        truths.append(true_points(pipeline, sample).cpu())
        if progress is not None:
            progress(len(sample))
    return Drawn(torch.cat(points)[:people], torch.cat(truths)[:people])


def true_points(pipeline: HMDiffPipeline, sample: Sample) -> Tensor:  # (B, P, 3) the model's frame
    assert sample.coarse_vertices is not None and sample.joints_3d is not None
    truth = pipeline.model.to_points(sample.coarse_vertices, sample.joints_3d)
    if pipeline.model.config.frame == "crop" and sample.focal is not None and sample.principal_point is not None:
        truth = truth @ crop_rotation(sample.principal_point, sample.focal)
    return truth


def train_aggregator(
    pipeline: HMDiffPipeline,  # receives the head
    drawn: Drawn,
    held_out: Drawn,  # from val: selects the epoch
    epochs: int = 30,
    hidden: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,  # called with the number of epochs done
) -> dict[str, Any]:
    """Train the head and set it in the pipeline. Returns settings and validation errors, mm over the coarse vertices.

    Raises:
        UserError: a direct baseline, whose hypotheses are all equal.
    """
    check_model(pipeline)
    model = pipeline.model
    torch.manual_seed(seed)
    head = HypothesisAggregator(AggregatorSizes(model.num_points, model.config.num_joints, hidden))
    head.set_basis(lbs_basis(pipeline.body, model.coarse_ids).points.cpu())
    coordinates = _coordinates(head, drawn.points)
    means, truth = _means(drawn.points), drawn.truth
    seen = _coordinates(head, held_out.points), _means(held_out.points), held_out.truth
    scale, count = model.config.mesh_scale * 1000, model.config.num_coarse

    def error(coordinates: Tensor, mean: Tensor, truth: Tensor) -> Tensor:  # () mm
        return ((mean + head.correction(coordinates) - truth)[:, :count].norm(dim=-1).mean()) * scale

    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = error(*seen).item()
    best, kept, chosen = before, copy.deepcopy(head.state_dict()), 0
    hypotheses = coordinates.shape[1]
    for epoch in range(epochs):
        for rows in torch.randperm(len(truth), generator=generator).split(BATCH):
            least = min(LEAST_HYPOTHESES, hypotheses)
            number = int(torch.randint(least, hypotheses + 1, (), generator=generator))
            some = torch.randperm(hypotheses, generator=generator)[:number]
            # The head corrects the mean of the same hypotheses that it reads.
            mean = drawn.points[rows][:, some].float().mean(1) if number < hypotheses else means[rows]
            loss = error(coordinates[rows][:, some], mean, truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = error(*seen).item()
        if now < best:
            best, kept, chosen = now, copy.deepcopy(head.state_dict()), epoch + 1
        if progress is not None:
            progress(1)
    head.load_state_dict(kept)
    found = {
        "people": len(truth),
        "num_hypotheses": hypotheses,
        "epochs": epochs,
        "best_epoch": chosen,
        "seed": seed,
        "val_people": len(held_out.truth),
        "val_mean_mm": before,
        "val_aggregated_mm": best,
    }
    head.fitted_on = found
    pipeline.aggregator = head.to(pipeline.device).eval()
    return found


def check_model(pipeline: HMDiffPipeline) -> None:
    """Raises `UserError` for a direct baseline, whose hypotheses are all equal."""
    if pipeline.model.config.mode == "direct":
        raise UserError("aggregator: a direct baseline gives one mesh; there are no hypotheses to put together")


def _coordinates(head: HypothesisAggregator, points: Tensor) -> Tensor:  # (P, N, points, 3) -> (P, N, D)
    return torch.cat([head.coordinates(part) for part in points.split(64)])


def _means(points: Tensor) -> Tensor:  # (P, points, 3)
    return torch.cat([part.float().mean(1) for part in points.split(64)])
