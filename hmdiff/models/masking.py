"""Masked modelling of vertex and joint tokens in training, as in METRO (arXiv 2012.09760).

METRO masks up to 30 % of the tokens of a sample. D2A-HMR (arXiv 2403.09063) masks too, but does not publish the ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_token_mask(
    shape: tuple[int, ...],  # (..., T), such as (B, N, T): N hypotheses of B people, T tokens
    most: float,  # 0..1: largest masking ratio; METRO: 0.3
    generator: torch.Generator | None = None,
) -> Tensor:  # (..., T) bool token mask, True = masked, on the generator's device
    """Per row, draw a ratio uniform in 0..most, then a uniform subset of that many tokens (rounded down).

    Rows are drawn in order: a smaller batch gives the first rows of a larger one. Raises `ValueError` for a ratio
    outside 0..1.
    """
    if not 0 <= most <= 1:
        raise ValueError(f"the share of masked tokens is {most}: 0 to 1 is needed")
    rows, tokens = shape[:-1], shape[-1]
    device = None if generator is None else generator.device
    drawn = torch.rand((*rows, 1 + tokens), generator=generator, device=device)
    count = (drawn[..., :1] * (most * tokens)).floor()
    return drawn[..., 1:].argsort(-1).argsort(-1) < count
