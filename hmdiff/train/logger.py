"""Training logs: log.csv, and accelerate's trackers (TensorBoard, Weights & Biases, ...)."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration

from hmdiff.errors import UserError
from hmdiff.files.reading import read_bytes
from hmdiff.files.storage import atomic_file

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hmdiff.config import Config

PROJECT = "hmdiff"
_LARGEST = 1 << 28  # maximum size of log.csv, bytes


def tracker_options(trackers: str, folder: Path) -> dict[str, Any]:
    """Keyword arguments of `Accelerator`. Raises `UserError` for a tracker that is unknown or not installed."""
    names = [] if trackers == "none" else [name.strip() for name in trackers.split(",") if name.strip()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"training.trackers {name!r} is not known; choose of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in {each.value for each in get_available_trackers()}:
            raise UserError(f"training.trackers {name!r} is not installed; pip install {name}, or leave it out")
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard"))
    return {"log_with": names or None, "project_config": project}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows that have a step; empty without a file. Raises `UserError` naming the malformed line."""
    if not os.path.lexists(path):
        return []
    text = read_bytes(path, _LARGEST).decode("utf-8", "replace").replace("\0", "\ufffd")
    table, rows = csv.DictReader(text.splitlines()), []
    try:
        for row in table:
            if None in row:
                raise ValueError(f"{len(row[None])} cells more than the header has")
            if row.get("step"):
                if not str(row["step"]).isascii() or not str(row["step"]).isdigit() or len(str(row["step"])) > 18:
                    raise ValueError(f"step {row['step']!r:.40} is not a whole number")
                rows.append({name: value for name, value in row.items() if value})
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {table.line_num}: {error}; mend the line, or remove the file") from None
    return rows


@contextlib.contextmanager
def run_log(
    accelerator: Accelerator,
    folder: Path,
    config: Config,
    step: int,  # of the checkpoint to resume from; 0: a new run
    again: bool,  # the evaluation at this step will be repeated
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function that writes a row to log.csv and the trackers (on the main process only).

    Rows that a resumed run writes again are dropped: those after `step`, and with `again` the evaluation at `step`.
    """
    if not accelerator.is_main_process:
        yield lambda row: None
        return
    path = folder / "log.csv"
    rows = [row for row in read_log(path) if int(row["step"]) <= step]
    if again:
        rows = [row for row in rows if int(row["step"]) < step or "val_pve_mean" not in row]
    # The same W&B run after a resume.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    accelerator.init_trackers(
        PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1},
            "wandb": {
                "name": config.name,
                "id": identity,
                "resume": "allow",
                "dir": str(folder),
                "config": dataclasses.asdict(config),
            },
        },
    )

    def log(row: dict[str, float]) -> None:
        rows.append({k: v if k == "step" else f"{v:.6g}" for k, v in row.items()})
        names = list(dict.fromkeys(name for row in rows for name in row))
        with atomic_file(path) as temporary, open(temporary, "w", newline="") as handle:
            table = csv.DictWriter(handle, names)
            table.writeheader()
            table.writerows(rows)
        values = {name: float(value) for name, value in row.items() if name != "step"}
        for tracker in accelerator.trackers:
            tracker.log(values, step=int(row["step"]))

    try:
        yield log
    finally:
        # Not end_training: it also destroys the process group, which the test evaluation still needs.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []
