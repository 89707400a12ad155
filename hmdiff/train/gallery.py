"""Pictures of validation people and their hypotheses, written during training."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from hmdiff.data.sample import PeopleSource
from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments, depth_argument
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.viz.canvas import contact_sheet, save_picture
from hmdiff.viz.overlays import PALETTE, turntable_view

_CELL = 220


def validation_picture(
    pipeline: HMDiffPipeline,
    data: PeopleSource,  # with the full mesh
    path: Path,
    people: int = 4,
    hypotheses: int = 3,
    split: str = "val",
) -> None:
    """Write a picture to `path`: per person a row of heatmaps, ground truth and hypotheses, from front and side."""
    sample = data.block(split, 0).map(lambda tensor: tensor[:people])
    given = camera_arguments(sample) | depth_argument(pipeline, sample)
    output = pipeline(sample.image, as_heatmaps(sample), num_hypotheses=hypotheses, **given)
    assert sample.vertices is not None
    cells, captions = [], []
    for person in range(people):
        cells.append(_heat_picture(sample.heatmaps[person]) if sample.heatmaps is not None else _plain())
        captions.append("heatmaps")
        bodies = [sample.vertices[person], *output.vertices[person].cpu()]
        for degrees in (0.0, 90.0):
            for number, vertices in enumerate(bodies):
                colour = (0.7, 0.7, 0.72) if number == 0 else PALETTE[number - 1]
                cells.append(turntable_view(vertices, output.faces, degrees, _CELL, colour, extent=1.15))
                name = "truth" if number == 0 else f"hypothesis {number}"
                captions.append(name if degrees == 0 else f"{name}, side")
    save_picture(path, contact_sheet(cells, columns=1 + 2 * (1 + hypotheses), captions=captions))


def _plain() -> np.ndarray:
    return np.full((_CELL, _CELL, 3), 245, np.uint8)


def _heat_picture(heatmaps: torch.Tensor) -> np.ndarray:  # (J, h, w) -> (220, 220, 3) uint8
    heat = (heatmaps.amax(0).clamp(0, 1) * 255).byte().cpu().numpy()
    heat = cv2.resize(heat, (_CELL, _CELL), interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
