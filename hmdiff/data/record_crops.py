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
from hmdiff.data.shards import Stored
from hmdiff.data.transforms import NO_CHANGE, Change, change_colours, crop_picture
from hmdiff.heatmaps.arrays import load_heatmaps
from hmdiff.heatmaps.distribution import HEATMAP_SIZE, pixel_coordinates


def by_name(
    values: np.ndarray | None,  # (P, D)
    confidence: np.ndarray | None,  # (P,); None: all 1
    names: Sequence[str],  # P
    wanted: Sequence[str],  # J
    dimensions: int,  # D
) -> tuple[np.ndarray, np.ndarray]:  # (J, D), (J,): 0 where not labelled
    """A data set's points in the order of `wanted`. Of several with one name, the most confident counts."""
    found, sure = np.zeros((len(wanted), dimensions)), np.zeros(len(wanted))
    if values is None:
        return found, sure
    places = {name: place for place, name in enumerate(wanted)}
    for number, name in enumerate(names):
        place = places.get(name)
        trust = 1.0 if confidence is None else float(confidence[number])
        if place is not None and trust > sure[place]:
            found[place], sure[place] = values[number], trust
    return found, sure


def read_crop(
    stored: Stored,
    affine: np.ndarray,  # (2, 3)
    size: int,  # S
    change: Change = NO_CHANGE,
) -> np.ndarray:  # (S, S, 3) uint8 RGB
    """The crop of a record's image. Raises `UserError` naming the record's source where it has none."""
    if stored.picture is None:
        raise stored.record.error("it has no picture, and the model reads pictures; give inputs=heatmaps")
    # Labels are made without following the EXIF orientation.
    picture = cv2.imdecode(stored.picture, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if picture is None:
        raise stored.record.error("its picture cannot be decoded; prepare the data set again")
    region = stored.region or (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0]))
    crop = crop_picture(picture, region, affine, size)
    return change_colours(cv2.cvtColor(crop, cv2.COLOR_BGR2RGB), change)


def read_heatmaps(
    folder: Path,
    record: Record,
    affine: np.ndarray,  # (2, 3) photo pixels to crop coordinates
    change: Change,
) -> tuple[Tensor, Tensor]:  # (1, J, 64, 64), (1, J) bool
    """An estimator's heatmaps from FOLDER/NAME.npz, resampled to this crop. Raises `UserError` if missing or bad."""
    path = folder / f"{record.name}.npz"
    if not path.is_file():
        raise record.error(f"its heatmaps {path} are missing; give heatmaps: labels, or make them")
    maps = load_heatmaps(path)
    grid = pixel_coordinates(HEATMAP_SIZE, maps.values).numpy().astype(np.float64)
    crop = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    photo = (crop - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T
    local = maps.crop[:1].from_photo(torch.from_numpy(photo)[None])
    places = local.float().reshape(1, HEATMAP_SIZE, HEATMAP_SIZE, 2)
    values = torch.nn.functional.grid_sample(maps.values[:1], places, align_corners=False)
    order = mirror_permutation(maps.names) if change.flip else list(range(len(maps.names)))
    return values[:, order], maps.valid[:1, order]
