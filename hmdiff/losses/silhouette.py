"""Errors of a predicted silhouette (D2A-HMR, arXiv 2403.09063): pure functions, one number per person."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silhouette_error(
    logits: Tensor,  # (B, S, S)
    target: Tensor,  # (B, S, S) 0..1: bool, or the covered fraction of each pixel
) -> Tensor:  # (B,) nats per pixel
    """Binary cross-entropy with logits, mean over the pixels.

    Without class balancing (ours): foreground pixels are not rare in a person's crop, and a weight on them would bias
    the predicted probability, making the outline too wide.
    """
    logits = _precise(logits)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").mean((-2, -1))


def silhouette_iou(
    logits: Tensor,  # (B, S, S)
    target: Tensor,  # (B, S, S) 0..1, or bool
) -> Tensor:  # (B,) 0..1
    """Intersection over union of the pixels above 0.5; 1 if both are empty."""
    predicted, true = logits > 0, target > 0.5
    union = (predicted | true).sum((-2, -1))
    shared = (predicted & true).sum((-2, -1))
    return torch.where(union > 0, shared / union.clamp_min(1), 1.0)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
