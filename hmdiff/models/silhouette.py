"""The silhouette decoder of D2A-HMR (arXiv 2403.09063), an auxiliary task on the context tokens, in training only.

Its architecture is not published: learned queries, one cross-attention and deconvolutions are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmdiff.models.layers import Attention, FeedForward, sinusoidal_position_2d

GRID = 8  # queries per side


class SilhouetteDecoder(nn.Module):
    """Context tokens -> cross-attention from an 8 x 8 grid of queries -> deconvolutions -> logits.

    Queries with positional encoding let the tokens be of any kind: image cells, joints or depth patches.
    """

    def __init__(self, width: int, heads: int, size: int = 64) -> None:
        super().__init__()
        doublings = (size // GRID).bit_length() - 1
        if size < GRID or size != GRID << doublings:
            raise ValueError(f"silhouette size {size} must be {GRID} times a power of two")
        self.queries = nn.Parameter(_grid_code(width))
        self.norm_context = nn.LayerNorm(width)
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 2.0)
        # Few channels: the maps are large, and the decoder should not dominate the cost of a training step.
        channels = min(width, 64)
        self.to_map = nn.Linear(width, channels)
        layers: list[nn.Module] = []
        for _ in range(doublings):
            fewer = max(16, channels // 2)
            layers += [nn.ConvTranspose2d(channels, fewer, 4, stride=2, padding=1), nn.GELU(approximate="tanh")]
            channels = fewer
        self.deconvolutions = nn.Sequential(*layers)
        self.to_logits = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(
        self,
        tokens: Tensor,  # (B, L, C)
        mask: Tensor | None = None,  # (B, L) bool, True = real token
    ) -> Tensor:  # (B, size, size) logits of the silhouette over the crop
        context = self.norm_context(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        key_mask = None if mask is None else mask[:, None, None, :]
        found = queries + self.attention(
            self.norm_attention(queries), self.attention.keys_values(context), mask=key_mask
        )
        found = found + self.feed_forward(self.norm_feed_forward(found))
        grid = self.to_map(found).transpose(1, 2).unflatten(2, (GRID, GRID))
        return self.to_logits(self.deconvolutions(grid))[:, 0]


def _grid_code(width: int) -> Tensor:  # (64, width)
    """Initial queries: a 2D positional encoding plus noise."""
    code = sinusoidal_position_2d(GRID, GRID, -(-width // 4) * 4)[:, :width]
    return code + 0.02 * torch.randn(GRID * GRID, width)
