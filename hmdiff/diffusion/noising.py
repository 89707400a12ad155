"""The forward process in training: draw steps, add noise, and say what the network should have predicted.

x_0 clean points, eps noise, x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) eps (DDPM, arXiv 2006.11239, eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.files.diffusers_parts import Scheduler

WEIGHTINGS = ("uniform", "min_snr", "truncated_snr")


def draw_steps(
    shape: tuple[int, ...],
    num_train_timesteps: int,
    terminal_share: float,
    generator: torch.Generator | None = None,
) -> Tensor:  # long, 0 .. K-1
    """Uniform steps, but a share of them at the last one, where x̂_0 is the direct regression (ours, not ablated).

    With two dimensions the steps of a row are stratified: M noise levels of one image spread over the whole process.
    """
    uniform = torch.rand(shape, generator=generator)
    if len(shape) == 2:
        uniform = (torch.arange(shape[1]) + uniform) / shape[1]
    terminal = torch.rand(shape, generator=generator) < terminal_share
    steps = (uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
    return torch.where(terminal, num_train_timesteps - 1, steps)


def signal_share(
    scheduler: Scheduler,
    steps: Tensor,  # (...) long
) -> Tensor:  # (...) abar_k
    return scheduler.alphas_cumprod.to(steps.device)[steps]


def training_target(
    clean: Tensor,  # (..., P, 3) x_0
    noise: Tensor,  # (..., P, 3) eps
    share: Tensor,  # (...) abar_k
    prediction_type: str,
) -> Tensor:  # (..., P, 3)
    """What the network should predict: eps, x_0, or v = sqrt(abar) eps - sqrt(1-abar) x_0 (arXiv 2202.00512)."""
    if prediction_type == "sample":
        return clean
    if prediction_type == "epsilon":
        return noise
    alpha, sigma = share.sqrt()[..., None, None], (1 - share).sqrt()[..., None, None]
    return alpha * noise - sigma * clean


def clean_estimate(
    prediction: Tensor,  # (..., P, 3)
    noisy: Tensor,  # (..., P, 3) x_k
    share: Tensor,  # (...) abar_k
    prediction_type: str,
) -> Tensor:  # (..., P, 3) x̂_0
    """x̂_0 from whatever the network predicts. For eps: (x_k - sqrt(1-abar) eps) / sqrt(abar), HMDiff's estimate."""
    if prediction_type == "sample":
        return prediction
    alpha, sigma = share.sqrt()[..., None, None], (1 - share).sqrt()[..., None, None]
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha.clamp_min(1e-4)
    return alpha * noisy - sigma * prediction


def loss_weight(
    share: Tensor,  # (...) abar_k
    prediction_type: str,
    weighting: str = "uniform",
    gamma: float = 5.0,
) -> Tensor:  # (...)
    """Weight of the squared error of the *prediction*, so that the clean mesh's error is weighted as named.

    min_snr: min(SNR, gamma) on x_0 (Hang et al., arXiv 2303.09556, eq. 7), nothing at the terminal step.
    truncated_snr: SNR kept within 1..gamma on x_0 (after Salimans and Ho, arXiv 2202.00512), so that it still counts.
    uniform: the prediction's own squared error.
    """
    if weighting == "uniform":
        return torch.ones_like(share)
    snr = share / (1 - share).clamp_min(1e-8)
    if weighting == "min_snr":
        on_clean = snr.clamp(max=gamma)
    elif weighting == "truncated_snr":
        on_clean = snr.clamp(min=1.0, max=gamma)
    else:
        raise ValueError(f"weighting {weighting!r} is none of {WEIGHTINGS}")
    # |x_0 error|² = |eps error|² / SNR = |v error|² (1 - abar)
    if prediction_type == "epsilon":
        return on_clean / snr.clamp_min(1e-4)
    if prediction_type == "v_prediction":
        return on_clean * (1 - share)
    return on_clean
