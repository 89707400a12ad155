"""The denoiser's conditioning, computed once per image and shared by all hypotheses and steps."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from hmdiff.models.layers import KeysValues


@dataclasses.dataclass(frozen=True)
class LiftedVolume:
    """JOTR's volume of 3D features, with the camera and exponent that map joints into it."""

    features: Tensor  # (B, V, D, H, W)
    camera: Tensor  # (B, 3) scale, tx, ty
    exponent: Tensor  # () k

    def rows(self, index: Tensor) -> LiftedVolume:
        return LiftedVolume(self.features[index], self.camera[index], self.exponent)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Context tokens of B images, and their volume if the model has lifting."""

    tokens: Tensor  # (B, L, C)
    mask: Tensor  # (B, L) bool, True = real token
    keys_values: tuple[KeysValues, ...] = ()  # of each cross-attention of the denoiser; () before they are computed
    volume: LiftedVolume | None = None

    def rows(
        self,
        index: Tensor,  # (M,) long
    ) -> Conditioning:
        """Select images by index."""
        keys_values = tuple((keys[index], values[index]) for keys, values in self.keys_values)
        volume = None if self.volume is None else self.volume.rows(index)
        return Conditioning(self.tokens[index], self.mask[index], keys_values, volume)
