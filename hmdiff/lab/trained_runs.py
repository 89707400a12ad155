"""The trainings of an ablation: one folder each, finished ones are reused, interrupted ones resume.

    OUTPUT/runs/MODE_WHAT_DIGEST/seed_N/    a training as `hmdiff train` writes it, and done.json once finished

Folders are named by the trained config, so rows of several tables with the same model share one; its budget must match
the requested one. A run depends only on its config, not on the order of runs. Several processes may train one table at
once: each skips runs that another process is training.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hmdiff.config import Config, load_config, save_config
from hmdiff.errors import UserError
from hmdiff.evaluate.store import digest
from hmdiff.files.locks import try_claim
from hmdiff.files.resources import config_path
from hmdiff.files.storage import atomic_file, make_folder
from hmdiff.lab.ablations import MODES, Comparison, Row, check_table

DONE = "done.json"
# The config sections that identify a run, besides budget and seed; the number of data workers does not matter.
_IDENTIFYING_SECTIONS = ("body", "model", "diffusion", "data", "loss")
_IGNORED_DATA_KEYS = ("workers",)
BUDGET = (
    "steps",
    "batch_size",
    "gradient_accumulation",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "gradient_clip",
    "ema_decay",
    "mixed_precision",
    "start_from",
)
Train = Callable[[Config], int]  # trains or resumes; returns the step reached


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    folder: Path
    config: Config = dataclasses.field(compare=False, hash=False)
    label: str = dataclasses.field(default="", compare=False, hash=False)  # label of the first row that needs it

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def pipeline(self) -> Path:
        return self.folder / "pipeline"

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs that the tables need: `runs_of[table][row]` lists a row's runs, one per seed."""

    runs_of: dict[str, dict[str, list[Run]]]
    rows: dict[str, dict[str, Row]]

    @property
    def runs(self) -> list[Run]:
        """Every run once, ordered by seed: an unfinished plan has complete tables with fewer seeds."""
        every = [run for rows in self.runs_of.values() for runs in rows.values() for run in runs]
        return sorted(dict.fromkeys(every), key=lambda run: run.seed)


def row_config(
    table: Comparison,
    row: Row,
    seed: int,
    mode: str = "direct",
    steps: int | None = None,  # training steps; None: the base's
    changes: Sequence[str] = (),  # key=value for all rows; a row's own overrides take precedence
    base: str | None = None,  # replaces the table's base config
) -> Config:
    """The training config of a row, without its folder. The warm-up is scaled with the number of steps.

    Raises:
        UserError: an unknown mode or base config, or a key that the config does not have.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    assert table.base is not None
    path = config_path(base or table.base)
    plain = load_config(path, changes)
    total = steps or plain.training.steps
    warmup = min(plain.training.warmup_steps, max(1, total - 1))
    if steps is not None and not any(text.startswith("training.warmup_steps=") for text in changes):
        warmup = round(plain.training.warmup_steps * total / plain.training.steps)
    fixed = [
        f"model.mode={mode}",
        f"seed={seed}",
        f"training.steps={total}",
        f"training.warmup_steps={warmup}",
        # No evaluation during training: all runs are evaluated once all are trained.
        f"training.evaluate_every={total}",
        f"training.picture_every={total + 1}",
        "evaluation.test_people=0",
    ]
    return load_config(path, [*changes, *fixed, *row.overrides])


def identifying_config(config: Config) -> dict[str, Any]:
    """The config values that differ from the defaults, without budget, seed and folder.

    New config entries that are off by default therefore do not change existing runs.
    """
    defaults, changed = Config(), {}
    for name in _IDENTIFYING_SECTIONS:
        value, default = getattr(config, name), getattr(defaults, name)
        if isinstance(value, dict) or not dataclasses.is_dataclass(value):
            if value != default:
                changed[name] = value
            continue
        for field in dataclasses.fields(value):
            value_of_field, default_of_field = getattr(value, field.name), getattr(default, field.name)
            if value_of_field == default_of_field or (name == "data" and field.name in _IGNORED_DATA_KEYS):
                continue
            if dataclasses.is_dataclass(value_of_field):
                value_of_field = {
                    key: inner for key, inner in vars(value_of_field).items() if inner != getattr(default_of_field, key)
                }
            changed[f"{name}.{field.name}"] = value_of_field
    result: dict[str, Any] = json.loads(json.dumps(changed))
    return result


def budget(config: Config) -> dict[str, Any]:
    return {name: getattr(config.training, name) for name in BUDGET}


def run_name(config: Config, overrides: Sequence[str]) -> str:
    """Folder name of a config's runs, shared by rows of several tables with the same model."""
    named_overrides = sorted(text for text in overrides if not text.startswith("loss."))
    words = [re.sub(r"[^a-z0-9]+", "-", text.split(".", 1)[-1].lower()).strip("-") for text in named_overrides]
    words = [word.removesuffix("-true") for word in words]
    return "_".join([str(config.model["mode"]), *(words or ["base"]), digest(identifying_config(config))])


def make_plan(
    tables: dict[str, Comparison],
    output: Path,
    seeds: int = 3,
    mode: str = "direct",
    steps: int | None = None,
    changes: Sequence[str] = (),
    base: str | None = None,
) -> Plan:
    """Resolve every row. Raises `UserError` for unknown config keys, and for a folder with another budget."""
    runs_of: dict[str, dict[str, list[Run]]] = {}
    for name, table in tables.items():
        check_table(name, table)
        runs_of[name] = {}
        for row in table.rows:
            runs, resolved = [], row_config(table, row, 0, mode, steps, changes, base)
            for seed in range(seeds):
                config = copy.deepcopy(resolved)
                config.seed = seed
                folder = output / "runs" / run_name(config, row.overrides) / f"seed_{seed}"
                config.name, config.output = f"{row.label}, seed {seed}", str(folder)
                runs.append(Run(folder, config, row.label))
                check_same_config(runs[-1])
            runs_of[name][row.label] = runs
    return Plan(runs_of, {name: {row.label: row for row in table.rows} for name, table in tables.items()})


def check_same_config(run: Run) -> None:
    """Raises `UserError` if the folder holds a run with another budget or config."""
    stored = run.folder / "config.yaml"
    if not stored.is_file():
        return
    stored_config = load_config(stored)
    for wanted, stored_values in (
        (budget(run.config), budget(stored_config)),
        (_flat(run.config), _flat(stored_config)),
    ):
        for name in sorted(wanted.keys() | stored_values.keys()):
            if wanted.get(name) != stored_values.get(name):
                raise UserError(
                    f"{run.folder}: holds a run with {name} {stored_values.get(name)}, and {wanted.get(name)} is asked "
                    "for; rows of a table have one budget: give another --output, or ask for the same"
                )


def _flat(config: Config) -> dict[str, Any]:
    values = identifying_config(config)
    model = values.pop("model", {})
    return values | {f"model.{name}": value for name, value in model.items()} | {"seed": config.seed}


def is_done(run: Run) -> bool:
    return read_done(run) is not None and (run.pipeline / "hmdiff.json").is_file()


def read_done(run: Run) -> dict[str, Any] | None:
    """The contents of done.json; None if the run is unfinished or was finished with other steps."""
    try:
        found: dict[str, Any] = json.loads((run.folder / DONE).read_text())
        return found if found["step"] == run.config.training.steps and found["seconds"] >= 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_step(run: Run) -> int:
    """The step of the last checkpoint, 0 without one."""
    if is_done(run):
        return run.config.training.steps
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in (run.folder / "checkpoints").glob("step_*")]
    return max((int(match[1]) for match in found if match), default=0)


def seconds_left(runs: Sequence[Run]) -> float | None:
    """Estimated from the median time per step of finished runs; None if none is finished."""
    found = [done["seconds"] / done["step"] for run in runs if (done := read_done(run)) is not None and done["step"]]
    left = sum(run.config.training.steps - last_step(run) for run in runs)
    return 0.0 if not left else statistics.median(found) * left if found else None


@dataclasses.dataclass(frozen=True)
class RunReport:
    """Passed to the callback after every run."""

    run: Run
    done: int
    total: int
    seconds: float
    seconds_left: float | None


def train_runs(
    runs: Sequence[Run],
    train: Train,
    report: Callable[[RunReport], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Run]:  # unfinished runs: interrupted, or held by another process
    """Train the unfinished runs, in the given order. Stops after an interrupted training."""
    for run in runs:
        if is_done(run):
            continue
        make_folder(run.folder)
        with try_claim(run.folder, ".ablation_lock") as claimed:
            if not claimed or is_done(run):
                continue
            check_same_config(run)
            save_config(run.config, run.folder / "config.yaml")
            first_step, started = last_step(run), clock()
            step, total = train(run.config), run.config.training.steps
            if step < total:
                break
            # Extrapolate a resumed run to its full duration.
            seconds = (clock() - started) * total / max(1, total - first_step)
            with atomic_file(run.folder / DONE) as temporary:
                temporary.write_text(json.dumps({"step": step, "seconds": seconds}) + "\n")
        if report is not None:
            finished = sum(is_done(each) for each in runs)
            report(RunReport(run, finished, len(runs), seconds, seconds_left(runs)))
    return [run for run in runs if not is_done(run)]


def train_one(config: Config) -> int:
    """Train with `hmdiff.train.loop` in this process, resuming from the folder's last checkpoint."""
    from hmdiff.train.loop import Trainer

    trainer = Trainer(config)
    trainer.run()
    step = trainer.step
    del trainer
    gc.collect()
    return step
