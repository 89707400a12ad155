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
    floor_depth = (y - horizon).clamp_min(0.02)
    floor_x, floor_z = (x - raw[:, 2] + 0.5) / floor_depth, 1 / floor_depth
    tiles = 1.5 + 4 * raw[:, 3]
    checker = ((floor_x * tiles).floor() + (floor_z * tiles * (raw[:, 4] > 0.5)).floor()) % 2
    fade = (floor_depth * 2).clamp(0, 1)  # far tiles are smaller than a pixel
    floor = colours[:, 0] * (1 - 0.35 * (checker * fade)[:, None])
    corner = 2 * raw[:, 5] - 1
    panels = ((x * (2 + 6 * raw[:, 6])).floor() % 2) * (raw[:, 7] > 0.6)
    wall = torch.where((x < corner)[:, None], colours[:, 1], colours[:, 1] * 0.75) * (1 - 0.2 * panels[:, None])
    room = torch.where((y > horizon)[:, None], floor, wall)

    picture = torch.where(kind < 0.25, gradient, torch.where(kind < 0.5, colours[:, 2].expand_as(smooth), room))
    picture = picture + smooth * torch.where((kind >= 0.25) & (kind < 0.5), 0.9, 0.15)
    # Objects: rectangles and ellipses on most backgrounds.
    num_objects = 6
    placement = uniform(generator, count, num_objects, 6, device=device)[..., None, None]
    tint = random_colours(generator, count, num_objects, device=device)[..., None, None]
    presence = uniform(generator, count, num_objects, device=device)[..., None, None]
    for object_index in range(num_objects):
        centre_x, centre_y, half_x, half_y, round_, turn = placement[:, object_index].unbind(1)
        dx, dy = x - (2.4 * centre_x - 1.2), y - (2.4 * centre_y - 1.2)
        cosine, sine = (turn * 1.2 - 0.6).cos(), (turn * 1.2 - 0.6).sin()
        along_width = ((dx * cosine + dy * sine) / (0.06 + 0.5 * half_x * half_x)).abs()
        along_height = ((dy * cosine - dx * sine) / (0.06 + 0.6 * half_y * half_y)).abs()
        outside = torch.where(
            round_ < 0.4, along_width.square() + along_height.square(), torch.maximum(along_width, along_height)
        )
        covered = (outside < 1) & (presence[:, object_index] < 0.55)
        lit = 0.85 + 0.3 * ((along_width + along_height) * 0.25).clamp(0, 1)
        picture = torch.where(covered[:, None], tint[:, object_index] * lit[:, None] + 0.1 * smooth, picture)
    return picture.clamp(0, 1)
