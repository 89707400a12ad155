"""Several processes over gloo, forked from a test."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed


def run_processes(
    work: Callable[[int], None],  # called with the rank, in the group of all processes
    count: int,
    folder: Path,
) -> None:
    """Fails if `work` raises in any process."""
    context = multiprocessing.get_context("fork")  # a fresh interpreter needs ten seconds to import torch
    processes = [context.Process(target=_work, args=(work, rank, count, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * count


def _work(work: Callable[[int], None], rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        distributed.init_process_group("gloo", f"file://{folder}/store_{count}", rank=rank, world_size=count)
        work(rank)
        distributed.barrier()  # no process leaves while another still needs it
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Not the interpreter's shutdown: gloo's threads may outlive what they use there, and abort the process.
    os._exit(0)
