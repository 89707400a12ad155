"""`PoseSource`: the interface of pose estimators, which map a photo to heatmaps of its people.

Sources are the embedded estimator, mmpose and transformers' ViTPose. Keypoint files and arrays become the same type,
`Heatmaps`, in `hmdiff.heatmaps`. P people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.heatmaps import Heatmaps

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 photo pixels


@dataclasses.dataclass(frozen=True)
class DetectedPeople:
    """The people that a source detected in one photo."""

    heatmaps: Heatmaps  # P people, by falling score; their crops do not have the photo's camera yet
    boxes: Tensor  # (P, 4) x1, y1, x2, y2 photo pixels
    num_skipped: int = 0  # detections skipped because the requested number of people was reached
    # Per person, if the source provides them: (H, W) 0..1 over the photo, computed lazily.
    silhouettes: tuple[Callable[[], np.ndarray], ...] = ()


class PoseSource(Protocol):
    @property
    def name(self) -> str:
        """Name that is printed and saved with the result."""
        ...

    def estimate(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        boxes: Sequence[Box] | None = None,  # people to estimate; None: all detected
    ) -> DetectedPeople:
        """Raises `UserError` if nobody is detected, or for an invalid box."""
        ...


def frame_estimator(source: PoseSource) -> Callable[..., DetectedPeople]:
    """A source's method for video frames: its `estimate_frame`, a faster `estimate`, if it has one."""
    method: Callable[..., DetectedPeople] = getattr(source, "estimate_frame", source.estimate)
    return method


def check_boxes(
    boxes: Tensor | np.ndarray | Sequence[Sequence[float]],  # (P, 4) x1, y1, x2, y2, photo pixels
    width: int,  # of the photo
    height: int,
) -> Tensor:  # (P, 4) float32
    """Validate boxes: each must overlap the photo. Raises `UserError` naming the first that does not."""
    people = torch.as_tensor(np.asarray(boxes, dtype=np.float32))
    if people.numel() == 0:
        raise UserError("boxes: nobody is given; give a box x1,y1,x2,y2 for each person in the photo")
    if people.dim() != 2 or people.shape[1] != 4 or not people.isfinite().all():
        raise UserError(f"boxes: shape {tuple(people.shape)} found, or NaN; (P, 4) numbers x1, y1, x2, y2 are expected")
    for index, (x1, y1, x2, y2) in enumerate(people.tolist()):
        text = f"boxes: box {index} ({x1:g},{y1:g},{x2:g},{y2:g})"
        if x2 <= x1 or y2 <= y1:
            raise UserError(f"{text} has no size; x1 < x2 and y1 < y2 are expected, in photo pixels")
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise UserError(f"{text} lies outside the {width} x {height} photo; give the box of a person in it")
    return people
