"""Parameters from meshes: known poses are recovered, independent of batch, frame and noise."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import standin_bodies as s
import torch
from torch import Tensor

from hmdiff.body.anatomy import joint_limit_violation
from hmdiff.body.body import Body, load_body
from hmdiff.body.body_fitter import BodyFitter
from hmdiff.body.fitting import LARGEST_BETA, fit_coarse, fit_parameters, within_limits
from hmdiff.body.mesh_cache import random_bodies
from hmdiff.cli.main import main
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix


@functools.cache
def free() -> Body:
    return load_body()


def posed(body: Body, count: int, seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotations, betas, translations, vertices."""
    generator = torch.Generator().manual_seed(seed)
    rotations = axis_angle_to_matrix(spread * torch.randn(count, body.num_joints, 3, generator=generator))
    betas = torch.randn(count, body.num_betas, generator=generator)
    translation = torch.randn(count, 3, generator=generator)
    return rotations, betas, translation, body(betas, rotations, translation).vertices


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between rotations."""
    trace = (first.mT @ second).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def rebuilt(body: Body, found: object) -> Tensor:
    return body(found.betas, axis_angle_to_matrix(found.pose), found.translation).vertices  # type: ignore[attr-defined]


def test_pose_and_shape_come_back() -> None:
    rotations, betas, _, vertices = posed(free(), 8)
    found = fit_parameters(free(), vertices)
    assert angle(axis_angle_to_matrix(found.pose), rotations).median() < 0.2
    assert angle(axis_angle_to_matrix(found.pose), rotations).max() < 5  # two collinear joints share a twist
    assert (found.betas - betas).abs().max() < 0.2
    assert found.error_mm.max() < 0.5
    told = 1000 * (rebuilt(free(), found) - vertices).norm(dim=-1).mean(-1)
    torch.testing.assert_close(found.error_mm, told, rtol=1e-3, atol=3e-3)
    assert not any(value.requires_grad for value in found)


def test_random_bodies_are_met_within_a_millimetre() -> None:
    """The required bound is 5 mm, on bodies as in `hmdiff bench --fit`."""
    assert fit_parameters(free(), random_bodies(free(), 24, seed=3)).error_mm.max() < 1


def test_noise_is_averaged_out() -> None:
    _, betas, _, vertices = posed(free(), 8)
    noisy = vertices + 0.01 * torch.randn(vertices.shape, generator=torch.Generator().manual_seed(1))
    found = fit_parameters(free(), noisy)
    assert (1000 * (rebuilt(free(), found) - vertices).norm(dim=-1)).mean() < 6  # for noise 16 mm long
    assert (found.betas - betas).abs().mean() < 0.6
    assert 14 < found.error_mm.mean() < 18


def test_a_fit_does_not_depend_on_its_batch() -> None:
    vertices = random_bodies(free(), 34, seed=1)
    vertices = vertices + 0.005 * torch.randn(vertices.shape, generator=torch.Generator().manual_seed(2))
    together = fit_parameters(free(), vertices)
    for row in (0, 31, 33):
        for all_of_them, alone in zip(together, fit_parameters(free(), vertices[row : row + 1]), strict=True):
            torch.testing.assert_close(all_of_them[row], alone[0], rtol=0, atol=1e-3)
    assert [value.shape[0] for value in fit_parameters(free(), vertices[:0])] == [0] * 4


def test_a_turned_and_moved_mesh_turns_the_root_alone() -> None:
    _, _, _, vertices = posed(free(), 4)
    turn, shift = axis_angle_to_matrix(torch.tensor([0.4, -2.5, 1.1])), torch.tensor([3.0, -1.0, 40.0])
    before, after = fit_parameters(free(), vertices), fit_parameters(free(), vertices @ turn.mT + shift)
    torch.testing.assert_close(after.pose[:, 1:], before.pose[:, 1:], rtol=0, atol=5e-3)
    torch.testing.assert_close(after.betas, before.betas, rtol=0, atol=5e-3)
    root = axis_angle_to_matrix(before.pose[:, 0])
    assert angle(axis_angle_to_matrix(after.pose[:, 0]), turn @ root).max() < 0.1
    assert after.error_mm.max() < 0.5


def test_what_is_no_body_gets_rotations_and_a_large_error() -> None:
    _, _, _, vertices = posed(free(), 3)
    mirror = vertices * torch.tensor([-1.0, 1, 1])
    for strange in (mirror, torch.zeros_like(vertices), torch.randn(vertices.shape)):
        found = fit_parameters(free(), strange)
        assert all(value.isfinite().all() for value in found)
        assert torch.linalg.det(axis_angle_to_matrix(found.pose)).min() > 0.99
        assert found.error_mm.min() > 15


def test_precision_follows_the_body() -> None:
    body = load_body()
    vertices = posed(body, 2)[3]
    assert fit_parameters(body.double(), vertices).pose.dtype == torch.float64
    assert fit_parameters(body.float(), vertices).pose.dtype == torch.float32


@pytest.mark.slow
def test_pose_blend_shapes_and_the_sex_count(tmp_path: Path) -> None:
    """Each stand-in's meshes are fitted by its own file; the other gender's file cannot."""
    bodies = [
        load_body(s.write_pickle(tmp_path / f"SMPL_{name}.pkl", s.smpl_arrays(seed)))
        for seed, name in ((0, "FEMALE"), (1, "MALE"))
    ]
    vertices = [posed(body, 4)[3] for body in bodies]
    for own, other in ((0, 1), (1, 0)):
        found = fit_parameters(bodies[own], vertices[own])
        assert found.error_mm.max() < 1 and found.betas.shape == (4, 10)
        assert fit_parameters(bodies[own], vertices[other]).error_mm.min() > found.error_mm.max() + 1


def test_a_hand(tmp_path: Path) -> None:
    """Sixteen joints; the fitted pose includes the mean pose."""
    hand = load_body(s.write_pickle(tmp_path / "MANO_RIGHT.pkl", s.mano_arrays()))
    assert hand.mean_pose is not None
    rotations = axis_angle_to_matrix(hand.mean_pose + 0.2 * torch.randn(6, 16, 3))
    vertices = hand(torch.randn(6, 10), rotations).vertices
    found = fit_parameters(hand, vertices)
    assert found.pose.shape == (6, 16, 3) and found.error_mm.max() < 0.5
    assert angle(axis_angle_to_matrix(found.pose), rotations).median() < 2


def test_bad_meshes_are_named() -> None:
    with pytest.raises(UserError, match=r"vertices \(2, 5, 3\) found, \(N, 12410, 3\) of body 'free' expected"):
        fit_parameters(free(), torch.zeros(2, 5, 3))
    vertices = posed(free(), 3)[3]
    vertices[1, 7, 2] = torch.nan
    with pytest.raises(UserError, match="vertices of mesh 1 are not finite"):
        fit_parameters(free(), vertices)


def test_bench_fit_prints_error_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--fit", "6", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "body free, 6 random bodies in batches of 4" in out
    rows = [line for line in out.splitlines() if line.startswith("noise")]
    assert [row.split(":")[0] for row in rows] == ["noise 0 mm", "noise 10 mm"]
    assert float(rows[0].split("error to the body ")[1].split()[0]) < 1
    assert all("ms a mesh" in row for row in rows)


def coarse_ids() -> Tensor:
    return torch.arange(0, free().num_vertices, 29)


def test_coarse_meshes_of_bodies_are_met_and_noise_is_smoothed() -> None:
    rotations = PoseMixture().sample(8, torch.Generator().manual_seed(0))
    truth = free()(torch.randn(8, 10, generator=torch.Generator().manual_seed(1)).clamp(-2, 2), rotations).vertices
    coarse = truth[:, coarse_ids()]
    assert fit_coarse(free(), coarse_ids(), coarse).error_mm.max() < 9
    found = fit_coarse(free(), coarse_ids(), coarse, rounds=2)
    assert found.error_mm.max() < 4
    assert 1000 * (rebuilt(free(), found) - truth).norm(dim=-1).mean() < 4
    noise = 0.03 * torch.randn(coarse.shape, generator=torch.Generator().manual_seed(2))
    noisy = fit_coarse(free(), coarse_ids(), coarse + noise)
    fitted = rebuilt(free(), noisy)[:, coarse_ids()]
    assert (fitted - coarse).norm(dim=-1).mean() < 0.5 * noise.norm(dim=-1).mean()
    told = 1000 * (fitted - coarse - noise).norm(dim=-1).mean(-1)
    torch.testing.assert_close(noisy.error_mm, told, rtol=1e-3, atol=1e-2)


def test_fitted_bodies_keep_their_joints_inside_the_limits() -> None:
    """A knee bent backwards and an arm through the back become anatomically possible."""
    wild = axis_angle_to_matrix(0.9 * torch.randn(16, 24, 3, generator=torch.Generator().manual_seed(0)))
    assert joint_limit_violation(wild).median() > 30
    vertices = free()(torch.zeros(16, 10), wild).vertices[:, coarse_ids()]
    found = fit_coarse(free(), coarse_ids(), vertices)
    assert joint_limit_violation(axis_angle_to_matrix(found.pose)).max() < 1
    inside = PoseMixture().sample(32, torch.Generator().manual_seed(0))
    inside = inside[joint_limit_violation(inside) == 0]
    assert len(inside) > 16 and torch.equal(within_limits(free(), inside), inside)


def test_fitted_shapes_stay_within_their_bound() -> None:
    """A giant and a dwarf become the largest and the smallest body that is allowed."""
    people = free()(torch.zeros(2, 10), torch.eye(3).expand(2, 24, 3, 3)).vertices[:, coarse_ids()]
    betas = fit_coarse(free(), coarse_ids(), people * torch.tensor([2.0, 0.4])[:, None, None]).betas
    assert betas.abs().amax(1).tolist() == [LARGEST_BETA] * 2


def knock(points: Tensor, metres: float, seed: int) -> Tensor:
    """Displace each body part separately: neighbours together, as in prediction errors."""
    generator = torch.Generator().manual_seed(seed)
    weights = free().lbs_weights[coarse_ids()]
    return points + weights @ (metres * torch.randn(len(points), weights.shape[1], 3, generator=generator))


def test_keypoints_stay_where_a_camera_sees_them() -> None:
    """With a camera they move less across the line of sight; along it there is no requirement."""
    body, ids = free(), coarse_ids()
    coarse = knock(
        body(torch.zeros(12, 10), PoseMixture().sample(12, torch.Generator().manual_seed(3))).vertices[:, ids], 0.01, 4
    )
    # A regressor on the coarse mesh: each keypoint is the mean of the vertices with the largest weight of one bone.
    near = body.lbs_weights[ids].T
    regressor = (near > 0.5).to(near) / (near > 0.5).sum(1, keepdim=True).clamp(min=1)
    regressor = regressor[(near > 0.5).any(1)]
    place = torch.tensor([[0.3, -0.2, 2.5]]).expand(12, -1)
    line = torch.nn.functional.normalize(regressor @ coarse + place[:, None], dim=-1)

    def moved(**seen: Tensor) -> tuple[Tensor, Tensor]:
        found = rebuilt(body, fit_coarse(body, ids, coarse, rounds=2, **seen))[:, ids]  # type: ignore[arg-type]
        way = regressor @ (found - coarse)
        along = (way * line).sum(-1, keepdim=True)
        return (way - along * line).norm(dim=-1).mean(), along.abs().mean()

    across, along = moved(keypoints=regressor, translation=place)
    without, _ = moved()
    elsewhere, _ = moved(keypoints=regressor, translation=place.flip(-1))  # seen from the side: another plane
    assert across < 0.8 * min(without, elsewhere)
    assert along > across


def test_joints_held_at_their_limits_are_made_up_for() -> None:
    """Refitted around them, the mesh is nearer than a free fit whose joints are clamped afterwards."""
    body, ids = free(), coarse_ids()
    wild = axis_angle_to_matrix(0.5 * torch.randn(16, 24, 3, generator=torch.Generator().manual_seed(5)))
    coarse = body(torch.zeros(16, 10), wild).vertices[:, ids]
    alone = fit_parameters(body, body(torch.zeros(16, 10), wild).vertices)
    brought_back = within_limits(body, axis_angle_to_matrix(alone.pose))
    off = (body(alone.betas, brought_back, alone.translation).vertices[:, ids] - coarse).norm(dim=-1).mean()
    assert (rebuilt(body, fit_coarse(body, ids, coarse))[:, ids] - coarse).norm(dim=-1).mean() < 0.85 * off


def test_coarse_meshes_of_the_wrong_shape_are_named() -> None:
    with pytest.raises(UserError, match=r"coarse \(2, 5, 3\) found, \(N, 428, 3\) expected"):
        fit_coarse(free(), coarse_ids(), torch.zeros(2, 5, 3))
    with pytest.raises(UserError, match="not finite"):
        fit_coarse(free(), coarse_ids(), torch.full((1, 428, 3), float("nan")))


def test_shapes_are_shrunk_as_the_prior_says() -> None:
    """At the optimum the cost, squared distances plus noise^2 |beta|^2, has no slope along the shape."""
    body = free()
    fitter = BodyFitter(body, None, noise=0.5)
    betas = torch.full((1, body.num_betas), 1.5)
    pose = torch.eye(3).expand(1, body.num_joints, 3, 3)
    target = body(betas, pose).vertices[:, fitter.ids]
    placed = fitter.fit(target, rounds=12)
    small = body.select(fitter.ids)

    def cost(shape: Tensor) -> Tensor:
        found = small(shape, placed.rotations, placed.translation).vertices
        return (target - found).square().sum() + 0.5**2 * shape.square().sum()

    shape = placed.betas.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(shape), shape)
    assert placed.betas.abs().max() < 1.45
    assert slope.norm() < 0.02 * (2 * 0.5**2 * placed.betas).norm()
    at = fitter._place(placed.rotations, placed.betas, placed.translation, target, None)
    torch.testing.assert_close(at.cost[0], cost(placed.betas), rtol=1e-4, atol=1e-6)
