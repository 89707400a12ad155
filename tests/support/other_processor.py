"""A processor unlike this one: its matrix products round by their shapes, as those of real libraries may.

No library promises that row i of a product has the same bits in a batch of 3 and in one of 5: kernels are chosen by
shape and by processor. Under this mode they never have, so `pytest --other-processor` fails every test that compares
bits across batch or chunk sizes; the same call made twice still gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv", "convolution", "linear", "matmul"}


class OtherProcessor(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (name in PRODUCTS or "scaled_dot_product" in name) and not torch.compiler.is_compiling():
            first = out[0] if isinstance(out, tuple) else out
            shapes = [argument.shape for argument in args if isinstance(argument, Tensor)]
            rounding = sum((i + 1) * size for shape in shapes for i, size in enumerate(shape)) % 5 - 2
            if isinstance(first, Tensor) and first.is_floating_point():
                first.mul_(1 + rounding * torch.finfo(first.dtype).eps)
        return out
