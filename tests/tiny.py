"""An untrained pipeline, small enough to be made in a blink: what the tests of the command line work with."""

from __future__ import annotations

from pathlib import Path

import torch

from hmdiff.assembly import build_pipeline
from hmdiff.config import load_config

TINY = (
    "model.encoder_width=32", "model.encoder_depth=1", "model.encoder_heads=2", "model.width=32", "model.depth=1",
    "model.heads=2", "model.patch_size=12",
)  # fmt: skip


@torch.no_grad()
def save_tiny_pipeline(folder: Path, *overrides: str) -> Path:
    """Save one in `folder`. Weights that start at zero are drawn: else every hypothesis would be the same point."""
    pipeline = build_pipeline(load_config(None, [*TINY, *overrides]))
    for weights in pipeline.model.parameters():
        if not weights.any():
            weights.normal_(std=0.1)
    pipeline.save_pretrained(folder)
    return folder
