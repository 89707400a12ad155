"""Data loading against training speed: people per second of each, measured separately on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from hmdiff.config import Config
from hmdiff.lab.bare_training import BareTraining
from hmdiff.train.timing import timings


def measure_throughput(
    config: Config,
    device: torch.device | str | None = None,  # training device; None: the GPU, if available
    repeats: int = 3,  # timings per measurement; the fastest counts, since other load only slows a run down
    clock: Callable[[], float] = time.perf_counter,  # time.process_time on a busy machine
) -> dict[str, Any]:
    """Time the config's data loading in one process, and its training step on a preloaded batch.

    Returns `data_people_per_second` (one process), `step_people_per_second`, `data_share` (fraction of the time spent
    on data with data.workers=0) and `workers_needed` for training never to wait for data. Each worker needs a processor
    core. A config with torch.compile is compiled.
    """
    values = config.training
    threads = torch.get_num_threads()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    training = BareTraining(config, device)
    if values.compile:
        training.model.forward = torch.compile(training.model.forward)  # type: ignore[method-assign]
    people, draws = training.stream[0]
    people, draws = people.to(device), draws.to(device)

    try:
        torch.set_num_threads(1)  # as in a worker
        data_seconds = min(timings(lambda: training.stream[1], 1 + repeats, None, clock)[1:])
        torch.set_num_threads(values.threads or threads)
        step_seconds = min(timings(lambda: training.step(people, draws), 1 + repeats, device, clock)[1:])
    finally:
        torch.set_num_threads(threads)
    return {
        "image_size": training.stream.data.image_size,
        "batch_size": values.batch_size,
        "data_people_per_second": values.batch_size / data_seconds,
        "step_people_per_second": values.batch_size / step_seconds,
        "data_share": data_seconds / (data_seconds + step_seconds),
        "workers_needed": math.ceil(data_seconds / step_seconds),
    }
