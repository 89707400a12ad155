"""`Heatmaps`, one distribution over the square crop for each named joint, and operations on them.

The centre of pixel (row i, column j) of an (H, W) heatmap lies at crop coordinates (-1 + 2(j+.5)/W, -1 + 2(i+.5)/H). A
channel's peak is the estimator's confidence, not the joint's visibility. Estimators regress raw values that can be
negative: the constructors clamp at 0, and only `normalised` makes a channel a distribution (the distribution U of
HMDiff, arXiv 2308.13369; the floor below which a joint is dropped is our choice).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, HAND21, shared_joints
from hmdiff.errors import UserError
from hmdiff.heatmaps.crop import Crop, concatenate_crops
from hmdiff.heatmaps.resampling import spline_weights

HEATMAP_SIZE = 64
MASS_FLOOR = 1.0  # in pixels of a 64 x 64 heatmap: equals a Gaussian of sigma 2 and peak 0.04
BOX_PADDING = 1.25
# A box of keypoints ends at the eyes and ankles, inside the person's box. Our choice, between what COCO-17 (1.5) and
# BODY_25 (1.36) need on two real photos to reach 1.25 times the person's box.
KEYPOINT_PADDING = 1.4


LARGEST = 1e6  # bound on values, so that squares and sums do not overflow


@dataclasses.dataclass(frozen=True)
class Heatmaps:
    """Heatmaps of B people, for the 26 joints of a body (`skeletons.HALPE26`) or the 21 of a hand (`HAND21`).

    Raises:
        UserError: wrong shapes, NaN or infinite or negative values, a person whose heatmaps are all zero.
    """

    values: Tensor  # (B, J, 64, 64) float32, >= 0, peak = confidence
    valid: Tensor  # (B, J) bool: joints that the source provides; channels of the others are zero
    crop: Crop  # B crops with their photos' cameras
    names: tuple[str, ...] = HALPE26  # J joint names

    def __post_init__(self) -> None:
        expected = (len(self.names), HEATMAP_SIZE, HEATMAP_SIZE)
        values, batch = self.values, len(self.values) if self.values.dim() else 0
        if values.dim() != 4 or tuple(values.shape[1:]) != expected or batch == 0:
            raise UserError(f"heatmaps: shape {_shape(values)} found, (B, {', '.join(map(str, expected))}) expected")
        if tuple(self.valid.shape) != (batch, len(self.names)) or self.valid.dtype != torch.bool:
            raise UserError(f"heatmaps: `valid` must be a bool array of shape ({batch}, {len(self.names)})")
        if len(self.crop) != batch:
            raise UserError(f"heatmaps: crops of {len(self.crop)} people for {batch}; give one for each")
        if values.dtype != torch.float32:
            raise UserError(f"heatmaps: float32 expected, {values.dtype} found; convert them with .float()")
        _check_finite(values, self.names)
        if (values < 0).any():
            raise UserError(f"heatmaps: negative value {values.min().item():.3g} found; clamp them at 0 first")
        if values.numel() and float(values.max()) > LARGEST:
            raise UserError(f"heatmaps: {float(values.max()):.3g} found, at most {LARGEST:g} is possible")
        if (values.flatten(2).amax(-1) > 0)[~self.valid].any():
            raise UserError("heatmaps: a joint marked as not valid has values; set its channel to 0 or mark it valid")
        empty = values.flatten(1).amax(-1) <= 0
        if empty.any():
            index = int(empty.nonzero()[0, 0])
            raise UserError(f"heatmaps: all zero for person {index}: nobody was seen there; leave this person out")

    @property
    def center(self) -> Tensor:  # (B, 2)
        """Centre of the square crop, photo pixels."""
        return self.crop.center

    @property
    def side(self) -> Tensor:  # (B,)
        """Side of the square crop, photo pixels."""
        return self.crop.side

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Heatmaps:
        """Select people; a single index gives a batch of one."""
        if isinstance(index, int):
            index = [index]
        return Heatmaps(self.values[index], self.valid[index], self.crop[index], self.names)

    def to(self, device: torch.device | str) -> Heatmaps:
        return Heatmaps(self.values.to(device), self.valid.to(device), self.crop.to(device), self.names)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_finite(values: Tensor, names: Sequence[str]) -> None:
    bad = ~values.isfinite().flatten(2).all(-1)
    if bad.any():
        person, joint = bad.nonzero()[0].tolist()
        raise UserError(
            f"heatmaps: NaN or infinite values in joint {names[joint]!r} of person {person}; "
            "mend the estimator's output or leave the joint out"
        )


def heatmaps_from_values(
    values: Tensor,  # (B, J, H, W) raw regression of an estimator, any size
    names: Sequence[str],  # J joint names
    center: Tensor,  # (B, 2) centre of the crop that the values cover, photo pixels
    side: Tensor,  # (B,) or (B, 2) width and height of that crop, photo pixels
    to_center: Tensor | None = None,  # (B, 2) centre of the target crop; None: the same centre
    to_side: Tensor | None = None,  # (B,) side of the target crop; None: the longer of width and height
) -> Heatmaps:
    """An estimator's output as `Heatmaps`: clamped at 0, resampled to 64 x 64, joints mapped by name.

    Joints are mapped to a hand's 21 if all are a hand's, else to a body's 26.

    Raises:
        UserError: NaN, wrong shapes, no known joint, or a person whose heatmaps are all zero.
    """
    if values.dim() != 4 or values.shape[1] != len(names):
        raise UserError(f"heatmaps: shape {_shape(values)} found, (B, {len(names)}, H, W) expected for their joints")
    values, center, side = values.float(), center.float(), side.float()
    _check_finite(values, names)
    known = joints_of_heatmaps(names)
    source, target = shared_joints(names, known)
    if not source:
        raise UserError(f"heatmaps: none of the joints {', '.join(names)} is known; known are {', '.join(HALPE26)}")
    values = values[:, source].clamp_min(0)
    to_center = center if to_center is None else to_center
    if to_side is None:
        to_side = side.amax(-1) if side.dim() == 2 else side
    unchanged = torch.equal(center, to_center) and side.dim() == 1 and torch.equal(side, to_side)
    if not (unchanged and values.shape[-2:] == (HEATMAP_SIZE, HEATMAP_SIZE)):
        values = resample_heatmaps(values, center, side, to_center, to_side)
    every = values.new_zeros(len(values), len(known), HEATMAP_SIZE, HEATMAP_SIZE)
    every[:, target] = values
    valid = torch.zeros(every.shape[:2], dtype=torch.bool, device=every.device)
    valid[:, target] = True
    return Heatmaps(every, valid, Crop.of(to_center, to_side), known)


def joints_of_heatmaps(
    names: Sequence[str],
) -> tuple[str, ...]:
    """The joint set for heatmaps of these joints: the hand's if all are a hand's, else the body's."""
    return HAND21 if names and all(name in HAND21 for name in names) else HALPE26


def concatenate_heatmaps(parts: Sequence[Heatmaps]) -> Heatmaps:
    """Concatenate along the batch. Raises `UserError` for a mix of bodies and hands."""
    if len({part.names for part in parts}) > 1:
        raise UserError("heatmaps: bodies and hands in one call; give them apart")
    return Heatmaps(
        torch.cat([part.values for part in parts]),
        torch.cat([part.valid for part in parts]),
        concatenate_crops([part.crop for part in parts]),
        parts[0].names,
    )


def gaussian_heatmaps(
    points: Tensor,  # (..., J, 2) crop coordinates
    confidence: Tensor,  # (..., J) the peak; where it is 0, the point may be anything, even NaN
    sigma: Tensor | float,  # (..., J) or one number, heatmap pixels
    size: int = HEATMAP_SIZE,
) -> Tensor:  # (..., J, size, size)
    """``confidence * exp(-d² / 2 sigma²)``, d in heatmap pixels, as the outer product of a column and a row."""
    points = torch.where(confidence[..., None] > 0, points, torch.zeros_like(points))
    pixel = (points + 1) * (size / 2) - 0.5
    grid = torch.arange(size, dtype=points.dtype, device=points.device)
    spread = sigma[..., None, None] if isinstance(sigma, Tensor) else sigma
    profile = torch.exp(-0.5 * ((grid - pixel[..., None]) / spread).square())  # (..., J, 2, size)
    across, down = profile[..., 0, :], profile[..., 1, :] * confidence[..., None]
    return down[..., :, None] * across[..., None, :]


def pixel_coordinates(
    size: int,
    like: Tensor,
) -> Tensor:  # (size,) crop coordinates of the pixel centres, with the dtype and device of `like`
    """``-1 + 2 (i + .5) / size``."""
    return (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) * (2 / size) - 1


def normalised(
    values: Tensor,  # (..., H, W) raw
    floor: float = MASS_FLOOR,  # pixels of a 64 x 64 heatmap
) -> Tensor:  # (..., H, W)
    """Distributions that sum to 1; a joint with a mass below the floor is dropped: its channel is 0."""
    values = values.clamp_min(0)
    height, width = values.shape[-2:]
    mass = values.sum((-2, -1), keepdim=True)
    kept = mass >= floor * height * width / HEATMAP_SIZE**2
    return torch.where(kept, values / mass.clamp_min(1e-12), torch.zeros_like(values))


def soft_argmax(
    values: Tensor,  # (..., H, W) >= 0, not necessarily normalised
) -> Tensor:  # (..., 2) crop coordinates
    """The mean of the distribution; the crop's centre for a channel without mass."""
    height, width = values.shape[-2:]
    mass = values.sum((-2, -1)).clamp_min(1e-12)
    x = (values.sum(-2) * pixel_coordinates(width, values)).sum(-1) / mass
    y = (values.sum(-1) * pixel_coordinates(height, values)).sum(-1) / mass
    return torch.stack([x, y], -1)


def heatmap_peaks(
    values: Tensor,  # (..., H, W) >= 0
) -> tuple[Tensor, Tensor]:  # (..., 2) crop coordinates, (...) confidence
    """The highest pixel and its value, refined by a parabola through the logarithms (exact for a Gaussian)."""
    height, width = values.shape[-2:]
    confidence, best = values.flatten(-2).max(-1)
    row, column = best // width, best % width

    def refined(position: Tensor, step: int, size: int) -> Tensor:
        inside = (position > 0) & (position < size - 1)
        index = torch.stack([best - step * inside, best, best + step * inside], -1)
        low, mid, high = values.flatten(-2).gather(-1, index).clamp_min(1e-12).log().unbind(-1)
        offset = 0.5 * (high - low) / (2 * mid - low - high).clamp_min(1e-6)
        return -1 + 2 * (position + 0.5 + offset.clamp(-0.5, 0.5)) / size

    return torch.stack([refined(column, 1, width), refined(row, width, height)], -1), confidence


def resample_heatmaps(
    values: Tensor,  # (B, J, H, W)
    center: Tensor,  # (B, 2) centre of the crop that the values cover, photo pixels
    side: Tensor,  # (B,) or (B, 2) width and height, photo pixels
    to_center: Tensor,  # (B, 2)
    to_side: Tensor,  # (B,)
    size: int = HEATMAP_SIZE,
) -> Tensor:  # (B, J, size, size)
    """The same heatmaps over another crop of the photo, by cubic splines; 0 outside the old crop."""
    extent = side if side.dim() == 2 else side[:, None].expand(-1, 2)
    grid = pixel_coordinates(size, values) / 2
    weights = []
    for axis, count in ((1, values.shape[-2]), (0, values.shape[-1])):
        places = (to_center[:, axis, None] + grid * to_side[:, None] - center[:, axis, None]) / extent[:, axis, None]
        weights.append(spline_weights(count, (places + 0.5) * count - 0.5).to(values.dtype))
    down, across = weights  # (B, size, H), (B, size, W)
    return torch.einsum("bik,bjkl,bml->bjim", down, values, across).clamp_min(0)


def draw_samples(
    values: Tensor,  # (..., J, H, W) >= 0, not necessarily normalised
    count: int,
    generator: torch.Generator,
) -> Tensor:  # (..., count, J, 2) crop coordinates
    """Samples from each joint's distribution, uniform within the pixel; 0 for a channel without mass.

    Random numbers are drawn on the generator's own device, so a seed gives the same points on any device. For points
    that do not depend on the batch, use a separate generator and call for each person.
    """
    width = values.shape[-1]
    cumulative = values.flatten(-2).double().cumsum(-1)
    total = cumulative[..., -1:]
    shape = (*values.shape[:-2], count)
    draws = torch.rand((3, *shape), generator=generator, dtype=torch.float64, device=generator.device).to(values.device)
    # right=True selects the first pixel whose cumulative mass exceeds the draw: never a pixel of mass 0.
    pixel = torch.searchsorted(cumulative, draws[0] * total, right=True).clamp_max(cumulative.shape[-1] - 1)
    x = (pixel % width + draws[1]) * (2 / width) - 1
    y = (pixel // width + draws[2]) * (2 / values.shape[-2]) - 1
    points = torch.stack([x, y], -1) * (total > 0)[..., None]
    return points.transpose(-3, -2).to(values.dtype)


def crop_from_box(
    box_xyxy: Tensor,  # (..., 4) photo pixels
    padding: float = BOX_PADDING,
) -> tuple[Tensor, Tensor]:  # centre (..., 2), side (...)
    """The square crop around a person's box, with `padding` times the box's longer side."""
    low, high = box_xyxy[..., :2], box_xyxy[..., 2:]
    return (low + high) / 2, padding * (high - low).amax(-1)


def crop_from_keypoints(
    points: Tensor,  # (..., J, 2) photo pixels
    confidence: Tensor,  # (..., J) joints at 0 are ignored
    padding: float = KEYPOINT_PADDING,
) -> tuple[Tensor, Tensor]:  # centre (..., 2), side (...)
    """The square crop around the detected keypoints. At least one is required."""
    there = (confidence > 0)[..., None]
    low = points.masked_fill(~there, float("inf")).amin(-2)
    high = points.masked_fill(~there, float("-inf")).amax(-2)
    return crop_from_box(torch.cat([low, high], -1), padding)
