"""Transformer building blocks: attention, feed-forward, and a norm modulated by the timestep.

B images, N hypotheses, T queries, L context tokens, C channels, H heads. The papers do not publish the inside of their
blocks; pre-norm blocks with adaptive norms (adaLN-Zero, Peebles and Xie, arXiv 2212.09748) are our choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # each (B, H, L, C/H)


def attend(
    queries: Tensor,  # (B, H, T, c)
    keys: Tensor,  # (B, H, L, c)
    values: Tensor,  # (B, H, L, c)
    mask: Tensor | None = None,  # broadcasts to (B, H, T, L) bool, True = may be attended to
) -> Tensor:  # (B, H, T, c)
    """Scaled dot-product attention.

    Uses torch's fused kernel except on the CPU, where its backward pass is slow for large batches of short sequences.
    """
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(values.dtype) @ values


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be precomputed and shared."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.to_query = nn.Linear(width, width)
        self.to_keys_values = nn.Linear(context_width or width, 2 * width)
        self.to_out = nn.Linear(width, width)
        # RMS-normalised queries and keys, with a learned temperature per head.
        self.sharpness = nn.Parameter(torch.ones(heads, 1, 1)) if qk_norm else None

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def keys_values(
        self,
        context: Tensor,  # (B, L, context width)
    ) -> KeysValues:
        keys, values = self.to_keys_values(context).chunk(2, dim=-1)
        keys = self._split(keys)
        return keys if self.sharpness is None else F.rms_norm(keys, keys.shape[-1:]), self._split(values)

    def forward(
        self,
        tokens: Tensor,  # (B, T, C)
        keys_values: KeysValues | None = None,  # of a context; None: self-attention
        mask: Tensor | None = None,  # broadcasts to (B, H, T, L) bool, True = may be attended to
    ) -> Tensor:  # (B, T, C)
        if keys_values is None:
            keys_values = self.keys_values(tokens)
        keys, values = keys_values
        queries = self._split(self.to_query(tokens))
        if self.sharpness is not None:
            queries = F.rms_norm(queries, queries.shape[-1:]) * self.sharpness.to(queries.dtype)
        attended = attend(queries, keys, values, mask)
        return self.to_out(attended.transpose(-3, -2).flatten(-2))


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between: 'linear' in HMDiff's figure of the block."""

    def __init__(self, width: int, ratio: float = 4.0) -> None:
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class Modulation(NamedTuple):
    """adaLN-Zero parameters of one sub-layer."""

    scale: Tensor  # (B, 1, C) or (1, 1, C), likewise shift and gate
    shift: Tensor
    gate: Tensor


def modulated(
    norm: nn.LayerNorm,  # without affine parameters
    tokens: Tensor,  # (B, T, C)
    by: Modulation,
) -> Tensor:  # (B, T, C)
    """norm(tokens) * scale + shift; fused if all rows have the same scale and shift."""
    if len(by.scale) == 1:
        scale, shift = by.scale.flatten().to(tokens.dtype), by.shift.flatten().to(tokens.dtype)
        return F.layer_norm(tokens, norm.normalized_shape, scale, shift, norm.eps)
    return norm(tokens) * by.scale + by.shift


class StepModulation(nn.Module):
    """Scale, shift and gate of `branches` sub-layers from the timestep embedding; zero-initialised."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.project = nn.Linear(width, 3 * branches * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(
        self,
        step: Tensor,  # (B, C)
    ) -> list[Modulation]:  # one per branch
        parts = self.project(F.silu(step)).unsqueeze(-2).chunk(3 * self.branches, dim=-1)
        return [Modulation(1 + parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.branches)]


class EncoderBlock(nn.Module):
    """A plain pre-norm transformer block over context tokens."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm=qk_norm)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, ratio)

    def make_identity(self) -> None:
        """Zero-initialise the outputs: a block added to a trained encoder starts as an identity."""
        for layer in (self.attention.to_out, self.feed_forward[-1]):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Tensor,  # (B, L, C)
        mask: Tensor | None = None,  # (B, L) bool, True = real token
    ) -> Tensor:  # (B, L, C)
        key_mask = None if mask is None else mask[:, None, None, :]
        tokens = tokens + self.attention(self.norm_attention(tokens), mask=key_mask)
        return tokens + self.feed_forward(self.norm_feed_forward(tokens))


def sinusoidal_position_2d(height: int, width: int, channels: int) -> Tensor:  # (height * width, channels)
    """2D sinusoidal positional encoding of DETR (arXiv 2005.12872): half the channels for y, half for x."""
    if channels % 4:
        raise ValueError(f"a 2D code needs channels divisible by 4, not {channels}")
    frequency = torch.exp(torch.linspace(0, -9.21, channels // 4))  # 1 to 1/10,000
    y = torch.arange(height)[:, None] * 1.0 * frequency
    x = torch.arange(width)[:, None] * 1.0 * frequency
    code_y = torch.cat([y.sin(), y.cos()], -1)[:, None].expand(height, width, -1)
    code_x = torch.cat([x.sin(), x.cos()], -1)[None].expand(height, width, -1)
    return torch.cat([code_y, code_x], -1).flatten(0, 1)


def sinusoidal_position_1d(count: int, channels: int) -> Tensor:  # (count, channels)
    """1D sinusoidal positional encoding (Vaswani et al., arXiv 1706.03762): sines, then cosines."""
    if channels % 2:
        raise ValueError(f"a 1D code needs channels divisible by 2, not {channels}")
    frequency = torch.exp(torch.linspace(0, -9.21, channels // 2))  # 1 to 1/10,000
    angle = torch.arange(count)[:, None] * 1.0 * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)
