"""Dry-run checks of gradients, memory, disk space, and whether data loading keeps up with the training step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

import torch

from hmdiff.config import Config
from hmdiff.errors import UserError
from hmdiff.train.check_data import CAREFUL, Found
from hmdiff.train.memory import parameters, peak_gigabytes
from hmdiff.train.sharding import whole

_NEARLY_FULL = 0.9  # share of GPU memory above which a larger batch may not fit


@torch.no_grad()
def randomise_zeros(weights: Iterable[torch.nn.Parameter]) -> None:
    """Give zero-initialised parameters small random values, of a model that is discarded afterwards.

    Zero gates and output layers block the gradient of all layers before them for the first steps. Without them a
    parameter that gets no gradient gets none from this data.
    """
    for parameter in weights:
        if not whole([parameter])[0].any():
            parameter.normal_(std=0.02)


def describe_gradients(
    names: Sequence[str],  # trainable parameters
    unmoved: Set[str],  # those without a gradient
) -> Found:
    """List the trainable parameters that get no gradient from this data, by module."""
    if not unmoved:
        return f"all {len(names)} parameters get one"
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    words = []
    for part, own in parts.items():
        still = [name for name in own if name in unmoved]
        if still:
            some = "" if len(still) == len(own) else f" ({still[0]}{', ...' if len(still) > 1 else ''})"
            words.append(f"{part}: {len(still)} of {len(own)}{some}")
    return CAREFUL, f"{len(unmoved)} of {len(names)} parameters get none from this data: " + "; ".join(words)


def describe_memory(device: torch.device, numbers: dict[str, float]) -> Found:
    """Peak memory of the GPU, or of the process on a CPU; also stored in `numbers`."""
    if device.type != "cuda":
        peak = peak_gigabytes()
        if peak is None:
            return CAREFUL, "this system does not tell"
        numbers["peak_bytes"] = peak * 1e9
        return f"{peak:.2f} GB at the peak of the process, its data and checks included"
    peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    numbers["peak_bytes"] = peak
    used = torch.cuda.max_memory_allocated(device)
    text = f"{used / 1e9:.2f} GB used, {peak / 1e9:.2f} GB reserved of the GPU's {total / 1e9:.1f} GB"
    return (CAREFUL, f"{text}: nearly full") if peak > _NEARLY_FULL * total else text


def describe_balance(config: Config, numbers: dict[str, float], processes: int) -> Found:
    """Whether data loading keeps up with the step, for one process and its workers."""
    values, workers = config.training, config.data.workers
    micro = values.batch_size * values.gradient_accumulation
    rate = micro / numbers["step_seconds"]
    loading = micro / numbers["loaded_a_second"]  # seconds per step in one worker
    needed = int(-(-loading // numbers["step_seconds"]))
    numbers["workers_needed"] = needed
    numbers["seconds_a_step"] = (
        max(numbers["step_seconds"], loading / workers) if workers else numbers["step_seconds"] + loading
    )
    text = f"the step takes {rate:.0f} people/s"
    cores = (os.cpu_count() or 1) // max(1, processes)
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


def disk_room(config: Config, model: torch.nn.Module) -> tuple[str, float]:  # text, bytes needed
    """Raises `UserError` if the checkpoints do not fit on the disk."""
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    checkpoint = weights + 4 * (parameters(model, False) + 2 * parameters(model))  # EMA, AdamW's two moments
    kept = config.training.keep_checkpoints
    needed = (kept + 1) * checkpoint + 2 * weights  # while saving, the old and the new one are both on disk
    free = shutil.disk_usage(_existing(Path(config.output))).free
    text = f"{needed / 1e9:.2f} GB for {kept} + 1 checkpoints and the pipeline, {free / 1e9:.1f} GB free"
    if free < needed:
        raise UserError(f"{config.output}: {text}; free some, or lower training.keep_checkpoints")
    return text, needed


def _existing(path: Path) -> Path:
    """The nearest existing parent folder."""
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists():
            return place
    return Path("/")


def writable(path: Path) -> Path:
    place = _existing(path)
    if not place.is_dir():
        raise UserError(f"{place}: a file of that name is in the way of a folder; move it or give another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: may not be written; choose another output folder")
    return path
