"""`Crop`: a person's square crop in the photo, and the camera of the photo.

Photo pixel coordinates start at the outer edge of the first pixel, x right and y down, in the displayed photo (after
the EXIF rotation). Crop coordinates (NDC) range from -1 to 1. The crop's axes are the photo's axes rotated by
`rotation`, so that a person who lies or hangs upside down is upright in the crop. B people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.errors import UserError

SMALLEST, LARGEST = 1e-3, 1e6  # pixels; LARGEST bounds every value, so that squares and products do not overflow


@dataclasses.dataclass(frozen=True)
class Crop:
    """The crops of B people with their photos' cameras. `Crop.of` fills in unknown values.

    Raises:
        UserError: wrong shapes, a number that is not finite, a side, a size or a focal length that is not above 0.
    """

    center: Tensor  # (B, 2) photo pixels
    side: Tensor  # (B,) photo pixels
    rotation: Tensor  # (B,) radians, clockwise in the displayed photo: the crop's x axis is (cos, sin) in the photo
    photo_size: Tensor  # (B, 2) width, height in pixels
    focal: Tensor  # (B,) pixels of the photo
    principal_point: Tensor  # (B, 2) photo pixels

    def __post_init__(self) -> None:
        batch = len(self.center) if self.center.dim() else 0
        pair, one = (batch, 2), (batch,)
        if tuple(self.center.shape) != pair or tuple(self.side.shape) != one:
            raise UserError(
                f"heatmaps: `center` and `side` must have shapes ({batch}, 2) and ({batch},), "
                f"found {tuple(self.center.shape)} and {tuple(self.side.shape)}"
            )
        if not (self.center.isfinite().all() and self.side.isfinite().all() and (self.side > 0).all()):
            raise UserError("heatmaps: `center` and `side` of the crop must be finite, and the side above 0 pixels")
        if not ((self.center.abs() <= LARGEST).all() and ((self.side >= SMALLEST) & (self.side <= LARGEST)).all()):
            raise UserError(f"heatmaps: a crop beyond {LARGEST:g} pixels, or a side under {SMALLEST:g}; give pixels")
        for name, shape in (("rotation", one), ("photo_size", pair), ("focal", one), ("principal_point", pair)):
            value = getattr(self, name)
            if tuple(value.shape) != shape or not value.isfinite().all():
                raise UserError(f"crop: `{name}` must be finite numbers of shape {shape}, found {tuple(value.shape)}")
        # Photo size 0 and focal length 0 mean 'unknown', in data sets without a camera.
        if (self.focal < 0).any() or (self.photo_size < 0).any():
            raise UserError("crop: `focal` and `photo_size` must be above 0 pixels")
        if any(
            (value.abs() > most).any()
            for value, most in (
                (self.rotation, LARGEST),
                (self.photo_size, 10 * LARGEST),
                (self.focal, 100 * LARGEST),
                (self.principal_point, 10 * LARGEST),
            )
        ):
            raise UserError("crop: a photo, a principal point or a rotation beyond what is possible; give pixels")

    @classmethod
    def of(
        cls,
        center: Tensor,  # (B, 2)
        side: Tensor,  # (B,)
        rotation: Tensor | None = None,  # (B,) None: upright
        photo_size: Tensor | Sequence[float] | None = None,  # (B, 2) or (2,); None: the photo's centre is the crop's
        focal: Tensor | float | None = None,  # None: the photo's diagonal, as in CLIFF (arXiv 2208.00571)
        principal_point: Tensor | Sequence[float] | None = None,  # (B, 2) or (2,); None: the photo's centre
    ) -> Crop:
        """A crop with defaults for unknown values. A single photo size, focal or principal point applies to all."""

        def of_all(value: Tensor | Sequence[float] | float, shape: tuple[int, ...]) -> Tensor:
            return torch.as_tensor(value, dtype=side.dtype, device=side.device).expand(shape).clone()

        if center.dim() != 2 or side.dim() != 1:
            raise UserError(
                f"heatmaps: `center` and `side` must have shapes (B, 2) and (B,), "
                f"found {tuple(center.shape)} and {tuple(side.shape)}"
            )
        one, pair = (len(center),), (len(center), 2)
        size = (center * 2).round().clamp_min(0) if photo_size is None else of_all(photo_size, pair)
        return cls(
            center,
            side,
            of_all(0.0, one) if rotation is None else of_all(rotation, one),
            size,
            size.norm(dim=-1) if focal is None else of_all(focal, one),
            size / 2 if principal_point is None else of_all(principal_point, pair),
        )

    def __len__(self) -> int:
        return len(self.side)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Crop:
        return Crop(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def to(self, like: torch.device | str | Tensor) -> Crop:
        """Move to a device, or to the dtype and device of a tensor."""
        return Crop(*(getattr(self, field.name).to(like) for field in dataclasses.fields(self)))

    def expand(self, count: int) -> Crop:
        """Repeat a one-person crop `count` times."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Crop(*(value.expand(count, *value.shape[1:]) for value in fields))

    def with_camera(
        self,
        photo_size: Tensor | None = None,  # (B, 2)
        focal: Tensor | None = None,  # (B,)
        principal_point: Tensor | None = None,  # (B, 2)
    ) -> Crop:
        """The same crop with another photo size or camera. A new size resets focal length and principal point."""
        known = self if photo_size is None else Crop.of(self.center, self.side, self.rotation, photo_size)
        changed = {"focal": focal, "principal_point": principal_point}
        return dataclasses.replace(known, **{k: v.to(self.side) for k, v in changed.items() if v is not None})

    @property
    def intrinsics(self) -> Tensor:  # (B, 3, 3)
        """Intrinsics of the photo: ``K @ (x, y, z)`` is a point's homogeneous photo pixel."""
        zero, one = torch.zeros_like(self.focal), torch.ones_like(self.focal)
        x, y = self.principal_point.unbind(-1)
        rows = [self.focal, zero, x, zero, self.focal, y, zero, zero, one]
        return torch.stack(rows, -1).unflatten(-1, (3, 3))

    def turn(self) -> Tensor:  # (B, 2, 2)
        """Rotation from the crop's axes to the photo's."""
        cos, sin = self.rotation.cos(), self.rotation.sin()
        return torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))

    def turn_3d(self) -> Tensor:  # (B, 3, 3)
        """Rotation from a camera rolled with the crop to the photo's camera (x right, y down, z forward)."""
        turn = torch.zeros(len(self), 3, 3, dtype=self.side.dtype, device=self.side.device)
        turn[:, :2, :2], turn[:, 2, 2] = self.turn(), 1.0
        return turn

    def to_photo(
        self,
        points: Tensor,  # (B, ..., 2) crop coordinates
    ) -> Tensor:  # (B, ..., 2) photo pixels
        turn, center, half = self._broadcast(points)
        return (turn @ (points * half)[..., None])[..., 0] + center

    def from_photo(
        self,
        points: Tensor,  # (B, ..., 2) photo pixels
    ) -> Tensor:  # (B, ..., 2) crop coordinates
        turn, center, half = self._broadcast(points)
        return (turn.mT @ (points - center)[..., None])[..., 0] / half

    def _broadcast(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        between = (1,) * (points.dim() - 2)
        crop = self if self.side.dtype == points.dtype and self.side.device == points.device else self.to(points)
        return (
            crop.turn().reshape(len(self), *between, 2, 2),
            crop.center.reshape(len(self), *between, 2),
            crop.side.reshape(len(self), *between, 1) / 2,
        )

    def upright(self) -> Crop:
        """The same crop in the photo rotated about its principal point so that the crop is upright."""
        offset = (self.center - self.principal_point)[..., None]
        center = (self.turn().mT @ offset)[..., 0] + self.principal_point
        return dataclasses.replace(self, center=center, rotation=torch.zeros_like(self.rotation))

    def affine(
        self,
        index: int,  # person index
        size: int,  # side of the crop's picture in pixels
    ) -> list[list[float]]:  # (2, 3)
        """From photo pixels to pixels of the crop's picture, both counted from the first pixel's outer edge."""
        scale, center = size / float(self.side[index]), self.center[index]
        linear = self.turn()[index].T * scale
        offset = size / 2 - linear @ center
        return torch.cat([linear, offset[:, None]], 1).double().tolist()


def concatenate_crops(parts: Sequence[Crop]) -> Crop:
    """Concatenate along the batch."""
    return Crop(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Crop)))
