"""Accuracy and speed of fitting pose and shape to meshes: random bodies with and without noise, on this machine."""

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
    count: int,  # random bodies; their poses are more extreme than real ones (`random_bodies`)
    batch_size: int,
    noises: tuple[float, ...] = (0.0, 0.01),  # standard deviation of each vertex coordinate, metres
) -> Iterator[dict[str, Any]]:
    """A row for each noise level: distance between the fitted and the noise-free body in mm, and time in ms.

    `mean_mm`, `p95_mm`, `worst_mm` are statistics over bodies of the mean vertex distance. `wall_ms` and `process_ms`
    are medians over batches, per mesh; `process_ms` sums the processor time of all threads.
    """
    device = body.v_template.device
    bodies = random_bodies(body, count, seed=0)
    fit_parameters(body, bodies[: min(2, count)])  # exclude one-off setup per body from the timing
    generator = torch.Generator().manual_seed(1)
    for noise in noises:
        errors, wall, process = [], [], []
        for truth in bodies.split(batch_size):
            vertices = (truth + noise * torch.randn(truth.shape, generator=generator)).to(device)
            started = time.perf_counter(), time.process_time()
            parameters = fit_parameters(body, vertices)
            wait_for(device)
            if len(truth) == min(batch_size, count):
                wall.append((time.perf_counter() - started[0]) / len(truth))
                process.append((time.process_time() - started[1]) / len(truth))
            fitted = body(parameters.betas, axis_angle_to_matrix(parameters.pose), parameters.translation).vertices
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
