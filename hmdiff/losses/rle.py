"""RLE: residual log-likelihood estimation (Li et al., arXiv 2107.11291), the regression loss of D2A-HMR (2403.09063).

A regressor predicts a mean μ̂ and a scale σ̂; a flow G learns the density of the normalised residual y = (μ_g - μ̂) / σ̂.

1. Change of variables: if y has density p, x = μ̂ + σ̂ y has density p(y) / Π_d σ̂_d: -log p(x) = Σ_d log σ̂_d - log p(y).
2. RLE sets p = Q G / Z, Q(y) = Π_d exp(-|y_d|) / 2 a Laplace density and G the flow's. Q and G are normalised, their
   product is not: Z = ∫ Q G <= 2^-D, the maximum of Q. The paper's constant c = 1 / Z depends on the flow.
3. `exact` drops log Z, as the paper does: Σ_d [log σ̂_d + log 2 + |y_d|] - log G(y). This is the negative log-likelihood
   plus -log Z >= D log 2, an upper bound of it.
4. Consequence (measured in LOG.md): the loss is Σ log σ̂ - log G(y), a proper likelihood that is invariant to a common
   factor on all σ̂ since the flow absorbs it, plus Σ |y|, which decreases with σ̂. So the magnitude of σ̂ is not
   identified: it grows until the sigmoid or the flow saturates. The ranking of σ̂ remains valid.
5. `official` is the authors' code: log σ̂ twice, log G added to each of D coordinates, √(2π) and √2 in Q, -y. The second
   log σ̂ bounds σ̂, but counting log G D times cancels that for D >= 2.
6. `composite` (ours) sums two proper likelihoods of the residual, Laplace's Q(y) / Π σ̂ and the flow's G(y) / Π σ̂:
   Σ_d [2 log σ̂_d + log 2 + |y_d|] - log G(y). With a fitted flow σ̂ is the mean absolute residual, as with Laplace, and
   G is the residual's shape. Use it where 1 - σ̂ is reported as a confidence, since its σ̂ is identified.

In a diffusion model (ours; the paper has a direct regressor) σ̂ is a head on the denoiser's tokens, a function of x_k, k
and the image, and RLE is a likelihood of x_0 given these:
- At the terminal step x_k is pure noise and x̂_0 the direct regression: only there is σ̂ the uncertainty of
  p(x_0 | image), used as the confidence. At smaller k it is the uncertainty that remains given x_k.
- The weight over noise levels is 1: y is already normalised per level, and a positive weight does not change the
  minimiser of a head conditioned on k. Min-SNR weights are meant for squared errors, and are 0 at the terminal step.
- Samplers assume that x̂_0 is the mean of p(x_0 | x_k, image). RLE's gradient, of magnitude 1 / σ̂, moves it to a median
  or mode, the more so at low noise. So the mean is detached below the terminal step, where only the squared error
  trains it; at the terminal step, and in the direct baseline, RLE trains the mean, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

RLE_VARIANTS = ("exact", "official", "composite")
_FLOOR = 1e-4  # lower bound on σ̂, units of the points, below that of the heads (`models.flow.scale_of`)


def rle_error(
    mean: Tensor,  # (..., P, D) μ̂
    scale: Tensor,  # (..., P, D) σ̂ > 0
    target: Tensor,  # (..., P, D) μ_g
    flow_log_prob: Callable[[Tensor], Tensor],  # (..., D) -> (...), such as `RealNVP.log_prob`
    variant: str = "exact",  # of RLE_VARIANTS
    weight: Tensor | None = None,  # (..., P) >= 0, 0 = not labelled
) -> Tensor:  # (...) nats; 0 if no point is labelled
    """Weighted mean over the points of their negative log-likelihood, each summed over its D coordinates.

    Computed in float32, or float64 for float64 inputs. An outlier costs Laplace's |y| plus the square of the flow's
    normal tail: clip gradients if labels may have outliers. Raises `ValueError` for an unknown variant.
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
    joints: Tensor,  # (B, N, K, D) of the hypotheses, in the units and frame of the mean
    mean: Tensor,  # (B, K, D) μ̂ of the image
    scale: Tensor,  # (B, K, D) σ̂ of the image
    flow_log_prob: Callable[[Tensor], Tensor],
    variant: str = "exact",  # that of the training
) -> Tensor:  # (B, N) nats, up to a constant per person
    """Log-likelihood of each hypothesis under the image's direct regression, for `hypotheses.select`.

    The density is that of the variant: Q G / Z for `exact` and `official` (its Q, its sign), the flow's G for
    `composite`. Joints are treated as independent, so compare only hypotheses of the same person. Raises `ValueError`
    for an unknown variant.
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
    """1 - σ̂, averaged over a point's coordinates: 1 is certain, 0 an expected error of one unit of the points."""
    return (1 - _precise(scale)).mean(-1).clamp(0, 1)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
