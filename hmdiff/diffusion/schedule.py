"""Noise schedules, given to diffusers' schedulers as `trained_betas`.

Symbols: alpha_bar_k is the fraction of signal variance left at step k; SNR_k = alpha_bar_k / (1 - alpha_bar_k);
K steps.

Terminal SNR: DDPM's linear schedule 1e-4..0.02 over the paper's K = 200 ends at alpha_bar_K = 0.13, which is not
Gaussian noise. Here alpha_bar_K is 0 (Lin et al., arXiv 2305.08891), or a small positive number for epsilon
prediction, which does not determine x_0 at alpha_bar = 0.

Shift: the points of a mesh are correlated, so the pose can be recovered by averaging at a moderate SNR. As for
high-resolution images (Hoogeboom et al., arXiv 2301.11093, sec. 3.1), the SNR is divided by shift² to spend more steps
where the pose is still uncertain. The value is ours; a short ablation showed no clear effect (LOG.md).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.diffusion.ddim import ListedDDIMScheduler
from hmdiff.errors import UserError
from hmdiff.files.diffusers_parts import Scheduler
from hmdiff.files.reading import read_json

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("cosine", "linear")
# alpha_bar_K for epsilon prediction: keeps the first x̂_0 = (x - ...) / sqrt(alpha_bar_K) finite.
EPSILON_TERMINAL = 1e-4

_MOST_STEPS = 100_000  # of a saved schedule

# Class names, imported on use: some of diffusers' schedulers import scipy.stats.
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ListedDDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "dpm++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    "sde-dpm++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
SCHEDULER_NAMES = tuple(_SCHEDULERS)


def _scheduler(name: str) -> tuple[Any, dict[str, Any]]:
    kind, options = _SCHEDULERS[name]
    return ListedDDIMScheduler if name == "ddim" else getattr(import_module("diffusers"), kind), options


def alpha_bars(
    num_train_timesteps: int,
    schedule: str = "cosine",
    noise_shift: float = 1.0,
    terminal: float = 0.0,
) -> np.ndarray:  # (K,) alpha_bar_1 .. alpha_bar_K, decreasing
    """alpha_bar of each step; the last equals `terminal`. Raises `UserError` for an unknown schedule."""
    steps = np.arange(1, num_train_timesteps + 1, dtype=np.float64)
    if schedule == "cosine":  # Nichol and Dhariwal, arXiv 2102.09672, eq. 17
        offset = 0.008
        alpha_bar = np.cos((steps / num_train_timesteps + offset) / (1 + offset) * np.pi / 2) ** 2
        alpha_bar = alpha_bar / np.cos(offset / (1 + offset) * np.pi / 2) ** 2
    elif schedule == "linear":  # DDPM, arXiv 2006.11239; rescaled to the terminal SNR below
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, num_train_timesteps))
    else:
        raise UserError(f"schedule {schedule!r} is not known; choose one of {', '.join(SCHEDULES)}")
    alpha_bar = np.clip(alpha_bar, 1e-12, 1 - 1e-9)
    snr = alpha_bar / (1 - alpha_bar) / noise_shift**2
    amplitude = np.sqrt(snr / (1 + snr))
    # Lin et al., algorithm 1: shift and scale sqrt(alpha_bar) to end at sqrt(terminal), keeping its first value.
    first, last, wanted = amplitude[0], amplitude[-1], np.sqrt(terminal)
    amplitude = wanted + (amplitude - last) * (first - wanted) / (first - last)
    return amplitude**2


def make_scheduler(
    name: str = "ddim",  # one of SCHEDULER_NAMES
    num_train_timesteps: int = 200,
    schedule: str = "cosine",
    noise_shift: float = 1.0,
    prediction_type: str = "sample",
) -> Scheduler:
    """A diffusers scheduler with the schedule of `alpha_bars`. Raises `UserError` for an unknown name.

    Timesteps are 'trailing', so sampling always starts at the last training step. The higher-order solvers work on log
    SNR, which must be finite: alpha_bar is at least 2^-24 for them, as in diffusers.
    """
    if name not in _SCHEDULERS:
        raise UserError(f"scheduler {name!r} is not known; choose one of {', '.join(SCHEDULER_NAMES)}")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"prediction_type {prediction_type!r} is not known; choose one of {', '.join(PREDICTION_TYPES)}"
        )
    kind, options = _scheduler(name)
    terminal = EPSILON_TERMINAL if prediction_type == "epsilon" else 0.0
    if name not in ("ddim", "ddpm"):
        terminal = max(terminal, 2.0**-24)
    alpha_bar = alpha_bars(num_train_timesteps, schedule, noise_shift, terminal)
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return kind(
        num_train_timesteps=num_train_timesteps,
        trained_betas=betas.tolist(),
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        **options,
    )


def load_scheduler(
    path: Path,  # of the scheduler_config.json that `save_pretrained` wrote
    name: str,  # one of SCHEDULER_NAMES
) -> Scheduler:
    """Load betas and prediction type from the file, other options from this module. Raises `UserError` if invalid."""
    mend = "save the pipeline again"
    config = read_json(path, 1 << 26, mend)
    betas = config.get("trained_betas") if isinstance(config, dict) else None
    steps = config.get("num_train_timesteps") if isinstance(config, dict) else None
    fine = isinstance(betas, list) and 1 <= len(betas) <= _MOST_STEPS and len(betas) == steps
    if not fine or not all(isinstance(beta, float | int) and 0 <= beta <= 1 for beta in betas or ()):
        raise UserError(f"{path}: not a schedule of as many betas of 0 to 1 as it has steps; {mend}")
    if name not in _SCHEDULERS or config.get("prediction_type") not in PREDICTION_TYPES:
        found = f"sampler {name!r:.60} and prediction_type {config.get('prediction_type')!r:.60}"
        raise UserError(f"{path}: {found}; one of {', '.join(SCHEDULER_NAMES)} and of {', '.join(PREDICTION_TYPES)}")
    kind, options = _scheduler(name)
    scheduler: Scheduler = kind(
        num_train_timesteps=len(betas or ()),
        trained_betas=betas,
        prediction_type=config["prediction_type"],
        timestep_spacing="trailing",
        **options,
    )
    return scheduler


def sampler_name(scheduler: Scheduler) -> str:
    """The scheduler's name in `make_scheduler`. Raises `UserError` for a scheduler of another class."""
    for name, (kind, options) in _SCHEDULERS.items():
        config = scheduler.config
        if type(scheduler).__name__ == kind and all(config[key] == options[key] for key in options):
            return name
    raise UserError(f"{type(scheduler).__name__}: not one of our schedulers; make it by hmdiff's make_scheduler")


def change_scheduler(
    scheduler: Scheduler,
    name: str,  # one of SCHEDULER_NAMES
) -> Scheduler:
    """Another sampler over the same training schedule."""
    if name not in _SCHEDULERS:
        raise UserError(f"scheduler {name!r} is not known; choose one of {', '.join(SCHEDULER_NAMES)}")
    kind, options = _scheduler(name)
    config = scheduler.config
    betas = np.asarray(config.trained_betas, dtype=np.float64)
    if name not in ("ddim", "ddpm"):
        alpha_bar = np.maximum(np.cumprod(1 - betas), 2.0**-24)
        betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return kind(
        num_train_timesteps=config.num_train_timesteps,
        trained_betas=betas.tolist(),
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        **options,
    )
