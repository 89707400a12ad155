"""Runtime of each pipeline stage, relative to one forward pass of a paper-size direct regressor.

Each stage runs separately, on the body, checkpoint and photo that `hmdiff sample` would use. FLOPs come from
`torch.utils.flop_counter` (matrix products and convolutions); the fraction of peak relates them to the rate of a square
matrix product on this machine. With one CPU thread the clock is the process's CPU time, so that other programs do not
count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.mesh_cache import load_mesh
from hmdiff.build import build_model
from hmdiff.config import Config
from hmdiff.diffusion.guidance import Guidance
from hmdiff.errors import UserError
from hmdiff.estimators.people import PhotoPeople, read_people
from hmdiff.files.resources import asset_path
from hmdiff.geometry import crop_rotation
from hmdiff.lab.direct_regressor import IMAGE_SIZE, direct_regressor
from hmdiff.names import SAVED
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.pipeline.surface import nearest_bodies
from hmdiff.train.memory import peak_gigabytes
from hmdiff.train.timing import timings
from hmdiff.viz.person_files import write_person

REGRESSOR = "direct regressor, one pass"
_MATRIX = 768  # matrix size of the peak measurement


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    people: int = 1  # B
    hypotheses: int = 25  # N
    steps: int | None = None  # K; None: the checkpoint's
    repeats: int = 3
    dtype: torch.dtype = torch.float32
    compile: bool = False  # torch.compile for encode and denoise
    start: bool = True  # time the imports, in separate processes
    regressor: bool = True
    files: tuple[str, ...] = SAVED
    counts: tuple[int, ...] = (1, 5, 25)  # N of the curves
    lengths: tuple[int, ...] = (1, 3, 10)  # K of the curves
    batches: tuple[int, ...] = (1, 4)  # B of the curves


@dataclasses.dataclass(frozen=True)
class Row:
    """One stage. Seconds are medians; the spread is half the range."""

    stage: str
    seconds: float
    spread: float
    first: float  # seconds of the first call, with nothing compiled or cached
    flops: int | None = None
    of_peak: float | None = None  # fraction of the matrix product's rate
    peak_gigabytes: float | None = None  # peak memory of the process so far

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Bench:
    """Collects the measured rows; `peak` is the rate of a matrix product in FLOP/s."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        single_thread = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if single_thread else time.perf_counter
        self.clock_name = "processor time" if single_thread else "wall time"
        matrix = torch.randn(_MATRIX, _MATRIX, device=device).to(options.dtype)
        fastest = min(timings(lambda: matrix @ matrix, 5, device, self.clock)[1:])
        self.peak = 2 * _MATRIX**3 / fastest

    def row(self, stage: str, action: Callable[[], Any], count: bool = False) -> Row:
        """Time an action; with `count`, count its FLOPs too."""
        first, *times = timings(action, 1 + self.options.repeats, self.device, self.clock)
        flops = counted_flops(action) if count else None
        seconds = statistics.median(times)
        share = None if not flops else flops / seconds / self.peak
        return Row(stage, seconds, (max(times) - min(times)) / 2, first, flops, share, peak_gigabytes())


def counted_flops(action: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def start_rows(repeats: int) -> Iterator[Row]:
    """CPU time of imports, each in a new process. `import torch` is the lower bound."""
    for stage, code in (
        ("import torch", "import torch"),
        ("import the pipeline", "import hmdiff.pipeline"),
        ("hmdiff --help", "import hmdiff.cli.main as m; m.build_parser().format_help()"),
    ):
        command = [sys.executable, "-c", code]
        run = functools.partial(subprocess.run, command, check=True)
        times = timings(run, 1 + repeats, clock=lambda: sum(os.times()[2:4]))
        yield Row(stage, statistics.median(times[1:]), (max(times[1:]) - min(times[1:])) / 2, times[0])


def stage_rows(
    checkpoint: str | Path,
    device: torch.device,
    options: Options,
) -> tuple[Bench, Iterator[Row]]:
    """The bench, and an iterator that yields each row once it is measured.

    Raises:
        UserError: more steps than the checkpoint was trained with, or a checkpoint that reads images.
    """
    bench = Bench(options, device)
    return bench, _rows(bench, checkpoint, device, options)


@torch.no_grad()
def _rows(bench: Bench, checkpoint: str | Path, device: torch.device, options: Options) -> Iterator[Row]:
    loaded: list[HMDiffPipeline] = []
    yield bench.row("load the checkpoint", lambda: loaded.append(HMDiffPipeline.from_pretrained(checkpoint, device)))
    pipe = loaded[-1].to(dtype=options.dtype)
    if pipe.model.config.inputs != "heatmaps":
        raise UserError(f"{checkpoint}: reads pictures; the stages are measured on checkpoints that read heatmaps")
    if options.compile:
        pipe.compile()
    photo = asset_path("sample.jpg")
    with contextlib.suppress(UserError):  # not installed
        source = pipe.source
        pixels = read_people(photo).pixels()
        yield bench.row("estimator, a photo", lambda: source.estimate(pixels))
    people_of_photo = read_people(photo)

    def run(count: int, steps: int | None, mode: str = "dat", people: int = options.people) -> Any:
        heatmaps = people_of_photo.heatmaps[[0] * people]
        guidance = Guidance(mode=mode)
        return pipe(heatmaps=heatmaps, num_hypotheses=count, num_inference_steps=steps, guidance=guidance)

    num_hypotheses = options.hypotheses
    # Before the rows that count FLOPs, so that the peak of memory is a result's own.
    yield bench.row(f"all of it, N = {num_hypotheses}, without DAT", lambda: run(num_hypotheses, options.steps, "none"))
    yield bench.row(f"all of it, N = {num_hypotheses}, with DAT", lambda: run(num_hypotheses, options.steps))
    yield from _network_rows(bench, pipe, people_of_photo, options)
    for count in options.counts:
        yield bench.row(f"curve: N = {count}, with DAT", functools.partial(run, count, options.steps))
    for length in options.lengths:
        yield bench.row(f"curve: K = {length}, with DAT", functools.partial(run, num_hypotheses, length))
    for people in options.batches:
        batched = functools.partial(run, num_hypotheses, options.steps, people=people)
        row = bench.row(f"curve: B = {people}, a person, with DAT", batched)
        yield dataclasses.replace(row, seconds=row.seconds / people, spread=row.spread / people)
    yield from _token_rows(bench, pipe, options)
    yield from _file_rows(bench, pipe, photo, run(num_hypotheses, options.steps), options)
    if options.regressor:
        model = direct_regressor(device, options.dtype)
        picture = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device).to(options.dtype)
        yield bench.row(REGRESSOR, lambda: model(picture), count=True)


def _token_rows(bench: Bench, pipe: HMDiffPipeline, options: Options) -> Iterator[Row]:
    """One denoising step of the same network with other token settings and random weights."""
    settings = {name: value for name, value in pipe.model.config.items() if not name.startswith("_")}
    mesh = load_mesh(pipe.body)
    for tokens, patch in (("parts", 8), ("patches", 8), ("patches", 1)):
        with contextlib.suppress(UserError):  # lifting and refinement need patches
            config = Config(model={**settings, "tokens": tokens, "patch_size": patch, "pretrained": False})
            model = build_model(config, pipe.body, mesh).to(pipe.device).eval()
            values = torch.zeros(options.people, model.config.num_keypoints, *[model.config.heatmap_size] * 2)
            valid = torch.ones(values.shape[:2], dtype=torch.bool)
            conditioning = model.encode(None, values.to(pipe.device), valid.to(pipe.device))[0]
            points = torch.randn(options.people, options.hypotheses, model.num_points, 3, device=pipe.device)
            step = torch.full((1, 1), 0.5, device=pipe.device)
            name = "body parts" if tokens == "parts" else f"patches of {patch}" if patch > 1 else "vertices"
            run = functools.partial(model.denoise, points, step, conditioning)
            yield bench.row(f"curve: one denoising step, tokens {name}", run, count=True)


def _network_rows(bench: Bench, pipe: HMDiffPipeline, people_of_photo: PhotoPeople, options: Options) -> Iterator[Row]:
    model, device = pipe.model, pipe.device
    heatmaps = people_of_photo.heatmaps[[0] * options.people]
    values, valid = heatmaps.values.to(device), heatmaps.valid.to(device)
    reduced_precision = options.dtype != torch.float32

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, options.dtype, enabled=reduced_precision)

    def encoded() -> Any:
        with autocast():
            return model.encode(None, values, valid)[0]

    conditioning = encoded()
    points = torch.randn(options.people, options.hypotheses, model.num_points, 3, device=device)
    step = torch.full((1, 1), 0.5, device=device)

    def denoised(noisy: Tensor) -> Tensor:
        with autocast():
            return model.denoise(noisy, step, conditioning)

    yield bench.row("encode", encoded, count=True)
    size = f"of {options.people} x {options.hypotheses}"
    yield bench.row(f"one denoising step {size}", lambda: denoised(points), count=True)
    yield bench.row("keypoint regressor", lambda: model.keypoint_regressor(pipe.body))
    matrix = model.keypoint_regressor(pipe.body)
    rotation = crop_rotation(torch.zeros(options.people, 2, device=device), torch.ones(options.people, device=device))

    def guided() -> None:
        with torch.enable_grad():
            noisy = points.clone().requires_grad_() * 1.0  # not a leaf: torch's FLOP counter cannot follow leaves
            keypoints = (matrix @ model.to_coarse(denoised(noisy))) @ rotation[:, None].mT
            torch.autograd.grad(keypoints.square().sum(), noisy)

    yield bench.row(f"the same with DAT's gradient {size}", guided, count=True)
    coarse = model.to_coarse(denoised(points).float())
    translation = points.new_tensor([0.0, 0.0, 5.0]).expand(*points.shape[:2], 3)
    yield bench.row(f"upsampling {size}", lambda: model.upsample(coarse), count=True)
    yield bench.row(
        f"bodies and parameters {size}", lambda: nearest_bodies(pipe.body, model, coarse, translation), count=True
    )


def _file_rows(bench: Bench, pipe: HMDiffPipeline, photo: Path, output: Any, options: Options) -> Iterator[Row]:
    people_of_photo = read_people(photo)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.files:

            def write(kind: str = kind) -> None:
                write_person(output, 0, people_of_photo, 0, Path(folder) / "person", pipe.body, kinds=(kind,))

            yield bench.row("write npz, with its report" if kind == "npz" else f"write npz and {kind}", write)


def summary(bench: Bench, rows: list[Row], options: Options) -> dict[str, Any]:
    """All results, for a JSON file."""
    return {
        "machine": {
            "device": str(bench.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "clock": bench.clock_name,
        "peak_flops_per_second": bench.peak,
        "options": {**dataclasses.asdict(options), "dtype": str(options.dtype)},
        "rows": [row.as_json() for row in rows],
    }
