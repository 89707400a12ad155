"""Options of the pose estimator, and the lazily loaded source that they select."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hmdiff.cli import arguments
from hmdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from hmdiff.estimators.source import Box, DetectedPeople, PoseSource

NONE, EMBEDDED = "none", "embedded"
MAX_PEOPLE = 10


def add_estimation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pose",
        metavar="MODEL",
        default=EMBEDDED,
        help="what sees the joints where nothing is given or found beside the photo: embedded (MediaPipe's networks, "
        "nothing to download), vitpose:MODEL of transformers, a config file or alias of mmpose such as human or "
        "rtmpose-l, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--pose-checkpoint",
        metavar="FILE",
        help="mmpose's weights, .pth or .safetensors (default: downloaded, where mmpose lists them)",
    )
    parser.add_argument(
        "--detector",
        metavar="MODEL",
        default="human",
        help="mmdet's model that finds the people for mmpose where no box is given (default: %(default)s)",
    )
    parser.add_argument(
        "--detector-checkpoint", metavar="FILE", help="its weights (default: downloaded, where they are listed)"
    )
    parser.add_argument(
        "--max-people",
        type=arguments.whole(1),
        default=MAX_PEOPLE,
        metavar="N",
        help="of those found in a photo, the surest (default: %(default)s)",
    )


class Estimation:
    """People detected in a photo by a pose source. The networks are loaded at the first photo that needs them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._source: PoseSource | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def source(self) -> PoseSource:
        from hmdiff.estimators.choose import load_source

        if self._source is None:
            options = self.options
            self._source = load_source(
                options.pose,
                options.pose_checkpoint,
                options.detector,
                options.detector_checkpoint,
                arguments.resolve_device(options.device),
                options.max_people,
            )
        return self._source

    def estimate(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        boxes: Sequence[Box] | None = None,  # None: detect everybody
    ) -> DetectedPeople:
        from hmdiff.estimators.source import check_boxes

        if boxes is not None:  # fail before the model is loaded, which takes seconds
            check_boxes(boxes, photo.shape[1], photo.shape[0])
        return self.source.estimate(photo, boxes)

    def estimate_frame(self, photo: np.ndarray, boxes: Sequence[Box] | None = None) -> DetectedPeople:
        """As the source does at the frames of a video."""
        from hmdiff.estimators.source import frame_estimator

        return frame_estimator(self.source)(photo, boxes)


def estimation_of(options: argparse.Namespace) -> Estimation | None:
    """None with `--pose none`. Raises `UserError` for weights without a model."""
    if options.pose_checkpoint is not None and options.pose in (NONE, EMBEDDED):
        path = Path(options.pose_checkpoint)
        raise UserError(f"--pose-checkpoint {path}: weights without a model; name its config or alias by --pose MODEL")
    return None if options.pose == NONE else Estimation(options)
