"""Occluders added in training: shapes, another person, pasted cut-outs; and which points they cover.

Each occluder is defined in crop coordinates, so that it can be evaluated at a point (is this joint hidden?), as a mask
(how much of the silhouette is left?) and as an image. Another person is a stick figure of thick limbs through the
keypoints of the next person of the block, moved and scaled: cheap, with a person's outline. Our choice. n people, J
keypoints (HALPE26), P points, K shapes, L limbs, S pixels a side. Crop coordinates -1..1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.config import Augment
from hmdiff.data.synthetic.cutouts import Cutouts
from hmdiff.data.synthetic.draws import grid, paint_occluder
from hmdiff.data.synthetic.rendering import OccluderBoxes
from hmdiff.errors import UserError

NOTHING, OBJECTS, PERSON, CUTOUT = range(4)
SHAPES = 2  # maximum K
_LEAST_KEYPOINTS = 8  # of the person in front: fewer give no outline
_SIDES = ("left", "right")
# Ends, radius relative to the person's extent, and colour index: head 0, upper body 1, legs 2.
_LIMBS: tuple[tuple[str, str, float, int], ...] = (
    ("neck", "top_head", 0.055, 0),
    ("neck", "mid_hip", 0.075, 1),
    ("left_shoulder", "right_shoulder", 0.04, 1),
    ("left_hip", "right_hip", 0.06, 2),
    *((f"{side}_shoulder", f"{side}_hip", 0.06, 1) for side in _SIDES),
    *((f"{side}_shoulder", f"{side}_elbow", 0.03, 1) for side in _SIDES),
    *((f"{side}_elbow", f"{side}_wrist", 0.025, 1) for side in _SIDES),
    *((f"{side}_hip", f"{side}_knee", 0.05, 2) for side in _SIDES),
    *((f"{side}_knee", f"{side}_ankle", 0.035, 2) for side in _SIDES),
)


@dataclasses.dataclass(frozen=True)
class InFront:
    """Occluders of n people: nothing or one kind each."""

    kind: Tensor  # (n,) long
    shapes: Tensor  # (n, K, 6) 0 ellipse, 1 box or 2 bar; x, y, half width, half height (0: absent), angle
    limbs: Tensor  # (n, L, 5) x and y of both ends, radius (0: absent)
    cutout: Tensor  # (n,) long: index of the cut-out
    pose: Tensor  # (n, 5) of the cut-out: x, y, half its side, angle, 1 or -1 (mirrored)
    cutouts: Cutouts | None
    looks: int  # seed of the textures

    def alpha(
        self,
        points: Tensor,  # (n, P, 2)
        pixel: float = 1e-6,  # width of soft edges
    ) -> tuple[Tensor, Tensor]:  # (n, P) 0..1; (n, P) long: the occluder's colour index
        """Coverage at the points."""
        alpha = points.new_zeros(points.shape[:2])
        part = torch.zeros(points.shape[:2], dtype=torch.long, device=points.device)
        for kind, depth_of in ((OBJECTS, _inside_shapes), (PERSON, _inside_limbs)):
            rows = (self.kind == kind).nonzero()[:, 0]
            if len(rows):
                things = self.shapes if kind == OBJECTS else self.limbs
                deepest, which = depth_of(things[rows], points[rows]).max(1)
                alpha[rows] = (0.5 + deepest / pixel).clamp(0, 1)
                part[rows] = which if kind == OBJECTS else _PART.to(which.device)[which]
        rows = (self.kind == CUTOUT).nonzero()[:, 0]
        if len(rows):
            alpha[rows] = self._pasted(rows, points[rows])[:, 3]
        return alpha, part

    def cover(
        self,
        points: Tensor,  # (n, P, 2)
    ) -> Tensor:  # (n, P) bool
        """Whether each point is hidden."""
        return self.alpha(points)[0] > 0.5

    def mask(
        self,
        size: int,  # S
    ) -> Tensor:  # (n, S, S) 0..1, over 0.5 where `cover` holds for the pixel's centre
        return self.alpha(*self._pixels(size))[0].unflatten(1, (size, size))

    def paint(
        self,
        image: Tensor,  # (n, 3, S, S) RGB 0..1
    ) -> Tensor:  # (n, 3, S, S)
        """The image with the occluders painted over it."""
        size = image.shape[-1]
        points, pixel = self._pixels(size)
        alpha, part = (each.unflatten(1, (size, size)) for each in self.alpha(points, pixel))
        generator = torch.Generator().manual_seed(self.looks)
        colour = paint_occluder(generator, part, max(SHAPES, 3)).to(image)
        painted = image + alpha[:, None] * (colour - image)
        rows = (self.kind == CUTOUT).nonzero()[:, 0]
        if len(rows):
            pasted = self._pasted(rows, points[rows]).unflatten(2, (size, size))
            painted[rows] = image[rows] * (1 - pasted[:, 3:]) + pasted[:, :3]
        return painted

    def _pixels(self, size: int) -> tuple[Tensor, float]:  # (n, S * S, 2), a pixel's width
        x, y = grid(size, size, self.kind.device)
        centres = torch.stack([x.expand(1, size, size), y.expand(1, size, size)], -1).flatten(1, 2)
        return centres.expand(len(self.kind), -1, -1), 2 / size

    def _pasted(self, rows: Tensor, points: Tensor) -> Tensor:  # (m, P, 2) -> (m, 4, P)
        assert self.cutouts is not None
        x, y, half, angle, mirror = self.pose[rows, :, None].unbind(1)
        right, down = _turned(points[..., 0] - x, points[..., 1] - y, angle)
        return self.cutouts.sampled(self.cutout[rows], torch.stack([right * mirror / half, down / half], -1))


class FrontDrawer:
    """Samples occluders for the people of a block. Raises `UserError` for shares that sum to more than 1."""

    def __init__(self, options: Augment) -> None:
        self.shares = (options.objects, options.people, options.pasted if options.cutouts else 0.0)
        if sum(self.shares) > 1:
            found = ", ".join(f"{share:g}" for share in self.shares)
            raise UserError(f"data.augment: objects, people and pasted are {found}, over 1 together; give less of one")
        self.cutouts = Cutouts(options.cutouts) if options.cutouts else None

    @property
    def active(self) -> bool:
        return sum(self.shares) > 0

    def __call__(
        self,
        points: Tensor,  # (n, J, 2) the people's keypoints, crop coordinates
        known: Tensor,  # (n, J) bool: labelled; other points are ignored
        generator: torch.Generator,  # CPU
        names: Sequence[str] = HALPE26,  # J; without HALPE26 (hands) no person is put in front
    ) -> InFront:
        """Draws the same numbers for everybody, so that a share changes only who is occluded by what."""
        n, device = len(points), points.device
        draw = torch.rand(n, 8 + 8 * SHAPES, generator=generator)
        looks = int(torch.randint(2**31, (1,), generator=generator))
        known = known & points.isfinite().all(-1)
        points = torch.where(known[..., None], points, 0.0).cpu()
        known = known.cpu()
        kind = torch.full((n,), NOTHING)
        low = 0.0
        for number, share in zip((OBJECTS, PERSON, CUTOUT), self.shares, strict=True):
            kind[(draw[:, 0] >= low) & (draw[:, 0] < low + share)] = number
            low += share
        seen = known & (points.abs() <= 1).all(-1)
        target = _one_of(points, seen, draw[:, 1])
        limbs, there = _next_person(points, known, draw[:, 2:6]) if tuple(names) == HALPE26 else (None, None)
        if limbs is None or there is None:
            limbs, there = torch.zeros(n, len(_LIMBS), 5), torch.zeros(n, dtype=torch.bool)
        kind[(kind == PERSON) & ~there] = NOTHING
        pose = torch.stack(
            [
                *(target + 0.3 * (draw[:, 2:4] - 0.5)).unbind(-1),
                0.25 + 0.4 * draw[:, 4],
                (draw[:, 5] - 0.5) * math.pi,
                torch.where(draw[:, 6] < 0.5, 1.0, -1.0),
            ],
            -1,
        )
        cutout = (draw[:, 7] * max(1, 0 if self.cutouts is None else len(self.cutouts))).long()
        shapes = torch.stack(
            [_shape(points, seen, draw[:, 8 + 8 * k : 16 + 8 * k], first=k == 0) for k in range(SHAPES)], 1
        )
        return InFront(
            kind.to(device),
            shapes.to(device),
            limbs.to(device),
            cutout.to(device),
            pose.to(device),
            self.cutouts,
            looks,
        )


@dataclasses.dataclass(frozen=True)
class BoxesAndFront(OccluderBoxes):
    """A synthetic block's boxes combined with the added occluders, in the interface of the boxes."""

    front: InFront

    @classmethod
    def of(cls, boxes: OccluderBoxes, front: InFront) -> BoxesAndFront:
        return cls(boxes.middle, boxes.half, boxes.behind, front)

    def cover(self, points: Tensor) -> Tensor:
        return super().cover(points) | self.front.cover(points)

    def mask(self, size: int) -> Tensor:
        return torch.maximum(super().mask(size), self.front.mask(size))


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _one_of(points: Tensor, seen: Tensor, draw: Tensor) -> Tensor:  # (n, J, 2), (n, J), (n,) -> (n, 2)
    """A random visible keypoint; the crop's centre if there is none."""
    order = seen.long().cumsum(1)
    rank = (draw * order[:, -1]).long() + 1
    chosen = torch.searchsorted(order, rank[:, None]).clamp_max(points.shape[1] - 1)[:, 0]
    return torch.where(seen.any(1)[:, None], points[torch.arange(len(points)), chosen], 0.0)


def _shape(points: Tensor, seen: Tensor, draw: Tensor, first: bool) -> Tensor:  # draw (n, 8) -> (n, 6)
    """Ellipse, box or bar around a keypoint; the second one is present half of the time."""
    kind = (draw[:, 0] * 3).floor()
    bar = kind == 2
    middle = _one_of(points, seen, draw[:, 1]) + 0.3 * (draw[:, 2:4] - 0.5)
    wide = torch.where(bar, 0.4 + 0.8 * draw[:, 4], 0.12 + 0.33 * draw[:, 4])
    high = torch.where(bar, 0.03 + 0.08 * draw[:, 5], 0.12 + 0.33 * draw[:, 5])
    if not first:
        wide = torch.where(draw[:, 7] < 0.5, wide, 0.0)
    return torch.stack([kind, *middle.unbind(-1), wide, high, draw[:, 6] * math.pi], -1)


def _next_person(points: Tensor, known: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:  # draw (n, 4)
    """Limbs (n, L, 5) of the block's next person, moved in front of this one; who has enough keypoints (n,)."""
    other, there = points.roll(-1, 0), known.roll(-1, 0)
    far = torch.tensor(1e9)
    low = torch.where(there[..., None], other, far).amin(1)
    high = torch.where(there[..., None], other, -far).amax(1)
    own = (points * known[..., None]).sum(1) / known.sum(1).clamp_min(1)[:, None]
    size = 0.7 + 0.6 * draw[:, 0]
    # Beside this person more often than centred on them: a shift to the left or right.
    aside = torch.where(draw[:, 1] < 0.5, -1.0, 1.0) * (0.15 + 0.6 * draw[:, 2])
    place = own + torch.stack([aside, 0.5 * (draw[:, 3] - 0.5)], -1)
    moved = (other - (low + high)[:, None] / 2) * size[:, None, None] + place[:, None]
    extent = (high - low).amax(-1) * size
    a, b = ([HALPE26.index(limb[end]) for limb in _LIMBS] for end in (0, 1))  # type: ignore[index]
    radius = extent[:, None] * torch.tensor([limb[2] for limb in _LIMBS])
    radius = torch.where(there[:, a] & there[:, b], radius, 0.0)
    enough = (there.sum(1) >= _LEAST_KEYPOINTS) & (extent.abs() < 10)
    return torch.cat([moved[:, a], moved[:, b], radius[..., None]], -1), enough


_PART = torch.tensor([limb[3] for limb in _LIMBS])


def _inside_limbs(limbs: Tensor, points: Tensor) -> Tensor:  # (m, L, 5), (m, P, 2) -> (m, L, P), > 0 inside
    start, end, radius = limbs[:, :, None, :2], limbs[:, :, None, 2:4], limbs[..., 4:]
    along = end - start
    offset = points[:, None] - start
    share = ((offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-9)).clamp(0, 1)
    distance = (offset - share[..., None] * along).norm(dim=-1)
    return torch.where(radius > 0, radius - distance, -1.0)


def _inside_shapes(shapes: Tensor, points: Tensor) -> Tensor:  # (m, K, 6), (m, P, 2) -> (m, K, P), > 0 inside
    kind, x, y, wide, high, angle = shapes[..., None, :].unbind(-1)  # (m, K, 1)
    u, w = _turned(points[:, None, :, 0] - x, points[:, None, :, 1] - y, angle)
    there = (wide > 0) & (high > 0)
    wide, high = wide.clamp_min(1e-6), high.clamp_min(1e-6)
    box = torch.minimum(wide - u.abs(), high - w.abs())
    ellipse = (1 - ((u / wide).square() + (w / high).square()).sqrt()) * torch.minimum(wide, high)
    return torch.where(there, torch.where(kind == 0, ellipse, box), -1.0)
