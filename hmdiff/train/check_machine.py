"""What a dry run finds of the machine: gradients, memory, disk, and whether the loading keeps up with the step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence, Set
from pathlib import Path

import torch

from hmdiff.config import Config
from hmdiff.errors import UserError
from hmdiff.train.check_data import CAREFUL, Found
from hmdiff.train.memory import parameters, peak_gigabytes

_NEARLY_FULL = 0.9  # share of a GPU's memory above which an unlucky batch may not fit


def describe_gradients(
    names: Sequence[str],  # of the parameters that are trained
    unmoved: Set[str],  # those without a gradient
) -> Found:
    """Does every parameter of every part that is on learn from this data? Those that do not, by part."""
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
    """The peak, of the GPU where there is one; into `numbers` too."""
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
    """Does the loading keep up? Of one process, which has workers of its own."""
    values, workers = config.training, config.data.workers
    micro = values.batch_size * values.gradient_accumulation
    rate = micro / numbers["step_seconds"]
    loading = micro / numbers["loaded_a_second"]  # seconds of one worker
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


def disk_room(config: Config, model: torch.nn.Module) -> tuple[str, float]:  # and the bytes that are needed
    """Raises `UserError` where the checkpoints do not fit on the disk."""
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    checkpoint = weights + 4 * (parameters(model, False) + 2 * parameters(model))  # EMA, AdamW's two moments
    kept = config.training.keep_checkpoints
    needed = (kept + 1) * checkpoint + 2 * weights  # the new one beside the old ones; the pipeline likewise
    free = shutil.disk_usage(_existing(Path(config.output))).free
    text = f"{needed / 1e9:.2f} GB for {kept} + 1 checkpoints and the pipeline, {free / 1e9:.1f} GB free"
    if free < needed:
        raise UserError(f"{config.output}: {text}; free some, or lower training.keep_checkpoints")
    return text, needed


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
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
