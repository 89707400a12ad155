"""Effects of a camera and of JPEG on an image: colour cast, contrast, gamma, blur, noise, quantisation. Our choice.

B images of H x W pixels, RGB 0..1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.data.synthetic.draws import Generators, gaussian, uniform


def camera_effects(
    generator: Generators,
    image: Tensor,  # (B, 3, H, W) RGB 0..1
    strength: float = 1.0,  # 0 changes nothing
) -> Tensor:  # (B, 3, H, W) RGB 0..1
    """Colour cast, contrast, gamma, blur, noise and JPEG quantisation, each of random strength."""
    if strength == 0:
        return image
    count, _, height, width = image.shape
    device = image.device
    raw = uniform(generator, count, 10, device=device)[:, :, None, None, None]
    signed = (raw * 2 - 1) * strength
    image = image * (1 + 0.15 * signed[:, 0:3, 0])  # colour cast, by channel
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (1 + 0.4 * signed[:, 3])
    middle = image.mean((1, 2, 3), keepdim=True)
    image = middle + (image - middle) * (1 + 0.3 * signed[:, 4]) + 0.1 * signed[:, 5]
    image = image.clamp(1e-4, 1) ** (1 + 0.25 * signed[:, 6])
    image = _blur(image, strength * 1.2 * (raw[:, 7].flatten() * 1.8 - 0.8).clamp_min(0))
    grain = gaussian(generator, count, 3, height, width, device=device)
    image = image + grain * (0.04 * strength * raw[:, 8].square())
    image = _jpeg(image.clamp(0, 1), raw[:, 9].flatten().square() * strength)
    return image.clamp(0, 1)


def _blur(
    image: Tensor,  # (B, 3, H, W)
    sigma: Tensor,  # (B,) pixels
) -> Tensor:
    radius = 4
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp_min(1e-3)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # (3B, 1, 9): one per image
    flat = F.pad(image.flatten(0, 1)[None], (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[..., None], groups=len(kernel))[0].view_as(image)


def _jpeg(
    image: Tensor,  # (B, 3, H, W) 0..1
    coarseness: Tensor,  # (B,) 0 (fine) .. 1 (about quality 20)
) -> Tensor:
    """Quantise the cosine coefficients of 8 x 8 blocks, coarser at higher frequencies, as JPEG does."""
    height, width = image.shape[2:]
    k = torch.arange(8, device=image.device, dtype=image.dtype)
    dct = torch.cos((2 * k[None] + 1) * k[:, None] * (torch.pi / 16)) * 0.5
    dct[0] *= 0.5**0.5
    padded = F.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).transpose(3, 4)  # (B, 3, h, w, 8, 8)
    step = (0.004 + 0.12 * coarseness[:, None, None]) * (1 + 0.8 * (k[:, None] + k[None]))
    step = step[:, None, None, None]
    coefficients = ((dct @ blocks @ dct.T) / step).round() * step
    return (dct.T @ coefficients @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]
