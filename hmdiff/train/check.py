"""What a long training would stumble over, found before it starts: `hmdiff train --dry-run`. Nothing is written.

Every check is a line of a table: what was found, or what is wrong and how to mend it. A check that fails does not keep
the others from running, but for those that need what it was about. The step is the training's own, on the real device
with the real batch; loading is timed in one process on one thread, as one worker does it, so that what several give is
an estimate: their number times that. torch.compile is left out: it takes minutes and changes no memory to speak of.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import torch

from hmdiff.body.body import load_body
from hmdiff.build import build_mesh, build_source
from hmdiff.config import Config
from hmdiff.data.mixture import PERIOD, Mixture, WithSplits
from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import evaluate
from hmdiff.train.checkpoint import checkpoints_in
from hmdiff.train.loop import Trainer
from hmdiff.train.memory import parameters, peak_gigabytes

FINE, CAREFUL, WRONG, SKIPPED = "ok", "care", "wrong", "-"
_TIMED_STEPS, _TIMED_SECONDS = 3, 10.0  # steps after the first: at most so many, none begun after so long
_EVALUATED = 2  # people of the validation split on whom one evaluation is tried
_NEARLY_FULL = 0.9  # share of a GPU's memory above which an unlucky batch may not fit


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the table."""

    name: str
    state: str  # FINE, CAREFUL, WRONG or SKIPPED
    found: str


@dataclasses.dataclass
class DryRun:
    """The lines, and the numbers in them by name."""

    checks: list[Check] = dataclasses.field(default_factory=list)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    main_process: bool = True

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.state == WRONG]


def dry_run(
    config: Config,
    tell: Callable[[str], None] = lambda name: None,  # told what is checked next
) -> DryRun:
    """Check everything that a training of this config needs, and make a few steps. See the module."""
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
        """One line. The action gives what it found, after a state where that is not FINE; True if nothing is wrong."""
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

    # -- what is there -----------------------------------------------------------------------------------------------

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
        """Each by itself, so that each fault has its line."""
        data, ready = self.config.data, self.mesh is not None
        if data.kind == "synthetic":
            self.sources_fine = self._check("data", lambda: self._source(self.config, "synthetic people"), ready)
            return
        if not data.sources:  # what is wrong with that, the assembly says
            self.sources_fine = self._check("data", lambda: self._source(self.config, ""), ready)
            return
        fine: list[bool] = []
        records: list[int] = []
        for number, entry in enumerate(data.sources):
            alone = copy.deepcopy(self.config)
            alone.data.sources, alone.data.splits, alone.data.label_noise = [copy.deepcopy(entry)], {}, 0.0
            where = str(entry.get("path", "synthetic")) if isinstance(entry, dict) else str(entry)
            look = functools.partial(self._source, alone, where, records)
            fine.append(self._check(f"data {number + 1}", look, ready))
        self.sources_fine = all(fine)
        if self.sources_fine and len(data.sources) > 1:  # what only shows in the mixture: weights, sizes
            self.sources_fine = self._check("mixture", self._mixture)
        self.result.numbers["records"] = float(sum(records))

    def _source(self, config: Config, name: str, records: list[int] | None = None) -> str | tuple[str, str]:
        source = build_source(config, self.body, self.mesh)
        held = _held(source)
        sample = source.block("train", 0)
        text = name
        if held is not None:
            text += f": {held:,} records"
            if records is not None:
                records.append(held)
            far = held // (2 * source.block_size)
            if far:
                source.block("train", far)
        labels = _labels(sample)
        text += f"; of {len(sample)} people read: {labels or 'no label'}"
        if source.image_size is not None:
            text += f"; pictures of {source.image_size} px"
        if not labels:
            return CAREFUL, f"{text}: nobody of them teaches anything"
        return text

    def _mixture(self) -> str:
        source = build_source(self.config, self.body, self.mesh)
        while not isinstance(source, Mixture):
            source = source.train if isinstance(source, WithSplits) else source.source  # type: ignore[attr-defined]
        turns = [source.turn(number)[0] for number in range(PERIOD)]
        shares = [turns.count(number) / PERIOD for number in range(len(source.sources))]
        return "shares of the blocks: " + ", ".join(f"{share:.1%}" for share in shares)

    def splits(self) -> None:
        def read() -> str:
            source = build_source(self.config, self.body, self.mesh, full_mesh=True)
            words = []
            values = self.config.evaluation
            for name, people in (("val", values.people), ("test", values.test_people)):
                if not people:
                    words.append(f"{name}: none")
                    continue
                sample = source.block(name, 0)
                split = source.splits[name] if isinstance(source, WithSplits) else source
                held = _held(split)
                of = "synthetic people" if held is None else f"{held:,} records"
                words.append(f"{name}: {people} of {of}" if held is not None else f"{name}: {people} {of}")
                assert sample.vertices is not None
            return "; ".join(words)

        self.splits_fine = self._check("splits", read, self.sources_fine)

    def output(self) -> None:
        self._check("output", lambda: f"would write to {_writable(Path(self.config.output))}/")

    # -- what is built -----------------------------------------------------------------------------------------------

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
            trainer.folder = Path(wanted)  # only to look into, from here on
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
            model = self.trainer.plain
            weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
            checkpoint = weights + 4 * (parameters(model, False) + 2 * parameters(model))  # EMA, AdamW's two moments
            kept = self.config.training.keep_checkpoints
            needed = (kept + 1) * checkpoint + 2 * weights  # the new one beside the old ones; the pipeline likewise
            place = _existing(Path(self.config.output))
            free = shutil.disk_usage(place).free
            self.result.numbers["disk_bytes"] = needed
            text = f"{needed / 1e9:.2f} GB for {kept} + 1 checkpoints and the pipeline, {free / 1e9:.1f} GB free"
            if free < needed:
                raise UserError(f"{self.config.output}: {text}; free some, or lower training.keep_checkpoints")
            return text

        self._check("disk", room, self.trainer is not None)

    # -- what is timed -----------------------------------------------------------------------------------------------

    def loading(self) -> None:
        def draw() -> str:
            assert self.trainer is not None
            stream, threads = self.trainer.stream, torch.get_num_threads()
            count = max(2, self.config.training.gradient_accumulation)
            try:
                torch.set_num_threads(1)  # as in a worker
                times = []
                for index in range(count):
                    started = time.perf_counter()
                    self.batches.append(stream[index % len(stream)])
                    times.append(time.perf_counter() - started)
            finally:
                torch.set_num_threads(threads)
            rate = self.config.training.batch_size / min(times)
            self.result.numbers["loaded_a_second"] = rate
            return f"{rate:.0f} people/s in one process, on one thread"

        self._check("loading", draw, self.trainer is not None)

    def step(self) -> None:
        fine = self._check("step", self._steps, bool(self.batches))
        if fine:
            self._check("gradients", self._gradients)
            self._check("memory", self._memory)
            self._check("balance", self._balance)

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
                loss = float(trainer._one_step(batches)["loss"])  # waits for the device
                times.append(time.perf_counter() - started)
                if sum(times) > _TIMED_SECONDS:
                    break
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
        compiled = " without compiling" if values.compile else ""
        return (
            f"{people} people x {self.config.loss.noise_levels} noise levels: {seconds:.2f} s (the first "
            f"{times[0]:.2f} s){compiled}; loss {loss:.4f}"
        )

    def _moves(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if name in self.unmoved and bool((gradient != 0).any()):
                self.unmoved.discard(name)

        return look

    def _gradients(self) -> str | tuple[str, str]:
        """Does every parameter of every part that is on learn from this data? Those that do not, by part."""
        assert self.trainer is not None
        names = [name for name, _ in _trained(self.trainer)]
        self.result.numbers["without_gradient"] = len(self.unmoved)
        if not self.unmoved:
            return f"all {len(names)} parameters get one"
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(name.split(".")[0], []).append(name)
        words = []
        for part, own in parts.items():
            still = [name for name in own if name in self.unmoved]
            if still:
                some = "" if len(still) == len(own) else f" ({still[0]}{', ...' if len(still) > 1 else ''})"
                words.append(f"{part}: {len(still)} of {len(own)}{some}")
        return CAREFUL, (
            f"{len(self.unmoved)} of {len(names)} parameters get none from this data in {1 + _TIMED_STEPS} steps: "
            + "; ".join(words)
        )

    def _memory(self) -> str | tuple[str, str]:
        assert self.trainer is not None
        device = self.trainer.accelerator.device
        if device.type != "cuda":
            peak = peak_gigabytes()
            if peak is None:
                return CAREFUL, "this system does not tell"
            self.result.numbers["peak_bytes"] = peak * 1e9
            return f"{peak:.2f} GB at the peak of the process, its data and checks included"
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
        self.result.numbers["peak_bytes"] = peak
        used = torch.cuda.max_memory_allocated(device)
        text = f"{used / 1e9:.2f} GB used, {peak / 1e9:.2f} GB reserved of the GPU's {total / 1e9:.1f} GB"
        return (CAREFUL, f"{text}: nearly full") if peak > _NEARLY_FULL * total else text

    def _balance(self) -> str | tuple[str, str]:
        """Does the loading keep up? Of one process, which has workers of its own."""
        numbers, values, workers = self.result.numbers, self.config.training, self.config.data.workers
        assert self.trainer is not None
        micro = values.batch_size * values.gradient_accumulation
        rate = micro / numbers["step_seconds"]
        loading = micro / numbers["loaded_a_second"]  # seconds of one worker
        needed = int(-(-loading // numbers["step_seconds"]))
        numbers["workers_needed"] = needed
        numbers["seconds_a_step"] = (
            max(numbers["step_seconds"], loading / workers) if workers else numbers["step_seconds"] + loading
        )
        text = f"the step takes {rate:.0f} people/s"
        cores = (os.cpu_count() or 1) // max(1, self.trainer.accelerator.num_processes)
        if not workers:
            share = loading / (loading + numbers["step_seconds"])
            text += f", and loading in the same process {share:.0%} of the time"
            return (CAREFUL, f"{text}: data.workers={needed}") if share > 0.1 else text
        text += f", {workers} workers load about {workers * numbers['loaded_a_second']:.0f}"
        if needed > workers:
            text += f": loading starves the step; data.workers={needed}"
            return CAREFUL, text + (f", and there are {cores} cores for it" if needed > cores else "")
        if workers > cores:
            return CAREFUL, f"{text}, on {cores} cores: data.workers={max(1, cores)} is as many as they run at once"
        return text

    def evaluation(self) -> None:
        def look() -> str:
            trainer, values = self.trainer, self.config.evaluation
            assert trainer is not None
            people = min(_EVALUATED, values.people)
            trainer.plain.eval()
            started = time.perf_counter()
            try:
                evaluate(trainer.pipeline, trainer.validation, "val", people, values.num_hypotheses, 1)
            finally:
                trainer.plain.train()
            seconds = time.perf_counter() - started
            at_most = seconds * values.people / people * values.num_inference_steps
            self.result.numbers["evaluation_seconds"] = at_most
            return (
                f"{people} people in {seconds:.1f} s at one denoising step; {values.people} at "
                f"{values.num_inference_steps} in at most {_duration(at_most)}"
            )

        ready = "step_seconds" in self.result.numbers
        if ready and not self.config.evaluation.people:
            return
        self._check("evaluation", look, ready)

    def length(self) -> None:
        def add() -> str:
            numbers, values = self.result.numbers, self.config.training
            assert self.trainer is not None
            left = max(0, values.steps - self.trainer.step)
            training = left * numbers["seconds_a_step"]
            looks = left // values.evaluate_every * numbers.get("evaluation_seconds", 0.0)
            numbers["whole_seconds"] = training + looks
            text = f"{left:,} steps in about {_duration(training)}, and evaluations of at most {_duration(looks)}"
            records = numbers.get("records")
            if records:
                text += f"; {left * numbers['people_a_step'] / records:.1f} times as many people as there are records"
            return text

        self._check("whole run", add, "seconds_a_step" in self.result.numbers)


def _trained(trainer: Trainer) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in trainer.plain.named_parameters() if value.requires_grad]


def _held(source: PeopleSource) -> int | None:
    """How many people a source holds; None where they are drawn without end."""
    while isinstance(source, WithSplits | Mixture):
        source = source.train if isinstance(source, WithSplits) else source.sources[0]
    return len(source) if isinstance(source, Sized) else None


def _labels(sample: Sample) -> str:
    """How many of the people have which label."""
    counted = {
        "mesh": _count(sample.coarse_vertices, sample.has_vertices),
        "3D joints": _count(sample.joints_3d, sample.has_joints_3d),
        "2D keypoints": _count(sample.joints_2d, sample.joints_2d_confidence),
        "camera": _count(sample.pelvis, sample.has_perspective),
    }
    return ", ".join(f"{name} {count}" for name, count in counted.items() if count)


def _count(value: torch.Tensor | None, mask: torch.Tensor | None) -> int:
    if value is None:
        return 0
    return len(value) if mask is None else int((mask > 0).reshape(len(mask), -1).any(-1).sum())


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists():
            return place
    return Path("/")


def _writable(path: Path) -> Path:
    place = _existing(path)
    if not place.is_dir():
        raise UserError(f"{place}: a file of that name is in the way of a folder; move it or give another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: may not be written; choose another output folder")
    return path


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_dry_run(result: DryRun) -> None:
    """The table, and what is wrong in full. Raises `UserError` with the first failure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if result.main_process:
        console = Console()
        if not console.is_terminal:
            console = Console(width=140)
        table = Table(title="dry run", title_justify="left")
        for name in ("check", "", "found"):
            table.add_column(name, overflow="fold", no_wrap=name != "found")
        colours = {FINE: "green", CAREFUL: "yellow", WRONG: "red", SKIPPED: "dim"}
        for check in result.checks:
            table.add_row(check.name, Text(check.state, colours[check.state]), Text(check.found))
        console.print(table)
        print("nothing was written")
    failures = result.failures
    if failures:
        more = f" ({len(failures) - 1} more above)" if len(failures) > 1 else ""
        raise UserError(failures[0].found + more)
