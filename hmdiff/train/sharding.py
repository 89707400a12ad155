"""Weights that several processes share out among them (FSDP 2): whole when they are saved, in parts where they live."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def shared_out(
    tensors: Iterable[Tensor],
) -> bool:
    """Whether any of them lives in parts."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def whole(
    tensors: Iterable[Tensor],
) -> list[Tensor]:
    """Each tensor in one piece. All processes must call it: those that are shared out are gathered.

    What is not shared out is given back as it is, not copied.
    """
    from torch.distributed.tensor import DTensor

    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def fill(
    tensor: Tensor,
    value: Tensor,  # in one piece, the same in every process
) -> None:
    """Copy the process's own part of the value into the tensor. All processes must call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
