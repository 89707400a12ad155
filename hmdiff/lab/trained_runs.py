"""The trainings of an ablation: each in a folder of its own, none done twice, a stopped one goes on.

    OUTPUT/runs/MODE_WHAT_DIGEST/seed_N/    a training as `hmdiff train` writes it, and done.json when it is finished

A folder is named by what is trained, so that rows of several tables that are the same model share it; its budget is
held to that of the call. A run depends on its config alone, so the order, and what was trained before, change nothing.
Several calls may train one table at once: a run that another process is at is left to it.
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
# What makes a run another one, beside its budget and its seed; the number of drawing processes changes nothing.
_WHAT = ("body", "model", "diffusion", "data", "loss")
_SAME_DATA = ("workers",)
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
Train = Callable[[Config], int]  # trains on from what is there; the step that it reached


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    folder: Path
    config: Config = dataclasses.field(compare=False, hash=False)
    label: str = dataclasses.field(default="", compare=False, hash=False)  # of the first row that needs it

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
    """What the tables need. `of[table][row]` are a row's runs, a seed each."""

    of: dict[str, dict[str, list[Run]]]
    rows: dict[str, dict[str, Row]]

    @property
    def runs(self) -> list[Run]:
        """Each once, all rows of the first seed first: an unfinished plan has whole tables of fewer seeds."""
        every = [run for rows in self.of.values() for runs in rows.values() for run in runs]
        return sorted(dict.fromkeys(every), key=lambda run: run.seed)


def row_config(
    table: Comparison,
    row: Row,
    seed: int,
    mode: str = "direct",
    steps: int | None = None,  # of training; None: the base's
    changes: Sequence[str] = (),  # key=value for all rows, under the row's own
    base: str | None = None,  # another base config
) -> Config:
    """What is trained for a row, but for its folder. The warm-up keeps its share of the steps.

    Raises:
        UserError: a mode or a base that is not known; a value that no config has.
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
        # Everything that is looked at is looked at when all are trained.
        f"training.evaluate_every={total}",
        f"training.picture_every={total + 1}",
        "evaluation.test_people=0",
    ]
    return load_config(path, [*changes, *fixed, *row.overrides])


def essence(config: Config) -> dict[str, Any]:
    """What a run is, without its budget, seed and place: the values that are not the defaults.

    So a new entry of the config, which is off by default, leaves the runs of yesterday what they were.
    """
    plain, found = Config(), {}
    for name in _WHAT:
        value, usual = getattr(config, name), getattr(plain, name)
        if isinstance(value, dict) or not dataclasses.is_dataclass(value):
            if value != usual:
                found[name] = value
            continue
        for field in dataclasses.fields(value):
            mine, other = getattr(value, field.name), getattr(usual, field.name)
            if mine == other or (name == "data" and field.name in _SAME_DATA):
                continue
            if dataclasses.is_dataclass(mine):
                mine = {key: each for key, each in vars(mine).items() if each != getattr(other, key)}
            found[f"{name}.{field.name}"] = mine
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def budget(config: Config) -> dict[str, Any]:
    return {name: getattr(config.training, name) for name in BUDGET}


def run_name(config: Config, overrides: Sequence[str]) -> str:
    """The folder of a config's runs: the same for rows of several tables that are the same model."""
    told = sorted(text for text in overrides if not text.startswith("loss."))
    words = [re.sub(r"[^a-z0-9]+", "-", text.split(".", 1)[-1].lower()).strip("-") for text in told]
    words = [word.removesuffix("-true") for word in words]
    return "_".join([str(config.model["mode"]), *(words or ["base"]), digest(essence(config))])


def make_plan(
    tables: dict[str, Comparison],
    output: Path,
    seeds: int = 3,
    mode: str = "direct",
    steps: int | None = None,
    changes: Sequence[str] = (),
    base: str | None = None,
) -> Plan:
    """Resolve every row. Raises `UserError` for what a config does not have, and for a folder with another budget."""
    of: dict[str, dict[str, list[Run]]] = {}
    for name, table in tables.items():
        check_table(name, table)
        of[name] = {}
        for row in table.rows:
            runs, resolved = [], row_config(table, row, 0, mode, steps, changes, base)
            for seed in range(seeds):
                config = copy.deepcopy(resolved)
                config.seed = seed
                folder = output / "runs" / run_name(config, row.overrides) / f"seed_{seed}"
                config.name, config.output = f"{row.label}, seed {seed}", str(folder)
                runs.append(Run(folder, config, row.label))
                check_same(runs[-1])
            of[name][row.label] = runs
    return Plan(of, {name: {row.label: row for row in table.rows} for name, table in tables.items()})


def check_same(run: Run) -> None:
    """Raises `UserError` where the folder holds a run with another budget, or of something else."""
    stored = run.folder / "config.yaml"
    if not stored.is_file():
        return
    before = load_config(stored)
    for mine, other in ((budget(run.config), budget(before)), (_flat(run.config), _flat(before))):
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name):
                raise UserError(
                    f"{run.folder}: holds a run with {name} {other.get(name)}, and {mine.get(name)} is asked for; rows "
                    "of a table have one budget: give another --output, or ask for the same"
                )


def _flat(config: Config) -> dict[str, Any]:
    values = essence(config)
    model = values.pop("model", {})
    return values | {f"model.{name}": value for name, value in model.items()} | {"seed": config.seed}


def is_done(run: Run) -> bool:
    return done_of(run) is not None and (run.pipeline / "hmdiff.json").is_file()


def done_of(run: Run) -> dict[str, Any] | None:
    """What was written when the run was finished; None where it is not, or was for fewer steps."""
    try:
        found: dict[str, Any] = json.loads((run.folder / DONE).read_text())
        return found if found["step"] == run.config.training.steps and found["seconds"] >= 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reached(run: Run) -> int:
    """The step of the last checkpoint, 0 where there is none."""
    if is_done(run):
        return run.config.training.steps
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in (run.folder / "checkpoints").glob("step_*")]
    return max((int(match[1]) for match in found if match), default=0)


def seconds_left(runs: Sequence[Run]) -> float | None:
    """Of what is not trained yet, by what the finished ones took a step; None: nothing to tell it by."""
    found = [done["seconds"] / done["step"] for run in runs if (done := done_of(run)) is not None and done["step"]]
    left = sum(run.config.training.steps - reached(run) for run in runs)
    return 0.0 if not left else statistics.median(found) * left if found else None


@dataclasses.dataclass(frozen=True)
class Trained:
    """Told after every run."""

    run: Run
    done: int
    total: int
    seconds: float
    seconds_left: float | None


def train_runs(
    runs: Sequence[Run],
    train: Train,
    report: Callable[[Trained], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Run]:  # those that are not finished: stopped, or in the hands of another process
    """Train what is not trained yet, in the order given. Stops where a training was stopped."""
    for run in runs:
        if is_done(run):
            continue
        make_folder(run.folder)
        with try_claim(run.folder, ".ablation_lock") as mine:
            if not mine or is_done(run):
                continue
            check_same(run)
            save_config(run.config, run.folder / "config.yaml")
            before, started = reached(run), clock()
            step, total = train(run.config), run.config.training.steps
            if step < total:
                break
            # A run that went on counts what the whole of it would have taken.
            seconds = (clock() - started) * total / max(1, total - before)
            with atomic_file(run.folder / DONE) as temporary:
                temporary.write_text(json.dumps({"step": step, "seconds": seconds}) + "\n")
        if report is not None:
            finished = sum(is_done(each) for each in runs)
            report(Trained(run, finished, len(runs), seconds, seconds_left(runs)))
    return [run for run in runs if not is_done(run)]


def train_one(config: Config) -> int:
    """By `hmdiff.train.loop`, in this process. It goes on from the folder's last checkpoint."""
    from hmdiff.train.loop import Trainer

    trainer = Trainer(config)
    trainer.run()
    step = trainer.step
    del trainer
    gc.collect()
    return step
