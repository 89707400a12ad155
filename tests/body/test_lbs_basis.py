"""The LBS basis: orthonormal, closed under affine bones, within millimetres of posed bodies, for any skeleton."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin_bodies as s
import torch
from small import free_body, people_block

from hmdiff.body.body import load_body
from hmdiff.body.lbs_basis import lbs_basis


def test_columns_are_orthonormal_and_the_rest_pose_lies_inside() -> None:
    body, mesh = free_body()
    basis = lbs_basis(body, mesh.coarse_ids)
    assert basis.points.shape == (456, 96) and basis.full.shape == (body.num_vertices, 96)
    torch.testing.assert_close(basis.points.mT @ basis.points, torch.eye(96), atol=1e-5, rtol=0)
    rest = torch.cat([body.v_template[mesh.coarse_ids], body.joint_template])
    torch.testing.assert_close(basis.points @ (basis.points.mT @ rest), rest, atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.full @ (basis.points.mT @ rest), body.v_template, atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", ["test", "test_ood"])
def test_posed_and_shaped_bodies_lie_within_millimetres(split: str) -> None:
    sample = people_block(split)
    assert sample.coarse_vertices is not None and sample.vertices is not None and sample.joints_3d is not None
    basis = lbs_basis(free_body()[0], free_body()[1].coarse_ids)
    points = torch.cat([sample.coarse_vertices, sample.joints_3d], 1)
    coordinates = basis.points.mT @ points
    assert 1000 * (basis.points @ coordinates - points).norm(dim=-1).mean() < 4
    assert 1000 * (basis.full @ coordinates - sample.vertices).norm(dim=-1).mean() < 3
    full = basis.full @ (basis.from_coarse @ sample.coarse_vertices)
    assert 1000 * (full - sample.vertices).norm(dim=-1).mean() < 3


def test_rotations_and_translations_stay_inside() -> None:
    body, mesh = free_body()
    basis = lbs_basis(body, mesh.coarse_ids).points
    inside = basis @ torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    moved = inside @ turn.mT + torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(basis @ (basis.mT @ moved), moved, atol=1e-4, rtol=0)


def test_a_bones_coordinates_move_mostly_what_the_bone_moves() -> None:
    body, mesh = free_body()
    basis = lbs_basis(body, mesh.coarse_ids).points
    owner = torch.cat([body.lbs_weights[mesh.coarse_ids].argmax(1), torch.arange(24)])
    energy = basis.square().unflatten(1, (24, 4)).sum(-1)
    own = torch.zeros(24, 24).index_add_(0, owner, energy).diagonal() / energy.sum(0)
    assert own.mean() > 0.8


@pytest.mark.parametrize(("name", "arrays"), [("MANO_RIGHT", s.mano_arrays), ("SMPL_NEUTRAL", s.smpl_arrays)])
def test_other_bodies_have_their_own_parts(name: str, arrays: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    body = load_body(s.write_pickle(tmp_path / f"{name}.pkl", arrays()))
    coarse = torch.arange(0, body.num_vertices, max(1, body.num_vertices // 150))
    basis = lbs_basis(body, coarse)
    bones = body.num_joints
    assert basis.points.shape == (len(coarse) + bones, 4 * bones) and basis.points.isfinite().all()
    rest = torch.cat([body.v_template[coarse], body.joint_template])
    torch.testing.assert_close(basis.points @ (basis.points.mT @ rest), rest, atol=2e-4, rtol=0)
    # A partial isometry: directions that no vertex spans have length 0.
    values = torch.linalg.eigvalsh(basis.points.mT @ basis.points)
    assert ((values - 1).abs().minimum(values.abs()) < 1e-3).all()


def test_any_affine_bones_stay_inside_with_joints_between_two_bones() -> None:
    """A joint moves with the mean of its bone and the parent's; the root with its own."""
    body, mesh = free_body()
    basis = lbs_basis(body, mesh.coarse_ids).points.double()
    generator = torch.Generator().manual_seed(2)
    linear = torch.randn(24, 3, 3, generator=generator).double()
    offset = torch.randn(24, 3, generator=generator).double()

    def moved(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # (M, 3), (M, 24) -> (M, 3)
        each = torch.einsum("jab,mb->mja", linear, points) + offset
        return (weights[..., None] * each).sum(1)

    halves = 0.5 * torch.eye(24)
    for joint, parent in enumerate(body.parents):
        halves[joint, max(parent, 0)] += 0.5
    vertices = moved(body.v_template[mesh.coarse_ids].double(), body.lbs_weights[mesh.coarse_ids].double())
    points = torch.cat([vertices, moved(body.joint_template.double(), halves.double())])
    projected = basis @ (basis.mT @ points)
    assert (projected - points).norm(dim=-1).max() < 1e-3 * points.norm(dim=-1).mean()
