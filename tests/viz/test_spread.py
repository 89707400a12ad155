"""The mesh coloured by spread: dark where the hypotheses differ, in every view, with its scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from hmdiff.errors import UserError
from hmdiff.viz.spread import SCALE, spread_sheet


def test_what_spreads_is_dark_in_every_view() -> None:
    """A ball whose upper half is certain and whose lower half is not."""
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    vertices = torch.tensor(np.array(mesh.vertices), dtype=torch.float32)
    photo = np.full((120, 120, 3), 255, np.uint8)
    options = {"height": 100, "confidence": 0.25}
    place = ([0.0, 0.0, 4.0], 200.0, [60.0, 60.0])
    spread = torch.where(vertices[:, 1] > 0, 0.95 * SCALE, 2.0)  # y points down
    sheet = spread_sheet(photo, vertices, spread, mesh.faces, *place, **options).astype(int)
    certain = spread_sheet(photo, vertices, torch.full_like(spread, 2.0), mesh.faces, *place, **options).astype(int)
    assert sheet.shape == certain.shape
    width = (sheet.shape[1] - 100 - 10) // 4  # of a cell with its gap; the bar takes 100
    for view in (1, 2, 3):
        middle = 10 + view * width + (width - 10) // 2
        darker = (certain - sheet)[10:110, middle].sum(-1)
        assert darker[72] > 150 and abs(darker[28]) < 10, view
    assert (sheet[10:110, 10:width] == certain[10:110, 10:width]).all()  # the photo itself
    bar = sheet[:, -100 + 20]
    column = bar[bar.sum(-1) < 765]
    assert column[0].sum() < column[-1].sum()  # highest on top, dark
    with pytest.raises(UserError, match=r"spread: shape \(3,\) found, \(642,\) expected, one number a vertex"):
        spread_sheet(photo, vertices, torch.zeros(3), mesh.faces, *place)


def test_all_pictures_have_one_scale() -> None:
    """Of two people, the one with less spread is paler, whoever else is in the image."""
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
    vertices = torch.tensor(np.array(mesh.vertices), dtype=torch.float32)
    photo, place = np.full((60, 60, 3), 255, np.uint8), ([0, 0, 4.0], 100.0, [30.0, 30.0])
    sheets = [
        spread_sheet(photo, vertices, torch.full((len(vertices),), each), mesh.faces, *place, height=60).astype(int)
        for each in (20.0, 60.0, 180.0)
    ]
    assert sheets[0].sum() > sheets[1].sum() > sheets[2].sum()
    assert (sheets[0][:, -100:] == sheets[2][:, -100:]).all()  # the same legend
