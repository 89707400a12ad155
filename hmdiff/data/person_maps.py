"""A person's depth map and mask: as stored with a record, and cropped like its image.

D2A-HMR (arXiv 2403.09063) reads pseudo-depth and learns a silhouette. A map covers the same part of the photo as the
image. Depth is a 16-bit png, 0 = unknown, its range scaled to 1..65535: models normalise unit and origin anyway. A mask
is an 8-bit png.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from hmdiff.data.transforms import warp_crop
from hmdiff.errors import UserError
from hmdiff.files.images import open_image

Region = tuple[float, float, float, float]  # x0, y0, x1, y1 photo pixels


def encode_depth(
    depth: np.ndarray,  # (h, w) of the whole photo, larger = farther, NaN or infinite = unknown
    photo_size: tuple[int, int],  # width, height
    region: Region,
    size: tuple[int, int],  # width, height of the stored map
) -> bytes | None:  # None: no known depth in the region
    """The region of a depth map as a png."""
    known = np.isfinite(depth)
    median = np.median(depth[known]) if known.any() else 0.0
    layers = np.stack([np.where(known, depth - median, 0), known], -1).astype(np.float32)
    layers = _resize_region(layers, photo_size, region, size)
    valid = layers[..., 1] >= 0.5
    if not valid.any():
        return None
    values = layers[..., 0] / np.maximum(layers[..., 1], 1e-6)
    low, high = values[valid].min(), values[valid].max()
    scaled = 1 + (values - low) * (65534 / max(high - low, 1e-12))
    return _encode_png(np.where(valid, scaled.round().clip(1, 65535), 0).astype(np.uint16))


def encode_mask(
    mask: np.ndarray,  # (h, w) bool of the whole photo
    photo_size: tuple[int, int],
    region: Region,
    size: tuple[int, int],
) -> bytes:
    """The region of a mask as a png of each pixel's coverage."""
    return _encode_png(
        (255 * _resize_region(mask.astype(np.float32), photo_size, region, size)).round().astype(np.uint8)
    )


def crop_depth(
    stored: np.ndarray,  # bytes of `encode_depth`
    region: Region,
    affine: np.ndarray,  # (2, 3) photo pixels to crop coordinates, with the image's rotation and flip
    size: int,  # S
) -> np.ndarray:  # (S, S) float32, NaN = unknown
    values = _decode_png(stored).astype(np.float32)
    known = values > 0
    layers = np.stack([values, known], -1).astype(np.float32)
    warped = warp_crop(layers, region, affine, size)
    return np.where(warped[..., 1] >= 0.5, warped[..., 0] / np.maximum(warped[..., 1], 1e-6), np.nan).astype(np.float32)


def crop_mask(
    stored: np.ndarray,  # bytes of `encode_mask`
    region: Region,
    affine: np.ndarray,
    size: int,
) -> np.ndarray:  # (S, S) float32, 0..1
    return warp_crop(_decode_png(stored).astype(np.float32) / 255, region, affine, size).clip(0, 1)


def map_fields(
    depths: Sequence[np.ndarray | None],  # (S, S) for each person
    masks: Sequence[np.ndarray | None],
    size: int,  # S
) -> dict[str, Tensor]:
    """A sample's `depth_input`, `silhouette` and `has_silhouette`; a field that no person has is left out."""
    fields = {}
    if any(depth is not None for depth in depths):
        unknown = np.full((size, size), np.nan, np.float32)
        fields["depth_input"] = torch.from_numpy(np.stack([unknown if depth is None else depth for depth in depths]))
    if any(mask is not None for mask in masks):
        empty = np.zeros((size, size), np.float32)
        fields["silhouette"] = torch.from_numpy(np.stack([empty if mask is None else mask for mask in masks]))
        fields["has_silhouette"] = torch.tensor([mask is not None for mask in masks])
    return fields


def read_mask(
    mask: Any,  # COCO polygons or RLE, or the path of an image that is nonzero on the person
    photo_size: tuple[int, int],  # width, height
    source: str,  # for error messages
) -> np.ndarray:  # (H, W) bool
    """A data set's mask. Raises `UserError` if it is damaged or its size is not the photo's."""
    width, height = photo_size
    if isinstance(mask, str | Path):
        with open_image(Path(mask)) as opened:
            pixels = np.asarray(opened.convert("L")) > 0
        if pixels.shape != (height, width):
            raise UserError(f"{mask}: {pixels.shape[1]} x {pixels.shape[0]} pixels, its photo has {width} x {height}")
        return pixels
    try:
        if isinstance(mask, dict):
            return _decode_rle(mask, width, height)
        filled = np.zeros((height, width), np.uint8)
        for polygon in mask:
            points = np.asarray(polygon, np.float64).reshape(-1, 2)
            # COCO's origin is a pixel's corner, OpenCV's its centre; units of 1/256 pixel.
            cv2.fillPoly(filled, [((points - 0.5) * 256).round().astype(np.int32)], 1, shift=8)
        return filled > 0
    except (ValueError, TypeError, KeyError, IndexError, cv2.error) as error:
        raise UserError(f"{source}: a damaged segmentation ({error!r:.120}); polygons or RLE are expected") from None


def _decode_rle(rle: dict[str, Any], width: int, height: int) -> np.ndarray:  # (H, W) bool
    """COCO's RLE: run lengths of 0s, 1s, 0s ... in column order, as a list or as text with 5 bits a character."""
    if [int(value) for value in rle["size"]] != [height, width]:
        raise ValueError(f"a mask of {rle['size']} in a photo of {[height, width]}")
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        counts = _decode_rle_text(counts.encode() if isinstance(counts, str) else counts)
    lengths = np.asarray(counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != width * height:
        raise ValueError(f"runs of {lengths.sum()} pixels, {width * height} expected")
    values = np.repeat(np.arange(len(lengths)) % 2, lengths)
    return values.reshape(width, height).T > 0


def _decode_rle_text(text: bytes) -> list[int]:
    """Decode COCO's RLE text: 5 bits a character from code 48 on, lowest first, bit 6 = more follows; from the third
    run on, the difference to the run two before; bit 5 of the last character is the sign.
    """
    counts: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            bits = text[position] - 48
            value |= (bits & 31) << shift
            more, position, shift = bool(bits & 32), position + 1, shift + 5
            if not more and bits & 16:
                value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def _resize_region(
    values: np.ndarray, photo_size: tuple[int, int], region: Region, size: tuple[int, int]
) -> np.ndarray:
    """A region of a map of the whole photo, resized from any map resolution; low-pass filtered where it shrinks."""
    x0, y0, x1, y1 = region
    stretch = np.array([photo_size[0] / values.shape[1], photo_size[1] / values.shape[0]])  # photo pixels per map pixel
    scale = np.array([size[0] / (x1 - x0), size[1] / (y1 - y0)])
    linear = np.diag(stretch * scale)
    offset = -np.array([x0, y0]) * scale + linear @ np.array([0.5, 0.5]) - 0.5
    magnification = float((stretch * scale).min())
    if magnification < 0.7:
        values = cv2.GaussianBlur(values, (0, 0), 0.4 / magnification, borderType=cv2.BORDER_REPLICATE)
    matrix = np.concatenate([linear, offset[:, None]], 1)
    return cv2.warpAffine(values, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _encode_png(values: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(".png", values)
    assert encoded
    return data.tobytes()


def _decode_png(stored: Sequence[int] | np.ndarray) -> np.ndarray:
    pixels = cv2.imdecode(np.asarray(stored, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 2:
        raise UserError("a stored depth map or mask cannot be decoded; prepare the data set again")
    return pixels
