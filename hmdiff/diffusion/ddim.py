"""DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16) over diffusers' scheduler, for any number of steps.

diffusers' own step goes floor(K / n) back, while 'trailing' timesteps lie K / n apart: for an n that does not divide K
the two drift, and the last step stops short of the clean mesh (n = 3 of K = 200 leaves 0.15 of a standard deviation of
noise, some 4 cm). Here a step goes to the next timestep of the list, and at eta = 1 a rounding cannot make a root NaN.

abar_k: signal share, x_k: points; sigma: share of fresh noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmdiff.diffusion.noising import clean_estimate
from hmdiff.files.diffusers_parts import DDIMScheduler, DDIMSchedulerOutput, randn_tensor


class ListedDDIMScheduler(DDIMScheduler):
    """`DDIMScheduler` whose steps follow `timesteps`. For an n that divides K the two are equal."""

    config: Any
    timesteps: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    num_inference_steps: int | None  # type: ignore[assignment]  # None alone, to a checker

    def step(  # type: ignore[override]  # without diffusers' options for clipped pictures
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
        kind = self.config.prediction_type
        later = self.timesteps[self.timesteps < timestep]
        share = self.alphas_cumprod[int(timestep)]
        share_next = self.alphas_cumprod[int(later[0])] if len(later) else self.final_alpha_cumprod
        clean = clean_estimate(model_output, sample, share, kind)
        if kind == "epsilon":
            noise = model_output
        elif kind == "sample":
            noise = (sample - share.sqrt() * clean) / (1 - share).sqrt()
        else:
            noise = share.sqrt() * model_output + (1 - share).sqrt() * sample
        variance = (1 - share_next) / (1 - share) * (1 - share / share_next)
        sigma = eta * variance.clamp_min(0).sqrt()
        points = share_next.sqrt() * clean + (1 - share_next - sigma**2).clamp_min(0).sqrt() * noise
        if eta > 0:
            points = points + sigma * randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        if not return_dict:
            return points, clean
        return DDIMSchedulerOutput(prev_sample=points, pred_original_sample=clean)
