"""ViTPose (Xu et al., arXiv 2204.12484) through transformers, as a source of heatmaps: `--pose vitpose:MODEL`.

MODEL is a name on the Hub or a folder of `save_pretrained`. Without boxes, the embedded estimator detects people.
ViTPose's heatmaps are UDP's (arXiv 1911.07524): pixel k of n lies at k / (n - 1) of the box. The model's box is the
person's, enlarged by 1.25 to the input's aspect ratio, as its processor does. P people.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hmdiff.body.skeletons import COCO17
from hmdiff.errors import UserError
from hmdiff.estimators.source import Box, DetectedPeople, check_boxes
from hmdiff.heatmaps import Heatmaps, crop_from_box, heatmaps_from_values

_PADDING = 1.25  # the processor's box enlargement


class VitPoseSource:
    """Raises `UserError` if transformers is not installed, or the model cannot be loaded."""

    def __init__(self, model: str, device: torch.device | str = "cpu", max_people: int = 10) -> None:
        if not model:
            raise UserError("--pose vitpose: names no model; give vitpose:NAME or vitpose:FOLDER")
        try:
            from transformers import VitPoseForPoseEstimation, VitPoseImageProcessor
        except ImportError:
            raise UserError('ViTPose needs transformers: pip install "hmdiff[depth]"') from None
        self.name = f"vitpose {model}"
        self.max_people = max_people
        try:
            self._processor: Any = VitPoseImageProcessor.from_pretrained(model)
            network: Any = VitPoseForPoseEstimation.from_pretrained(model)
            self._model = network.to(device).eval()
        except Exception as error:  # the hub, JSON and torch raise various types
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(f"vitpose:{model}: cannot be loaded ({reason}); name one of the hub, or a folder") from None
        names = getattr(self._model.config, "id2label", None) or {}
        spelled = [str(names[index]) for index in sorted(names)] if len(names) >= 17 else list(COCO17)
        from hmdiff.heatmaps.formats.joint_names import map_names

        self.names = COCO17 if spelled[0].startswith("LABEL") else map_names(spelled, self.name)[0]
        self._device = device

    @torch.no_grad()
    def estimate(self, photo: np.ndarray, boxes: Sequence[Box] | None = None) -> DetectedPeople:
        if boxes is None:
            from hmdiff.estimators.landmarks import LandmarkEstimator

            detected = LandmarkEstimator(max_people=self.max_people).estimate(photo)
            people, num_skipped = detected.boxes, detected.num_skipped
        else:
            num_skipped = 0
            people = check_boxes(boxes, photo.shape[1], photo.shape[0])
        xywh = torch.cat([people[:, :2], people[:, 2:] - people[:, :2]], 1).numpy()
        inputs = self._processor(photo, boxes=[xywh.tolist()], return_tensors="pt").to(self._device)
        options = {}
        if getattr(self._model.config.backbone_config, "num_experts", 1) > 1:
            options["dataset_index"] = torch.zeros(len(people), dtype=torch.long, device=self._device)
        values = self._model(**inputs, **options).heatmaps.float().cpu()
        return DetectedPeople(self._to_crops(values, people), people, num_skipped)

    def _to_crops(self, values: torch.Tensor, people: torch.Tensor) -> Heatmaps:
        """UDP's pixel centres lie at the ends of the box: extend the area by half a pixel on every side."""
        height, width = values.shape[-2:]
        size = people[:, 2:] - people[:, :2]
        aspect = width / height
        extent_x = torch.maximum(size[:, 0], size[:, 1] * aspect)
        extent = torch.stack([extent_x, extent_x / aspect], -1) * _PADDING
        extent = extent * torch.tensor([width / (width - 1), height / (height - 1)])
        center, side = crop_from_box(people)
        return heatmaps_from_values(values, self.names, (people[:, :2] + people[:, 2:]) / 2, extent, center, side)
