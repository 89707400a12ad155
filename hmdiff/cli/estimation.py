"""The pose estimator and the detector that a command may run on photos: their options, and both loaded when needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.cli.photos import Box
from hmdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from hmdiff.heatmaps import Heatmaps


def add_estimation(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--pose", metavar="MODEL", required=required,
        help="mmpose's top-down model that sees the joints: a config file, an alias such as human or rtmpose-l, or the "
        "name of a shipped config" + ("" if required else " (default: none; keypoints or heatmaps are needed then)"),
    )  # fmt: skip
    parser.add_argument(
        "--pose-checkpoint", metavar="FILE",
        help="its weights, .pth or .safetensors (default: downloaded, where mmpose lists them)",
    )  # fmt: skip
    parser.add_argument(
        "--detector", metavar="MODEL", default="human",
        help="mmdet's model that finds the people where no box is given: config or alias (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--detector-checkpoint", metavar="FILE", help="its weights (default: downloaded, where they are listed)"
    )


class Estimation:
    """Heatmaps of the people in a photo. The models are built at the first photo that needs them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._estimator: Any = None
        self._detector: Any = None

    def __call__(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        boxes: Sequence[Box] | None = None,  # None: the detector's
    ) -> tuple[Heatmaps, Tensor]:  # of P people, their boxes (P, 4)
        import torch

        from hmdiff.estimators.mmpose_source import MMPoseEstimator, check_boxes

        # Boxes first: a wrong one should not cost the seconds of loading a model.
        given = None if boxes is None else check_boxes(boxes, photo.shape[1], photo.shape[0])
        device = arguments.resolve_device(self.options.device)
        if self._estimator is None:
            self._estimator = MMPoseEstimator(_model(self.options.pose), self.options.pose_checkpoint, device)
        if given is None:
            given = self._boxes(photo, device)
        with torch.no_grad():
            return self._estimator.heatmaps(photo, given), given

    def _boxes(self, photo: np.ndarray, device: torch.device) -> Tensor:
        from hmdiff.estimators.detector import PersonDetector

        if self._detector is None:
            self._detector = PersonDetector(_model(self.options.detector), self.options.detector_checkpoint, device)
        found: Tensor = self._detector.boxes(photo)
        return found


def _model(name: str) -> str:
    if not name:
        raise UserError("an empty name of a model; give a config file, or an alias such as human")
    return name


def needs_pose(options: argparse.Namespace) -> None:
    """Options about a model that is not there say nothing: better to ask."""
    if options.pose is None and options.pose_checkpoint is not None:
        path = Path(options.pose_checkpoint)
        raise UserError(f"--pose-checkpoint {path}: weights without a model; name its config or alias by --pose MODEL")
