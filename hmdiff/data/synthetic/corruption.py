"""Corruptions as of a 2D pose estimator, as a random process: true keypoints in, heatmaps out (our choice throughout).

Jitter, larger on hips and on hidden joints; missing joints; confidence; blur; second peaks; left-right swaps; face
keypoints of a head turned away; joints missing from the estimator's joint set; guesses of hidden joints. All draws come
from one CPU generator, so that a seed gives the same data on every device. n people, J keypoints of HALPE26.

Guesses (`hidden`): by default a hidden joint's heatmap is hardly less accurate or wider than a visible one's, as in
labelled data. A network trained on heatmaps instead predicts the mean of a broad posterior: off, and as wide and low as
it is uncertain. Ours is off by 0.31 in the median and 0.30 wide on `test_occluded` (LOG.md), as for a normal density of
0.26. In a file of keypoints such a guess is a point of low confidence. Half of the people get one kind of map, half the
other; people with `exact` labels get neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.body.skeletons import COCO17, HALPE26, LSP14, OPENPOSE25, mirror_permutation
from hmdiff.config import HeatmapCorruption
from hmdiff.heatmaps.distribution import HEATMAP_SIZE

_NAMES = HALPE26
_MIRROR = torch.tensor(mirror_permutation(_NAMES))
_ARMS = torch.tensor([any(part in name for part in ("shoulder", "elbow", "wrist")) for name in _NAMES])
_LEGS = torch.tensor([any(part in name for part in ("hip", "knee", "ankle", "toe", "heel")) for name in _NAMES])
_HIPS = torch.tensor(["hip" in name for name in _NAMES])
_FACE = {name: _NAMES.index(name) for name in ("nose", "left_eye", "right_eye", "left_ear", "right_ear")}
# Joint sets of estimators, and their frequency.
_SOURCES = ((COCO17, 0.5), (OPENPOSE25, 0.2), (LSP14, 0.15), (HALPE26, 0.15))
_LIMBS12 = tuple(name for name in LSP14 if name in COCO17)
_BLAZEPOSE = tuple(n for n in HALPE26 if n in COCO17 or n.endswith(("heel", "big_toe")))  # those of its 33 in HALPE26
_WIDE_SOURCES = (
    (COCO17, 0.33),
    (OPENPOSE25, 0.15),
    (LSP14, 0.1),
    (HALPE26, 0.15),
    (_LIMBS12, 0.07),
    (_BLAZEPOSE, 0.2),
)


def face_visibility(
    keypoints_3d: Tensor,  # (n, J, 3) camera frame
) -> Tensor:  # (n, J) bool: False for face points on the far side of the head
    """False for nose and eyes when the head is turned away, and for the ear on the far side."""
    ears = (keypoints_3d[:, _FACE["left_ear"]] + keypoints_3d[:, _FACE["right_ear"]]) / 2
    forward = torch.nn.functional.normalize(keypoints_3d[:, _FACE["nose"]] - ears, dim=-1)[:, 2]
    outward = keypoints_3d[:, _FACE["left_ear"]] - keypoints_3d[:, _FACE["right_ear"]]
    outward = torch.nn.functional.normalize(outward, dim=-1)[:, 2]
    visible = torch.ones(keypoints_3d.shape[:2], dtype=torch.bool, device=keypoints_3d.device)
    for name in ("nose", "left_eye", "right_eye"):
        visible[:, _FACE[name]] = forward < 0.35
    visible[:, _FACE["left_ear"]] = outward < 0.55
    visible[:, _FACE["right_ear"]] = outward > -0.55
    return visible


def estimate_heatmaps(
    points: Tensor,  # (n, J, 2) true keypoints, crop coordinates
    visible: Tensor,  # (n, J) bool: not behind an occluder
    face_visible: Tensor,  # (n, J) bool
    corruption: HeatmapCorruption,
    generator: torch.Generator,  # CPU
) -> tuple[Tensor, Tensor]:  # heatmaps (n, J, 64, 64), valid (n, J) bool
    """The peaks of `estimate_peaks`, drawn as heatmaps."""
    peaks, confidence, valid = estimate_peaks(points, visible, face_visible, corruption, generator)
    heatmaps = two_gaussians(peaks[..., :2], peaks[..., 2], peaks[..., 0, 3])
    heatmaps = heatmaps * (confidence / heatmaps.amax((-2, -1)).clamp_min(1e-6))[..., None, None]
    return heatmaps * valid[..., None, None], valid


def estimate_peaks(
    points: Tensor,  # (n, J, 2) true keypoints, crop coordinates
    visible: Tensor,  # (n, J) bool: not behind an occluder
    face_visible: Tensor,  # (n, J) bool
    corruption: HeatmapCorruption,
    generator: torch.Generator,  # CPU
) -> tuple[Tensor, Tensor, Tensor]:  # peaks (n, J, 2, 4), confidence (n, J), valid (n, J) bool
    """Heatmaps as sums of two Gaussians: x, y (crop), height relative to the other, sigma (heatmap pixels).

    The sum is scaled so that its maximum is the confidence; a second height of 0 means no second peak.
    """
    n, joints, _ = points.shape
    device = points.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    exact = uniform(n, 1) < corruption.exact
    level = corruption.jitter * (0.5 * normal(n, 1)).exp()
    level = torch.where(exact, 0.3 * level, level)
    level = level * torch.where(_HIPS.to(device), 1.8, 1.0) * torch.where(visible & face_visible, 1.0, 2.5)
    # Heavy tails: a few joints are far off.
    tail = torch.where(uniform(n, joints) < 0.04, 3.0, 1.0)
    main = points + (level * torch.where(exact, 1.0, tail))[..., None] * normal(n, joints, 2)

    other, relative_height = main, torch.zeros(n, joints, device=device)
    has_second = (uniform(n, joints) < corruption.second_peak) & ~exact
    second_position = torch.where(
        (uniform(n, joints) < 0.5)[..., None], main[:, _MIRROR.to(device)], main + 0.25 * normal(n, joints, 2)
    )
    other = torch.where(has_second[..., None], second_position, other)
    relative_height = torch.where(has_second, 0.2 + 0.8 * uniform(n, joints), relative_height)

    # Left-right confusion of arms, legs or both: swapped, or as two peaks.
    kind = uniform(n, 1)
    arms, legs = _ARMS.to(device), _LEGS.to(device)
    swapped_limb = torch.where(kind < 0.4, legs, torch.where(kind < 0.7, arms, arms | legs))
    is_swapped = (uniform(n, 1) < corruption.swap) & ~exact & swapped_limb
    as_two_peaks = uniform(n, 1) < 0.5
    mirrored = main[:, _MIRROR.to(device)]
    other = torch.where((is_swapped & as_two_peaks)[..., None], mirrored, other)
    relative_height = torch.where(is_swapped & as_two_peaks, 0.5 + uniform(n, joints), relative_height)
    main = torch.where((is_swapped & ~as_two_peaks)[..., None], mirrored, main)

    confidence = (1 - 0.15 * normal(n, joints).abs()).clamp(0.3, 1)
    confidence = confidence * torch.where(visible & face_visible, 1.0, 0.25 + 0.6 * uniform(n, joints))
    confidence = confidence * (0.75 + 0.25 * uniform(n, 1))
    missing = uniform(n, joints) < torch.where(exact, 0.0, torch.tensor(corruption.missing, device=device))
    missing |= (uniform(n, joints) < corruption.missing_hidden) & ~visible
    missing |= (uniform(n, joints) < 0.75) & ~face_visible
    missing |= (main.abs() > 1.0).any(-1)  # an estimator does not see outside the crop
    confidence = torch.where(missing, 0.0, confidence)

    sources = _WIDE_SOURCES if corruption.few_joints else _SOURCES
    source = torch.multinomial(
        torch.tensor([frequency for _, frequency in sources]), n, replacement=True, generator=generator
    )
    joint_in_source = torch.tensor([[name in names for name in _NAMES] for names, _ in sources])
    valid = joint_in_source[source].to(device) | corruption.all_joints

    width = corruption.narrowest + (corruption.widest - corruption.narrowest) * uniform(n, 1)
    sigma = width * (0.1 * normal(n, joints)).exp()
    if corruption.hidden > 0:  # drawn last, so that without guesses the random numbers are unchanged
        hidden_std = corruption.hidden * (0.3 * normal(n, joints)).exp()
        is_guess = ~visible & ~exact
        is_wide = (uniform(n, 1) < 0.5) & is_guess
        guess_position = points + hidden_std[..., None] * normal(n, joints, 2)
        main, other = (torch.where(is_guess[..., None], guess_position, position) for position in (main, other))
        confidence = torch.where(is_guess & (guess_position.abs() > 1.0).any(-1), 0.0, confidence)
        wide_sigma = (sigma**2 + (hidden_std * (HEATMAP_SIZE / 2)) ** 2).sqrt()
        # The mass is kept, so the peak sinks.
        confidence = confidence * torch.where(is_wide, (sigma / wide_sigma) ** 2, 1.0)
        sigma = torch.where(is_wide, wide_sigma, sigma)
    positions, heights = (
        torch.stack([main, other], 2),
        torch.stack([torch.ones_like(relative_height), relative_height], 2),
    )
    widths = sigma[..., None].expand_as(heights)
    return torch.cat([positions, heights[..., None], widths[..., None]], -1), confidence * valid, valid


def scaled_peaks(
    peaks: Tensor,  # from `estimate_peaks`
    confidence: Tensor,  # (n, J)
) -> Tensor:  # (n, J, 2, 4) x, y (crop), height, sigma (heatmap pixels)
    """The peaks with their heights in the heatmap, whose maximum is the confidence."""
    x, y, height, sigma = peaks.unbind(-1)
    half_size = HEATMAP_SIZE / 2
    distance = ((x[..., 0] - x[..., 1]).square() + (y[..., 0] - y[..., 1]).square()) * half_size**2
    # The maximum of the sum lies close to one of the two peaks: exactly there if they are far apart or coincide.
    overlap = torch.exp(-0.5 * distance / sigma[..., 0].square())[..., None]
    maximum = (height + height.flip(-1) * overlap).amax(-1, keepdim=True)
    height = height * confidence[..., None] / maximum.clamp_min(1e-6)
    return torch.stack([x, y, height, sigma], -1)


def two_gaussians(
    points: Tensor,  # (n, J, 2, 2) positions of two peaks, crop coordinates
    height: Tensor,  # (n, J, 2) their heights
    sigma: Tensor,  # (n, J) heatmap pixels
) -> Tensor:  # (n, J, 64, 64)
    """The sum of two Gaussians, as one small matrix product per joint."""
    coordinates = (torch.arange(HEATMAP_SIZE, device=points.device) + 0.5) * (2 / HEATMAP_SIZE) - 1
    width = (sigma * (2 / HEATMAP_SIZE))[..., None, None, None]
    profiles = torch.exp(-0.5 * ((coordinates - points[..., None]) / width) ** 2)  # (n, J, 2 peaks, xy, 64)
    return (profiles[..., 1, :] * height[..., None]).transpose(-1, -2) @ profiles[..., 0, :]
