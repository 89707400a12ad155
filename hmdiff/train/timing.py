"""Seconds of an action, call by call: where every table of times gets its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def timings(
    action: Callable[[], Any],
    repeats: int,
    device: Any = None,  # a torch.device; a GPU is waited for
    clock: Callable[[], float] = time.perf_counter,  # time.process_time where other programs run
) -> list[float]:  # one a call; the first is slower: memory, caches, compilation
    times = []
    for _ in range(repeats):
        started = clock()
        action()
        wait_for(device)
        times.append(clock() - started)
    return times


def wait_for(device: Any) -> None:
    """Until a GPU has done what it was given; a processor has done it already."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
