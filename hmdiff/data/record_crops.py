"""What a record has in the image plane of its crop: the image, named points, a pose estimator's heatmaps.

J keypoints (HALPE26; HAND21 for a hand), S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from hmdiff.body.skeletons import mirror_permutation
from hmdiff.data.record import Record
from hmdiff.data.shards import StoredRecord
from hmdiff.data.transforms import NO_AUGMENTATION, Augmentation, scale_channels, warp_crop
from hmdiff.heatmaps.arrays import load_heatmaps
from hmdiff.heatmaps.distribution import HEATMAP_SIZE, pixel_coordinates


def reorder_by_name(
    values: np.ndarray | None,  # (P, D)
    confidence: np.ndarray | None,  # (P,); None: all 1
    names: Sequence[str],  # P
    wanted: Sequence[str],  # J
    dimensions: int,  # D
) -> tuple[np.ndarray, np.ndarray]:  # (J, D), (J,): 0 where not labelled
    """A data set's points in the order of `wanted`. Of several with one name, the most confident counts."""
    reordered, best_confidence = np.zeros((len(wanted), dimensions)), np.zeros(len(wanted))
    if values is None:
        return reordered, best_confidence
    index_of = {name: index for index, name in enumerate(wanted)}
    for row, name in enumerate(names):
        index = index_of.get(name)
        point_confidence = 1.0 if confidence is None else float(confidence[row])
        if index is not None and point_confidence > best_confidence[index]:
            reordered[index], best_confidence[index] = values[row], point_confidence
    return reordered, best_confidence


def read_crop(
    stored: StoredRecord,
    affine: np.ndarray,  # (2, 3)
    size: int,  # S
    augmentation: Augmentation = NO_AUGMENTATION,
) -> np.ndarray:  # (S, S, 3) uint8 RGB
    """The crop of a record's image. Raises `UserError` naming the record's source where it has none."""
    if stored.picture is None:
        raise stored.record.error("it has no picture, and the model reads pictures; give inputs=heatmaps")
    # Labels are made without following the EXIF orientation.
    picture = cv2.imdecode(stored.picture, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if picture is None:
        raise stored.record.error("its picture cannot be decoded; prepare the data set again")
    region = stored.region or (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0]))
    crop = warp_crop(picture, region, affine, size)
    return scale_channels(cv2.cvtColor(crop, cv2.COLOR_BGR2RGB), augmentation)


def read_heatmaps(
    folder: Path,
    record: Record,
    affine: np.ndarray,  # (2, 3) photo pixels to crop coordinates
    augmentation: Augmentation,
) -> tuple[Tensor, Tensor]:  # (1, J, 64, 64), (1, J) bool
    """An estimator's heatmaps from FOLDER/NAME.npz, resampled to this crop. Raises `UserError` if missing or bad."""
    path = folder / f"{record.name}.npz"
    if not path.is_file():
        raise record.error(f"its heatmaps {path} are missing; give heatmaps: labels, or make them")
    maps = load_heatmaps(path)
    grid = pixel_coordinates(HEATMAP_SIZE, maps.values).numpy().astype(np.float64)
    crop = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    photo = (crop - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T
    in_source_crop = maps.crop[:1].from_photo(torch.from_numpy(photo)[None])
    positions = in_source_crop.float().reshape(1, HEATMAP_SIZE, HEATMAP_SIZE, 2)
    values = torch.nn.functional.grid_sample(maps.values[:1], positions, align_corners=False)
    permutation = mirror_permutation(maps.names) if augmentation.flip else list(range(len(maps.names)))
    return values[:, permutation], maps.valid[:1, permutation]
