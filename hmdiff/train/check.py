"""`hmdiff train --dry-run`: finds the errors of a long training before it starts. Nothing is written.

Each check is a row of a table with its result, or the error and its fix. Checks are independent unless one needs the
result of another. The training step is the real one, on the real device and batch size. Data loading is timed in one
process with one thread, as in one worker; the throughput of several workers is extrapolated linearly. torch.compile is
skipped: it takes minutes and hardly changes the memory.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hmdiff.body.body import load_body
from hmdiff.build import build_mesh
from hmdiff.config import Config
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import evaluate
from hmdiff.evaluate.table import Table, duration_text
from hmdiff.train.check_data import CAREFUL, describe_mixture, describe_source, describe_splits
from hmdiff.train.check_machine import (
    describe_balance,
    describe_gradients,
    describe_memory,
    disk_room,
    randomise_zeros,
    writable,
)
from hmdiff.train.checkpoint import checkpoints_in
from hmdiff.train.loop import Trainer
from hmdiff.train.memory import parameters
from hmdiff.train.timing import timings

FINE, WRONG, SKIPPED = "ok", "wrong", "-"  # and CAREFUL
_TIMED_STEPS, _TIMED_SECONDS = 3, 10.0  # limits on the steps that are timed after the first
_EVALUATED = 2  # people of the validation split in the trial evaluation


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    state: str  # FINE, CAREFUL, WRONG or SKIPPED
    found: str


@dataclasses.dataclass
class DryRun:
    """The rows, and their numbers by name."""

    checks: list[Check] = dataclasses.field(default_factory=list)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    main_process: bool = True

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.state == WRONG]


def dry_run(
    config: Config,
    tell: Callable[[str], None] = lambda name: None,  # called with the name of each check before it runs
) -> DryRun:
    """Check everything that a training of this config needs, and run a few steps."""
    run = _Checks(copy.deepcopy(config), tell)
    run.body_and_mesh()
    run.sources()
    run.splits()
    run.output()
    with tempfile.TemporaryDirectory(prefix="hmdiff-dry-run-") as folder:
        run.model(Path(folder))
        run.resume()
        run.disk()
        run.loading()
        run.step()
        run.evaluation()
        run.length()
    return run.result


class _Checks:
    def __init__(self, config: Config, tell: Callable[[str], None]) -> None:
        self.config, self.tell, self.result = config, tell, DryRun()
        self.body: Any = None
        self.mesh: Any = None
        self.trainer: Trainer | None = None
        self.sources_fine = self.splits_fine = False
        self.batches: list[Any] = []
        self.unmoved: set[str] = set()

    def _check(self, name: str, action: Callable[[], str | tuple[str, str]], ready: bool = True) -> bool:
        """Add a row; return whether it passed. `action` returns the text, or (state, text) if the state is not FINE."""
        state, found = SKIPPED, "needs what is wrong above"
        if ready:
            self.tell(name)
            try:
                answer = action()
                state, found = (FINE, answer) if isinstance(answer, str) else answer
            except UserError as error:
                state, found = WRONG, str(error)
        self.result.checks.append(Check(name, state, found))
        return state in (FINE, CAREFUL)

    def body_and_mesh(self) -> None:
        def read() -> str:
            self.body = load_body(self.config.body)
            self.mesh = build_mesh(self.config, self.body)
            return (
                f"{self.config.body!r}: {self.body.num_vertices:,} vertices, {self.body.num_joints} joints; "
                f"{self.mesh.num_coarse} coarse vertices"
            )

        self._check("body", read)

    def sources(self) -> None:
        """Check each source by itself, so that each error has its own row."""
        data, ready = self.config.data, self.mesh is not None
        if data.kind == "synthetic" or not data.sources:  # build_source raises if sources are missing
            name = "synthetic people" if data.kind == "synthetic" else ""
            look = functools.partial(describe_source, self.config, self.body, self.mesh, name)
            self.sources_fine = self._check("data", look, ready)
            return
        fine: list[bool] = []
        records: list[int] = []
        for number, entry in enumerate(data.sources):
            alone = copy.deepcopy(self.config)
            alone.data.sources, alone.data.splits, alone.data.label_noise = [copy.deepcopy(entry)], {}, 0.0
            where = str(entry.get("path", "synthetic")) if isinstance(entry, dict) else str(entry)
            look = functools.partial(describe_source, alone, self.body, self.mesh, where, records)
            fine.append(self._check(f"data {number + 1}", look, ready))
        self.sources_fine = all(fine)
        if self.sources_fine and len(data.sources) > 1:  # weights and sizes only matter in the mixture
            self.sources_fine = self._check("mixture", lambda: describe_mixture(self.config, self.body, self.mesh))
        self.result.numbers["records"] = float(sum(records))

    def splits(self) -> None:
        self.splits_fine = self._check(
            "splits", lambda: describe_splits(self.config, self.body, self.mesh), self.sources_fine
        )

    def output(self) -> None:
        self._check("output", lambda: f"would write to {writable(Path(self.config.output))}/")

    def model(self, folder: Path) -> None:
        def build() -> str:
            wanted, self.config.output = self.config.output, str(folder / "run")
            self.config.training.compile = False
            started = time.perf_counter()
            try:
                trainer = Trainer(self.config)
            except OSError as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"the model could not be built ({reason}); where it is about weights that are downloaded, put them "
                    "in timm's cache or give model.pretrained=false"
                ) from None
            finally:
                self.config.output = wanted
            trainer.folder = Path(wanted)  # only read from here on
            self.trainer, self.result.main_process = trainer, trainer.accelerator.is_main_process
            model = trainer.plain
            self.result.numbers["parameters"] = parameters(model, False)
            return (
                f"{parameters(model) / 1e6:.1f} M parameters trained of {parameters(model, False) / 1e6:.1f} M; "
                f"{model.num_tokens} tokens; built in "
                f"{time.perf_counter() - started:.1f} s"
            )

        if self._check("model", build, self.sources_fine and self.splits_fine):
            self._check("device", self._device)

    def _device(self) -> str | tuple[str, str]:
        assert self.trainer is not None
        accelerator, precision = self.trainer.accelerator, self.config.training.mixed_precision
        device = accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        many = accelerator.num_processes
        text = f"{many} processes ({accelerator.distributed_type.value})" if many > 1 else "1 process"
        text += f" on {name}, {'full precision' if precision == 'no' else precision}"
        if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
            return CAREFUL, f"{text}: this GPU emulates bf16; training.mixed_precision=fp16 is faster"
        return text

    def resume(self) -> None:
        def look() -> str:
            assert self.trainer is not None
            self.trainer._check_same_run()
            found = checkpoints_in(self.trainer.folder / "checkpoints")
            if not found:
                return "a new run: no checkpoint is there"
            self.trainer._resume()
            steps = self.config.training.steps
            if self.trainer.step >= steps:
                return f"{found[-1]}: all {steps} steps are done, nothing would be trained"
            return f"goes on from {found[-1]}, step {self.trainer.step} of {steps}"

        self._check("resume", look, self.trainer is not None)

    def disk(self) -> None:
        def room() -> str:
            assert self.trainer is not None
            text, self.result.numbers["disk_bytes"] = disk_room(self.config, self.trainer.plain)
            return text

        self._check("disk", room, self.trainer is not None)

    def loading(self) -> None:
        def draw() -> str:
            assert self.trainer is not None
            stream, threads = self.trainer.stream, torch.get_num_threads()
            count = max(2, self.config.training.gradient_accumulation)
            try:
                torch.set_num_threads(1)  # as in a worker
                numbers = itertools.cycle(range(len(stream)))
                times = timings(lambda: self.batches.append(stream[next(numbers)]), count)
            finally:
                torch.set_num_threads(threads)
            rate = self.config.training.batch_size / min(times)
            self.result.numbers["loaded_a_second"] = rate
            return f"{rate:.0f} people/s in one process, on one thread"

        self._check("loading", draw, self.trainer is not None)

    def step(self) -> None:
        fine = self._check("step", self._steps, bool(self.batches))
        if fine:
            assert self.trainer is not None
            trainer, numbers = self.trainer, self.result.numbers
            names = [name for name, _ in _trained(trainer)]
            numbers["without_gradient"] = len(self.unmoved)
            self._check("gradients", lambda: describe_gradients(names, self.unmoved))
            self._check("memory", lambda: describe_memory(trainer.accelerator.device, numbers))
            processes = trainer.accelerator.num_processes
            self._check("balance", lambda: describe_balance(self.config, numbers, processes))

    def _steps(self) -> str:
        trainer, values = self.trainer, self.config.training
        assert trainer is not None
        device = trainer.accelerator.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batches, times, loss = itertools.cycle(self.batches), [], float("nan")
        self.unmoved = set(dict(_trained(trainer)))
        hooks = [parameter.register_hook(self._moves(name)) for name, parameter in _trained(trainer)]
        try:
            for _ in range(1 + _TIMED_STEPS):
                started = time.perf_counter()
                loss = float(trainer._one_step(batches)["loss"])  # float() synchronises the device
                times.append(time.perf_counter() - started)
                if sum(times) > _TIMED_SECONDS:
                    break
            randomise_zeros(parameter for _, parameter in _trained(trainer))
            trainer._one_step(batches)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "out of memory" not in str(error):
                raise
            raise UserError(
                f"{device}: not enough memory for {values.batch_size} people a process; lower training.batch_size and "
                "raise training.gradient_accumulation, or give training.gradient_checkpointing=true"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
        seconds = min(times[1:] or times)
        people = values.batch_size * values.gradient_accumulation * trainer.accelerator.num_processes
        self.result.numbers |= {"step_seconds": seconds, "people_a_step": people, "loss": loss}
        compiled = ""
        if values.compile:
            compiled = " without torch.compile, by which the training's first steps take minutes and print nothing"
        return (
            f"{people} people x {self.config.loss.noise_levels} noise levels: {seconds:.2f} s (the first "
            f"{times[0]:.2f} s){compiled}; loss {loss:.4f}"
        )

    def _moves(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if name in self.unmoved and bool((gradient != 0).any()):
                self.unmoved.discard(name)

        return look

    def evaluation(self) -> None:
        def look() -> str:
            trainer, values = self.trainer, self.config.evaluation
            assert trainer is not None
            people = min(_EVALUATED, values.people)
            trainer.plain.eval()
            started = time.perf_counter()
            try:
                evaluate(trainer.pipeline, trainer.validation, "val", people, SamplingConfig(values.num_hypotheses, 1))
            finally:
                trainer.plain.train()
            seconds = time.perf_counter() - started
            at_most = seconds * values.people / people * values.num_inference_steps
            self.result.numbers["evaluation_seconds"] = at_most
            return (
                f"{people} people in {seconds:.1f} s at one denoising step; {values.people} at "
                f"{values.num_inference_steps} in at most {duration_text(at_most)}"
            )

        ready = "step_seconds" in self.result.numbers
        if self.config.evaluation.people or not ready:
            self._check("evaluation", look, ready)

    def length(self) -> None:
        def add() -> str:
            numbers, values = self.result.numbers, self.config.training
            assert self.trainer is not None
            left = max(0, values.steps - self.trainer.step)
            training = left * numbers["seconds_a_step"]
            looks = left // values.evaluate_every * numbers.get("evaluation_seconds", 0.0)
            numbers["whole_seconds"] = training + looks
            text = f"{left:,} steps in about {duration_text(training)}"
            text += f", and evaluations of at most {duration_text(looks)}"
            records = numbers.get("records")
            if records:
                text += f"; {left * numbers['people_a_step'] / records:.1f} times as many people as there are records"
            return text

        self._check("whole run", add, "seconds_a_step" in self.result.numbers)


def _trained(trainer: Trainer) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in trainer.plain.named_parameters() if value.requires_grad]


def print_dry_run(result: DryRun) -> None:
    """Print the table. Raises `UserError` with the first failure."""
    if result.main_process:
        rows = [(check.name, check.state, check.found) for check in result.checks]
        Table("dry run", ("check", "", "found"), rows, names=3).print()
        print("nothing was written")
    failures = result.failures
    if failures:
        more = f" ({len(failures) - 1} more above)" if len(failures) > 1 else ""
        raise UserError(failures[0].found + more)
