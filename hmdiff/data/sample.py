"""The sample contract: what every data set, real or synthetic, hands to training and evaluation.

One frozen dataclass serves single samples and batches (a leading B on every field). A missing label is None, or, where
only some samples of a batch have it, marked by its `has_*` mask: never a zero that counts. Frames and units are those
of `hmdiff.geometry`: metres relative to the pelvis in the camera frame, crop coordinates -1..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """People in square crops. J = 26 keypoints (HALPE26), K = 24 body joints, V vertices, C coarse vertices."""

    image: Tensor | None = None  # (B, 3, H, W) RGB, 0..1
    heatmaps: Tensor | None = None  # (B, J, h, w) >= 0, peak = confidence
    heatmap_valid: Tensor | None = None  # (B, J) bool: the estimator has this joint at all
    vertices: Tensor | None = None  # (B, V, 3)
    coarse_vertices: Tensor | None = None  # (B, C, 3): a subset of the vertices, for training without the full mesh
    has_vertices: Tensor | None = None  # (B,) bool
    joints_3d: Tensor | None = None  # (B, K, 3)
    has_joints_3d: Tensor | None = None  # (B,) bool
    keypoints_3d: Tensor | None = None  # (B, J, 3)
    joints_2d: Tensor | None = None  # (B, J, 2) crop coordinates of the keypoints
    joints_2d_confidence: Tensor | None = None  # (B, J) 0..1, 0 = not labelled
    visible: Tensor | None = None  # (B, J) bool: not hidden by an occluder, inside the crop
    silhouette: Tensor | None = None  # (B, h, w) 0..1
    depth: Tensor | None = None  # (B, h, w) metres from the camera; 0 where there is no body
    camera: Tensor | None = None  # (B, 3) weak-perspective scale, tx, ty in the crop
    pelvis: Tensor | None = None  # (B, 3) metres, pelvis in the camera frame
    focal: Tensor | None = None  # (B,) focal length in crop half-sides
    principal_point: Tensor | None = None  # (B, 2) crop coordinates
    visible_fraction: Tensor | None = None  # (B,) visible part of the body in the crop, 0..1
    index: Tensor | None = None  # (B,) position in the split: the seed of what is random about this sample

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The same sample with `function` applied to every tensor that is there."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Sample(**{name: None if value is None else function(value) for name, value in values.items()})

    def to(self, device: torch.device | str) -> Sample:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def __len__(self) -> int:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                return len(value)
        return 0


def concatenate(samples: list[Sample]) -> Sample:
    """Batches joined along B. A field must be there in all of them or in none."""
    merged = {}
    for field in dataclasses.fields(Sample):
        values = [getattr(sample, field.name) for sample in samples]
        present = [value for value in values if value is not None]
        if present and len(present) != len(values):
            raise ValueError(f"field {field.name!r} is there in {len(present)} of {len(values)} batches")
        merged[field.name] = torch.cat(present) if present else None
    return Sample(**merged)
