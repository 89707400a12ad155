"""Timing of repeated calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def timings(
    action: Callable[[], Any],
    repeats: int,
    device: Any = None,  # a torch.device; a GPU is synchronised after each call
    clock: Callable[[], float] = time.perf_counter,  # time.process_time on a busy machine
) -> list[float]:  # seconds per call; the first is slower: memory, caches, compilation
    times = []
    for _ in range(repeats):
        started = clock()
        action()
        wait_for(device)
        times.append(clock() - started)
    return times


def wait_for(device: Any) -> None:
    """Synchronise a GPU; a CPU is always synchronous."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
