"""Heatmap sources by name, for `--pose` and `pipe(photo)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hmdiff.errors import UserError
from hmdiff.estimators.source import Box, DetectedPeople, PoseSource, check_boxes

EMBEDDED = "embedded"
VITPOSE = "vitpose:"


def load_source(
    name: str = EMBEDDED,  # embedded, embedded:FOLDER, vitpose:MODEL, or an mmpose model
    checkpoint: str | None = None,  # mmpose weights
    detector: str = "human",  # mmdet model that detects people for mmpose
    detector_checkpoint: str | None = None,
    device: torch.device | str = "cpu",
    max_people: int = 10,
) -> PoseSource:
    """Raises `UserError` for an unknown model, or missing dependencies of the source."""
    if not name:
        raise UserError("an empty name of a model; give embedded, vitpose:MODEL, or an alias of mmpose such as human")
    if name == EMBEDDED or name.startswith(f"{EMBEDDED}:"):
        from hmdiff.estimators.landmarks import LandmarkEstimator

        return LandmarkEstimator(name.removeprefix(EMBEDDED).removeprefix(":") or None, max_people=max_people)
    if name.startswith(VITPOSE):
        from hmdiff.estimators.vitpose import VitPoseSource

        return VitPoseSource(name.removeprefix(VITPOSE), device, max_people)
    return MMPoseSource(name, checkpoint, detector, detector_checkpoint, device, max_people)


class MMPoseSource:
    """A top-down mmpose model with an mmdet detector. The detector is built at the first photo without boxes."""

    def __init__(
        self,
        model: str,
        checkpoint: str | None,
        detector: str,
        detector_checkpoint: str | None,
        device: torch.device | str,
        max_people: int,
    ) -> None:
        from hmdiff.estimators.mmpose_source import MMPoseEstimator

        self.name = f"mmpose {model}"
        self.max_people = max_people
        self._estimator = MMPoseEstimator(model, checkpoint, device)
        self._detector: Any = None
        self._detector_arguments = (detector, detector_checkpoint, device)

    def estimate(self, photo: np.ndarray, boxes: Sequence[Box] | None = None) -> DetectedPeople:
        if boxes is None:
            if self._detector is None:
                from hmdiff.estimators.detector import PersonDetector

                self._detector = PersonDetector(*self._detector_arguments)
            detected = self._detector.boxes(photo)
            selected = detected[: self.max_people]
        else:
            detected = selected = check_boxes(boxes, photo.shape[1], photo.shape[0])
        with torch.no_grad():
            return DetectedPeople(self._estimator.heatmaps(photo, selected), selected, len(detected) - len(selected))
