"""DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16) on diffusers' scheduler, for any number of steps.

diffusers' step goes back by floor(K / n), but 'trailing' timesteps are K / n apart: if n does not divide K, the last
step does not reach x_0 (n = 3 of K = 200 leaves noise of 0.15 standard deviations, about 4 cm). Here each step goes to
the next entry of `timesteps`, and negative rounding errors under a root are clamped at eta = 1.

alpha_bar_k: `alphas_cumprod`; x_k: noisy points; sigma: standard deviation of the fresh noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmdiff.diffusion.noising import predict_x0
from hmdiff.files.diffusers_parts import DDIMScheduler, DDIMSchedulerOutput, randn_tensor


class ListedDDIMScheduler(DDIMScheduler):
    """`DDIMScheduler` whose steps follow `timesteps`. Equal to it if n divides K."""

    config: Any
    timesteps: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    num_inference_steps: int | None  # type: ignore[assignment]  # inferred as None

    def step(  # type: ignore[override]  # without diffusers' clipping options
        self,
        model_output: Tensor,  # (..., P, 3)
        timestep: int | Tensor,
        sample: Tensor,  # (..., P, 3) x_k
        eta: float = 0.0,  # 0 deterministic, 1 as DDPM
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        prediction_type = self.config.prediction_type
        later = self.timesteps[self.timesteps < timestep]
        alpha_bar = self.alphas_cumprod[int(timestep)]
        alpha_bar_next = self.alphas_cumprod[int(later[0])] if len(later) else self.final_alpha_cumprod
        x0_pred = predict_x0(model_output, sample, alpha_bar, prediction_type)
        if prediction_type == "epsilon":
            noise = model_output
        elif prediction_type == "sample":
            noise = (sample - alpha_bar.sqrt() * x0_pred) / (1 - alpha_bar).sqrt()
        else:
            noise = alpha_bar.sqrt() * model_output + (1 - alpha_bar).sqrt() * sample
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        sigma = eta * variance.clamp_min(0).sqrt()
        prev_sample = alpha_bar_next.sqrt() * x0_pred + (1 - alpha_bar_next - sigma**2).clamp_min(0).sqrt() * noise
        if eta > 0:
            prev_sample = prev_sample + sigma * randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        if not return_dict:
            return prev_sample, x0_pred
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0_pred)
