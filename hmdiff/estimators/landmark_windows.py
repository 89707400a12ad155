"""BlazePose's geometry (arXiv 2006.10204): anchors of the detector, its boxes, and the rotated landmark windows.

The detector reads the photo letterboxed to 224 x 224. For each person it returns a *face* box and four points; the
first two, the middle of the hips and a point above it, set centre, half size and orientation of the square window that
the landmark network reads. Windows are `Crop`s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hmdiff.heatmaps import Crop

DETECTOR_SIZE = 224
_LAYERS = ((28, 2), (14, 2), (7, 6))  # cells per side, anchors per cell
_WINDOW = 1.25  # MediaPipe's scale for twice the distance of the two points
_OVERLAP = 0.3  # minimum IoU of boxes of the same face
_SAME_PERSON = 0.5  # relative to the smaller hip-to-head distance: closer hips belong to one person
_MUCH_SMALLER = 0.6  # relative to another detection's hip-to-head distance
_TILE_OVERLAP = 0.3  # minimum overlap of neighbouring tiles, relative to their side


@functools.cache
def anchors() -> np.ndarray:  # (2254, 2) centres, x and y, 0..1
    layers = []
    for cells, count in _LAYERS:
        middle = (np.arange(cells) + 0.5) / cells
        x, y = np.meshgrid(middle, middle)
        layers.append(np.repeat(np.stack([x.ravel(), y.ravel()], -1), count, 0))
    return np.concatenate(layers)


def letterbox(
    width: int,
    height: int,
    size: int = DETECTOR_SIZE,
) -> np.ndarray:  # (2, 3) photo pixels to pixels of the detector's input, both with the origin at the outer edge
    scale = size / max(width, height)
    return np.array([[scale, 0, (size - width * scale) / 2], [0, scale, (size - height * scale) / 2]])


class Detections(NamedTuple):
    points: np.ndarray  # (P, 4, 2) photo pixels
    scores: np.ndarray  # (P,)
    tiles_per_side: np.ndarray  # (P,) tiles along the photo's longer side, see `tiles`

    def of(self, selection: np.ndarray) -> Detections:  # indices, or a mask
        return Detections(*(values[selection] for values in self))


def merge_passes(passes: Sequence[Detections]) -> Detections:
    """Merge detections of several passes without duplicates, by falling score; earlier passes take precedence.

    Passes over larger areas come first: a small tile may cut a body off, or mistake a hand for a head. A much smaller
    detection that overlaps a person is therefore dropped, and so are hips near another person's. Our choice.
    """
    sorted_passes = [one.of(np.argsort(-one.scores, kind="stable")) for one in passes]
    candidates = Detections(*map(np.concatenate, zip(*sorted_passes, strict=True)))
    hips, size = candidates.points[:, 0], np.linalg.norm(candidates.points[:, 1] - candidates.points[:, 0], axis=-1)
    kept: list[int] = []
    for index in range(len(size)):
        distance = np.linalg.norm(hips[kept] - hips[index], axis=-1)
        same_hips = distance < _SAME_PERSON * np.minimum(size[kept], size[index])
        inside_larger = (distance < size[kept]) & (size[index] < _MUCH_SMALLER * size[kept])
        if not (same_hips | inside_larger).any():
            kept.append(index)
    merged = candidates.of(np.array(kept, int))
    return merged.of(np.argsort(-merged.scores, kind="stable"))


def tiles(
    width: int,  # of the photo
    height: int,
    count: int,  # number of non-overlapping tiles along its longer side; 1: the whole photo
) -> list[np.ndarray]:  # each (2, 3), as `letterbox`: overlapping square tiles of the photo
    """Tiles of a photo: people of a quarter to a seventh of its height are detected only in tiles."""
    if count == 1:
        return [letterbox(width, height)]
    side = max(width, height) / count

    def offsets(length: int) -> np.ndarray:
        if length <= side:
            return np.array([(length - side) / 2])
        return np.linspace(0, length - side, math.ceil((length - side) / (side * (1 - _TILE_OVERLAP))) + 1)

    scale = DETECTOR_SIZE / side
    return [np.array([[scale, 0, -scale * x], [0, scale, -scale * y]]) for y in offsets(height) for x in offsets(width)]


def decode_detections(
    raw: np.ndarray,  # (2254, 12) the network's boxes: centre and size, four points
    logits: np.ndarray,  # (2254,)
    affine: np.ndarray,  # (2, 3) photo pixels to pixels of the detector's input
    min_score: float = 0.5,  # minimum score
    tiles_per_side: int = 1,
) -> Detections:
    """Detections by falling score. Weighted non-maximum suppression: overlapping boxes are averaged by score."""
    score = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
    kept = np.flatnonzero(score >= min_score)
    if not len(kept):
        return Detections(np.zeros((0, 4, 2)), np.zeros(0), np.zeros(0, int))
    values, score = raw[kept] / DETECTOR_SIZE, score[kept]
    center = values[:, :2] + anchors()[kept]
    points = values[:, 4:].reshape(-1, 4, 2) + anchors()[kept][:, None]
    half = values[:, 2:4] / 2
    boxes = np.concatenate([center - half, center + half], 1)
    averaged, scores = [], []
    rest = np.argsort(-score, kind="stable")
    while len(rest):
        overlap = _iou(boxes[rest[0]], boxes[rest])
        same = rest[overlap > _OVERLAP] if (overlap > _OVERLAP).any() else rest[:1]
        weight = score[same] / score[same].sum()
        averaged.append((points[same] * weight[:, None, None]).sum(0))
        scores.append(score[rest[0]])
        rest = rest[~np.isin(rest, same)]
    pixels = (np.stack(averaged) * DETECTOR_SIZE - affine[:, 2]) / affine[0, 0]
    return Detections(pixels, np.array(scores), np.full(len(scores), tiles_per_side))


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod((high - low).clip(0), axis=1)
    area = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    return common / np.maximum(area - common, 1e-12)


def landmark_window(
    hips: np.ndarray,  # (2,) middle of the hips, photo pixels
    above: np.ndarray,  # (2,) the point that sets the window's size and rotation
) -> Crop | None:  # one person; None if the points coincide
    x, y = above - hips
    size = math.hypot(x, y)
    if not math.isfinite(size) or size < 1.0:
        return None
    return Crop.of(
        torch.tensor(hips[None], dtype=torch.float32),
        torch.tensor([2 * _WINDOW * size], dtype=torch.float32),
        torch.tensor([math.atan2(x, -y)], dtype=torch.float32),
    )


def landmark_window_of_box(box: tuple[float, float, float, float]) -> Crop:
    """An upright window around a given box; the second pass rotates it."""
    x1, y1, x2, y2 = box
    center = torch.tensor([[(x1 + x2) / 2, (y1 + y2) / 2]])
    return Crop.of(center, torch.tensor([_WINDOW * max(x2 - x1, y2 - y1)]))
