"""Metadata of a photo file, without its pixels: size, EXIF orientation, and EXIF's focal length if present."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from hmdiff.errors import UserError
from hmdiff.files.images import open_image

_FILM_DIAGONAL = math.hypot(36.0, 24.0)  # mm, of 35 mm film, the reference of EXIF's equivalent focal length
_ORIENTATION, _EXIF, _FOCAL_35MM, _WIDTH, _HEIGHT = 0x0112, 0x8769, 0xA405, 0xA002, 0xA003
_ASPECT = 0.02  # relative difference of equal aspect ratios
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclasses.dataclass(frozen=True)
class PhotoInfo:
    """A photo as displayed, and the EXIF orientation that maps stored to displayed pixels."""

    width: int  # pixels, as displayed
    height: int
    orientation: int = 1  # EXIF 1 to 8: 6 is 90 degrees clockwise, 8 counter-clockwise, 3 is 180 degrees
    focal: float | None = None  # pixels; None if EXIF has none, or refers to an uncropped photo

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def stored_size(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation in _TURNED else (self.width, self.height)


def photo_info(path: str | Path) -> PhotoInfo:
    """Read a photo's header. Raises `UserError` for a file that is not an image."""
    with open_image(path) as opened:
        exif = opened.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        details, stored = exif.get_ifd(_EXIF), opened.size
    width, height = stored[::-1] if orientation in _TURNED else stored
    return PhotoInfo(width, height, orientation, _focal(details, stored))


def _focal(details: dict[int, object], stored: tuple[int, int]) -> float | None:
    """Focal length in pixels, from the 35 mm equivalent. Cropped photos keep their old EXIF: compare aspect ratios."""
    try:
        film = float(details.get(_FOCAL_35MM, 0))  # type: ignore[arg-type]
        taken = tuple(float(details.get(tag, 0)) for tag in (_WIDTH, _HEIGHT))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if not (math.isfinite(film) and film > 0):
        return None
    if min(taken) > 0 and abs(taken[0] / taken[1] * stored[1] / stored[0] - 1) > _ASPECT:
        return None
    return film / _FILM_DIAGONAL * math.hypot(*stored)


def label_map(
    photo: PhotoInfo,
    size: tuple[float, float] | None,  # width, height of the image that the labels refer to; None: unknown
    what: str,  # names the file in errors
) -> tuple[tuple[float, float], int, str]:  # scale x, y; EXIF orientation to apply; a note, or ""
    """How labels of an image of one size map to the photo: unchanged, scaled, or rotated by the EXIF orientation.

    Raises:
        UserError: the sizes contradict each other, and neither a rotation nor a scale explains it.
    """
    if size is None or size == (1.0, 1.0):
        return (1.0, 1.0) if size is None else (float(photo.width), float(photo.height)), 1, ""
    if tuple(size) == tuple(map(float, photo.size)):
        return (1.0, 1.0), 1, ""
    if min(size) <= 0:
        raise UserError(f"{what}: says the picture has {size[0]:g} x {size[1]:g} pixels; correct its width and height")
    sizes = f"{size[0]:g} x {size[1]:g} in the file, {photo.width} x {photo.height} in the photo"
    across, down = photo.width / size[0], photo.height / size[1]
    if abs(across / down - 1) <= _ASPECT:
        return (across, down), 1, f"{what}: sizes differ ({sizes}): keypoints scaled to the photo"
    stored = photo.stored_size
    across, down = stored[0] / size[0], stored[1] / size[1]
    if photo.orientation in (6, 8) and abs(across / down - 1) <= _ASPECT:
        return (across, down), photo.orientation, f"{what}: keypoints turned as the photo's EXIF tag turns it ({sizes})"
    raise UserError(
        f"{what}: sizes contradict each other ({sizes}), so the keypoints are of another picture; give those that were "
        "found in this photo"
    )


def turn_point(
    x: float,
    y: float,
    photo: PhotoInfo,
    orientation: int,  # 1: unchanged, 6 or 8: a quarter turn
) -> tuple[float, float]:
    """Maps a point from the stored to the displayed image."""
    if orientation == 6:
        return photo.width - y, x
    if orientation == 8:
        return y, photo.height - x
    return x, y
