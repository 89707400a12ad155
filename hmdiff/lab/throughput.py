"""Does the data keep up with the training? People per second of each, measured apart on this machine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from hmdiff.body.body import load_body
from hmdiff.build import build_mesh, build_model, build_scheduler, build_source
from hmdiff.config import Config
from hmdiff.train.step import keypoint_map, training_losses
from hmdiff.train.stream import TrainingStream


def measure_throughput(
    config: Config,
    device: torch.device | str | None = None,  # of the training; None: the GPU, if there is one
    repeats: int = 3,  # of each timing; the fastest counts, since other programs only ever slow one down
    clock: Callable[[], float] = time.perf_counter,  # time.process_time on a busy machine
) -> dict[str, Any]:
    """Time batches of the config's data in one process, and its training step on a batch that is there already.

    Returns `data_people_per_second` (of one process), `step_people_per_second`, `data_share` (of the time, when the
    training draws its own people: data.workers=0) and `workers_needed` for the training never to wait for its data.
    A worker takes a processor core of its own. A config that asks for torch.compile is compiled.
    """
    values = config.training
    threads = torch.get_num_threads()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    body = load_body(config.body)
    mesh = build_mesh(config, body)
    config.model["pretrained"] = False  # nothing is downloaded to be timed
    model = build_model(config, body, mesh).to(device).train()
    if model.upsample_weight is not None:
        model.upsample_weight.requires_grad_(False)  # as the training does
    scheduler, keypoints = build_scheduler(config), keypoint_map(config.loss, model, body)
    stream = TrainingStream(build_source(config, body, mesh), config, 0, 1, model)
    if values.compile:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    people, draws = stream[0]
    people, draws = people.to(device), draws.to(device)

    def draw() -> None:
        stream[1]

    def step() -> None:
        narrow = values.mixed_precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if narrow else contextlib.nullcontext():
            loss = training_losses(model, scheduler, config.loss, people, draws, keypoints=keypoints)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), values.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        torch.set_num_threads(1)  # as in a worker
        data_seconds = _fastest(draw, repeats, clock)
        torch.set_num_threads(values.threads or threads)
        step_seconds = _fastest(step, repeats, clock)
    finally:
        torch.set_num_threads(threads)
    return {
        "image_size": stream.data.image_size,
        "batch_size": values.batch_size,
        "data_people_per_second": values.batch_size / data_seconds,
        "step_people_per_second": values.batch_size / step_seconds,
        "data_share": data_seconds / (data_seconds + step_seconds),
        "workers_needed": math.ceil(data_seconds / step_seconds),
    }


def _fastest(action: Callable[[], None], repeats: int, clock: Callable[[], float]) -> float:
    action()  # the first is slower: memory, compilation
    times = []
    for _ in range(repeats):
        started = clock()
        action()
        times.append(clock() - started)
    return min(times)
