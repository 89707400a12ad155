"""Occluders for synthetic photos: things in front of a person that hide a wanted fraction of them, exactly. Our choice.

B pictures of H x W pixels, RGB 0..1, crop coordinates -1..1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.data.synthetic.draws import Generators, any_colour, grid, noise, uniform

SHAPE_COUNT = 4  # shapes an occluder is the union of, at most


def random_occluders(
    generator: Generators,
    target: Tensor,  # (B, H, W) 0..1 or bool: the silhouette that is to be covered
    fraction: Tensor,  # (B,) 0..1: how much of it
) -> tuple[Tensor, Tensor]:  # alpha (B, H, W) 0..1, colour (B, 3, H, W)
    """Ellipses, boxes, polygons, limb-like bars and edges of furniture in front of a person.

    Each shape is a gauge g(pixel), growing from 0 at its core. The occluder is {min over the shapes of g <= s}, and s
    is the quantile of that minimum over the silhouette: so the fraction is met exactly, up to one pixel, whatever the
    shapes. The occlusion mask is ``alpha > 0.5``. A fraction of 0 gives an empty occluder.
    """
    count, height, width = target.shape
    device = target.device
    body = target > 0.5
    x, y = grid(height, width, device)
    raw = uniform(generator, count, SHAPE_COUNT, 6, device=device)
    many = uniform(generator, count, device=device)
    sides = uniform(generator, count, SHAPE_COUNT, 5, 2, device=device)

    # Cores lie on random pixels of the silhouette.
    order = body.flatten(1).long().cumsum(1)
    pixels = order[:, -1]
    rank = (raw[..., 0] * pixels[:, None]).long() + 1
    core = torch.searchsorted(order, rank).clamp_max(height * width - 1)
    core_x = (core % width + 0.5) * (2 / width) - 1
    core_y = (torch.div(core, width, rounding_mode="floor") + 0.5) * (2 / height) - 1

    gauges = []
    for k in range(SHAPE_COUNT):
        kind, turn, aspect, size_ = (raw[:, k, 1 + j, None, None] for j in range(4))
        dx, dy = x - core_x[:, k, None, None], y - core_y[:, k, None, None]
        angle = turn * torch.pi
        u, w = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        aspect = 0.35 + 1.3 * aspect
        ellipse = (u.square() * aspect + w.square() / aspect).sqrt()
        box = torch.maximum(u.abs() * aspect, w.abs() / aspect)
        bar = (w.square() + (u.abs() - 0.7).clamp_min(0).square()).sqrt() * 2.5
        edge_angle = (turn * 4).floor() * (torch.pi / 2) + (aspect - 1) * 0.3
        edge = dx * edge_angle.cos() + dy * edge_angle.sin() + 0.5
        wedge = (torch.arange(5, device=device) + 0.8 * sides[:, k, :, 0]) * (2 * torch.pi / 5)
        reach = 0.6 + 0.8 * sides[:, k, :, 1]
        polygon = torch.stack(
            [
                (dx * wedge[:, j, None, None].cos() + dy * wedge[:, j, None, None].sin()) / reach[:, j, None, None]
                for j in range(5)
            ]
        ).amax(0)
        gauge = polygon
        for threshold, other in ((0.8, edge), (0.6, bar), (0.4, box), (0.2, ellipse)):
            gauge = torch.where(kind < threshold, other, gauge)
        gauge = gauge / (0.5 + size_)
        # Further shapes come with falling probability, so that a single big occluder stays common.
        used = (many * SHAPE_COUNT >= k)[:, None, None]
        gauges.append(torch.where(used, gauge, torch.inf))
    gauge, shape = torch.stack(gauges, 1).min(1)

    ordered = torch.where(body, gauge, torch.inf).flatten(1).sort(1).values
    wanted = (fraction.clamp(0, 1) * pixels).round().long()
    level = ordered.gather(1, (wanted - 1).clamp_min(0)[:, None])[:, 0]
    beyond = ordered.gather(1, wanted.clamp_max(height * width - 1)[:, None])[:, 0]
    # Half way to the next pixel, so that the threshold is on neither; past the last one there is no next.
    level = torch.where(beyond.isfinite(), (level + beyond) / 2, level * 1.001)[:, None, None]
    none = ((wanted == 0) | (pixels == 0))[:, None, None]
    inside = (gauge <= level) & ~none
    # Soft edges two pixels wide; the sign decides the mask, so softness does not move it.
    slope = torch.stack(torch.gradient(gauge.clamp_max(1e3), dim=(1, 2))).square().sum(0).sqrt().clamp_min(1e-4)
    margin = ((level - gauge) / (2 * slope)).clamp(-0.49, 0.49)
    alpha = torch.where(inside, 0.5 + margin.clamp_min(0.01), 0.5 + margin.clamp_max(-0.01))
    alpha = torch.where(none, torch.zeros_like(alpha), ((alpha - 0.01) / 0.98).clamp(0, 1))

    # Darker towards the rim, as a rounded thing is under light from the front.
    rim = 1 - 0.45 * (gauge / level.clamp_min(1e-6)).clamp(0, 1).square()
    return alpha, paint_occluder(generator, shape, SHAPE_COUNT) * rim[:, None]


def paint_occluder(
    generator: Generators,
    shape: Tensor,  # (B, H, W) long: which thing a pixel belongs to, 0 .. things - 1
    things: int,
) -> Tensor:  # (B, 3, H, W)
    """Colour, stripes and grain for the things in front, one set of colours a thing."""
    count, height, width = shape.shape
    device = shape.device
    x, y = grid(height, width, device)
    base = any_colour(generator, count, things, 2, device=device)
    picked = base[torch.arange(count, device=device)[:, None, None], shape]  # (B, H, W, 2, 3)
    style = uniform(generator, count, 4, device=device)[:, :, None, None]
    stripes = ((x * (style[:, 0] - 0.5) + y * (style[:, 1] - 0.5)) * (10 + 50 * style[:, 2])).sin() > 0
    mix = (stripes & (style[:, 3] > 0.5))[..., None]
    colour = torch.where(mix, picked[..., 1, :], picked[..., 0, :]).permute(0, 3, 1, 2)
    return (colour + noise(generator, count, height, width, device) * 0.25).clamp(0, 1)
