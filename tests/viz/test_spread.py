"""The mesh coloured by spread: dark where the hypotheses differ, in every view, with its scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from hmdiff.errors import UserError
from hmdiff.viz.spread import scale_end, spread_sheet


def test_what_spreads_is_dark_in_every_view() -> None:
    """A ball whose upper half is certain and whose lower half is not."""
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    vertices = torch.tensor(np.array(mesh.vertices), dtype=torch.float32)
    photo = np.full((120, 120, 3), 255, np.uint8)
    options = {"highest": 100.0, "height": 100}
    place = ([0.0, 0.0, 4.0], 200.0, [60.0, 60.0])
    spread = torch.where(vertices[:, 1] > 0, 95.0, 2.0)  # y points down
    sheet = spread_sheet(photo, vertices, spread, mesh.faces, *place, **options).astype(int)
    certain = spread_sheet(photo, vertices, torch.full_like(spread, 2.0), mesh.faces, *place, **options).astype(int)
    assert sheet.shape == certain.shape
    width = (sheet.shape[1] - 100 - 10) // 4  # of a cell with its gap; the bar takes 100
    for view in (1, 2, 3):
        middle = 10 + view * width + (width - 10) // 2
        darker = (certain - sheet)[10:110, middle].sum(-1)
        assert darker[72] > 150 and abs(darker[28]) < 10, view
    assert (sheet[10:110, 10 : width] == certain[10:110, 10 : width]).all()  # the photo itself
    bar = sheet[:, -100 + 20]
    column = bar[bar.sum(-1) < 765]
    assert column[0].sum() < column[-1].sum()  # the highest on top, dark
    with pytest.raises(UserError, match=r"spread: shape \(3,\) found, \(642,\) expected, one number a vertex"):
        spread_sheet(photo, vertices, torch.zeros(3), mesh.faces, *place)


def test_the_scale_ends_at_a_round_number_over_nearly_all() -> None:
    assert scale_end(torch.zeros(10)) == 50.0
    assert scale_end(torch.full((10,), 50.0)) == 50.0
    assert scale_end(torch.full((10,), 51.0)) == 100.0
    outlier = torch.full((1000,), 80.0)
    outlier[0] = 900.0
    assert scale_end(outlier) == 100.0
