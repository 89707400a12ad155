"""Synthetic people stored as recorded ones read back unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import free_body, small_config

from hmdiff.build import build_data
from hmdiff.data.recorded import RecordedPeople
from hmdiff.data.shards import PreparedShards
from tools.build.recorded import write_recorded


@pytest.mark.slow
def test_recorded_stand_ins_are_the_people_that_were_drawn(tmp_path: Path) -> None:
    write_recorded(tmp_path / "a", 3, "val", 0, 32)
    body, mesh = free_body()
    read = RecordedPeople(
        PreparedShards(tmp_path / "a"),
        body,
        mesh.coarse_ids,
        3,
        full_mesh=True,
        heatmaps="labels",
        same_body=True,
        map_size=32,
    ).block("val", 0)
    drawn = build_data(small_config("unused", "data.map_size=32", "data.block_size=16"), body, mesh, True)
    people = drawn.block("val", 0).map(lambda tensor: tensor[:3])
    for name in ("vertices", "coarse_vertices"):
        moved = getattr(read, name) - getattr(people, name)
        assert moved.norm(dim=-1).max() < 0.05  # the pelvis is recomputed from the mesh
        assert (moved - moved.mean(1, keepdim=True)).norm(dim=-1).max() < 1e-4
    assert read.joints_2d is not None and people.joints_2d is not None and people.visible is not None
    seen = people.visible
    torch.testing.assert_close(read.joints_2d[seen], people.joints_2d[seen], atol=1e-4, rtol=0)
    assert read.has_silhouette is not None and read.has_silhouette.all()
    assert read.silhouette is not None and people.silhouette is not None
    assert (read.silhouette - people.silhouette).abs().mean() < 0.02
    assert read.depth_input is not None and people.depth_input is not None
    for found, expected in zip(read.depth_input, people.depth_input, strict=True):
        both = found.isfinite() & expected.isfinite()
        assert both.float().mean() > 0.5
        pair = torch.stack([found[both], expected[both]])
        assert torch.corrcoef(pair)[0, 1] > 0.99  # unit and origin are lost, the order is kept
