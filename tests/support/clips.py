"""Small videos for tests, and a source that sees people who walk through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from small import people_block

from hmdiff.errors import UserError
from hmdiff.estimators.source import DetectedPeople
from hmdiff.heatmaps import Crop, Heatmaps

WIDTH, HEIGHT, RATE = 160, 96, 25.0
STEP = 12  # grey levels from frame to frame: the picture says which frame it is


def write_clip(path: Path, frames: int, codec: str = "mp4v", damaged: int | None = None) -> Path:
    """Frame i is grey of level STEP i. A damaged frame's bytes are zeros."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), RATE, (WIDTH, HEIGHT))
    for number in range(frames):
        writer.write(np.full((HEIGHT, WIDTH, 3), STEP * number, np.uint8))
    writer.release()
    if damaged is not None:
        content = bytearray(path.read_bytes())
        mark = {"MJPG": b"\xff\xd8\xff", "mp4v": b"\x00\x00\x01\xb6"}[codec]
        at = [index for index in range(len(content)) if content[index : index + len(mark)] == mark]
        content[at[damaged] : at[damaged + 1] - 8] = bytes(at[damaged + 1] - 8 - at[damaged])
        path.write_bytes(content)
    return path


class Walkers:
    """Two people, one to the right and one to the left, whose order in the answer changes from frame to frame."""

    name = "walkers"

    def __init__(self, hidden: Callable[[int, int], bool] = lambda frame, person: False) -> None:
        self.hidden = hidden  # frame, person
        self.asked: list[int] = []

    def place(self, frame: int, person: int) -> tuple[float, float]:
        return (40.0 + 5 * frame, 50.0) if person == 0 else (120.0 - 5 * frame, 50.0)

    def estimate(self, photo: np.ndarray, boxes: Any = None) -> DetectedPeople:
        frame = round(float(photo.mean()) / STEP)
        self.asked.append(frame)
        people = [p for p in ((0, 1) if frame % 2 else (1, 0)) if not self.hidden(frame, p)]
        if boxes is not None or not people:
            raise UserError("no person is seen")
        sample = people_block()
        assert sample.heatmaps is not None and sample.heatmap_valid is not None
        crop = Crop.of(torch.tensor([self.place(frame, p) for p in people]), torch.tensor([60.0, 70.0])[people])
        return DetectedPeople(Heatmaps(sample.heatmaps[people], sample.heatmap_valid[people], crop), torch.zeros(2, 4))
