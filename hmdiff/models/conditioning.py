"""What the denoiser is told of the image: tokens, computed once per image, shared by all hypotheses and all steps."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hmdiff.models.layers import KeysValues


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Context tokens of B images. Optional paths (depth, lifting) add tokens by `joined_with`."""

    tokens: Tensor  # (B, L, C)
    mask: Tensor  # (B, L) bool, True = real token
    keys_values: tuple[KeysValues, ...] = ()  # of every cross-attention of the denoiser, once they are computed

    def joined_with(
        self,
        tokens: Tensor,  # (B, M, C)
        mask: Tensor | None = None,  # (B, M) bool
    ) -> Conditioning:
        """The same image with more tokens; keys and values must be computed anew."""
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Conditioning(torch.cat([self.tokens, tokens], 1), torch.cat([self.mask, mask], 1))

    def rows(
        self,
        index: Tensor,  # (M,) long
    ) -> Conditioning:
        """Conditioning of some of the images, in the order of `index`."""
        keys_values = tuple((keys[index], values[index]) for keys, values in self.keys_values)
        return Conditioning(self.tokens[index], self.mask[index], keys_values)
