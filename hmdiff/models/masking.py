"""Masked modelling: which vertex and joint tokens are hidden in training, as METRO does it (arXiv 2012.09760).

METRO hides up to 30 % of the tokens of a person, so that the rest must tell where they are. D2A-HMR (arXiv 2403.09063)
masks too, and does not say how much; the same share is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_hidden(
    shape: tuple[int, ...],  # (..., T), such as (B, N, T): N hypotheses of B people, T tokens
    most: float,  # 0..1: the largest share of a row's tokens; METRO: 0.3
    generator: torch.Generator | None = None,
) -> Tensor:  # (..., T) bool, True = hidden, on the generator's device
    """Per row a share uniform in 0..most, and so many of its tokens (rounded down), every choice equally likely.

    The rows are drawn in order: those of a smaller batch are the first of a larger one.
    """
    if not 0 <= most <= 1:
        raise ValueError(f"the share of hidden tokens is {most}: 0 to 1 is needed")
    rows, tokens = shape[:-1], shape[-1]
    device = None if generator is None else generator.device
    drawn = torch.rand((*rows, 1 + tokens), generator=generator, device=device)
    count = (drawn[..., :1] * (most * tokens)).floor()
    return drawn[..., 1:].argsort(-1).argsort(-1) < count
