"""A photo's camera, as far as known, and files of intrinsics: one for all photos, or one per photo.

Formats: JSON and npz with a 3 x 3 matrix (bare, or under K, intrinsics, camera_matrix, cam_intrinsics), or fx, fy, cx,
cy (also f or focal; principal_point); or an object from photo names to either. Pixels are those of the displayed photo.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmdiff.errors import UserError
from hmdiff.files.reading import read_json, read_npz
from hmdiff.heatmaps.crop import Crop
from hmdiff.heatmaps.formats.picture_names import find_picture, last_name
from hmdiff.heatmaps.photo import PhotoInfo

_MATRIX = ("K", "intrinsics", "camera_matrix", "cam_intrinsics", "intrinsic_matrix", "k")
_LONGEST = 100_000_000  # pixels, as `models.inputs.check_camera`
_SQUARE = 0.03  # maximum relative difference of fx and fy: the model assumes square pixels


@dataclasses.dataclass(frozen=True)
class PhotoCamera:
    """A pinhole camera in photo pixels; unknown values are None."""

    focal: float | None = None  # None: the diagonal of the photo (CLIFF, arXiv 2208.00571)
    principal_point: tuple[float, float] | None = None  # None: the photo's centre
    source: str = ""  # origin of the focal length, for messages

    def __post_init__(self) -> None:
        where = f"{self.source}: " if self.source else ""
        if self.focal is not None and not 0.1 <= self.focal <= _LONGEST:
            raise UserError(f"{where}a focal length of {self.focal:g} pixels; 0.1 to {_LONGEST:,} are possible")
        if self.principal_point is not None and not all(abs(value) <= _LONGEST for value in self.principal_point):
            x, y = self.principal_point
            raise UserError(f"{where}a principal point at {x:g},{y:g} pixels, which is beyond any photo")

    def applied(self, crop: Crop, photo: PhotoInfo) -> Crop:
        """The crop with the photo's size and this camera."""
        focal = self.focal if self.focal is not None else photo.focal
        count, like = len(crop), crop.side
        return crop.with_camera(
            torch.tensor([photo.size], dtype=like.dtype).expand(count, 2).to(like),
            None if focal is None else like.new_full((count,), focal),
            None if self.principal_point is None else like.new_tensor([self.principal_point]).expand(count, 2),
        )

    def described(self, photo: PhotoInfo) -> str:
        if self.focal is not None:
            return self.source or "given"
        return "EXIF" if photo.focal is not None else "guessed: the photo's diagonal"


def read_intrinsics(path: str | Path, photo: str | Path) -> PhotoCamera:
    """The camera of a photo from a file. Raises `UserError` if the file is damaged or lacks the photo."""
    path = Path(path)
    data = _load(path)
    if isinstance(data, dict) and not _is_camera(data):
        named = [(key, key) for key in data if last_name(key) == last_name(Path(photo).name)]
        found = find_picture(photo, named, str(path)) if named else None
        if found is None:
            raise UserError(
                f"{path}: neither a camera (K, or fx, fy, cx, cy) nor one of {Path(photo).name}; add it by its name"
            )
        data = data[found]
    return _camera(path, data)


def _load(path: Path) -> Any:
    mend = "JSON or npz of K, or of fx, fy, cx, cy is needed"
    if path.suffix.lower() != ".npz":
        return read_json(path, mend=mend)
    return {name: values.tolist() for name, values in read_npz(path, mend=mend).items()}


def _is_camera(data: dict[str, Any]) -> bool:
    return any(key in data for key in (*_MATRIX, "fx", "f", "focal", "focal_length"))


def _camera(path: Path, data: Any) -> PhotoCamera:
    try:
        if isinstance(data, dict):
            matrix = next((data[key] for key in _MATRIX if key in data), None)
            if matrix is None:
                both = data.get("f", data.get("focal", data.get("focal_length")))
                both = both if isinstance(both, list) else [both, both]
                fx, fy = data.get("fx", both[0]), data.get("fy", data.get("fx", both[-1]))
                point = data.get("principal_point") or [data.get("cx"), data.get("cy")]
                known = point[0] is not None and point[1] is not None
                pair = (float(point[0]), float(point[1])) if known else None
                return _checked(path, float(str(fx)), float(str(fy)), pair)
            data = matrix
        matrix = np.asarray(data, np.float64)
        if matrix.shape != (3, 3):
            raise ValueError(f"shape {matrix.shape}")
    except (TypeError, ValueError, LookupError) as error:  # of a list or mapping of another size
        raise UserError(f"{path}: no camera ({error}); a 3 x 3 matrix K, or fx, fy, cx, cy is expected") from None
    return _checked(path, matrix[0, 0], matrix[1, 1], (float(matrix[0, 2]), float(matrix[1, 2])))


def _checked(path: Path, fx: float, fy: float, point: tuple[float, float] | None) -> PhotoCamera:
    known = (fx, fy, *(point or ()))
    if not all(map(math.isfinite, known)) or fx <= 0 or fy <= 0:
        raise UserError(f"{path}: focal lengths {fx:g}, {fy:g}: finite pixels above 0 are expected")
    if abs(fx / fy - 1) > _SQUARE:
        raise UserError(f"{path}: fx {fx:g} and fy {fy:g} differ: the pixels are not square; stretch the photo first")
    return PhotoCamera(math.sqrt(fx) * math.sqrt(fy), point, str(path))
