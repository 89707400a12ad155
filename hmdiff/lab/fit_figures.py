"""How well and how fast pose and shape are fitted to meshes: random bodies with and without noise, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from hmdiff.body.body import Body
from hmdiff.body.fitting import fit_parameters
from hmdiff.body.mesh_cache import random_bodies
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.train.timing import wait_for


def fit_figures(
    body: Body,
    count: int,  # random bodies, in poses wilder than people's (`random_bodies`)
    batch_size: int,
    noises: tuple[float, ...] = (0.0, 0.01),  # metres, standard deviation of each coordinate of each vertex
) -> Iterator[dict[str, Any]]:
    """A row for each noise: millimetres from the fitted body to the one that the noise was put on, and milliseconds.

    `mean_mm`, `p95_mm`, `worst_mm` are over bodies, of a body's mean over its vertices. `wall_ms` and `process_ms` are
    medians over whole batches, per mesh; the second counts the processor time of all threads.
    """
    device = body.v_template.device
    bodies = random_bodies(body, count, seed=0)
    fit_parameters(body, bodies[: min(2, count)])  # what is done once for a body is not timed
    generator = torch.Generator().manual_seed(1)
    for noise in noises:
        errors, wall, process = [], [], []
        for truth in bodies.split(batch_size):
            given = (truth + noise * torch.randn(truth.shape, generator=generator)).to(device)
            started = time.perf_counter(), time.process_time()
            found = fit_parameters(body, given)
            wait_for(device)
            if len(truth) == min(batch_size, count):
                wall.append((time.perf_counter() - started[0]) / len(truth))
                process.append((time.process_time() - started[1]) / len(truth))
            fitted = body(found.betas, axis_angle_to_matrix(found.pose), found.translation).vertices
            errors.append((fitted - truth.to(device)).norm(dim=-1).mean(-1).cpu())
        error = 1000 * torch.cat(errors)
        yield {
            "noise_mm": 1000 * noise,
            "mean_mm": float(error.mean()),
            "p95_mm": float(error.quantile(0.95)),
            "worst_mm": float(error.max()),
            "wall_ms": 1000 * statistics.median(wall),
            "process_ms": 1000 * statistics.median(process),
        }
