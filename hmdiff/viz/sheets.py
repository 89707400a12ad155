"""A sheet of one result: the photo, the mean and hypotheses over it, and all of them from the side.

Vertices are in the camera frame (x right, y down, z forward), metres. The layout is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.body.skeletons import COCO17
from hmdiff.viz.canvas import as_tensor, contact_sheet, draw_keypoints
from hmdiff.viz.overlays import PALETTE, Colour, overlay, person_crop, reach_of, turntable_view, view_all

FOOTER = "The photo is as it was taken; bodies, their shadows and the floor are rendered."
MEAN_COLOUR: Colour = (0.75, 0.75, 0.78)


def hypotheses_sheet(
    photo: np.ndarray,  # (H, W, 3) uint8
    vertices: ArrayLike | Tensor,  # (N, V, 3) metres, relative to the pelvis
    faces: ArrayLike | Tensor,  # (F, 3)
    camera_translation: ArrayLike | Tensor,  # (3,) or (N, 3) metres
    focal: float,  # pixels
    principal_point: ArrayLike | Tensor,  # (2,) pixels
    columns: int = 5,  # bodies shown: mean, selected, hypotheses; the rest only in the combined view
    keypoints: ArrayLike | Tensor | None = None,  # (J, 3) pixels and confidence
    names: Sequence[str] = COCO17,  # of the J keypoints
    selected: int | None = None,  # the hypothesis selected without ground truth
    height: int = 360,  # cell height in pixels
) -> np.ndarray:  # uint8
    """Top row: the photo, then each body over it. Bottom row: side views of all bodies together, then of each."""
    bodies = as_tensor(vertices).float()
    shifts = as_tensor(camera_translation).float().expand(len(bodies), 3)
    crop, centre, scale, (left, top) = person_crop(photo, bodies + shifts[:, None], focal, principal_point, height)
    width = crop.shape[1]

    first = crop
    if keypoints is not None:
        moved = as_tensor(keypoints).double().numpy().copy()
        moved[:, :2] = (moved[:, :2] - [left, top]) * scale
        first = draw_keypoints(crop, moved, names)
    shown = [("mean", bodies.mean(0), shifts.mean(0), MEAN_COLOUR)] if len(bodies) > 1 else []
    order = [] if selected is None else [selected]
    order += [number for number in range(len(bodies)) if number != selected]
    for number in order[: columns - len(shown)]:
        caption = f"hypothesis {number}" + (", selected" if number == selected else "")
        shown.append((caption, bodies[number], shifts[number], PALETTE[number % len(PALETTE)]))
    size = (height, width)
    looked_at, extent = reach_of(bodies, size)
    many = list(bodies[: max(columns, 12)])
    colours = [PALETTE[number % len(PALETTE)] for number in range(len(many))]
    top_row = [first]
    top_row += [overlay(crop, body, faces, shift, focal * scale, centre, tint) for _, body, shift, tint in shown]
    bottom_row = [view_all(torch.stack(many), faces, 90.0, size, colours, extent, looked_at)]
    bottom_row += [turntable_view(body, faces, 90.0, size, tint, extent, looked_at) for _, body, _, tint in shown]
    below = f"{len(many)} of {len(bodies)}, side" if len(many) < len(bodies) else f"all {len(many)}, side"
    words = ["photo" if keypoints is None else "photo, keypoints", *(name for name, *_ in shown)]
    return contact_sheet(top_row + bottom_row, len(words), [*words, below, *["side"] * len(shown)], footer=FOOTER)
