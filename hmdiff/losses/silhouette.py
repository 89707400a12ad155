"""Errors of a predicted silhouette (a term of D2A-HMR, arXiv 2403.09063): pure functions, one number a person."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silhouette_error(
    logits: Tensor,  # (B, S, S)
    target: Tensor,  # (B, S, S) 0..1: bool, or the covered share of each pixel
) -> Tensor:  # (B,) nats a pixel
    """Binary cross-entropy, the mean over the pixels, from logits: stable however sure the network is.

    Not balanced (ours): the crop is made for the person, so that his pixels are not rare, and a weight on them would
    make the outline too fat, since the least error would no longer be at the true probability.
    """
    logits = _precise(logits)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").mean((-2, -1))


def silhouette_iou(
    logits: Tensor,  # (B, S, S)
    target: Tensor,  # (B, S, S) 0..1, or bool
) -> Tensor:  # (B,) 0..1
    """Intersection over union of the pixels above one half; 1 where both are empty."""
    predicted, true = logits > 0, target > 0.5
    union = (predicted | true).sum((-2, -1))
    shared = (predicted & true).sum((-2, -1))
    return torch.where(union > 0, shared / union.clamp_min(1), 1.0)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
