"""The parts of diffusers that the core uses, imported without torch's compiler.

diffusers' utilities import torch._dynamo for a decorator that none of our models uses, which takes longer than
importing torch itself; and, if installed, all of transformers for one type annotation. Both imports are optional, so
the two modules are hidden during the first import of diffusers, and available as usual afterwards.
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
    """Make the import of a module fail, unless it is already imported."""
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
    """Interface of diffusers' schedulers for the reverse process; their common base class does not declare it."""

    config: Any  # num_train_timesteps, prediction_type, trained_betas
    alphas_cumprod: Tensor  # (K,) alpha_bar; also present in Euler's and Heun's
    timesteps: Tensor  # (n,) of the reverse process, descending
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...

    @property
    def step(self) -> Callable[..., Any]: ...  # (prediction, timestep, x_k, ...) -> .prev_sample

    def save_pretrained(self, save_directory: Any) -> None: ...
