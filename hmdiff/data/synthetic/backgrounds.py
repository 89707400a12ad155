"""Backgrounds for synthetic photos: gradients, noise, objects, rooms. Our choice.

B images of H x W pixels, RGB 0..1, crop coordinates -1..1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.data.synthetic.draws import Generators, grid, noise, random_colours, uniform


def random_backgrounds(
    generator: Generators,
    count: int,
    size: tuple[int, int],  # (H, W)
    device: torch.device | str = "cpu",
) -> Tensor:  # (B, 3, H, W)
    """A gradient, smooth noise or a room, most with rectangles and ellipses on top."""
    height, width = size
    x, y = grid(height, width, device)
    kind = uniform(generator, count, device=device)[:, None, None, None]
    colours = random_colours(generator, count, 4, device=device)[..., None, None]  # (B, 4, 3, 1, 1)
    smooth = noise(generator, count, height, width, device)
    raw = uniform(generator, count, 8, device=device)[:, :, None, None]

    angle = raw[:, 0] * 2 * torch.pi
    ramp = ((x * angle.cos() + y * angle.sin()) * 0.5 + 0.5).clamp(0, 1)[:, None]
    gradient = colours[:, 0] + (colours[:, 1] - colours[:, 0]) * ramp

    # A room: a floor with tiles or planks below the horizon, a wall with a corner and panels above it.
    horizon = 0.9 * raw[:, 1] - 0.3
    below = (y - horizon).clamp_min(0.02)
    floor_x, floor_z = (x - raw[:, 2] + 0.5) / below, 1 / below
    tiles = 1.5 + 4 * raw[:, 3]
    checker = ((floor_x * tiles).floor() + (floor_z * tiles * (raw[:, 4] > 0.5)).floor()) % 2
    fade = (below * 2).clamp(0, 1)  # far tiles are smaller than a pixel
    floor = colours[:, 0] * (1 - 0.35 * (checker * fade)[:, None])
    corner = 2 * raw[:, 5] - 1
    panels = ((x * (2 + 6 * raw[:, 6])).floor() % 2) * (raw[:, 7] > 0.6)
    wall = torch.where((x < corner)[:, None], colours[:, 1], colours[:, 1] * 0.75) * (1 - 0.2 * panels[:, None])
    room = torch.where((y > horizon)[:, None], floor, wall)

    picture = torch.where(kind < 0.25, gradient, torch.where(kind < 0.5, colours[:, 2].expand_as(smooth), room))
    picture = picture + smooth * torch.where((kind >= 0.25) & (kind < 0.5), 0.9, 0.15)
    # Objects: rectangles and ellipses on most backgrounds.
    things = 6
    place = uniform(generator, count, things, 6, device=device)[..., None, None]
    tint = random_colours(generator, count, things, device=device)[..., None, None]
    busy = uniform(generator, count, things, device=device)[..., None, None]
    for thing in range(things):
        centre_x, centre_y, half_x, half_y, round_, turn = place[:, thing].unbind(1)
        dx, dy = x - (2.4 * centre_x - 1.2), y - (2.4 * centre_y - 1.2)
        cosine, sine = (turn * 1.2 - 0.6).cos(), (turn * 1.2 - 0.6).sin()
        across = ((dx * cosine + dy * sine) / (0.06 + 0.5 * half_x * half_x)).abs()
        down = ((dy * cosine - dx * sine) / (0.06 + 0.6 * half_y * half_y)).abs()
        outside = torch.where(round_ < 0.4, across.square() + down.square(), torch.maximum(across, down))
        there = (outside < 1) & (busy[:, thing] < 0.55)
        lit = 0.85 + 0.3 * ((across + down) * 0.25).clamp(0, 1)
        picture = torch.where(there[:, None], tint[:, thing] * lit[:, None] + 0.1 * smooth, picture)
    return picture.clamp(0, 1)
