"""Boxes of the people in a photo, from any mmdet detector with a class `person`. P people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.estimators.openmmlab import (
    find_checkpoint,
    find_model,
    import_openmmlab,
    load_weights,
    quiet,
    read_config,
)

SCORE_FLOOR = 0.3  # our choice, as in mmpose's own demo


class PersonDetector:
    """An mmdet detector with its weights.

    Args:
        config: a config file, "human" (RTMDet-m for people), an mmdet alias such as "rtmdet-m", or a `Config`.
        checkpoint: .pth or .safetensors, a file or a URL; None: downloaded, if mmdet lists the weights.
        untrained: keep random weights; for tests.

    Raises:
        UserError: mmdet is not installed; an unknown model; missing or mismatched weights; no class `person`.
    """

    def __init__(
        self,
        config: str | Path | Any = "human",
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        untrained: bool = False,
    ) -> None:
        apis = import_openmmlab("mmdet.apis")
        weights = None
        self.name = "config"
        if isinstance(config, (str, Path)):
            self.name = str(config)
            path, weights = find_model(config, "mmdet")
            config = read_config(path)
        file = None if untrained else find_checkpoint(self.name, checkpoint, weights, "mmdet")
        with quiet():
            try:
                # Setting a palette keeps mmdet from loading the data set.
                self.model = apis.init_detector(config, None, palette="coco", device="cpu")
            except UserError:
                raise
            except Exception as error:  # registries, torch and the modules raise various types
                reason = str(error).strip().split("\n")[0][:200]
                raise UserError(f"{self.name}: cannot be built ({reason}); give a config of mmdet") from None
        stored = {} if file is None else load_weights(self.model, file)
        self.person = _person_class(self.name, stored, config)
        self.model.to(device).eval()

    @torch.no_grad()
    def boxes(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        floor: float = SCORE_FLOOR,  # minimum score
    ) -> Tensor:  # (P, 4) x1, y1, x2, y2 photo pixels, by falling score
        """The people in a photo. Raises `UserError` if there are none."""
        from mmdet.apis import inference_detector

        with quiet():
            instances = inference_detector(self.model, np.ascontiguousarray(photo[..., ::-1])).pred_instances
        height, width = photo.shape[:2]
        persons = instances.labels == self.person
        boxes, scores = instances.bboxes[persons].cpu().float(), instances.scores[persons].cpu()
        boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], -1).flatten(1)
        sure = (scores >= floor) & (boxes[:, 2:] - boxes[:, :2] > 1).all(-1)
        if not sure.any():
            best = f"the surest box has a score of {float(scores.max()):.2f}" if len(scores) else "it has no box at all"
            raise UserError(
                f"nobody was found by {self.name} with a score of at least {floor:g} ({best}); give a photo with "
                "people, or their boxes by --box X1,Y1,X2,Y2"
            )
        order = scores[sure].argsort(descending=True, stable=True)
        return boxes[sure][order]


def _person_class(name: str, meta: dict[str, Any], config: Any) -> int:
    """The label of `person`: from the checkpoint's classes, else the config's, else COCO's, where it is the first."""
    known = meta.get("dataset_meta", meta)
    known = known if isinstance(known, dict) else {}
    classes: Sequence[str] | None = known.get("classes", known.get("CLASSES"))
    if classes is None:
        classes = config.get("test_dataloader", {}).get("dataset", {}).get("metainfo", {}).get("classes", ("person",))
    lower = [str(kind).lower() for kind in ([classes] if isinstance(classes, str) else classes)]
    if "person" not in lower:
        raise UserError(f"{name}: its {len(lower)} classes ({lower[0]}, ...) have no person; take a detector of people")
    return lower.index("person")
