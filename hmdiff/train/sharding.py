"""Sharded weights (FSDP 2): gathering them to save, filling them to load."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def shared_out(
    tensors: Iterable[Tensor],
) -> bool:
    """Whether any tensor is sharded."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def whole(
    tensors: Iterable[Tensor],
) -> list[Tensor]:
    """Gather sharded tensors; all processes must call it. Unsharded tensors are returned as they are, not copied."""
    from torch.distributed.tensor import DTensor

    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def fill(
    tensor: Tensor,
    value: Tensor,  # unsharded, the same in every process
) -> None:
    """Copy the process's shard of `value` into `tensor`. All processes must call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
