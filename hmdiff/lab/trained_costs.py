"""Measured cost of a row: parameters, milliseconds per image, milliseconds per training step.

All rows are timed in one process and interleaved (row 1, row 2, ..., row 1 again), so that other load affects all rows
alike; medians are reported. A training step is the real one without data: forward, backward, clipping, optimizer, EMA.
An image is encoded and denoised with the requested number of hypotheses. Our choice.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hmdiff.config import Config, load_config, save_config
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.evaluate.evaluation import as_heatmaps, predict_batch
from hmdiff.train.loop import Trainer
from hmdiff.train.timing import timings

REPEATS = 7
IMAGES = 8  # per call


def measure_costs(
    configs: Sequence[Config],  # one per row; timed at their initial weights
    num_hypotheses: int = 25,
    steps: int | None = None,  # denoising steps
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] | None = None,  # called with the number of timings done
) -> list[dict[str, Any]]:  # parameters, milliseconds, step_milliseconds and the conditions
    with tempfile.TemporaryDirectory(prefix="hmdiff-costs-") as folder:
        timed = [_Timed(config, Path(folder) / str(number)) for number, config in enumerate(configs)]
        for turn in range(repeats + 1):  # the first turn is a warm-up
            for row in timed:
                row.step(clock, turn > 0)
                row.image(num_hypotheses, steps, clock, turn > 0)
                if progress is not None:
                    progress(1)
        return [row.summary() for row in timed]


class _Timed:
    """A row's trainer, and the batch used for timing."""

    def __init__(self, config: Config, folder: Path) -> None:
        folder.mkdir()
        save_config(config, folder / "config.yaml")
        config = load_config(folder / "config.yaml", [f"output={folder / 'run'}", "training.compile=false"])
        self.mode = config.model["mode"]
        self.trainer = Trainer(config)
        self.batch = self.trainer.stream[0]
        sample = self.trainer.validation.block("val", 0)
        self.sample = sample.map(lambda tensor: tensor[:IMAGES])
        self.step_times: list[float] = []
        self.image_times: list[float] = []

    def step(self, clock: Callable[[], float], counts: bool) -> None:
        self.trainer.plain.train()
        step = functools.partial(self.trainer._one_step, itertools.repeat(self.batch))
        call_seconds = timings(step, 1, self.trainer.accelerator.device, clock)
        if counts:
            self.step_times += call_seconds

    def image(self, num_hypotheses: int, steps: int | None, clock: Callable[[], float], counts: bool) -> None:
        self.trainer.plain.eval()
        count = num_hypotheses if self.mode == "diffusion" else 1
        heatmaps = as_heatmaps(self.sample)
        call = functools.partial(
            predict_batch, self.trainer.pipeline, self.sample, heatmaps, SamplingConfig(count, steps)
        )
        call_seconds = timings(call, 1, self.trainer.accelerator.device, clock)
        if counts:
            self.image_times += [seconds / len(self.sample) for seconds in call_seconds]

    def summary(self) -> dict[str, Any]:
        values = self.trainer.config.training
        return {
            "parameters": sum(p.numel() for p in self.trainer.plain.parameters() if p.requires_grad),
            "step_milliseconds": 1000 * statistics.median(self.step_times),
            "milliseconds": 1000 * statistics.median(self.image_times),
            "batch_size": values.batch_size,
            "device": str(self.trainer.accelerator.device),
            "threads": torch.get_num_threads(),
        }
