"""RLE: residual log-likelihood estimation (Li et al., arXiv 2107.11291), the regression loss of D2A-HMR (2403.09063).

A regressor gives a mean μ̂ and a scale σ̂; y = (μ_g - μ̂) / σ̂ is the residual in its own units, and a flow G learns
its shape.

1. Change of variables: if y has the density p, x = μ̂ + σ̂ y has p(y) / Π_d σ̂_d, so -log p(x) = Σ_d log σ̂_d - log p(y).
   log σ̂ comes in once, from the stretch of the axes.
2. RLE sets p = Q G / Z, Q(y) = Π_d exp(-|y_d|) / 2 a Laplace density and G the flow's. Both integrate to 1, their
   product does not: Z = ∫ Q G is at most 2^-D, the height of Q. The paper's constant, c = 1 / Z, moves with the flow.
3. `exact` leaves log Z out, as the paper does: Σ_d [log σ̂_d + log 2 + |y_d|] - log G(y). This is the negative logarithm
   of a density plus -log Z >= D log 2: an upper bound of it, not the thing itself.
4. What that costs (ours; measured in LOG.md). The loss is [Σ log σ̂ - log G(y)], a proper likelihood that stays as it is
   under a common factor of all σ̂, since the flow takes it up, plus Σ |y|, which falls as σ̂ grows. So nothing holds the
   size of σ̂: it grows until the sigmoid or the flow ends it. Which σ̂ is larger than which stays right.
5. `official` is the authors' code: log σ̂ twice, the one log G added to each of D coordinates, √(2π) and √2 in Q, y with
   the other sign. The second log σ̂ does hold σ̂, but counting log G D times takes that back for D >= 2.
6. `composite` (ours) adds two proper likelihoods of one residual, Laplace's Q(y) / Π σ̂ and the flow's G(y) / Π σ̂:
   Σ_d [2 log σ̂_d + log 2 + |y_d|] - log G(y). Where the flow fits, σ̂ is the mean absolute residual, as with Laplace,
   and G is its shape. Where 1 - σ̂ is shown as a confidence, use this one: its size means something.

In a diffusion model (our choice; the paper has a direct regressor) σ̂ is a head of the denoiser's tokens, so a function
of x_k, k and the image, and RLE is a likelihood of x_0 given these. Three things follow.
- At the terminal step x_k is noise and x̂_0 the direct regressor: there, and only there, σ̂ is the uncertainty of
  p(x_0 | image), and becomes the confidence. At smaller k it is what is still open once x_k is known.
- Nats need no weight by noise level: y is already in units of its own level, and no positive weight moves the minimiser
  of a head that is told its level. Min-SNR weights are made for squared errors, and the plain one is 0 at the terminal
  step, where σ̂ is wanted most. The weight is 1.
- Samplers take x̂_0 for the mean of p(x_0 | x_k, image). RLE pulls it to a median or a mode, by a force of 1 / σ̂,
  which grows as the noise falls. So below the terminal step the mean is detached and the squared error alone trains
  it; at the terminal step, and in the direct baseline, RLE pulls at the mean, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RLE_VARIANTS = ("exact", "official", "composite")
_FLOOR = 1e-4  # of the unit of the points: the last guard; under it σ̂ has no gradient (heads: `models.flow.scale_of`)


def rle_error(
    mean: Tensor,  # (..., P, D) μ̂
    scale: Tensor,  # (..., P, D) σ̂ > 0
    target: Tensor,  # (..., P, D) μ_g
    flow_log_prob: Callable[[Tensor], Tensor],  # (..., D) -> (...), such as `RealNVP.log_prob`
    variant: str = "exact",  # of RLE_VARIANTS
    weight: Tensor | None = None,  # (..., P) >= 0, 0 = not labelled: whatever stands there does not count
) -> Tensor:  # (...) nats; 0 where no point is labelled
    """Weighted mean over the points of their negative log-likelihood, each summed over its D coordinates.

    Computed in float32 whatever comes in (float64 stays). An outlier is charged by Laplace's |y| and by the square that
    the flow's normal tail adds; clip gradients where labels may be wild.
    """
    mean, scale, target = _precise(mean), _precise(scale), _precise(target)
    if weight is not None:
        target = torch.where(weight[..., None] > 0, target, mean.detach())
    error = _point_error(mean, scale, target, flow_log_prob, variant)
    if weight is None:
        return error.mean(-1)
    weight = weight.to(error)
    total = weight.sum(-1)
    return (error * weight).sum(-1) / torch.where(total > 0, total, 1.0)


def _point_error(
    mean: Tensor,  # (..., P, D)
    scale: Tensor,
    target: Tensor,
    flow_log_prob: Callable[[Tensor], Tensor],
    variant: str,
) -> Tensor:  # (..., P)
    if variant not in RLE_VARIANTS:
        raise ValueError(f"RLE variant {variant!r} is none of {RLE_VARIANTS}")
    scale = scale.clamp_min(_FLOOR)
    residual = (target - mean) / scale
    log_scale = scale.log()
    if variant == "official":
        laplace = log_scale + 0.5 * math.log(2 * math.pi) + residual.abs() / math.sqrt(2)
        return (laplace + log_scale - flow_log_prob(-residual)[..., None]).sum(-1)
    laplace = (log_scale + math.log(2) + residual.abs()).sum(-1)
    if variant == "composite":
        laplace = laplace + log_scale.sum(-1)
    return laplace - flow_log_prob(residual)


def rle_log_likelihood(
    joints: Tensor,  # (B, N, K, D) of the hypotheses, in the unit and frame of the mean
    mean: Tensor,  # (B, K, D) μ̂ of the image
    scale: Tensor,  # (B, K, D) σ̂ of the image
    flow_log_prob: Callable[[Tensor], Tensor],
    variant: str = "exact",  # the one that the flow and σ̂ were trained by
) -> Tensor:  # (B, N) nats, up to a constant of the person
    """How likely the image's own regression makes each hypothesis: what `hypotheses.select` can add to its score.

    Of the density that the variant trains: Q G / Z for `exact` and `official` (its Q, its sign), the flow's G for
    `composite`. The joints count as independent, which they are not: for comparing hypotheses of one person only.
    """
    if variant not in RLE_VARIANTS:
        raise ValueError(f"RLE variant {variant!r} is none of {RLE_VARIANTS}")
    joints, mean, scale = _precise(joints), _precise(mean)[:, None], _precise(scale)[:, None].clamp_min(_FLOOR)
    residual = (joints - mean) / scale
    if variant == "composite":
        each = flow_log_prob(residual)
    elif variant == "exact":
        each = flow_log_prob(residual) - residual.abs().sum(-1)
    else:
        each = flow_log_prob(-residual) - residual.abs().sum(-1) / math.sqrt(2)
    return (each - scale.log().sum(-1)).sum(-1)


def joint_confidence(
    scale: Tensor,  # (..., P, D) σ̂
) -> Tensor:  # (..., P) 0..1
    """1 - σ̂, the mean over a point's coordinates: 1 is certain, 0 is one unit of the points off on average."""
    return (1 - _precise(scale)).mean(-1).clamp(0, 1)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
