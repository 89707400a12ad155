"""Learning curve of a config on one processor core: error against core-minutes, with optional overrides.

The clock is the process's CPU time, so other programs affect the result only through shared caches; it is stopped
during evaluation. The learning rate schedule is fitted to the budget: warm-up over 3 % of it, constant, then linear to
zero over the last 30 %. Errors are those of the regressor (one evaluation at t = T) on `val` people: coarse vertices,
root-relative, in the crop's frame, which direct and diffusion models both learn first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hmdiff.build import build_data
from hmdiff.config import Config
from hmdiff.data.sample import Sample
from hmdiff.geometry import crop_rotation
from hmdiff.lab.bare_training import BareTraining
from hmdiff.models.recovery import MeshRecoveryModel

SPLITS = ("val", "test_ood")
PEOPLE = 192
WARM_UP, DECAY = 0.03, 0.3  # fractions of the budget
NOT_COUNTED = 3  # untimed first steps: memory allocation, caches, compilation


class LearningPoint(NamedTuple):
    minutes: float  # CPU time of the process
    people: int  # samples seen so far
    errors: dict[str, float]  # by split, mm


def learning_curve(
    config: Config,
    core_minutes: float,
    points: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0),  # fractions of the budget
    clock: Callable[[], float] = time.process_time,
) -> Iterator[LearningPoint]:
    """Train from scratch for the given time and evaluate at `points`. One thread, synthetic people, no checkpoints."""
    torch.set_num_threads(1)
    values = dataclasses.replace(config.training, steps=1_000_000)
    config = dataclasses.replace(config, training=values)
    training = BareTraining(config)
    groups = training.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    data = build_data(
        dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=PEOPLE)),
        training.body,
        training.mesh,
        full_mesh=True,
    )
    held_out = {split: data.block(split, 0) for split in SPLITS}
    used, budget, due = 0.0, 60 * core_minutes, list(points)
    for index in range(values.steps):
        started = clock()
        people, draws = training.stream[index]
        share = min(1.0, used / budget)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1.0, share / WARM_UP + 0.01, (1 - share) / DECAY)
        training.step(people, draws)
        if index >= NOT_COUNTED:
            used += clock() - started
        if due and used >= budget * due[0]:
            due.pop(0)
            errors = {split: regression_error(training.model, sample) for split, sample in held_out.items()}
            yield LearningPoint(used / 60, (index + 1) * values.batch_size, errors)
        if not due:
            return


@torch.no_grad()
def regression_error(model: MeshRecoveryModel, sample: Sample) -> float:
    """Mean distance between the regressed and the ground truth coarse vertices, mm."""
    assert sample.coarse_vertices is not None and sample.principal_point is not None and sample.focal is not None
    model.eval()
    conditioning, _ = model.encode(None, sample.heatmaps, sample.heatmap_valid)
    predicted: Tensor = model.to_coarse(model.regress(conditioning)[:, 0].float())
    model.train()
    truth = sample.coarse_vertices
    if model.config.frame == "crop":
        truth = truth @ crop_rotation(sample.principal_point, sample.focal)
    return 1000 * float((predicted - truth).norm(dim=-1).mean())
