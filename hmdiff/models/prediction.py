"""Outputs of a forward pass. Fields of optional modules keep their defaults when these are off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

NO_SCALE: Mapping[str, Tensor] = {}


class Denoised(NamedTuple):
    """Output of the denoiser. B images, N hypotheses, P points, K joints, C coarse vertices, E blocks but the last."""

    points: Tensor  # (B, N, P, 3) noise, x_0 or velocity
    scale: Mapping[str, Tensor] = NO_SCALE  # RLE's σ̂ by quantity: (B, N, K or C, 3 or 2), 0..1
    estimates: Tensor | None = None  # (B, N, E, K, 3) intermediate joints, with lifting
    meshes: Tensor | None = None  # (B, N, E, C, 3) intermediate vertices, with coarse_to_fine


class Prediction(NamedTuple):
    """Output of the whole model."""

    points: Tensor  # (B, N, P, 3)
    camera: Tensor  # (B, 3) scale (crop half-sides per metre), tx, ty
    scale: Mapping[str, Tensor] = NO_SCALE
    silhouette: Tensor | None = None  # (B, S, S) logits
    estimates: Tensor | None = None  # (B, N, E, K, 3)
    volume: Tensor | None = None  # (B, V, D, H, W)
    exponent: Tensor | None = None  # () k of the volume
    meshes: Tensor | None = None  # (B, N, E, C, 3)
