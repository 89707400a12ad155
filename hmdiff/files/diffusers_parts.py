"""The parts of diffusers that the core stands on, imported without torch's compiler.

diffusers' utilities import torch._dynamo for one decorator that none of our models uses, which costs more than torch
itself; they go on without it where it cannot be imported. So it is hidden while they are imported for the first time,
and torch.compile finds it afterwards as ever.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["ConfigMixin", "DDIMScheduler", "DDIMSchedulerOutput", "ModelMixin", "SchedulerMixin", "randn_tensor",
           "register_to_config"]  # fmt: skip


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


with hidden("torch._dynamo"):
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.torch_utils import randn_tensor
