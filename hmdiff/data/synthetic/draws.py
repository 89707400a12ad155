"""Random numbers, colours and noise fields shared by the modules of synthetic photos. Our choice.

Every function takes one `torch.Generator` for the batch, or a list of B, one per person. With a list, a person's values
do not depend on the batch. Values are drawn on the generator's device and then moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def uniform(
    generator: Generators,
    count: int,  # B
    *shape: int,
    device: torch.device | str = "cpu",
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:  # (B, *shape) in [low, high)
    """Uniform numbers, one row per person; with a list of generators, each row from its own."""
    if isinstance(generator, torch.Generator):
        values = torch.rand(count, *shape, generator=generator, device=generator.device)
    else:
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} people: give one, or one a person")
        values = torch.stack([torch.rand(shape, generator=own, device=own.device) for own in generator])
    return (values * (high - low) + low).to(device)


def gaussian(
    generator: Generators,
    count: int,  # B
    *shape: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # (B, *shape)
    """Standard normal numbers, one row per person."""
    # Box-Muller, so that lists of generators need no second branch.
    pair = uniform(generator, count, 2, *shape, device=device)
    return (-2 * (1 - pair[:, 0]).log()).sqrt() * torch.cos(2 * torch.pi * pair[:, 1])


def hsv_to_rgb(
    hsv: Tensor,  # (..., 3) each 0..1
) -> Tensor:  # (..., 3)
    """The hexcone model."""
    hue, saturation, value = hsv.unbind(-1)
    sector = (hue[..., None] * 6 + torch.tensor([5.0, 3.0, 1.0], device=hsv.device)) % 6
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def random_colours(
    generator: Generators,
    count: int,  # B
    *shape: int,
    device: torch.device | str,
) -> Tensor:  # (B, *shape, 3) RGB 0..1
    """Random colours of objects."""
    raw = uniform(generator, count, *shape, 3, device=device)
    # Cloth and walls are less saturated than a uniform draw, and dark ones are as frequent as bright ones.
    return hsv_to_rgb(torch.stack([raw[..., 0], raw[..., 1].square(), 0.08 + 0.9 * raw[..., 2]], -1))


def grid(
    height: int,
    width: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:  # x (1, 1, W), y (1, H, 1)
    """Crop coordinates of the pixel centres."""
    x = (torch.arange(width, device=device) + 0.5) * (2 / width) - 1
    y = (torch.arange(height, device=device) + 0.5) * (2 / height) - 1
    return x[None, None], y[None, :, None]


def noise(
    generator: Generators,
    count: int,
    height: int,
    width: int,
    device: torch.device | str,
) -> Tensor:  # (B, 3, H, W) about -0.5..0.5
    """Smooth noise: octaves of random grids, amplitude halved per octave, more grey than coloured."""
    fine = 24
    total = torch.zeros(count, 3, fine, fine, device=device)
    for octave, cells in enumerate((3, 6, 12, fine)):
        coarse = uniform(generator, count, 4, cells, cells, device=device, low=-0.5, high=0.5)
        coarse = 0.4 * coarse[:, :3] + 0.75 * coarse[:, 3:]
        total += F.interpolate(coarse, (fine, fine), mode="bicubic", align_corners=False) / 2**octave
    return F.interpolate(total, (height, width), mode="bicubic", align_corners=False)


def occluder_texture(
    generator: Generators,
    shape: Tensor,  # (B, H, W) long: the occluder of each pixel, 0 .. things - 1
    num_colours: int,
) -> Tensor:  # (B, 3, H, W)
    """Colour, stripes and grain for occluders, one set of colours each."""
    count, height, width = shape.shape
    device = shape.device
    x, y = grid(height, width, device)
    base = random_colours(generator, count, num_colours, 2, device=device)
    colours = base[torch.arange(count, device=device)[:, None, None], shape]  # (B, H, W, 2, 3)
    style = uniform(generator, count, 4, device=device)[:, :, None, None]
    stripes = ((x * (style[:, 0] - 0.5) + y * (style[:, 1] - 0.5)) * (10 + 50 * style[:, 2])).sin() > 0
    mix = (stripes & (style[:, 3] > 0.5))[..., None]
    colour = torch.where(mix, colours[..., 1, :], colours[..., 0, :]).permute(0, 3, 1, 2)
    return (colour + noise(generator, count, height, width, device) * 0.25).clamp(0, 1)
