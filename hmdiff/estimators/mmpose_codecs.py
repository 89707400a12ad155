"""Resampling of mmpose's heatmaps to our square crop without shifting positions.

P people, K joints of the model. Pixel k of a heatmap corresponds to pixel k * stride of the model's input. The stride
is input / heatmap for the MSRA codec (arXiv 1804.06208), (input - 1) / (heatmap - 1) for UDP (arXiv 1911.07524), and
one over the split ratio for the bins of SimCC (arXiv 2107.03332). Whether the photo is warped into the input by UDP is
a separate setting of a config. Photo pixels are counted like mmpose's keypoints. Our choice: SimCC's bins are blurred
to the width of Gaussian heatmaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hmdiff.heatmaps.distribution import HEATMAP_SIZE, Heatmaps, heatmaps_from_values, pixel_coordinates
from hmdiff.heatmaps.resampling import spline_weights

_SIMCC_SIGMA = 2.0  # in our heatmaps' pixels, as for Gaussian heatmaps


def heatmaps_from_codec(
    values: Tensor,  # (P, K, h, w) the model's heatmaps
    names: Sequence[str],  # K
    codec: Any,  # mmpose's MSRAHeatmap or UDPHeatmap
    center: Tensor,  # (P, 2) centre of the model's input, photo pixels
    scale: Tensor,  # (P, 2) width and height of the input, photo pixels
    use_udp: bool,  # whether the warp into the input is UDP's
    to_center: Tensor,  # (P, 2) our crop
    to_side: Tensor,  # (P,)
) -> Heatmaps:
    """The same heatmaps over our crop, by cubic splines: bilinear interpolation would shift a Gaussian's peak."""
    size = torch.tensor([values.shape[-1], values.shape[-2]])
    first, step = _grid(codec, center, scale, use_udp, size)
    across, down = (
        torch.stack(
            [
                spline_weights(int(size[axis]), places)
                for places in (_targets(to_center, to_side, axis) - first[:, axis, None]) / step[:, axis, None]
            ]
        )
        for axis in (0, 1)
    )
    resampled = torch.einsum("pik,pjkl,pml->pjim", down, values, across)
    return heatmaps_from_values(resampled, names, to_center, to_side)


def _targets(center: Tensor, side: Tensor, axis: int) -> Tensor:  # (P, 64) photo positions of our pixels, double
    return center[:, axis, None].double() + pixel_coordinates(HEATMAP_SIZE, side.double()) / 2 * side[:, None].double()


def heatmaps_from_simcc(
    x: Tensor,  # (P, K, bins of the width) >= 0
    y: Tensor,  # (P, K, bins of the height)
    scores: Tensor,  # (P, K) the confidence
    names: Sequence[str],  # K
    codec: Any,  # mmpose's SimCCLabel
    center: Tensor,  # (P, 2) centre of the model's input, photo pixels
    scale: Tensor,  # (P, 2) width and height of the input, photo pixels
    use_udp: bool,
    to_center: Tensor,  # (P, 2) our crop
    to_side: Tensor,  # (P,)
) -> Heatmaps:
    """The outer product of both distributions, with the score as peak. Two modes also produce their mirror images: (x1
    or x2) and (y1 or y2) give four peaks.

    Each bin is blurred by a Gaussian, so that a SimCC label becomes as wide as a heatmap label (`_SIMCC_SIGMA`).
    """
    size = torch.tensor([x.shape[-1], y.shape[-1]])
    first, step = _grid(codec, center, scale, use_udp, size)
    pixel = to_side / HEATMAP_SIZE
    profiles = []
    for axis, bins in enumerate((x, y)):
        label = codec.sigma[axis] if codec.smoothing_type == "gaussian" else 0.0
        width = ((_SIMCC_SIGMA * pixel) ** 2 - (label * step[:, axis]) ** 2).clamp_min((pixel / 2) ** 2).sqrt()
        places = first[:, axis, None] + step[:, axis, None] * torch.arange(int(size[axis]))  # (P, bins)
        spread = _spread(bins, places, _targets(to_center, to_side, axis), width)
        # The peak may lie outside our crop, so it is evaluated at the bins.
        profiles.append(spread / _spread(bins, places, places, width).amax(-1, keepdim=True).clamp_min(1e-12))
    values = profiles[1][..., :, None] * profiles[0][..., None, :] * scores.clamp(0, 1)[..., None, None]
    return heatmaps_from_values(values, names, to_center, to_side)


def _spread(
    bins: Tensor,  # (P, K, n)
    places: Tensor,  # (P, n) positions of the bins
    at: Tensor,  # (P, m)
    width: Tensor,  # (P,) the Gaussian's sigma
) -> Tensor:  # (P, K, m)
    distance = (at[:, None, :] - places[:, :, None]) / width[:, None, None]
    return bins @ torch.exp(-0.5 * distance.double().square()).to(bins.dtype)


def _grid(
    codec: Any, center: Tensor, scale: Tensor, use_udp: bool, size: Tensor
) -> tuple[Tensor, Tensor]:  # (P, 2) photo position of a heatmap's first pixel, (P, 2) spacing in photo pixels
    entry = torch.tensor(codec.input_size, dtype=torch.float64)
    kind = type(codec).__name__
    if kind == "SimCCLabel":
        stride = torch.full((2,), 1 / codec.simcc_split_ratio, dtype=torch.float64)
    else:
        stride = (entry - 1) / (size - 1) if kind == "UDPHeatmap" else entry / size
    return center - scale / 2, stride * scale / (entry - int(use_udp))
