"""PCK of a pose estimator on synthetic people, for visible and hidden joints separately.

PCK@a: share of joints whose peak is within `a` times the crop's side of the ground truth (after Yang and Ramanan, PAMI
2013, who use the person's box). PCKh@0.5: within half of the projected length from the top of the head to the neck
(after Andriluka et al., CVPR 2014). Joints outside the crop are not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.estimators.pose_network import SyntheticEstimator
from hmdiff.heatmaps.distribution import heatmap_peaks

THRESHOLDS = (0.05, 0.1)
_HEAD = (HALPE26.index("top_head"), HALPE26.index("neck"))


def within(
    predicted: Tensor,  # (B, J, 2)
    truth: Tensor,  # (B, J, 2)
    radius: Tensor | float,  # (B, 1) or a scalar, in the points' unit
) -> Tensor:  # (B, J) bool
    return (predicted - truth).norm(dim=-1) <= radius


def pck_figures(
    estimator: SyntheticEstimator,
    data: SyntheticHumans,  # with pictures
    split: str,
    people: int,
) -> dict[str, dict[str, float]]:
    """Number of joints, PCK, PCKh and mean peak height for "visible" and "hidden" (occluded) joints."""
    names = (*map(_name, THRESHOLDS), "pckh@0.5", "peak", "seen", "there")
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for number in range(-(-people // data.block_size)):
        kept = min(data.block_size, people - number * data.block_size)
        sample = data.block(split, number).map(lambda tensor, kept=kept: tensor[:kept])  # type: ignore[misc]
        assert sample.image is not None and sample.joints_2d is not None and sample.visible is not None
        assert sample.joints_2d_confidence is not None
        points, peaks = heatmap_peaks(estimator.estimate(sample.image))
        truth = sample.joints_2d
        for threshold in THRESHOLDS:
            rows[_name(threshold)].append(within(points, truth, 2 * threshold))  # the crop's side is 2
        head = (truth[:, _HEAD[0]] - truth[:, _HEAD[1]]).norm(dim=-1, keepdim=True)
        rows["pckh@0.5"].append(within(points, truth, 0.5 * head))
        rows["peak"].append(peaks)
        rows["seen"].append(sample.visible)
        rows["there"].append(sample.joints_2d_confidence > 0)
    joined = {name: torch.cat(parts).cpu() for name, parts in rows.items()}
    seen, there = joined.pop("seen"), joined.pop("there")
    figures = {}
    for kind, mask in (("visible", seen), ("hidden", there & ~seen)):
        # Without hidden joints: 0 joints and zeros, not NaN.
        shares = {name: value[mask].float().mean().item() if mask.any() else 0.0 for name, value in joined.items()}
        figures[kind] = {"joints": int(mask.sum()), **shares}
    return figures


def _name(threshold: float) -> str:
    return f"pck@{threshold:g}"
