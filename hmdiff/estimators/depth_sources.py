"""Depth maps of photos from files or any callable, behind one interface; `depth_network` has networks.

Every source returns 'larger = farther' maps with NaN for unknown. Unit and origin do not matter: the model's
normalisation (hmdiff/models/depth.py) removes both. Disparity (larger = nearer, as in Depth Anything and MiDaS) is
negated: it is known only up to scale and shift, so it cannot be inverted (our choice). The rendered depth of synthetic
people is in `Sample.depth_input`. B photos of H x W pixels, P people, S pixels per side of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.files.images import open_image
from hmdiff.files.reading import ArrayArchive
from hmdiff.heatmaps.crop import Crop

GIVES = ("depth", "disparity")
SUFFIXES = (".npy", ".npz", ".png")
ASPECT = 0.02  # relative tolerance of the aspect ratio: networks round sizes to patches


class DepthSource(Protocol):
    """Maps photos to depth maps of the same size or aspect ratio."""

    def __call__(
        self,
        images: Tensor,  # (B, 3, H, W) RGB 0..1
    ) -> Tensor: ...  # (B, h, w) larger = farther, NaN = unknown


def farther_is_larger(
    values: Tensor,  # any shape
    gives: str,  # "depth", or "disparity": larger = nearer
) -> Tensor:
    """Orient values so that larger is farther; infinity becomes NaN. Raises `UserError` for an unknown `gives`."""
    if gives not in GIVES:
        raise UserError(f"a depth source that gives {gives!r}: one of {', '.join(GIVES)} is expected")
    values = values.float()
    values = torch.where(values.isfinite(), values, torch.nan)
    return -values if gives == "disparity" else values


class CallableDepth:
    """Any function of photos as a depth source. Its output is validated."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor | np.ndarray],  # (B, 3, H, W) RGB 0..1 -> (B, h, w) or (B, 1, h, w)
        gives: str = "depth",
    ) -> None:
        self.function, self.gives = function, gives

    def __call__(self, images: Tensor) -> Tensor:
        depth = torch.as_tensor(self.function(images))
        if depth.dim() == 4 and depth.shape[1] == 1:
            depth = depth[:, 0]
        if depth.dim() != 3 or len(depth) != len(images) or 0 in depth.shape:
            raise UserError(
                f"the depth source gave shape {tuple(depth.shape)}; ({len(images)}, h, w) is expected, a map of each "
                "photo"
            )
        check_aspect("the depth source's map", depth.shape[1:], images.shape[-2:])
        return farther_is_larger(depth, self.gives)


class DepthFile:
    """A map beside a photo, as a source for that photo only. `read_depth` lists the file types."""

    def __init__(self, path: str | Path, gives: str = "depth") -> None:
        self.path, self.gives = Path(path), gives

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != 1:
            raise UserError(f"{self.path}: the depth of one photo, {len(images)} were given; give one file a photo")
        return read_depth(self.path, (images.shape[-1], images.shape[-2]), self.gives)[None]


def read_depth(
    path: str | Path,
    photo_size: tuple[int, int] | None = None,  # width, height in pixels; None: unchecked
    gives: str = "depth",
) -> Tensor:  # (h, w) larger = farther, NaN = unknown
    """Read a depth map: npy; npz with the array `depth` or `disparity`, or with a single array; 16-bit grey png.

    Any unit. NaN and infinity mean unknown, and so does 0 in a png, as in KITTI and most depth cameras.

    Raises:
        UserError: the file is missing, damaged, of another type, not (h, w) numbers, without a known pixel, or of
            another aspect ratio than the photo.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a depth map is one of {', '.join(SUFFIXES)} (16-bit grey)")
    if not path.is_file():
        raise UserError(f"{path}: no such depth map; check the path")
    values: np.ndarray[Any, Any]
    if path.suffix.lower() == ".png":
        values = _read_png(path)
    else:
        values, named = _read_arrays(path)
        gives = named or gives
    while values.ndim > 2 and 1 in (values.shape[0], values.shape[-1]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise UserError(f"{path}: {values.dtype} of shape {values.shape}; one map (h, w) of numbers is expected")
    if photo_size is not None:
        check_aspect(str(path), values.shape, (photo_size[1], photo_size[0]))
    with np.errstate(over="ignore"):
        depth = farther_is_larger(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), gives)
    if not depth.isfinite().any():
        raise UserError(f"{path}: no pixel of it is known (NaN, infinite, or 0 in a png); leave the map out")
    return depth


def depth_file_beside(photo: Path) -> Path | None:
    """The depth map beside a photo: NAME_depth.npz, .npy or .png; None if missing."""
    places = [photo.with_name(f"{photo.stem}_depth{suffix}") for suffix in (".npz", ".npy", ".png")]
    return next((place for place in places if place.is_file()), None)


def check_aspect(
    what: str,
    found: tuple[int, ...] | torch.Size,  # h, w
    photo: tuple[int, ...] | torch.Size,  # H, W
) -> None:
    """Raises `UserError` if the aspect ratios differ: the map is of another photo, or rotated."""
    height, width = found
    if abs(math.log((width / height) * (photo[0] / photo[1]))) > ASPECT and not (
        abs(width - height * photo[1] / photo[0]) <= 1 or abs(height - width * photo[0] / photo[1]) <= 1
    ):
        raise UserError(
            f"{what}: {width} x {height} pixels, and the photo has {photo[1]} x {photo[0]}; give the map of this "
            "photo, of its size or of its proportions"
        )


def crop_depth(
    depth: Tensor,  # (h, w) of the whole photo, NaN = unknown
    photo_size: tuple[int, int],  # width, height in pixels
    crop: Crop,  # P people
    size: int = 64,  # S
) -> Tensor:  # (P, S, S), NaN = unknown or outside the photo
    """Crop the map for each person, pixel by pixel as `estimators.people.crops` crops the photo."""
    crops = []
    for index in range(len(crop)):
        affine = np.array(crop.affine(index, 2))  # photo pixels to 0..2
        affine[:, 2] -= 1  # to crop coordinates
        crops.append(warp_depth(depth, photo_size, affine, size))
    return torch.stack(crops) if crops else depth.new_zeros(0, size, size)


def warp_depth(
    depth: Tensor,  # (h, w) of the whole photo, NaN = unknown
    photo_size: tuple[int, int],  # width, height in pixels
    affine: np.ndarray,  # (2, 3) photo pixels to crop coordinates, as `data.transforms.crop_affine`
    size: int,  # S
) -> Tensor:  # (S, S), NaN = unknown or outside the photo
    """One crop, warped like the photo in `data.transforms.warp_crop`: smoothed before downsampling, then bilinear.

    Only known pixels are averaged; a pixel is unknown if less than half of its weight is known.
    """
    height, width = depth.shape
    photo_per_map_pixel = np.array([photo_size[0] / width, photo_size[1] / height])  # photo pixels per map pixel
    linear = affine[:, :2] * photo_per_map_pixel * (size / 2)
    offset = (affine[:, 2] + 1) * (size / 2)
    # OpenCV's origin is the centre of the first pixel, ours its corner.
    offset = offset + linear @ np.array([0.5, 0.5]) - 0.5
    values = depth.float().numpy()
    known = np.isfinite(values)
    # Subtract the median, so that a large offset costs no precision.
    median = np.float32(np.median(values[known])) if known.any() else np.float32(0)
    layers: np.ndarray[Any, Any] = np.stack([np.where(known, values - median, 0), known], -1).astype(np.float32)
    scale = math.sqrt(abs(np.linalg.det(linear)))
    if scale < 0.7:
        layers = cv2.GaussianBlur(layers, (0, 0), 0.4 / scale, borderType=cv2.BORDER_CONSTANT)
    matrix = np.concatenate([linear, offset[:, None]], 1)
    layers = cv2.warpAffine(layers, matrix, (size, size), flags=cv2.INTER_LINEAR)
    total, known_weight = torch.from_numpy(layers).unbind(-1)
    return torch.where(known_weight >= 0.5, total / known_weight.clamp_min(1e-6) + float(median), torch.nan)


def _read_png(path: Path) -> np.ndarray[Any, Any]:  # (h, w) float32
    with open_image(path) as opened:
        opened.load()  # detects damage that OpenCV only reports on stderr
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"{path}: a damaged png; write it again")
    if pixels.dtype != np.uint16 or pixels.ndim != 2:
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        raise UserError(
            f"{path}: {8 * pixels.dtype.itemsize} bits in {channels} channel{'s' * (channels > 1)}; a depth map is a "
            "16-bit grey png (a coloured or 8-bit picture of depth is not one); save an npy"
        )
    return np.where(pixels == 0, np.nan, pixels.astype(np.float32))


def _read_arrays(path: Path) -> tuple[np.ndarray, str | None]:  # the map; for an npz, the kind it states
    archive = ArrayArchive(path, mend="write it again by numpy.save")
    if archive.single:
        return archive.read(""), None
    named = next((name for name in GIVES if name in archive), None)
    if named is None and len(archive.names) != 1:
        found = ", ".join(archive.names) or "none"
        raise UserError(f"{path}: no array `depth` or `disparity` (found: {found}); name it so")
    return archive.read(named or archive.names[0]), named
