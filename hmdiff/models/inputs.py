"""Validation of a pipeline call's inputs and results: finite numbers in ranges that do not overflow.

Without it, NaN or 1e30 would pass through the network silently and give a wrong body, or NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hmdiff.errors import UserError

MAX_HYPOTHESES = 10_000  # per person; each takes 150 KB of vertices
_COLOURS = (-0.5, 1.5)  # RGB is 0..1; bicubic resizing overshoots
_DEEPEST = 1e9  # of a depth map, any unit
_LARGEST_SEED = 2**63 - 1
_PIXELS = (1.0, 1e6)  # of a photo's side
_FOCAL = (1e-1, 1e8)


def check_call(
    num_hypotheses: Any,
    seed: Any,
    eta: Any,
    people: Sequence[Any] | None,
) -> None:
    """Check the scalars of a call. Raises `UserError` naming the first of a wrong type or out of range."""
    for name, value, least, most in (
        ("num_hypotheses", num_hypotheses, 1, MAX_HYPOTHESES),
        ("seed", seed, 0, _LARGEST_SEED),
        *(("people", number, 0, _LARGEST_SEED) for number in people or ()),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (hasattr(value, "__index__") and not isinstance(value, bool)):
            raise UserError(f"{name} {value!r:.60}: a whole number is needed")
        if not value >= least:
            what = "at least 1 is needed" if least else "a whole number from 0 on is needed"
            raise UserError(f"{name} {value}: {what}")
        if value > most:
            raise UserError(f"{name} {value}: at most {most:,} is possible")
    if eta is not None and not (isinstance(eta, int | float) and 0 <= eta <= 1):
        raise UserError(f"eta {eta!r:.60}: a number from 0 (no fresh noise) to 1 (as ddpm) is needed")


def check_pictures(images: Tensor) -> None:
    """Raises `UserError` for NaN, infinity, and colours in 0..255."""
    low, high = _COLOURS
    if not bool(((images >= low) & (images <= high)).all()):
        bad = "NaN or infinity" if not bool(images.isfinite().all()) else f"{float(images.abs().max()):.4g}"
        raise UserError(f"images: {bad} found, RGB of 0..1 expected; divide 8-bit pictures by 255")


def check_depth(depth: Tensor) -> None:
    """Raises `UserError` for infinite or huge values; NaN means unknown."""
    if bool((depth.abs() > _DEEPEST).any()):
        raise UserError(f"depth: {float(depth.nan_to_num(0).abs().max()):.4g} found; put NaN where it is not known")


def check_camera(
    photo_sizes: Tensor | None,  # (B, 2) pixels
    focal: Tensor | None,  # (B,) pixels
    count: int,  # B
) -> None:
    """Raises `UserError` for a wrong shape, or a photo size or focal length out of range."""
    for name, values, shape, (least, most) in (
        ("photo_sizes", photo_sizes, (count, 2), _PIXELS),
        ("focal", focal, (count,), _FOCAL),
    ):
        if values is None:
            continue
        if tuple(values.shape) != shape:
            raise UserError(f"{name}: shape {tuple(values.shape)} found, {shape} expected, one for each person")
        bad = ~((values >= least) & (values <= most))
        if bool(bad.any()):
            raise UserError(f"{name}: {float(values[bad][0]):g} found; {least:g} to {most:g} pixels are possible")


def check_weights(dtype: torch.dtype) -> None:
    """Raises `UserError` for weights of another precision."""
    if dtype != torch.float32:
        raise UserError(
            f"the model's weights are {dtype}, and it computes in float32: load it again without .half(), "
            ".bfloat16() or .double(); save_pretrained(half=True) halves the files, torch.autocast the arithmetic"
        )


def check_result(tensors: Iterable[Tensor]) -> None:
    """Raises `UserError` for a result that is not finite."""
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise UserError(
                "the result is not finite; the input or the weights are beyond what the model was made for: look at "
                "the heatmaps and the crop, or take another checkpoint"
            )
