"""Sharded weights are gathered and filled correctly: two processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import run_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hmdiff.train.sharding import fill, whole


def test_what_is_not_shared_out_is_given_back() -> None:
    tensor = torch.rand(3)
    assert whole([tensor])[0] is tensor
    fill(tensor, torch.ones(3))
    assert tensor.eq(1).all()


def gathers_and_fills(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    # 5 rows are not divisible by 2; 1 row leaves a process without a shard.
    values = [torch.arange(15.0).view(5, 3), torch.arange(4.0)[None], torch.tensor([2.0, 7.0])]
    parts = [distribute_tensor(value.clone(), mesh, [Shard(0)]) for value in values]
    parts.append(distribute_tensor(values[0].clone(), mesh, [Replicate()]))
    expected = [*values, values[0]]
    for found, value in zip(whole(parts), expected, strict=True):
        assert not isinstance(found, DTensor) and torch.equal(found, value)
    for part, value in zip(parts, expected, strict=True):
        kept = part.placements
        fill(part, value + 1)
        assert isinstance(part, DTensor) and part.placements == kept
    assert parts[0].to_local().shape[0] == (3, 2)[rank]
    for found, value in zip(whole(parts), expected, strict=True):
        assert torch.equal(found, value + 1)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path: Path) -> None:
    run_processes(gathers_and_fills, 2, tmp_path)
