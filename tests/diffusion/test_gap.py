"""DAT's gap against known values: distance to samples, likelihood of a Gaussian, and the fitted camera."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hmdiff.diffusion.gap import Target, distribution_gap, make_target, project
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.sampling import hypothesis_generators
from hmdiff.heatmaps import gaussian_heatmaps

J = 14


def places(people: int = 2) -> Tensor:  # (B, J, 2)
    return 0.9 * torch.rand(people, J, 2, generator=torch.Generator().manual_seed(0)) - 0.45


def target(guidance: Guidance, count: int = 1, sigma: float = 2.0, **more: Tensor) -> Target:
    points = places()
    heatmaps = gaussian_heatmaps(points, torch.ones(points.shape[:2]), sigma)
    camera = torch.tensor([[1.5, 0.1, -0.2], [2.0, 0.0, 0.0]])
    return make_target(guidance, heatmaps, camera, hypothesis_generators(0, range(2), count), **more)


def test_the_samples_gap_is_the_weighted_squared_distance() -> None:
    guidance = Guidance(pairing="mean")
    aim = target(guidance)
    torch.testing.assert_close(aim.points, places(), atol=0.01, rtol=0)
    assert distribution_gap(guidance, aim.points, aim).abs().max() < 1e-10
    off = aim.points + torch.tensor([0.03, -0.04])
    torch.testing.assert_close(distribution_gap(guidance, off, aim), torch.full((2,), 0.05**2))
    one = aim.points.clone()
    one[:, 5, 0] += 0.2
    torch.testing.assert_close(distribution_gap(guidance, one, aim), 0.04 * aim.weight[:, 5])


def test_the_likelihood_gap_is_that_of_the_heatmap_and_not_the_samples() -> None:
    """-2 s² log U of a Gaussian is the squared distance to its *mean*, independent of the drawn sample."""
    guidance = Guidance(gap="likelihood", pairing="paired")
    aim = target(guidance, count=4, sigma=3.0)
    mean = places().repeat_interleave(4, 0)
    assert (aim.points - mean).norm(dim=-1).mean() > 0.01  # the draws are not the mean
    at_mean = distribution_gap(guidance, mean, aim)
    samples = distribution_gap(dataclasses.replace(guidance, gap="samples"), mean, aim)
    assert (at_mean < 0.2 * samples).all()
    near, far = (distribution_gap(guidance, mean + torch.tensor([step, 0.0]), aim) for step in (0.02, 0.04))
    torch.testing.assert_close((far - at_mean) / (near - at_mean), torch.full((8,), 4.0), rtol=0.25, atol=0)


def test_the_heads_camera_is_a_weak_perspective() -> None:
    guidance = Guidance(projection="camera")
    aim = target(guidance)
    mesh = torch.randn(2, J, 3, generator=torch.Generator().manual_seed(1))
    seen = project(guidance, mesh, aim)
    torch.testing.assert_close(seen[0], 1.5 * mesh[0, :, :2] + torch.tensor([0.1, -0.2]))
    torch.testing.assert_close(seen[1], 2.0 * mesh[1, :, :2])


def test_the_fitted_camera_is_a_pinhole_that_knows_where_in_the_photo_the_crop_was() -> None:
    """A mesh that projects to the targets has no gap; with a wrong principal point it has one."""
    guidance = Guidance(pairing="mean")
    principal = torch.tensor([[0.8, -0.5], [-0.6, 0.3]])
    aim = target(guidance, principal_point=principal)
    depth = 3.0 + 0.8 * torch.randn(2, J, 1, generator=torch.Generator().manual_seed(2))
    focal = 4.0
    rays = torch.cat([(aim.points - principal[:, None]) / focal, torch.ones(2, J, 1)], -1)
    mesh = rays * depth
    mesh = mesh - mesh.mean(1, keepdim=True)
    right = distribution_gap(guidance, project(guidance, mesh, aim), aim)
    elsewhere = dataclasses.replace(aim, principal_point=torch.zeros(2, 2))
    wrong = distribution_gap(guidance, project(guidance, mesh, elsewhere), elsewhere)
    assert (right < 1e-4).all() and (wrong > 10 * right).all()
    assert target(guidance).principal_point.abs().max() == 0  # unknown: the crop's centre


@pytest.mark.parametrize("weights", [(1.0,) * J, tuple(float(i == 3) for i in range(J))])
def test_joint_weights_decide_whose_distance_counts(weights: tuple[float, ...]) -> None:
    guidance = Guidance(pairing="mean", joint_weights=weights)
    aim = target(guidance)
    off = aim.points.clone()
    off[:, 3] += torch.tensor([0.3, 0.4])
    torch.testing.assert_close(aim.weight.sum(-1), torch.ones(2))
    assert (aim.weight[:, 3] == 1).all() if sum(weights) == 1 else (aim.weight > 0.05).all()
    torch.testing.assert_close(distribution_gap(guidance, off, aim), 0.25 * aim.weight[:, 3])


def blurred(places: Tensor, peak: Tensor, sigma: float = 2.0) -> Tensor:  # (B, J, 2), (B, J) -> (B, J, 64, 64)
    return gaussian_heatmaps(places, peak, sigma)


def test_every_hypothesis_is_compared_with_its_own_person() -> None:
    """Rows of a person are adjacent: draws, camera and principal point are repeated in blocks."""
    guidance = Guidance(pairing="paired")
    principal = torch.tensor([[0.8, -0.5], [-0.6, 0.3]])
    aim = target(guidance, count=3, principal_point=principal)
    own = places().repeat_interleave(3, 0)
    assert (aim.points - own).norm(dim=-1).max() < 0.3 < (aim.points - own.flip(0)).norm(dim=-1).max()
    assert aim.camera[:, 0].tolist() == [1.5] * 3 + [2.0] * 3
    torch.testing.assert_close(aim.principal_point, principal.repeat_interleave(3, 0))
    spread = (aim.points.unflatten(0, (2, 3)) - places()[:, None]).norm(dim=-1)
    assert (spread > 0).float().mean() > 0.5  # they are drawn


def test_the_sharpness_narrows_the_heatmap_and_its_background_is_no_place() -> None:
    """A Gaussian to the power 4 has a quarter of the variance. Background moves the mean to the centre of the crop."""
    camera, draws = torch.ones(2, 3), hypothesis_generators(0, range(2), 1)
    heatmaps = blurred(places(), torch.ones(2, J), 4.0)
    wide, narrow = (make_target(Guidance(sharpness=s), heatmaps, camera, draws).variance for s in (1.0, 4.0))
    assert ((wide / narrow > 2.0) & (wide / narrow < 4.0)).all()  # less than 4, as the wide one is without its tails
    veiled = heatmaps.clamp_min(0.09)
    aim = make_target(Guidance(sharpness=1.0), veiled, camera, draws)
    torch.testing.assert_close(aim.points, places(), atol=0.01, rtol=0)


def test_joints_count_by_the_height_of_their_peak_and_faint_ones_not_at_all() -> None:
    height = torch.ones(2, J)
    height[:, 1], height[:, 2] = 0.25, 0.01
    aim = make_target(Guidance(), blurred(places(), height), torch.ones(2, 3), hypothesis_generators(0, range(2), 1))
    torch.testing.assert_close(aim.weight[:, 0], 4 * aim.weight[:, 1], rtol=0.05, atol=0)
    assert (aim.weight[:, 2] == 0).all()


@pytest.mark.parametrize("pairing", ["mean", "paired"])
def test_the_likelihood_gap_has_the_unit_of_a_squared_distance(pairing: str) -> None:
    """-2 s² log U with s² = 2 sigma² over two axes is twice the squared distance; far away it has its gradient."""
    points = (places() * 32).round() / 32 + 1 / 64  # centres of pixels, where bilinear sampling is exact
    heatmaps = blurred(points, torch.ones(2, J), 3.0)
    guidance = Guidance(gap="likelihood", pairing=pairing, sharpness=1.0)
    aim = make_target(guidance, heatmaps, torch.ones(2, 3), hypothesis_generators(0, range(2), 1))
    assert distribution_gap(guidance, points, aim).abs().max() < 1e-5
    for way in (torch.tensor([2 / 32, 0.0]), torch.tensor([0.0, -2 / 32])):
        gap, other = (distribution_gap(guidance, points + side * way, aim) for side in (1, -1))
        torch.testing.assert_close(gap, other, rtol=0.02, atol=1e-6)
        ratio = gap / way.square().sum()
        assert ((ratio > 1.2) & (ratio < 2.2)).all()
    far = (points + 0.9).requires_grad_()
    (pull,) = torch.autograd.grad(distribution_gap(guidance, far, aim).sum(), far)
    torch.testing.assert_close(pull, 2 * aim.weight[..., None] * (far - aim.points))
