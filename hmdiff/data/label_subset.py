"""A source of which only some labels are trained on: like a data set with only 2D keypoints or 3D joints.

For a data set whose fitted bodies are worse than its keypoints, and to measure what such labels teach
(`loss.keypoints_2d`, `loss.keypoints_3d`).
"""

from __future__ import annotations

import dataclasses

import torch

from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.errors import UserError

LABELS = ("all", "keypoints", "keypoints_2d")  # the last two have no mesh, body joints and camera


class LabelSubset:
    """The source's training people with only these labels; its other streams are unchanged."""

    def __init__(self, source: PeopleSource, labels: str) -> None:
        if labels not in LABELS:
            raise UserError(f"labels {labels!r} of a source are not known; choose one of {', '.join(LABELS)}")
        self.source, self.labels = source, labels
        self.block_size, self.full_mesh, self.image_size = source.block_size, source.full_mesh, source.image_size

    def block(self, stream: str, number: int) -> Sample:
        sample = self.source.block(stream, number)
        if stream != "train" or self.labels == "all":
            return sample
        none = torch.zeros(len(sample), dtype=torch.bool)
        masks = {"has_vertices": none, "has_joints_3d": none, "has_camera": none, "has_perspective": none}
        if self.labels == "keypoints_2d" and sample.keypoints_3d is not None:
            masks["has_keypoints_3d"] = torch.zeros(sample.keypoints_3d.shape[:2], dtype=torch.bool)
        return dataclasses.replace(sample, **masks)
