"""BlazePose's geometry (arXiv 2006.10204): anchors of the detector, its boxes, and the turned windows it leads to.

The detector sees the photo letterboxed to 224 x 224. Of each person it gives a box of the *face* and four points; the
first two, the middle of the hips and a point above it, set the square window that the landmark network reads: its
centre, half its size, and which way is up. Windows are `Crop`s.
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
_LAYERS = ((28, 2), (14, 2), (7, 6))  # cells a side, anchors a cell
_WINDOW = 1.25  # MediaPipe's enlargement of twice the distance of the two points
_OVERLAP = 0.3  # IoU from which two boxes are of one face
_SAME_PLACE = 0.5  # of the smaller one's reach from hips to head: hips that are nearer are one person's
_SMALLER = 0.6  # of somebody's reach
_SHARED = 0.3  # of a part's side that it has in common with the next, at least


@functools.cache
def anchors() -> np.ndarray:  # (2254, 2) centres, x and y, 0..1
    parts = []
    for cells, count in _LAYERS:
        middle = (np.arange(cells) + 0.5) / cells
        x, y = np.meshgrid(middle, middle)
        parts.append(np.repeat(np.stack([x.ravel(), y.ravel()], -1), count, 0))
    return np.concatenate(parts)


def letterbox(
    width: int,
    height: int,
    size: int = DETECTOR_SIZE,
) -> np.ndarray:  # (2, 3) photo pixels to pixels of the detector's input, both from the outer edge
    scale = size / max(width, height)
    return np.array([[scale, 0, (size - width * scale) / 2], [0, scale, (size - height * scale) / 2]])


class Detections(NamedTuple):
    points: np.ndarray  # (P, 4, 2) photo pixels
    scores: np.ndarray  # (P,)
    look: np.ndarray  # (P,) parts along the photo's longer side, see `parts`

    def of(self, chosen: np.ndarray) -> Detections:  # of indices, or a mask
        return Detections(*(values[chosen] for values in self))


def merged(looks: Sequence[Detections]) -> Detections:
    """Of several looks at one photo everybody once, surest first: by the look that comes first, then by the score.

    The wider look comes first: in a part of the photo a body may be cut off, and a hand taken for a head. So what is
    much smaller than somebody and lies on them is no person of its own, nor are hips near another's. Our choice.
    """
    sorted_looks = [look.of(np.argsort(-look.scores, kind="stable")) for look in looks]
    every = Detections(*map(np.concatenate, zip(*sorted_looks, strict=True)))
    hips, reach = every.points[:, 0], np.linalg.norm(every.points[:, 1] - every.points[:, 0], axis=-1)
    kept: list[int] = []
    for index in range(len(reach)):
        apart = np.linalg.norm(hips[kept] - hips[index], axis=-1)
        near = apart < _SAME_PLACE * np.minimum(reach[kept], reach[index])
        on = (apart < reach[kept]) & (reach[index] < _SMALLER * reach[kept])
        if not (near | on).any():
            kept.append(index)
    found = every.of(np.array(kept, int))
    return found.of(np.argsort(-found.scores, kind="stable"))


def parts(
    width: int,  # of the photo
    height: int,
    count: int,  # along its longer side, if they had nothing in common; 1: all of it
) -> list[np.ndarray]:  # each (2, 3), as `letterbox`: square parts of the photo, which overlap
    """A person of a 4th to a 7th of the photo's height is too small for the detector in all of it, not in a part."""
    if count == 1:
        return [letterbox(width, height)]
    side = max(width, height) / count

    def starts(length: int) -> np.ndarray:
        if length <= side:
            return np.array([(length - side) / 2])
        return np.linspace(0, length - side, math.ceil((length - side) / (side * (1 - _SHARED))) + 1)

    scale = DETECTOR_SIZE / side
    return [np.array([[scale, 0, -scale * x], [0, scale, -scale * y]]) for y in starts(height) for x in starts(width)]


def detections(
    raw: np.ndarray,  # (2254, 12) the network's boxes: centre and size, four points
    logits: np.ndarray,  # (2254,)
    affine: np.ndarray,  # (2, 3) photo pixels to pixels of the detector's input
    least: float = 0.5,  # score
    look: int = 1,
) -> Detections:
    """Surest first. Weighted non-maximum suppression: what overlaps the surest box is averaged into it by its score."""
    score = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
    kept = np.flatnonzero(score >= least)
    if not len(kept):
        return Detections(np.zeros((0, 4, 2)), np.zeros(0), np.zeros(0, int))
    values, score = raw[kept] / DETECTOR_SIZE, score[kept]
    center = values[:, :2] + anchors()[kept]
    points = values[:, 4:].reshape(-1, 4, 2) + anchors()[kept][:, None]
    half = values[:, 2:4] / 2
    boxes = np.concatenate([center - half, center + half], 1)
    found, scores = [], []
    rest = np.argsort(-score, kind="stable")
    while len(rest):
        overlap = _iou(boxes[rest[0]], boxes[rest])
        same = rest[overlap > _OVERLAP] if (overlap > _OVERLAP).any() else rest[:1]
        weight = score[same] / score[same].sum()
        found.append((points[same] * weight[:, None, None]).sum(0))
        scores.append(score[rest[0]])
        rest = rest[~np.isin(rest, same)]
    pixels = (np.stack(found) * DETECTOR_SIZE - affine[:, 2]) / affine[0, 0]
    return Detections(pixels, np.array(scores), np.full(len(scores), look))


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod((high - low).clip(0), axis=1)
    area = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    return common / np.maximum(area - common, 1e-12)


def window(
    middle: np.ndarray,  # (2,) of the hips, photo pixels
    above: np.ndarray,  # (2,) the point that gives the size of the body and its turn
) -> Crop | None:  # of one person, None where the points coincide
    x, y = above - middle
    reach = math.hypot(x, y)
    if not math.isfinite(reach) or reach < 1.0:
        return None
    return Crop.of(
        torch.tensor(middle[None], dtype=torch.float32),
        torch.tensor([2 * _WINDOW * reach], dtype=torch.float32),
        torch.tensor([math.atan2(x, -y)], dtype=torch.float32),
    )


def window_of_box(box: tuple[float, float, float, float]) -> Crop:
    """An upright window about a given box; the second pass turns it."""
    x1, y1, x2, y2 = box
    middle = torch.tensor([[(x1 + x2) / 2, (y1 + y2) / 2]])
    return Crop.of(middle, torch.tensor([_WINDOW * max(x2 - x1, y2 - y1)]))
