"""Images of a stress test: maps over the crop with colour bars, and the hypotheses for an occluded person.

Pale where a patch has no effect, dark where it has the largest. Colours and layout are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.heatmaps import Crop
from hmdiff.viz.canvas import as_tensor, colour_bar, contact_sheet, heat_colours, to_bytes
from hmdiff.viz.overlays import overlay_all, reach_of, view_all
from hmdiff.viz.spread import SCALE

STEP = 10.0  # mm: the scale ends at a multiple
_OPACITY = 0.62
_TRANSLUCENT = 0.5  # opacity of a hypothesis
_PATCH = 128  # of 255, the patch's grey


def cut_out(
    photo: np.ndarray,  # (H, W, 3) uint8
    crop: Crop,  # one person, rotated or not
    size: int,  # size of the result
) -> np.ndarray:  # (size, size, 3) uint8, light grey outside the photo
    """The square crop, for display."""
    affine = np.array(crop.affine(0, size))
    scale = size / float(crop.side[0])
    affine[:, 2] += affine[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV's origin is the centre of the first pixel
    base = photo if scale >= 0.7 else cv2.GaussianBlur(photo, (0, 0), 0.4 / scale)
    how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_LINEAR
    return cv2.warpAffine(base, affine, (size, size), flags=how, borderValue=(238, 239, 242))


def draw_patch(
    crop: np.ndarray,  # (S, S, 3) uint8
    centre: ArrayLike | Tensor,  # (2,) crop coordinates
    half: float,
    outline: bool = False,  # draw only the outline
) -> np.ndarray:  # (S, S, 3) uint8
    """Draw the grey patch on the crop."""
    size = len(crop)
    x, y = ((np.asarray(as_tensor(centre), np.float64) + 1) * size / 2).tolist()
    reach = half * size / 2
    corners = [round(value) for value in (x - reach, y - reach, x + reach, y + reach)]
    left, top, right, bottom = (min(max(corner, 0), size) for corner in corners)
    result = crop.copy()
    if outline:
        cv2.rectangle(result, (left, top), (right - 1, bottom - 1), (25, 25, 30), 3)
        cv2.rectangle(result, (left, top), (right - 1, bottom - 1), (250, 250, 250), 1)
        return result
    result[top:bottom, left:right] = _PATCH
    return result


def map_over(
    crop: np.ndarray,  # (S, S, 3) uint8
    values: ArrayLike | Tensor,  # (G, G) at the patch positions, first row on top
    half: float,  # half the patch's side: positions range from half - 1 to 1 - half
    lowest: float,
    highest: float,
) -> np.ndarray:  # (S, S, 3) uint8
    """The map in heat colours over the greyed crop, interpolated between positions; empty outside them."""
    grid = np.asarray(as_tensor(values), np.float32)
    if grid.ndim != 2 or grid.shape[0] != grid.shape[1]:
        raise UserError(f"map: shape {grid.shape} found, one value for each of G x G places expected")
    size = len(crop)
    pixel = (np.arange(size) + 0.5) * 2 / size - 1
    # Grid position of a pixel; a single position covers everything.
    step = 2 * (1 - half) / max(len(grid) - 1, 1)
    place = ((pixel - (half - 1)) / step).clip(0, len(grid) - 1).astype(np.float32)
    column, row = np.meshgrid(place, place)
    smooth = cv2.remap(grid, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = (np.abs(pixel) <= 1 - half + step / 2).astype(np.float64)
    alpha = _OPACITY * (inside[:, None] * inside[None])[..., None]
    grey = crop.mean(-1, keepdims=True).repeat(3, -1) / 255
    colours = heat_colours(smooth, lowest, highest)
    return to_bytes(grey * (1 - alpha) + colours * alpha)


def stress_sheet(
    crop: np.ndarray,  # (S, S, 3) uint8
    maps: Sequence[tuple[str, ArrayLike | Tensor]],  # caption and (G, G) millimetres
    half: float,
    worst: ArrayLike | Tensor,  # (2,) the position to outline in the crop
) -> np.ndarray:  # uint8
    """The crop, then the maps over it, each with a colour bar from its minimum to its maximum."""
    size = len(crop)
    cells = [draw_patch(crop, worst, half, outline=True)]
    for _, values in maps:
        grid = np.asarray(as_tensor(values), np.float64)
        low = STEP * math.floor(float(grid.min()) / STEP)
        high = max(STEP * math.ceil(float(grid.max()) / STEP), low + STEP)
        bar = colour_bar(low, high, "mm", (size, 90))
        cells.append(np.concatenate([map_over(crop, grid, half, low, high), bar], axis=1))
    captions = ["photo, patch where the mesh moves most", *(caption for caption, _ in maps)]
    return contact_sheet(cells, len(cells), captions)


def hidden_sheet(
    rows: Sequence[tuple[np.ndarray, ArrayLike | Tensor, ArrayLike | Tensor, ArrayLike | Tensor]],
    faces: ArrayLike | Tensor,  # (F, 3)
    focal: float,  # pixels of the crop
    principal_point: ArrayLike | Tensor,  # (2,) pixels of the crop
    captions: Sequence[str],  # one per row
    shown: int = 8,  # number of hypotheses
) -> np.ndarray:  # uint8
    """One row per entry: a crop (S, S, 3), hypotheses (N, V, 3) over it and from the side, coloured by their spread
    (V,).

    An entry is (crop, hypotheses in metres relative to the pelvis, their translations (N, 3), spread in mm). All rows
    share the scales of colour and length.
    """
    size = len(rows[0][0])
    middle, extent = reach_of(torch.cat([as_tensor(row[1]).float()[:shown] for row in rows]), (size, size))
    cells, words = [], []
    for (crop, vertices, shifts, spread), caption in zip(rows, captions, strict=True):
        bodies, places = as_tensor(vertices).float()[:shown], as_tensor(shifts).float()[:shown]
        tints = [heat_colours(spread, 0.0, SCALE)] * len(bodies)
        cells += [
            crop,
            overlay_all(crop, bodies, faces, places, focal, principal_point, tints, _TRANSLUCENT),
            view_all(bodies, faces, 90.0, size, tints, 1.1 * extent, middle, _TRANSLUCENT),
        ]
        words += [caption, f"{len(bodies)} hypotheses", "from the side"]
    sheet = contact_sheet(cells, 3, words)
    bar = np.full((len(sheet), 100, 3), 255, np.uint8)
    bar[10 : 10 + size, :90] = colour_bar(0.0, SCALE, "mm", (size, 90))
    return np.concatenate([sheet, bar], axis=1)
