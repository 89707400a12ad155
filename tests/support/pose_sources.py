"""A pose source for tests: what it sees does not depend on the photo."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from small import people_block

from hmdiff.estimators.source import DetectedPeople
from hmdiff.heatmaps import Crop, Heatmaps


class Source:
    """Sees the same two people in every photo."""

    name = "test source"

    def estimate(self, photo: np.ndarray, boxes: Any = None) -> DetectedPeople:
        sample = people_block()
        assert sample.heatmaps is not None and sample.heatmap_valid is not None
        crop = Crop.of(torch.tensor([[60.0, 50.0], [100.0, 60.0]]), torch.tensor([70.0, 80.0]))
        return DetectedPeople(Heatmaps(sample.heatmaps[:2], sample.heatmap_valid[:2], crop), torch.zeros(2, 4))
