"""Context encoders: a transformer over the backbone's tokens, or a residual MLP over their concatenation.

"transformer": pre-norm blocks over [camera | backbone tokens], for any backbone and component (depth, lifting).
"mlp": a fixed number of tokens (one per joint), concatenated, through a wide residual MLP (after Martinez et al., arXiv
1705.03098) that outputs a camera token and one token per body part. Cheap: a few large matrix products per image. Both
are our choice. B images, L tokens, C channels, J parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODERS = ("transformer", "mlp")


class ResidualBlock(nn.Module):
    """x + W (ReLU(V norm(x)))²: squared ReLU after So et al. (arXiv 2109.08668); W starts at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_hidden = nn.Linear(width, hidden)
        self.to_out = nn.Linear(hidden, width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(
        self,
        features: Tensor,  # (B, width)
    ) -> Tensor:  # (B, width)
        return features + self.to_out(F.relu(self.to_hidden(self.norm(features))).square())


class MLPEncoder(nn.Module):
    """L tokens in a fixed order -> 1 + J tokens."""

    def __init__(
        self,
        num_tokens: int,  # L
        width: int,  # C
        num_parts: int,  # J
        hidden: int = 1024,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.to_hidden = nn.Linear(num_tokens * (width + 1), hidden)
        self.blocks = nn.ModuleList(ResidualBlock(hidden, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.to_tokens = nn.Linear(hidden, (1 + num_parts) * width)

    def forward(
        self,
        tokens: Tensor,  # (B, L, C)
        mask: Tensor,  # (B, L) bool, True = real token
    ) -> Tensor:  # (B, 1 + J, C): the camera's, then the parts'
        given = torch.cat([tokens * mask[..., None], mask[..., None].to(tokens.dtype)], -1)
        features = self.to_hidden(given.flatten(1))
        for block in self.blocks:
            features = block(features)
        return self.to_tokens(self.norm(features)).unflatten(-1, (1 + self.num_parts, -1))
