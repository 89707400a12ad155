"""Peak memory of a process, and parameter counts."""

from __future__ import annotations

import sys
from typing import Any


def parameters(model: Any, trained: bool = True) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def memory_text(device: Any) -> str:
    """Peak memory of the process, and of the GPU if one is used."""
    gigabytes = peak_gigabytes()
    text = "unknown on this system" if gigabytes is None else f"{gigabytes:.2f} GB at the peak of the process"
    if device.type == "cuda":
        import torch

        text += f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of the GPU"
    return text


def peak_gigabytes() -> float | None:
    """Peak resident memory of this process so far; None on systems that do not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
