"""Errors of points, edges and projections: pure functions, unreduced over the batch.

METRO and FastMETRO use L1; a diffusion model with x0 prediction needs the squared error, whose minimiser is the
posterior mean that samplers assume.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINT_LOSSES = ("l2", "l1", "euclidean")


def point_error(
    predicted: Tensor,  # (..., P, 3)
    target: Tensor,  # (..., P, 3)
    kind: str = "l2",
    weight: Tensor | None = None,  # (..., P) >= 0, not all zero
) -> Tensor:  # (...)
    """Weighted mean over the points of the squared, absolute or Euclidean error."""
    difference = predicted - target
    if kind == "l2":
        error = difference.square().mean(-1)
    elif kind == "l1":
        error = difference.abs().mean(-1)
    elif kind == "euclidean":
        error = (difference.square().sum(-1) + 1e-10).sqrt()
    else:
        raise ValueError(f"point loss {kind!r} is none of {POINT_LOSSES}")
    if weight is None:
        return error.mean(-1)
    return (error * weight).sum(-1) / weight.sum(-1)


def edge_error(
    predicted: Tensor,  # (..., C, 3)
    target: Tensor,  # (..., C, 3)
    edges: Tensor,  # (E, 2) long
) -> Tensor:  # (...)
    """Mean absolute difference of edge lengths (after Pixel2Mesh)."""

    def lengths(points: Tensor) -> Tensor:
        return ((points[..., edges[:, 0], :] - points[..., edges[:, 1], :]).square().sum(-1) + 1e-10).sqrt()

    return (lengths(predicted) - lengths(target)).abs().mean(-1)


def reprojection_error(
    projected: Tensor,  # (..., J, 2) crop coordinates
    target: Tensor,  # (..., J, 2)
    confidence: Tensor,  # (..., J) 0..1, 0 = not labelled
) -> Tensor:  # (...)
    """Mean absolute 2D distance, weighted by confidence; 0 without labels."""
    error = (projected - target).abs().sum(-1) * confidence
    return error.sum(-1) / confidence.sum(-1).clamp_min(1.0)


def camera_error(
    predicted: Tensor,  # (..., 3) scale, tx, ty
    target: Tensor,  # (..., 3)
) -> Tensor:  # (...)
    """Absolute error of the log scale plus that of the translation in the crop."""
    scale = (predicted[..., 0].clamp_min(1e-4).log() - target[..., 0].clamp_min(1e-4).log()).abs()
    return scale + (predicted[..., 1:] - target[..., 1:]).abs().sum(-1)


def mask_unlabelled(
    error: Tensor,  # (B, ...)
    labelled: Tensor | None,  # (B,) bool, None = all
) -> Tensor:
    """Zero the errors of samples without this label."""
    if labelled is None:
        return error
    shape = (-1,) + (1,) * (error.dim() - 1)
    return torch.where(labelled.reshape(shape), error, torch.zeros_like(error))


def mean_over_labelled(
    error: Tensor,  # (B, ...)
    labelled: Tensor | None,  # (B,) bool, None = all
    name: str = "",  # of the term
    shares: dict[str, Tensor] | None = None,  # filled with the labelled fraction of the batch, see `processes`
) -> Tensor:  # ()
    """Mean over the people with this label; 0 without any.

    A mean over the batch would down-weight the mesh term in a mixture with people without mesh labels.
    """
    mean = mask_unlabelled(error, labelled).mean()
    share = mean.new_ones(()) if labelled is None else labelled.to(mean).mean()
    if shares is not None:
        shares[name] = share.detach()
    if labelled is None:
        return mean
    # The fraction is exactly 1 if all are labelled: the term then equals that without masks.
    return mean / torch.where(share > 0, share, 1.0)
