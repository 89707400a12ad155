"""The sample contract: what every data set, real or synthetic, provides for training and evaluation.

One frozen dataclass serves single samples and batches (a leading B on every field). A missing label is None; where only
some samples of a batch have it, its mask (`MASKS`) marks them, so that a placeholder zero never counts as a label.
Frames and units as in `hmdiff.geometry`: metres relative to the pelvis in the camera frame, crop coordinates -1..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """People in square crops. J = 26 keypoints (HALPE26), K = 24 body joints, V vertices, C coarse vertices."""

    image: Tensor | None = None  # (B, 3, H, W) RGB, 0..1
    heatmaps: Tensor | None = None  # (B, J, h, w) >= 0, peak = confidence
    heatmap_valid: Tensor | None = None  # (B, J) bool: the estimator's joint set includes this joint
    peaks: Tensor | None = None  # (B, J, 2, 4) x, y, height, sigma: Gaussians whose sum is the heatmap
    vertices: Tensor | None = None  # (B, V, 3)
    coarse_vertices: Tensor | None = None  # (B, C, 3): a subset of the vertices, for training without the full mesh
    has_vertices: Tensor | None = None  # (B,) bool
    joints_3d: Tensor | None = None  # (B, K, 3)
    has_joints_3d: Tensor | None = None  # (B,) bool
    keypoints_3d: Tensor | None = None  # (B, J, 3)
    has_keypoints_3d: Tensor | None = None  # (B, J) bool: real data sets label a subset of them
    joints_2d: Tensor | None = None  # (B, J, 2) crop coordinates of the keypoints
    joints_2d_confidence: Tensor | None = None  # (B, J) 0..1, 0 = not labelled
    visible: Tensor | None = None  # (B, J) bool: not hidden by an occluder, inside the crop
    silhouette: Tensor | None = None  # (B, h, w) 0..1
    has_silhouette: Tensor | None = None  # (B,) bool
    depth: Tensor | None = None  # (B, h, w) metres from the camera; 0 where there is no body
    has_depth: Tensor | None = None  # (B,) bool
    depth_input: Tensor | None = None  # (B, s, s) the model's input: larger = farther, any unit, NaN = unknown
    camera: Tensor | None = None  # (B, 3) weak-perspective scale, tx, ty in the crop
    has_camera: Tensor | None = None  # (B,) bool
    pelvis: Tensor | None = None  # (B, 3) metres, pelvis in the camera frame
    focal: Tensor | None = None  # (B,) focal length in crop half-sides
    principal_point: Tensor | None = None  # (B, 2) crop coordinates
    has_perspective: Tensor | None = None  # (B,) bool: pelvis, focal and principal_point are known
    visible_fraction: Tensor | None = None  # (B,) visible part of the body in the crop, 0..1
    occlusion: Tensor | None = None  # (B, h, w) bool: pixels covered by an occluder, on the person or beside
    index: Tensor | None = None  # (B,) position in the split: seeds this sample's randomness

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The same sample with `function` applied to every field that is not None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Sample(**{name: None if value is None else function(value) for name, value in values.items()})

    def to(self, device: torch.device | str) -> Sample:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def zero_unlabelled(self) -> Sample:
        """The same sample with 0 (also in place of NaN) wherever a mask marks the label as missing.

        Multiplying a loss by its mask is not enough: NaN times 0 is NaN, in the value or in the gradient.
        """
        changed = {}
        for name, mask_name in MASKS.items():
            value, mask = getattr(self, name), getattr(self, mask_name)
            if value is not None and mask is not None and name not in ("heatmaps", "peaks"):  # inputs, not labels
                labelled = (mask > 0).reshape(*mask.shape, *(1,) * (value.dim() - mask.dim()))
                changed[name] = torch.where(labelled, value, torch.zeros_like(value))
        return dataclasses.replace(self, **changed)

    def __len__(self) -> int:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                return len(value)
        return 0


# The mask of each field. A mask of None means that every sample has the field.
MASKS = {
    "heatmaps": "heatmap_valid",
    "peaks": "heatmap_valid",
    "vertices": "has_vertices",
    "coarse_vertices": "has_vertices",
    "joints_3d": "has_joints_3d",
    "keypoints_3d": "has_keypoints_3d",
    "joints_2d": "joints_2d_confidence",
    "visible": "joints_2d_confidence",
    "silhouette": "has_silhouette",
    "visible_fraction": "has_silhouette",
    "occlusion": "has_silhouette",
    "depth": "has_depth",
    "camera": "has_camera",
    "pelvis": "has_perspective",
    "focal": "has_perspective",
    "principal_point": "has_perspective",
}
_PER_KEYPOINT = {"heatmaps", "peaks", "keypoints_3d", "joints_2d", "visible"}  # masks of (B, J), not (B,)


class PeopleSource(Protocol):
    """A source of blocks of people: synthetic people, a prepared data set, or a mixture of several."""

    block_size: int
    full_mesh: bool  # whether its samples have `vertices`
    image_size: int | None  # S of its images; None: it has none

    def block(self, stream: str, number: int) -> Sample: ...  # a function of (the source, stream, number) alone

    def __hash__(self) -> int: ...  # by identity: results computed from a source are cached per source


def concatenate(samples: list[Sample]) -> Sample:
    """Concatenate batches along B. Samples without a label get zeros for it, and False in its mask.

    Raises:
        ValueError: a field without a mask (the image) is missing in some batches; or a mask marks a missing field.
    """
    merged: dict[str, Tensor | None] = {}
    for field in dataclasses.fields(Sample):
        values = [getattr(sample, field.name) for sample in samples]
        present = [value for value in values if value is not None]
        if present and len(present) != len(values):
            if field.name in MASKS:
                values = [_blank(sample, field.name, present[0]) for sample in samples]
            elif field.name == "depth_input":
                like = present[0]
                values = [
                    like.new_full((len(sample), *like.shape[1:]), torch.nan) if value is None else value
                    for sample, value in zip(samples, values, strict=True)
                ]
            elif field.name in MASKS.values():
                values = [_mask(sample, field.name, present[0]) for sample in samples]
            else:
                raise ValueError(f"field {field.name!r} is there in {len(present)} of {len(values)} batches")
        merged[field.name] = torch.cat(values) if present else None
    for name, mask_name in MASKS.items():  # a mask that no batch had, because each one alone was complete
        if merged[mask_name] is None and any(getattr(sample, name) is None for sample in samples):
            value = merged[name]
            if value is not None:
                like = value.new_zeros(value.shape[: 2 if name in _PER_KEYPOINT else 1], dtype=torch.bool)
                merged[mask_name] = torch.cat([_mask(sample, mask_name, like) for sample in samples])
    return Sample(**merged)


def _blank(sample: Sample, name: str, like: Tensor) -> Tensor:
    """The field, or zeros of its shape where it is None."""
    value = getattr(sample, name)
    if value is not None:
        return value
    mask = getattr(sample, MASKS[name])
    if mask is not None and (mask > 0).any():
        raise ValueError(f"{MASKS[name]!r} says that {name!r} is there, and it is not")
    return like.new_zeros(len(sample), *like.shape[1:])


def _mask(sample: Sample, mask_name: str, like: Tensor) -> Tensor:
    """The mask; where it is None, one that is True for all people if the masked fields are present, else False."""
    mask = getattr(sample, mask_name)
    if mask is not None:
        return mask
    any_labelled = any(getattr(sample, name) is not None for name, of in MASKS.items() if of == mask_name)
    return like.new_full((len(sample), *like.shape[1:]), any_labelled)
