"""Training the MLP from N hypotheses to one mesh (`hmdiff/models/aggregation.py`) beside a finished pipeline.

Synthetic people of the training's stream, of a seed that no training has by default, are drawn once with all their
hypotheses; the head then learns the truth from random subsets of them, by the mean distance over the coarse vertices.
`val` chooses among the epochs, the plain mean (epoch 0) included; no test split is looked at. All of it is our choice.
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

SEED = 7_654_321  # of the people; added to the command's
BATCH = 64
RATE, WEIGHT_DECAY = 3e-4, 1e-2
LEAST_HYPOTHESES = 2  # that a training batch keeps


class Drawn(NamedTuple):
    """What the head learns from: P people, in units of the diffusion, the model's frame."""

    points: Tensor  # (P, N, points, 3) float16: half of what they take
    truth: Tensor  # (P, points, 3)


@torch.no_grad()
def draw_hypotheses(
    pipeline: HMDiffPipeline,
    data: PeopleSource,  # with maps and pictures where the model reads them
    stream: str,
    people: int,
    num_hypotheses: int,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,  # told how many people are done
) -> Drawn:
    """The first people of a stream with their hypotheses, unguided."""
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
    pipeline: HMDiffPipeline,  # gets the head
    drawn: Drawn,
    held_out: Drawn,  # of val: chooses among the epochs
    epochs: int = 30,
    hidden: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,  # told how many epochs are done
) -> dict[str, Any]:
    """Train the head and set it in the pipeline. Returns what val's people are off by, mm over the coarse vertices.

    Raises:
        UserError: a model without diffusion, whose hypotheses are copies of one.
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
            # The mean that the head corrects is of the same hypotheses that it sees.
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
    """Raises `UserError` for a model whose hypotheses are copies of one."""
    if pipeline.model.config.mode == "direct":
        raise UserError("aggregator: a direct baseline gives one mesh; there are no hypotheses to put together")


def _coordinates(head: HypothesisAggregator, points: Tensor) -> Tensor:  # (P, N, points, 3) -> (P, N, D)
    return torch.cat([head.coordinates(part) for part in points.split(64)])


def _means(points: Tensor) -> Tensor:  # (P, points, 3)
    return torch.cat([part.float().mean(1) for part in points.split(64)])
