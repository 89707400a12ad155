"""Synthetic photos: a dressed, lit body before a background, behind an occluder, with camera effects.

Torch only, on any device, vectorised over the batch; our choice. The goal is not realism: colour, texture, light and
background must carry no information about the pose, while the outline and the shading do. Randomness: see
`hmdiff.data.synthetic.draws`.

Symbols: B images of H x W pixels, V vertices. Colours are RGB 0..1; crop coordinates -1..1; metres.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.backgrounds import random_backgrounds
from hmdiff.data.synthetic.camera_effects import camera_effects
from hmdiff.data.synthetic.draws import Generators, gaussian, hsv_to_rgb, occluder_texture, random_colours, uniform
from hmdiff.viz.renderer import Fragments, Lights, rasterize, shade, silhouette


class Clothing:
    """Dresses a body. What a garment may cover is computed once, from the template and its skinning weights."""

    def __init__(
        self,
        template: Tensor,  # (V, 3) metres, the canonical body: y up, facing +z
        lbs_weights: Tensor,  # (V, K) skinning weights
        joint_names: Sequence[str] = SMPL24,  # K names
    ):
        device = template.device
        names = [name.removeprefix("left_").removeprefix("right_") for name in joint_names]
        dominant_joint = lbs_weights.argmax(-1)

        def vertices_of(*wanted: str) -> Tensor:  # (V,) bool
            return torch.tensor([name in wanted for name in names], device=device)[dominant_joint]

        def position_along(mask: Tensor, axis: int, absolute: bool = False) -> Tensor:  # (V,) 0..1 over the part
            value = template[:, axis].abs() if absolute else template[:, axis]
            if not mask.any():
                return torch.zeros_like(value)
            low, high = value[mask].min(), value[mask].max()
            return ((value - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)

        self.template = template
        self.head = vertices_of("head", "neck")
        self.torso = vertices_of("spine1", "spine2", "spine3", "collar")
        self.hips = vertices_of("pelvis", "hip")  # the `hip` joint moves the thigh
        self.shins = vertices_of("knee")
        self.arms = vertices_of("shoulder", "elbow")
        self.feet = vertices_of("ankle", "foot")
        self.hands = vertices_of("wrist", "hand")
        legs = vertices_of("hip", "knee")
        self.down_leg = 1 - position_along(legs | vertices_of("pelvis"), 1)  # 0 at the waist, 1 at the ankle
        self.down_arm = position_along(
            self.arms, 0, absolute=True
        )  # 0 at the shoulder, 1 at the wrist (a T- or A-pose)
        self.up_head = position_along(vertices_of("head"), 1) * vertices_of("head")
        self.front_head = position_along(vertices_of("head"), 2)
        self.legs = legs

    def colours(
        self,
        generator: Generators,
        count: int,
    ) -> Tensor:  # (B, V, 3) RGB 0..1
        """Skin, hair, a top, trousers or shorts, shoes, each with random colours and texture."""
        device = self.template.device
        tone = uniform(generator, count, 3, device=device)
        pale, deep = (torch.tensor(rgb, device=device) for rgb in ([0.96, 0.80, 0.69], [0.28, 0.17, 0.11]))
        skin = pale + (deep - pale) * tone[:, :1] + 0.06 * (tone[:, 1:2] - 0.5)
        colour = skin[:, None].expand(count, len(self.template), 3)

        cut = uniform(generator, count, 6, device=device)
        hem = torch.where(cut[:, 0] < 0.35, 0.25 + 0.45 * cut[:, 1], 1.1)  # where shorts or trousers end along the leg
        sleeve = torch.where(cut[:, 2] < 0.5, 0.1 + 0.4 * cut[:, 3], torch.where(cut[:, 2] < 0.85, 1.1, -0.1))
        hairline = 0.45 + 0.6 * cut[:, 4]  # above 1 is bald
        trousers = (self.hips | self.shins | self.legs) & (self.down_leg < hem[:, None])
        top = self.torso | (self.arms & (self.down_arm < sleeve[:, None]))
        # The hairline is higher over the face than at the back of the head.
        hair = self.up_head > hairline[:, None] + 0.35 * (self.front_head - 0.5)
        barefoot = cut[:, 5:] < 0.1

        hair_colour = hsv_to_rgb(
            uniform(generator, count, 3, device=device) * torch.tensor([0.09, 0.6, 0.7], device=device)
            + torch.tensor([0.03, 0.15, 0.04], device=device)
        )
        for mask, cloth in (
            (trousers, self._cloth(generator, count)),
            (top, self._cloth(generator, count)),
            (self.feet & ~barefoot, self._cloth(generator, count)),
            (hair, hair_colour[:, None]),
        ):
            colour = torch.where(mask[..., None], cloth, colour)
        # A slight unevenness fixed to the body: low-frequency waves of the canonical coordinates.
        wave = gaussian(generator, count, 3, 4, device=device) * 9
        phase = uniform(generator, count, 1, 4, device=device, high=6.3)
        shade_ = (torch.einsum("vc,bcw->bvw", self.template, wave) + phase).sin().mean(-1, keepdim=True)
        return (colour * (1 + 0.12 * shade_)).clamp(0, 1)

    def _cloth(self, generator: Generators, count: int) -> Tensor:  # (B, V, 3)
        """Two colours mixed by stripes, checks, blotches or nothing; the pattern is defined on the canonical body."""
        device = self.template.device
        first, second = random_colours(generator, count, 2, device=device).unbind(1)
        kind = uniform(generator, count, 1, device=device)
        choice = uniform(generator, count, 4, device=device)
        period = 0.04 + 0.14 * choice[:, :1]  # metres; finer would alias on the vertices
        angle = (choice[:, 1:2] * 4).floor() * (torch.pi / 4)
        x, y, z = self.template.unbind(-1)
        u, w = x * angle.cos() + y * angle.sin(), z + y * angle.cos() - x * angle.sin()
        stripes = (u * (2 * torch.pi / period)).sin()
        checks = stripes * (w * (2 * torch.pi / period)).sin()
        wave = gaussian(generator, count, 3, 6, device=device) * 25
        phase = uniform(generator, count, 1, 6, device=device, high=6.3)
        blotches = (torch.einsum("vc,bcw->bvw", self.template, wave) + phase).sin().sum(-1)
        pattern = torch.where(kind < 0.6, stripes, torch.where(kind < 0.8, checks, blotches))
        mix = (pattern > choice[:, 2:3] - 0.5).float() * (kind > 0.35)
        return first[:, None] + (second - first)[:, None] * mix[..., None]


def random_lights(
    generator: Generators,
    count: int,
    device: torch.device | str = "cpu",
) -> Lights:
    """A key light from above, a weaker fill light from the viewer's side, and an ambient light of a similar colour."""
    raw = uniform(generator, count, 8, device=device)
    azimuth = (raw[:, 0:2] - 0.5) * 2 * torch.pi * 0.75
    height = torch.stack([0.25 + 1.0 * raw[:, 2], -0.3 + 1.2 * raw[:, 3]], 1)
    # Towards the viewer is -z, up is -y.
    direction = torch.stack([azimuth.sin() * height.cos(), -height.sin(), -azimuth.cos() * height.cos()], -1)
    warmth = 1 + 0.25 * (uniform(generator, count, 3, 3, device=device) - 0.5)
    strength = torch.stack([0.25 + 0.35 * raw[:, 4], 0.45 + 0.6 * raw[:, 5], 0.35 * raw[:, 6]], 1)
    radiance = warmth * strength[..., None]
    return Lights(radiance[:, 0], direction, radiance[:, 1:])


@dataclasses.dataclass(frozen=True)
class RenderedPhoto:
    """A synthetic photo with its labels."""

    image: Tensor  # (B, 3, H, W) RGB 0..1
    silhouette: Tensor  # (B, H, W) 0..1: the whole person, including parts behind occluders
    occlusion: Tensor  # (B, H, W) bool: pixels of the occluder, on the person or beside it
    fragments: Fragments


def render_photo(
    generator: Generators,
    clothing: Clothing,
    vertices: Tensor,  # (B, V, 3) metres, camera frame (absolute)
    faces: Tensor,  # (F, 3)
    focal: Tensor,  # (B,) crop half-sides
    principal_point: Tensor,  # (B, 2) crop coordinates
    size: int | tuple[int, int],  # H = W, or (H, W)
    occluder: Tensor | None = None,  # (B, H, W) 0..1 coverage by an occluder; None: no occluder
    strength: float = 1.0,  # of the camera effects
    fragments: Fragments | None = None,  # from `rasterize` at the same size, if already computed
    cull: bool = True,  # back-face culling; the body is closed
) -> RenderedPhoto:
    """Render a dressed, lit person before a background, behind an occluder, with camera effects."""
    height, width = (size, size) if isinstance(size, int) else size
    count, device = len(vertices), vertices.device
    if fragments is None:
        fragments = rasterize(vertices, faces, focal, principal_point, size, cull=cull)
    image = shade(
        fragments,
        vertices,
        faces,
        focal,
        principal_point,
        clothing.colours(generator, count),
        random_lights(generator, count, device),
        random_backgrounds(generator, count, (height, width), device),
    )
    person = silhouette(fragments)
    occlusion = torch.zeros_like(person, dtype=torch.bool)
    if occluder is not None:
        colour = occluder_texture(generator, torch.zeros_like(occluder, dtype=torch.long), 1)
        image = image + occluder[:, None] * (colour - image)
        occlusion = occluder > 0.5
    return RenderedPhoto(camera_effects(generator, image, strength), person, occlusion, fragments)
