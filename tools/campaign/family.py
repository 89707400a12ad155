"""A family of files that the mutant campaign damages: how to write good ones, and how the package reads one."""

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

# A model of milliseconds.
SMALL = (
    "model.width=32",
    "model.heads=2",
    "model.depth=1",
    "model.encoder_width=32",
    "model.encoder_depth=1",
    "model.encoder_heads=2",
    "model.tokens=parts",  # to divide a mesh into patches takes seconds
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Good files in a folder, and the reading of one of them; each may be the one that is damaged."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path, str], None]  # folder, the damaged file's name; raises UserError, or Wrong
    files: tuple[str, ...]  # relative names; of several one is drawn, as often as it stands here
    share: float = 1.0  # how many mutants of it, where another family has one
    keeps: bool = True  # reading leaves all files of the folder as they were

    def mutate(self, folder: Path, draw: random.Random) -> str:
        """Damage one file; its name."""
        name = draw.choice(self.files)
        path = folder / name
        path.write_bytes(MUTATIONS.get(path.suffix, mutate_bytes)(path.read_bytes(), draw))
        return name


def finite(*values: Any) -> None:
    """Raises `Wrong` where a result holds NaN or infinity. None is passed over."""
    for value in values:
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Wrong("a result that is not finite")


def support() -> None:
    """Puts the makers of stand-in data sets of tests/support on the path: they are written once."""
    import sys

    folder = str(Path(__file__).resolve().parents[2] / "tests" / "support")
    if folder not in sys.path:
        sys.path.insert(0, folder)
