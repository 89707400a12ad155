"""What one forward pass gives. The optional paths fill their own fields, and leave them empty when they are off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

NO_SCALE: Mapping[str, Tensor] = {}


class Denoised(NamedTuple):
    """Of the denoiser. B images, N hypotheses, P points, K joints, E estimates on the way."""

    points: Tensor  # (B, N, P, 3) noise, clean mesh or velocity
    scale: Mapping[str, Tensor] = NO_SCALE  # RLE's σ̂ by what it is of: (B, N, K or C, 3 or 2), 0..1
    estimates: Tensor | None = None  # (B, N, E, K, 3) lifting's joints after each block but the last
    meshes: Tensor | None = None  # (B, N, E, C, 3) and its vertices, where they are refined from block to block


class Prediction(NamedTuple):
    """Of the whole model."""

    points: Tensor  # (B, N, P, 3)
    camera: Tensor  # (B, 3) scale (crop half-sides per metre), tx, ty
    scale: Mapping[str, Tensor] = NO_SCALE
    silhouette: Tensor | None = None  # (B, S, S) logits
    estimates: Tensor | None = None  # (B, N, E, K, 3)
    volume: Tensor | None = None  # (B, V, D, H, W)
    exponent: Tensor | None = None  # () of the volume's depth
    meshes: Tensor | None = None  # (B, N, E, C, 3)
