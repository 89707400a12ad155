"""A file family of the mutant campaign: how to write valid files, and how the package reads one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.campaign.children import Wrong
from tools.campaign.mutations import MUTATIONS, mutate_bytes

# A model that runs in milliseconds.
SMALL = (
    "model.width=32",
    "model.heads=2",
    "model.depth=1",
    "model.encoder_width=32",
    "model.encoder_depth=1",
    "model.encoder_heads=2",
    "model.tokens=parts",  # dividing a mesh into patches takes seconds
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Valid files in a folder, and how to read one of them; any of them may be damaged."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path, str], None]  # arguments: folder, the damaged file's name; raises UserError, or Wrong
    files: tuple[str, ...]  # relative names; one is drawn, repeated names more often
    share: float = 1.0  # number of mutants relative to other families
    keeps: bool = True  # reading does not modify the folder's files

    def mutate(self, folder: Path, draw: random.Random) -> str:
        """Damage one file; returns its name."""
        name = draw.choice(self.files)
        path = folder / name
        path.write_bytes(MUTATIONS.get(path.suffix, mutate_bytes)(path.read_bytes(), draw))
        return name


def finite(*values: Any) -> None:
    """Raises `Wrong` if a result holds NaN or infinity. Ignores None."""
    for value in values:
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Wrong("a result that is not finite")


def support() -> None:
    """Put tests/support on the path, to reuse its writers of stand-in data sets."""
    import sys

    folder = str(Path(__file__).resolve().parents[2] / "tests" / "support")
    if folder not in sys.path:
        sys.path.insert(0, folder)
