"""The parts of diffusers that the core stands on, imported without torch's compiler.

diffusers' utilities import torch._dynamo for one decorator that none of our models uses, which costs more than torch
itself, and all of transformers, where it is installed, for the type of one argument; they go on without where these
cannot be imported. So both are hidden while diffusers is imported for the first time, and found afterwards as ever.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "ConfigMixin",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "ModelMixin",
    "Scheduler",
    "randn_tensor",
    "register_to_config",
]


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """An import of this module fails, unless it was there before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules.get(name, ...) is None:
            del sys.modules[name]


with hidden("torch._dynamo"), hidden("transformers.utils.quantization_config"):
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor


class Scheduler(Protocol):
    """What the reverse process needs of diffusers' schedulers, whose common base declares nothing of it."""

    config: Any  # num_train_timesteps, prediction_type, trained_betas
    alphas_cumprod: Tensor  # (K,) abar; Euler's and Heun's have it too
    timesteps: Tensor  # (n,) of the reverse process, descending
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    @property
    def step(self) -> Callable[..., Any]: ...  # (prediction, timestep, x_k, ...) -> .prev_sample

    def save_pretrained(self, save_directory: Any) -> None: ...
