"""The reverse process: a plain function of any denoiser and a diffusers scheduler.

Guidance (DAT) wraps the denoiser. Each hypothesis has its own generator, so its result depends on the seed, the person
and the hypothesis index, not on the batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.files.diffusers_parts import Scheduler

Denoise = Callable[[Tensor, Tensor], Tensor]  # x_k (M, P, 3), step as a fraction of K (M,) -> prediction (M, P, 3)
# At the end of a step: its index, the timestep, x_t after it, the prediction -> another x_t, or None to keep it
Callback = Callable[[int, int, Tensor, Tensor], Tensor | None]


def hypothesis_generators(
    seed: int,
    people: Sequence[int],  # index of each person in the whole call, not in the batch
    hypotheses: int,
    first_hypothesis: int = 0,
) -> list[torch.Generator]:
    """One generator per (person, hypothesis), in row order. The first n of N hypotheses equal those of N = n.

    Raises `UserError` for a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed {seed}: a whole number from 0 on is needed")
    generators = []
    for person in people:
        for hypothesis in range(first_hypothesis, first_hypothesis + hypotheses):
            # torch's CPU generator uses only 32 bits of its seed, so the three numbers are hashed, not packed. The
            # upper word of a seed over 32 bits comes last, so that it cannot be mistaken for a person's index.
            words = np.random.SeedSequence([seed % 2**32, person, hypothesis, seed >> 32]).generate_state(1)
            generators.append(torch.Generator().manual_seed(int(words[0])))
    return generators


def initial_noise(
    generators: Sequence[torch.Generator],
    num_points: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # (M, P, 3)
    """Gaussian noise, drawn on the CPU so that a seed gives the same noise on every device."""
    return torch.stack([torch.randn(num_points, 3, generator=generator) for generator in generators]).to(device)


def sample(
    denoise: Denoise,
    scheduler: Scheduler,
    noise: Tensor,  # (M, P, 3) x_K
    num_inference_steps: int,
    generators: Sequence[torch.Generator] | None = None,  # one per row, for stochastic samplers
    eta: float = 0.0,  # DDIM's fresh noise: 0 deterministic, 1 as DDPM
    clip: float = 6.0,  # bound on |x̂_0| under epsilon prediction, units of the diffusion
    callback: Callback | None = None,
) -> Tensor:  # (M, P, 3) x_0
    """Run the reverse process of the given scheduler (DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502; ...).

    The scheduler is copied, not modified, so threads can share it.
    """
    # Its state is copied, but not the configuration and the tables of all K steps, which nothing modifies.
    kept = [value for value in vars(scheduler).values() if isinstance(value, (Tensor, Mapping))]
    scheduler = copy.deepcopy(scheduler, {id(value): value for value in kept})
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    total = scheduler.config.num_train_timesteps
    x_t = noise * scheduler.init_noise_sigma
    options = _step_options(scheduler, generators, eta)
    for number, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x_t, timestep)
        fraction = ((timestep + 1) / total).expand(len(x_t)).to(x_t.dtype)
        prediction = denoise(scaled, fraction)
        if scheduler.config.prediction_type == "epsilon" and hasattr(scheduler, "alphas_cumprod"):
            prediction = _bounded_noise(prediction, scaled, timestep, scheduler, clip)
        x_t = scheduler.step(prediction, timestep, x_t, **options).prev_sample
        if callback is not None:
            replaced = callback(number, int(timestep), x_t, prediction)
            x_t = x_t if replaced is None else replaced
    return x_t


def _step_options(scheduler: Scheduler, generators: Sequence[torch.Generator] | None, eta: float) -> dict[str, Any]:
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "generator" in accepted and generators is not None:
        options["generator"] = list(generators)
    if "eta" in accepted:
        options["eta"] = eta
    return options


def _bounded_noise(prediction: Tensor, x_t: Tensor, timestep: Tensor, scheduler: Scheduler, clip: float) -> Tensor:
    """Clamp x̂_0 under epsilon prediction: at small alpha_bar a small error in eps is a large one in x̂_0."""
    alpha_bar = scheduler.alphas_cumprod.to(x_t.device)[timestep.long()]
    x0_pred = (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    return (x_t - alpha_bar.sqrt() * x0_pred.clamp(-clip, clip)) / (1 - alpha_bar).sqrt().clamp_min(1e-6)
