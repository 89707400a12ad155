"""The mesh coloured by how far its hypotheses spread: over the photo, from the side, and the scale in millimetres.

Pale where the hypotheses agree, dark where the photo leaves the body open. Colours and layout are our choice.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.viz.canvas import as_tensor, colour_bar, contact_sheet, heat_colours
from hmdiff.viz.overlays import overlay, person_crop, reach_of, turntable_view

STEP = 50.0  # mm: the scale's end is a multiple, so that pictures of several people can be compared


def spread_sheet(
    photo: np.ndarray,  # (H, W, 3) uint8
    vertices: ArrayLike | Tensor,  # (V, 3) metres, relative to the pelvis: the mesh that is coloured
    spread: ArrayLike | Tensor,  # (V,) millimetres
    faces: ArrayLike | Tensor,  # (F, 3)
    camera_translation: ArrayLike | Tensor,  # (3,) metres
    focal: float,  # pixels
    principal_point: ArrayLike | Tensor,  # (2,) pixels
    highest: float | None = None,  # mm, the darkest colour; None: `scale_end`
    height: int = 480,  # of a view, pixels
) -> np.ndarray:  # uint8
    """Photo, mesh over it, mesh from the side and from behind, and the colour bar.

    Raises:
        UserError: a spread that is not of these vertices.
    """
    body, values = as_tensor(vertices).float(), as_tensor(spread).float()
    if values.shape != body.shape[:1]:
        raise UserError(f"spread: shape {tuple(values.shape)} found, ({len(body)},) expected, one number a vertex")
    place = as_tensor(camera_translation).float()
    crop, centre, scale, _ = person_crop(photo, (body + place)[None], focal, principal_point, height)
    highest = scale_end(values) if highest is None else highest
    colours = heat_colours(values, 0.0, highest)
    size = (height, crop.shape[1])
    middle, extent = reach_of(body[None], size)
    views = [crop, overlay(crop, body, faces, place, focal * scale, centre, colours, opacity=1.0)]
    views += [turntable_view(body, faces, degrees, size, colours, extent, middle) for degrees in (90.0, 180.0)]
    sheet = contact_sheet(views, len(views), ["photo", "spread of the hypotheses", "side", "behind"])
    bar = np.full((len(sheet), 100, 3), 255, np.uint8)
    bar[10 : 10 + height, :90] = colour_bar(0.0, highest, "mm", (height, 90))
    return np.concatenate([sheet, bar], axis=1)


def scale_end(
    spread: ArrayLike | Tensor,  # (V,) millimetres
) -> float:
    """The next multiple of `STEP` that 99 % of the vertices stay under."""
    reached = float(np.quantile(np.asarray(as_tensor(spread), np.float64), 0.99))
    return STEP * max(1, math.ceil(reached / STEP))
