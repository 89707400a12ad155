"""Training checkpoints: written atomically, flushed to disk, and verified by checksum before loading.

    checkpoints/step_N/model.safetensors, optimizer.bin, random_states_R.pkl   by accelerate (only tensors are loaded)
    checkpoints/step_N/ema.safetensors, progress.json                          EMA weights and progress
    checkpoints/step_N/checksums.json                                          of all files above

Names that start with a dot are being written or removed; the next checkpoint removes what a killed process left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.files.checksums import folder_checksums, verify_checksums
from hmdiff.files.reading import read_json
from hmdiff.files.storage import make_folder, replace_folder, share_files, sync_tree

PROGRESS, EMA, CHECKSUMS = "progress.json", "ema.safetensors", "checksums.json"
_NAME = re.compile(r"step_(\d{1,12})")
MEND = "remove it to go on from the one before"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a training."""

    step: int
    ema_steps: int
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # of the losses since the last row of the log
    counted: int = 0  # number of steps in the sums


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / PROGRESS).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def begin(place: Path) -> Path:
    """Create an empty temporary folder for a checkpoint, replacing leftovers; pass it to `finish`."""
    make_folder(place.parent)
    part = _hidden(place, "part")
    _remove(part)
    os.mkdir(part)  # fails if another process has created it meanwhile
    return part


def finish(part: Path, place: Path, keep: int) -> None:
    """Write checksums, set permissions, flush, rename; then remove all but the last `keep` checkpoints."""
    (part / CHECKSUMS).write_text(json.dumps(folder_checksums(part, (CHECKSUMS,)), indent=1))
    share_files(part)
    sync_tree(part)
    replace_folder(part, place)
    sweep(place.parent, keep)


def sweep(folder: Path, keep: int) -> None:
    """Remove old checkpoints, unfinished checkpoints and unfinished removals."""
    whole = checkpoints_in(folder)
    for path in folder.glob("step_*"):
        if _NAME.fullmatch(path.name) and path not in whole[-keep:]:
            # Renamed first: if killed during the removal, a partial folder would look like a checkpoint.
            with contextlib.suppress(OSError):
                os.rename(path, _hidden(path, "gone"))
    for path in folder.glob(".step_*"):
        if path.suffix in (".part", ".gone"):
            _remove(path)


def _hidden(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{kind}")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def write_progress(folder: Path, progress: Progress) -> None:
    (folder / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress)))


def read_progress(place: Path) -> Progress:
    """Verify a checkpoint and return its progress. Old checkpoints without checksums are accepted.

    Raises:
        UserError: a checksum differs, or the progress does not belong to this checkpoint.
    """
    if (place / CHECKSUMS).exists():
        expected = read_json(place / CHECKSUMS, mend=MEND)
        verify_checksums(place, expected, MEND)
        if PROGRESS not in expected:
            raise UserError(f"{place / CHECKSUMS}: lacks {PROGRESS}; {MEND}")
    found = read_json(place / PROGRESS, mend=MEND)
    path = place / PROGRESS
    if not isinstance(found, dict):
        raise UserError(f"{path}: a {type(found).__name__} where a mapping was expected; {MEND}")
    step, counted = _whole(path, found, "step"), _whole(path, found, "counted", 0)
    if step != int(place.name.removeprefix("step_")):
        raise UserError(f"{path}: is of step {step}; {MEND}")
    sums = found.get("sums", {})
    if not isinstance(sums, dict) or not all(isinstance(v, float | int) and math.isfinite(v) for v in sums.values()):
        raise UserError(f"{path}: sums {sums!r:.80}, finite numbers were expected; {MEND}")
    ema_steps = _whole(path, found, "ema_steps")
    return Progress(step, ema_steps, {name: float(value) for name, value in sums.items()}, counted)


def _whole(path: Path, found: dict[str, Any], name: str, default: int | None = None) -> int:
    value = found.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
        raise UserError(f"{path}: {name} is {value!r:.80}, a whole number was expected; {MEND}")
    return value


def check_finite(place: Path, tensors: Iterable[Tensor], what: str) -> None:
    """Raises `UserError` if a weight is NaN or infinite: training cannot resume from it."""
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{place}: {what} that are not finite numbers; {MEND}")


def check_like(place: Path, mine: list[Tensor], stored: dict[str, Tensor]) -> None:
    """Raises `UserError` if the EMA weights do not match this model's shapes."""
    if len(stored) != len(mine):
        raise UserError(f"{place / EMA}: {len(stored)} averaged weights, this model has {len(mine)}; {MEND}")
    for tensor, name in zip(mine, sorted(stored), strict=True):
        if stored[name].shape != tensor.shape or not stored[name].is_floating_point():
            found, wanted = tuple(stored[name].shape), tuple(tensor.shape)
            raise UserError(f"{place / EMA}: {name} is {stored[name].dtype} {found}, floats {wanted} expected; {MEND}")


def write_average(folder: Path, averaged: list[Tensor]) -> None:
    """Write the EMA weights, named by their index."""
    save_file({f"{number:04d}": tensor.contiguous() for number, tensor in enumerate(averaged)}, folder / EMA)


def read_average(place: Path, mine: list[Tensor]) -> list[Tensor]:
    """Read the EMA weights of `write_average`. Raises `UserError` if they do not match the model."""
    stored = load_file(place / EMA)
    check_like(place, mine, stored)
    return [stored[name] for name in sorted(stored)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def not_written(place: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:160]
    return UserError(f"{place}: could not be written ({reason}); earlier checkpoints stand")
