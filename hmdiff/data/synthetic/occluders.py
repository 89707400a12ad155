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
from hmdiff.data.synthetic.draws import grid, occluder_texture
from hmdiff.data.synthetic.rendering import OccluderBoxes
from hmdiff.errors import UserError

NOTHING, OBJECTS, PERSON, CUTOUT = range(4)
SHAPES = 2  # maximum K
_MIN_KEYPOINTS = 8  # of the person in front: fewer give no outline
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
class TrainingOccluders:
    """Occluders of n people: nothing or one kind each."""

    kind: Tensor  # (n,) long
    shapes: Tensor  # (n, K, 6) 0 ellipse, 1 box or 2 bar; x, y, half width, half height (0: absent), angle
    limbs: Tensor  # (n, L, 5) x and y of both ends, radius (0: absent)
    cutout: Tensor  # (n,) long: index of the cut-out
    pose: Tensor  # (n, 5) of the cut-out: x, y, half its side, angle, 1 or -1 (mirrored)
    cutouts: Cutouts | None
    texture_seed: int  # seed of the textures

    def alpha(
        self,
        points: Tensor,  # (n, P, 2)
        pixel: float = 1e-6,  # width of soft edges
    ) -> tuple[Tensor, Tensor]:  # (n, P) 0..1; (n, P) long: the occluder's colour index
        """Coverage at the points."""
        alpha = points.new_zeros(points.shape[:2])
        colour_index = torch.zeros(points.shape[:2], dtype=torch.long, device=points.device)
        for kind, signed_distance in ((OBJECTS, _shape_signed_distance), (PERSON, _limb_signed_distance)):
            rows = (self.kind == kind).nonzero()[:, 0]
            if len(rows):
                parameters = self.shapes if kind == OBJECTS else self.limbs
                distance, nearest = signed_distance(parameters[rows], points[rows]).max(1)
                alpha[rows] = (0.5 + distance / pixel).clamp(0, 1)
                colour_index[rows] = nearest if kind == OBJECTS else _LIMB_COLOUR.to(nearest.device)[nearest]
        rows = (self.kind == CUTOUT).nonzero()[:, 0]
        if len(rows):
            alpha[rows] = self._cutout_pixels(rows, points[rows])[:, 3]
        return alpha, colour_index

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
        alpha, colour_index = (values.unflatten(1, (size, size)) for values in self.alpha(points, pixel))
        generator = torch.Generator().manual_seed(self.texture_seed)
        colour = occluder_texture(generator, colour_index, max(SHAPES, 3)).to(image)
        painted = image + alpha[:, None] * (colour - image)
        rows = (self.kind == CUTOUT).nonzero()[:, 0]
        if len(rows):
            pasted = self._cutout_pixels(rows, points[rows]).unflatten(2, (size, size))
            painted[rows] = image[rows] * (1 - pasted[:, 3:]) + pasted[:, :3]
        return painted

    def _pixels(self, size: int) -> tuple[Tensor, float]:  # (n, S * S, 2), a pixel's width
        x, y = grid(size, size, self.kind.device)
        centres = torch.stack([x.expand(1, size, size), y.expand(1, size, size)], -1).flatten(1, 2)
        return centres.expand(len(self.kind), -1, -1), 2 / size

    def _cutout_pixels(self, rows: Tensor, points: Tensor) -> Tensor:  # (m, P, 2) -> (m, 4, P)
        assert self.cutouts is not None
        x, y, half, angle, mirror = self.pose[rows, :, None].unbind(1)
        right, down = _rotate(points[..., 0] - x, points[..., 1] - y, angle)
        return self.cutouts.sample(self.cutout[rows], torch.stack([right * mirror / half, down / half], -1))


class OccluderSampler:
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
        labelled: Tensor,  # (n, J) bool: labelled; other points are ignored
        generator: torch.Generator,  # CPU
        names: Sequence[str] = HALPE26,  # J; without HALPE26 (hands) no person is put in front
    ) -> TrainingOccluders:
        """Draws the same numbers for everybody, so that a share changes only who is occluded by what."""
        n, device = len(points), points.device
        random = torch.rand(n, 8 + 8 * SHAPES, generator=generator)
        texture_seed = int(torch.randint(2**31, (1,), generator=generator))
        labelled = labelled & points.isfinite().all(-1)
        points = torch.where(labelled[..., None], points, 0.0).cpu()
        labelled = labelled.cpu()
        kind = torch.full((n,), NOTHING)
        lower = 0.0
        for kind_index, share in zip((OBJECTS, PERSON, CUTOUT), self.shares, strict=True):
            kind[(random[:, 0] >= lower) & (random[:, 0] < lower + share)] = kind_index
            lower += share
        visible = labelled & (points.abs() <= 1).all(-1)
        target = _random_visible_point(points, visible, random[:, 1])
        limbs, has_neighbour = (
            _neighbour_limbs(points, labelled, random[:, 2:6]) if tuple(names) == HALPE26 else (None, None)
        )
        if limbs is None or has_neighbour is None:
            limbs, has_neighbour = torch.zeros(n, len(_LIMBS), 5), torch.zeros(n, dtype=torch.bool)
        kind[(kind == PERSON) & ~has_neighbour] = NOTHING
        pose = torch.stack(
            [
                *(target + 0.3 * (random[:, 2:4] - 0.5)).unbind(-1),
                0.25 + 0.4 * random[:, 4],
                (random[:, 5] - 0.5) * math.pi,
                torch.where(random[:, 6] < 0.5, 1.0, -1.0),
            ],
            -1,
        )
        cutout = (random[:, 7] * max(1, 0 if self.cutouts is None else len(self.cutouts))).long()
        shapes = torch.stack(
            [_shape(points, visible, random[:, 8 + 8 * k : 16 + 8 * k], first=k == 0) for k in range(SHAPES)], 1
        )
        return TrainingOccluders(
            kind.to(device),
            shapes.to(device),
            limbs.to(device),
            cutout.to(device),
            pose.to(device),
            self.cutouts,
            texture_seed,
        )


@dataclasses.dataclass(frozen=True)
class CombinedOccluders(OccluderBoxes):
    """A synthetic block's boxes combined with the added occluders, in the interface of the boxes."""

    occluders: TrainingOccluders

    @classmethod
    def of(cls, boxes: OccluderBoxes, occluders: TrainingOccluders) -> CombinedOccluders:
        return cls(boxes.center, boxes.half, boxes.enabled, occluders)

    def cover(self, points: Tensor) -> Tensor:
        return super().cover(points) | self.occluders.cover(points)

    def mask(self, size: int) -> Tensor:
        return torch.maximum(super().mask(size), self.occluders.mask(size))


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _random_visible_point(
    points: Tensor, visible: Tensor, random: Tensor
) -> Tensor:  # (n, J, 2), (n, J), (n,) -> (n, 2)
    """A random visible keypoint; the crop's centre if there is none."""
    order = visible.long().cumsum(1)
    rank = (random * order[:, -1]).long() + 1
    chosen = torch.searchsorted(order, rank[:, None]).clamp_max(points.shape[1] - 1)[:, 0]
    return torch.where(visible.any(1)[:, None], points[torch.arange(len(points)), chosen], 0.0)


def _shape(points: Tensor, visible: Tensor, random: Tensor, first: bool) -> Tensor:  # draw (n, 8) -> (n, 6)
    """Ellipse, box or bar around a keypoint; the second one is present half of the time."""
    kind = (random[:, 0] * 3).floor()
    bar = kind == 2
    center = _random_visible_point(points, visible, random[:, 1]) + 0.3 * (random[:, 2:4] - 0.5)
    half_width = torch.where(bar, 0.4 + 0.8 * random[:, 4], 0.12 + 0.33 * random[:, 4])
    half_height = torch.where(bar, 0.03 + 0.08 * random[:, 5], 0.12 + 0.33 * random[:, 5])
    if not first:
        half_width = torch.where(random[:, 7] < 0.5, half_width, 0.0)
    return torch.stack([kind, *center.unbind(-1), half_width, half_height, random[:, 6] * math.pi], -1)


def _neighbour_limbs(points: Tensor, own_labelled: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:  # draw (n, 4)
    """Limbs (n, L, 5) of the block's next person, moved in front of this one; who has enough keypoints (n,)."""
    neighbour, labelled = points.roll(-1, 0), own_labelled.roll(-1, 0)
    infinity = torch.tensor(1e9)
    low = torch.where(labelled[..., None], neighbour, infinity).amin(1)
    high = torch.where(labelled[..., None], neighbour, -infinity).amax(1)
    own_center = (points * own_labelled[..., None]).sum(1) / own_labelled.sum(1).clamp_min(1)[:, None]
    scale = 0.7 + 0.6 * random[:, 0]
    # Beside this person more often than centred on them: a shift to the left or right.
    side_shift = torch.where(random[:, 1] < 0.5, -1.0, 1.0) * (0.15 + 0.6 * random[:, 2])
    position = own_center + torch.stack([side_shift, 0.5 * (random[:, 3] - 0.5)], -1)
    placed = (neighbour - (low + high)[:, None] / 2) * scale[:, None, None] + position[:, None]
    extent = (high - low).amax(-1) * scale
    starts, ends = ([HALPE26.index(limb[end]) for limb in _LIMBS] for end in (0, 1))  # type: ignore[index]
    radius = extent[:, None] * torch.tensor([limb[2] for limb in _LIMBS])
    radius = torch.where(labelled[:, starts] & labelled[:, ends], radius, 0.0)
    has_outline = (labelled.sum(1) >= _MIN_KEYPOINTS) & (extent.abs() < 10)
    return torch.cat([placed[:, starts], placed[:, ends], radius[..., None]], -1), has_outline


_LIMB_COLOUR = torch.tensor([limb[3] for limb in _LIMBS])


def _limb_signed_distance(limbs: Tensor, points: Tensor) -> Tensor:  # (m, L, 5), (m, P, 2) -> (m, L, P), > 0 inside
    start, end, radius = limbs[:, :, None, :2], limbs[:, :, None, 2:4], limbs[..., 4:]
    along = end - start
    offset = points[:, None] - start
    share = ((offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-9)).clamp(0, 1)
    distance = (offset - share[..., None] * along).norm(dim=-1)
    return torch.where(radius > 0, radius - distance, -1.0)


def _shape_signed_distance(shapes: Tensor, points: Tensor) -> Tensor:  # (m, K, 6), (m, P, 2) -> (m, K, P), > 0 inside
    kind, x, y, half_width, half_height, angle = shapes[..., None, :].unbind(-1)  # (m, K, 1)
    u, w = _rotate(points[:, None, :, 0] - x, points[:, None, :, 1] - y, angle)
    present = (half_width > 0) & (half_height > 0)
    half_width, half_height = half_width.clamp_min(1e-6), half_height.clamp_min(1e-6)
    box = torch.minimum(half_width - u.abs(), half_height - w.abs())
    ellipse = (1 - ((u / half_width).square() + (w / half_height).square()).sqrt()) * torch.minimum(
        half_width, half_height
    )
    return torch.where(present, torch.where(kind == 0, ellipse, box), -1.0)
