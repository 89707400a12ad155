"""Corruptions as of a monocular depth network, as a random process: a scene's depth in, an estimate out (our choice).

Disparity instead of depth, bent surfaces, displaced edges, blur, grain, missing regions, a missing map, and the unknown
scale and shift that D2A-HMR's (arXiv 2403.09063) input has too. All draws come from one CPU generator, and their number
does not depend on the options. n people, S pixels a side.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.config import DepthCorruption
from hmdiff.data.synthetic.draws import gaussian, grid, uniform

_SPOTS = 3  # maximum number of missing regions of a person


def estimate_depth(
    depth: Tensor,  # (n, S, S) metres, NaN = empty
    corruption: DepthCorruption,
    generator: torch.Generator,  # CPU
) -> Tensor:  # (n, S, S) larger = farther, arbitrary unit, NaN = unknown
    """A network's possible prediction for these scenes."""
    if corruption.none:
        return depth
    n, size = depth.shape[:2]
    device = depth.device
    random = uniform(generator, n, 8, device=device)
    smooth = gaussian(generator, n, 3, 4, 4, device=device)
    fine = gaussian(generator, n, 2, 8, 8, device=device)
    grain = gaussian(generator, n, size, size, device=device)
    spots = uniform(generator, n, _SPOTS, 4, device=device)

    known = depth.isfinite()
    values = torch.where(known, depth, 0.0)
    count = known.flatten(1).sum(1).clamp_min(1)[:, None, None]
    inverted = (random[:, 0] < corruption.disparity)[:, None, None] & known
    values = torch.where(inverted, -1 / torch.where(inverted, values, 1.0), values)
    # Relative to the map's mean and spread, so that corruptions are the same in depth and in disparity.
    mean = values.sum((1, 2), keepdim=True) / count
    values = torch.where(known, values - mean, 0.0)
    spread = (values.square().sum((1, 2), keepdim=True) / count).sqrt()
    bending = F.interpolate(smooth[:, :1], (size, size), mode="bicubic", align_corners=False)[:, 0]
    values = values + corruption.bend * spread * bending

    # A smooth displacement field: where depth is discontinuous, the edge moves.
    x, y = grid(size, size, device)
    shift = 0.5 * F.interpolate(smooth[:, 1:], (size, size), mode="bicubic", align_corners=False)
    shift = corruption.edges * (shift + 0.9 * F.interpolate(fine, (size, size), mode="bicubic", align_corners=False))
    positions = torch.stack([x + shift[:, 0], y + shift[:, 1]], -1)
    layers = torch.stack([torch.where(known, values, 0.0), known.to(values.dtype)], 1)
    layers = F.grid_sample(layers, positions, padding_mode="border", align_corners=False)
    layers = _blurred(layers, corruption.blur * random[:, 1] * (size / 2))
    known = layers[:, 1] >= 0.5
    values = layers[:, 0] / layers[:, 1].clamp_min(1e-6) + corruption.grain * random[:, 2, None, None] * spread * grain

    # Unknown ellipses: a real map is unknown on glass, in the sky, or where two networks disagree.
    has_spot = (random[:, 3] < corruption.missing)[:, None] & (
        torch.arange(_SPOTS, device=device) < _SPOTS * random[:, 4, None]
    )
    center, half = 2 * spots[..., :2] - 1, 0.08 + 0.4 * spots[..., 2:]
    dx_squared = ((x[:, None] - center[..., 0, None, None]) / half[..., 0, None, None]).square()
    dy_squared = ((y[:, None] - center[..., 1, None, None]) / half[..., 1, None, None]).square()
    missing = ((dx_squared + dy_squared < 1) & has_spot[..., None, None]).any(1)
    missing |= (random[:, 5] < corruption.missing_map)[:, None, None]
    if corruption.affine:
        unit = 1000 ** (2 * random[:, 6, None, None] - 1)
        values = (values + mean) * unit + spread * unit * (4 * random[:, 7, None, None] - 2)
    else:
        values = values + mean
    return torch.where(known & ~missing, values, torch.nan)


def _blurred(
    maps: Tensor,  # (n, C, S, S)
    sigma: Tensor,  # (n,) pixels
) -> Tensor:
    """Gaussian blur with one sigma per person. OpenCV's is several times faster than a grouped convolution on a CPU."""
    layers = maps.permute(0, 2, 3, 1).cpu().numpy()
    blurred = [
        cv2.GaussianBlur(layer, (0, 0), width, borderType=cv2.BORDER_REPLICATE) if width > 0.2 else layer
        for layer, width in zip(layers, sigma.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2).to(maps.device)
