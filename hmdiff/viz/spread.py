"""The mesh coloured by the spread of its hypotheses: over the photo, from the side, and the scale in millimetres.

Pale where the hypotheses agree, dark where the photo is ambiguous. Colours and layout are our choice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.viz.canvas import as_tensor, colour_bar, contact_sheet, heat_colours
from hmdiff.viz.overlays import overlay, person_crop, reach_of, turntable_view
from hmdiff.viz.sheets import FOOTER

SCALE = 200.0  # mm, the darkest colour: a common scale, so that people can be compared


def spread_sheet(
    photo: np.ndarray,  # (H, W, 3) uint8
    vertices: ArrayLike | Tensor,  # (V, 3) metres, relative to the pelvis: the coloured mesh
    spread: ArrayLike | Tensor,  # (V,) millimetres
    faces: ArrayLike | Tensor,  # (F, 3)
    camera_translation: ArrayLike | Tensor,  # (3,) metres
    focal: float,  # pixels
    principal_point: ArrayLike | Tensor,  # (2,) pixels
    confidence: float | None = None,  # 0..1, the fraction of the surface expected within 100 mm; None: unknown
    height: int = 480,  # height of a view in pixels
) -> np.ndarray:  # uint8
    """Photo, mesh over it, mesh from the side and from behind, and the colour bar.

    Raises:
        UserError: the spread does not match the vertices.
    """
    body, values = as_tensor(vertices).float(), as_tensor(spread).float()
    if values.shape != body.shape[:1]:
        raise UserError(f"spread: shape {tuple(values.shape)} found, ({len(body)},) expected, one number a vertex")
    place = as_tensor(camera_translation).float()
    crop, centre, scale, _ = person_crop(photo, (body + place)[None], focal, principal_point, height)
    colours = heat_colours(values, 0.0, SCALE)
    size = (height, crop.shape[1])
    middle, extent = reach_of(body[None], size)
    views = [crop, overlay(crop, body, faces, place, focal * scale, centre, colours, opacity=1.0)]
    views += [turntable_view(body, faces, degrees, size, colours, extent, middle) for degrees in (90.0, 180.0)]
    note = FOOTER
    if confidence is not None:
        note = f"Confidence {confidence:.0%} (share of the surface expected within 100 mm). " + note
    captions = ["photo", "spread over the photo", "rendered, side", "rendered, behind"]
    sheet = contact_sheet(views, len(views), captions, footer=note)
    bar = np.full((len(sheet), 100, 3), 255, np.uint8)
    bar[10 : 10 + height, :90] = colour_bar(0.0, SCALE, "mm", (height, 90))
    return np.concatenate([sheet, bar], axis=1)
