"""A grid of sampling settings over one split. All cells use the same people and noise, so differences are paired.

Each cell is a JSON file, named by its settings and the model's hash and written atomically: finished cells are reused,
and a grid can grow. It stores the error of every person, from which paired intervals are computed. Hypotheses are
nested by seed, so cells that differ only in the number of hypotheses share one run. Our choice throughout.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.schedule import change_scheduler
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import (
    MESHES_AT_ONCE,
    as_heatmaps,
    measure,
    predict_batch,
    split_batches,
    with_estimated_heatmaps,
)
from hmdiff.evaluate.measured import Measured, coverage_per_person, summary
from hmdiff.evaluate.store import digest, save_report, stored
from hmdiff.lab.comparison import UNGUIDED
from hmdiff.pipeline import HMDiffPipeline

FORMAT = 1
NO_SAMPLER = "none"  # sampler name of a model without diffusion
REPEATS = 5  # minimum number of timed calls per cell
# Approximate cost of a step relative to an unguided one: DAT backpropagates through the denoiser.
_STEP_COST = {UNGUIDED: 1.0, "disrupted": 1.2, "dat": 3.0}
_MESH_COST = 2.0  # cost of upsampling and scoring one hypothesis, in unguided steps


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and its sampling settings."""

    model: str  # label
    sampling: SamplingConfig

    @property
    def mode(self) -> str:
        return UNGUIDED if self.sampling.guidance is None else self.sampling.guidance.mode


def resolved(setting: Setting, pipeline: HMDiffPipeline) -> Setting:
    """The setting with all defaults filled in, in a canonical form: equivalent settings become equal.

    Raises:
        UserError: an unknown sampler, or more steps than the model has.
    """
    sampling = setting.sampling
    if pipeline.model.config.mode == "direct":  # one deterministic step: all hypotheses are equal
        return Setting(setting.model, SamplingConfig(1, 1, sampling.seed, NO_SAMPLER, 0.0))
    total = pipeline.scheduler.config.num_train_timesteps
    if sampling.num_inference_steps is not None and not 1 <= sampling.num_inference_steps <= total:
        steps = sampling.num_inference_steps
        raise UserError(f"steps {steps}: {setting.model} was trained with {total} steps; give 1 to {total}")
    if sampling.num_hypotheses < 1:
        raise UserError(f"number of hypotheses {sampling.num_hypotheses}: at least 1 is needed")
    complete = pipeline.resolved(sampling)
    assert complete.scheduler is not None
    change_scheduler(pipeline.scheduler, complete.scheduler)
    return Setting(setting.model, complete if complete.scheduler == "ddim" else complete.but(eta=0.0))


@dataclasses.dataclass
class Study:
    """The models, the people, and the folder of the cells."""

    pipelines: dict[str, HMDiffPipeline]
    hashes: dict[str, str]  # label -> hash of the model's files
    people_of: Callable[[HMDiffPipeline], PeopleSource]  # with the full mesh and the inputs that the model reads
    folder: Path
    split: str = "val"
    people: int = 500
    batch: int = 8  # people per call; affects only the timing
    estimate: Callable[[Tensor], Tensor] | None = None  # a pose estimator that replaces the split's heatmaps
    heatmaps: str = "synthetic"  # name and hash of that estimator
    _estimated: dict[int, list[Sample]] = dataclasses.field(default_factory=dict, repr=False)  # by data set

    def samples(self, pipeline: HMDiffPipeline) -> Iterator[Sample]:
        """The people. Estimated heatmaps (0.4 MB per person) are kept in memory, since estimation is slow."""
        data = self.people_of(pipeline)
        if not data.full_mesh:
            raise UserError("experiments need the full mesh of their people: build the data with full_mesh=True")
        batches = split_batches(data, self.split, self.people)
        if self.estimate is None:
            yield from batches
            return
        cached = self._estimated.setdefault(id(data), [])
        for number, sample in enumerate(batches):
            if number == len(cached):
                maps = with_estimated_heatmaps(sample, self.estimate)
                cached.append(Sample(heatmaps=maps.heatmaps, heatmap_valid=maps.heatmap_valid))
            maps = cached[number]
            yield dataclasses.replace(sample, heatmaps=maps.heatmaps, heatmap_valid=maps.heatmap_valid)

    def settings(self, setting: Setting) -> dict[str, Any]:
        """Everything that a cell's result depends on, as JSON; `setting` is resolved."""
        sampling = setting.sampling
        values = {
            "format": FORMAT,
            "model": setting.model,
            "model_hash": self.hashes[setting.model],
            "split": self.split,
            "people": self.people,
            "seed": sampling.seed,
            "batch": self.batch,
            "heatmaps": self.heatmaps,
            "num_hypotheses": sampling.num_hypotheses,
            "steps": sampling.num_inference_steps,
            "sampler": sampling.scheduler,
            "eta": sampling.eta,
            "guidance": None if sampling.guidance is None else dataclasses.asdict(sampling.guidance),
        }
        result: dict[str, Any] = json.loads(json.dumps(values, default=lambda tensor: tensor.tolist()))
        return result

    def path(self, setting: Setting) -> Path:
        return self.folder / f"{setting.model}_{self.split}_{digest(self.settings(setting), 16)}.json"

    def stored(self, setting: Setting) -> dict[str, Any] | None:
        """The cell's stored result; None if missing or damaged."""
        return stored(self.path(setting), self.settings(setting), ("settings", "errors", "values", "time"))


class Progress(NamedTuple):
    """Passed to the callback after every cell."""

    done: int  # cells, including stored ones
    total: int
    seconds_left: float  # estimated from the time per unit of work so far
    setting: Setting
    result: dict[str, Any]


def run_cells(
    study: Study,
    settings: Sequence[Setting],
    report: Callable[[Progress], None] | None = None,
    bar: Callable[[Setting], AbstractContextManager[Callable[[int], None]]] | None = None,  # progress bar of a run
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:  # in the order of the settings
    """Compute the missing cells, cheapest first, so that the time estimate converges early."""
    requested = [resolved(setting, study.pipelines[setting.model]) for setting in settings]
    cells = {setting: study.stored(setting) for setting in dict.fromkeys(requested)}
    results = {setting: result for setting, result in cells.items() if result is not None}
    runs = sorted(
        _runs([setting for setting in cells if setting not in results]), key=lambda run: cost_per_person(run[-1])
    )
    seconds, done, left = 0.0, 0.0, sum(cost_per_person(run[-1]) for run in runs)
    warm: set[str] = set()
    for run in runs:
        pipeline, largest = study.pipelines[run[-1].model], run[-1]
        if largest.model not in warm:  # the first call is slower
            timed_calls(study, largest, 1, clock, warm=False)
            warm.add(largest.model)
        counts = [setting.sampling.num_hypotheses for setting in run]
        with nullcontext() if bar is None else bar(largest) as update:
            started = clock()
            measured = measure(
                pipeline, study.samples(pipeline), _call(largest), counts, update, clock=clock, batch=study.batch
            )
            seconds += clock() - started
        done, left = done + cost_per_person(largest), left - cost_per_person(largest)
        for setting in run:
            result = cell(study, setting, measured[setting.sampling.num_hypotheses], clock)
            save_report(result, study.path(setting))
            results[setting] = result
            if report is not None:
                report(Progress(len(results), len(cells), seconds * left / done, setting, result))
    return [results[setting] for setting in requested]


def _runs(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Group settings that differ only in the number of hypotheses: one pipeline run each, the largest last."""
    runs: dict[Setting, list[Setting]] = {}
    for setting in settings:
        shared = dataclasses.replace(setting, sampling=setting.sampling.but(num_hypotheses=1))
        runs.setdefault(shared, []).append(setting)
    return [sorted(run, key=lambda setting: setting.sampling.num_hypotheses) for run in runs.values()]


def cell(
    study: Study,
    setting: Setting,
    measured: Measured,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """A cell's JSON: settings, summary, values of every person, milliseconds per image."""
    pipeline = study.pipelines[setting.model]
    diffusion = pipeline.model.config.mode == "diffusion"
    values: dict[str, Any] = {
        metric: {kind: _rounded(errors) for kind, errors in kinds.items()} for metric, kinds in measured.errors.items()
    }
    report = summary(measured, diffusion)
    if "coverage" in report:
        values["coverage"] = _rounded(coverage_per_person(measured), 6)
    values |= {name: _rounded(numbers, 6) for name, numbers in measured.guidance.items()}
    calls = [call for call in measured.calls if call[0] == measured.calls[0][0]]  # without a smaller last batch
    if len(calls) < REPEATS:
        calls += timed_calls(study, setting, REPEATS - len(calls), clock, warm=not calls)
    milliseconds = sorted(1000 * seconds / people for people, seconds in calls)
    quarter = len(milliseconds) // 4
    return {
        "settings": study.settings(setting),
        "code": code_digest(),
        **report,
        "time": {
            "milliseconds_per_image": statistics.median(milliseconds),
            "low": milliseconds[quarter],  # quartiles
            "high": milliseconds[-1 - quarter],
            "calls": len(milliseconds),
            "batch": calls[-1][0],
            "device": str(pipeline.device),
            "threads": torch.get_num_threads(),
        },
        "values": values,
    }


@functools.cache
def code_digest() -> str:
    """Digest of the data and sampling code. Cells of older code are still used; the digest identifies them."""
    hasher, package = hashlib.sha256(), Path(__file__).resolve().parents[1]
    folders = [package / name for name in ("data", "diffusion", "heatmaps", "models", "pipeline")]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def timed_calls(
    study: Study,
    setting: Setting,  # resolved
    repeats: int,
    clock: Callable[[], float],
    warm: bool,  # add an untimed warm-up call
) -> list[tuple[int, float]]:  # number of people and seconds
    """Timed calls on the first people of the split."""
    pipeline = study.pipelines[setting.model]
    sample = next(study.samples(pipeline))
    size = min(len(sample), study.batch, max(1, MESHES_AT_ONCE // setting.sampling.num_hypotheses))
    sample = sample.map(lambda tensor: tensor[:size])
    heatmaps, calls = as_heatmaps(sample), []
    for _ in range(repeats + warm):
        started = clock()
        predict_batch(pipeline, sample, heatmaps, _call(setting))
        calls.append((size, clock() - started))
    return calls[warm:]


def _call(setting: Setting) -> SamplingConfig:
    """The sampling settings to call the pipeline with."""
    none = setting.sampling.scheduler == NO_SAMPLER
    return setting.sampling.but(scheduler=None) if none else setting.sampling


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values.double().tolist()]


def cost_per_person(setting: Setting) -> float:
    """Cost per person in unguided denoising steps of one hypothesis."""
    sampling = setting.sampling
    steps = (sampling.num_inference_steps or 1) * (2 if sampling.scheduler == "heun" else 1)
    return sampling.num_hypotheses * (steps * _STEP_COST.get(setting.mode, 1.0) + _MESH_COST)
