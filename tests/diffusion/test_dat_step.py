"""One evaluation of DAT on a linear problem, by hand: every kind of step, its bounds, its switch, its fall-back."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from hmdiff.diffusion.dat import AlignedDenoiser, GuidanceReport, aligned_sample
from hmdiff.diffusion.gap import Target
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.sampling import hypothesis_generators, initial_noise
from hmdiff.diffusion.schedule import make_scheduler

everywhere = functools.partial(Guidance, last=1.0)  # in every step
ROWS, POINTS, STEPS, GAIN = 3, 6, 50, 0.6
SCHEDULER = make_scheduler("ddim", STEPS, prediction_type="sample")
MESH = torch.randn(POINTS, 3, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.2, 0.1])


def denoise(points: Tensor, step: Tensor) -> Tensor:
    return MESH + GAIN * points


def target(scale: float = 1.0) -> Target:
    places = scale * torch.randn(ROWS, POINTS, 2, generator=torch.Generator().manual_seed(2))
    nothing, camera = torch.zeros(ROWS), torch.tensor([[1.0, 0.0, 0.0]]).expand(ROWS, -1)
    heatmaps = torch.zeros(1, POINTS, 4, 4)  # read by the likelihood alone
    return Target(places, WEIGHT.expand(ROWS, -1), nothing, nothing, heatmaps, camera, torch.zeros(ROWS, 2))


def aligned(guidance: Guidance, goal: Target, network=denoise) -> AlignedDenoiser:  # type: ignore[no-untyped-def]
    return AlignedDenoiser(network, SCHEDULER, lambda points: points, goal, guidance)


def noise() -> Tensor:
    return torch.randn(ROWS, POINTS, 3, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("number", [9, 29, 48])  # at the last sqrt(alpha_bar) is below its lower bound, 0.1
@pytest.mark.parametrize("of", ["denoiser", "estimate", "disrupted"])
@pytest.mark.parametrize("step", ["gradient", "score"])
def test_the_step_is_the_gradient_times_its_factor(number: int, of: str, step: str) -> None:
    mode, gradient = ("disrupted", "denoiser") if of == "disrupted" else ("dat", of)
    guidance = everywhere(mode=mode, gradient=gradient, step=step, strength=0.1, projection="camera")
    goal, x_t = target(), noise()
    found = aligned(guidance, goal)(x_t, torch.full((ROWS,), (number + 1) / STEPS))
    clean = denoise(x_t, torch.ones(ROWS))
    at = x_t if of == "disrupted" else clean
    residual = at[..., :2] - goal.points
    by_points = torch.nn.functional.pad(2 * WEIGHT[:, None] * residual, (0, 1))  # of D in the points
    share = SCHEDULER.alphas_cumprod[number]
    signal = share.sqrt().clamp_min(0.1)
    # In x_k: times the denoiser's own gain, or 1 / sqrt(alpha_bar) where the gradient stops at x̂_0.
    by_noisy = by_points * {"denoiser": GAIN, "estimate": 1 / signal, "disrupted": 1.0}[of]
    move = (1 - share) / signal * by_noisy
    if step == "score":
        move = move / (2 * (WEIGHT * residual.square().sum(-1)).sum(-1).sqrt())[:, None, None]
    length = move.square().mean((1, 2), keepdim=True).sqrt()
    expected = clean - 0.1 * move * (2 / length).clamp(max=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - clean).norm(dim=-1).max() > 1e-3


def test_no_step_is_longer_than_its_bound() -> None:
    """Two units, root mean square over the points, whatever the gap."""
    guidance = everywhere(step="gradient", projection="camera", strength=0.5)
    x_t, step = noise(), torch.full((ROWS,), 0.6)
    for scale, bounded in ((1000.0, True), (0.01, False)):
        moved = aligned(guidance, target(scale))(x_t, step) - denoise(x_t, step)
        length = moved.square().mean((1, 2)).sqrt()
        assert torch.allclose(length, torch.ones(ROWS)) == bounded and (length <= 1 + 1e-5).all()


def test_a_direction_that_raises_the_gap_is_not_taken() -> None:
    """If x̂_0 falls where x_k rises, the gradient in x_k points the wrong way for x̂_0: the length along it is 0."""
    x_t, step = noise(), torch.full((ROWS,), 0.4)

    def backwards(points: Tensor, step: Tensor) -> Tensor:
        return MESH - GAIN * points

    guidance = everywhere(projection="camera")
    assert torch.equal(aligned(guidance, target(), backwards)(x_t, step), backwards(x_t, step))
    assert not torch.allclose(aligned(guidance, target())(x_t, step), denoise(x_t, step), atol=1e-2)


def test_disrupted_guidance_moves_the_mesh_by_the_residual_of_the_noise() -> None:
    """The Gauss-Newton step at x_k: with f the identity in x and y, weighted residuals decide the length."""
    goal, x_t, step = target(), noise(), torch.full((ROWS,), 0.4)
    found = aligned(everywhere(mode="disrupted", projection="camera"), goal)(x_t, step)
    residual = goal.points - x_t[..., :2]
    way = WEIGHT[:, None] * residual
    along = (WEIGHT[:, None] * residual * way).sum((1, 2)) / (WEIGHT[:, None] * way.square()).sum((1, 2))
    moved = torch.nn.functional.pad(way * along[:, None, None], (0, 1))
    torch.testing.assert_close(found, denoise(x_t, step) + moved, rtol=1e-3, atol=1e-3)


def test_off_is_off_for_all_later_steps() -> None:
    found = aligned(everywhere(threshold=0.1), target())
    for gaps, on in (([1.0, 1.0, 1.0], [1, 1, 1]), ([0.5, 0.05, 0.5], [1, 0, 1]), ([0.5, 0.9, 0.09], [1, 0, 0])):
        found._switch(torch.tensor(gaps))
        assert found.on.tolist() == [bool(each) for each in on]


def test_the_relative_gap_is_relative_to_the_first_estimate_also_where_that_is_not_guided() -> None:
    """With `last`, D_K is that of the first x̂_0, steps before DAT may act."""
    found = aligned(everywhere(last=0.5, threshold=0.05, projection="camera"), target())
    x_t = noise()
    found(x_t, torch.ones(ROWS))
    assert found.first_gap is not None and found.first_estimate is not None
    torch.testing.assert_close(found.first_gap, found.gap(denoise(x_t, torch.ones(ROWS))))
    # At a later step the mesh is on its target already: the gap has closed, and DAT is off.
    closed = torch.nn.functional.pad(target().points, (0, 1))
    found.denoise = lambda points, step: closed
    assert torch.equal(found(x_t, torch.full((ROWS,), 0.4)), closed) and not found.on.any()


def test_a_fall_back_that_is_worse_is_not_taken() -> None:
    """The hypothesis without guidance replaces the guided one only where its gap is smaller."""
    generators = hypothesis_generators(0, [0], ROWS)
    goal, guidance = target(), everywhere(strength=30.0, threshold=0.0, projection="camera")

    def run(unguided: Tensor) -> tuple[Tensor, GuidanceReport]:
        start = initial_noise(generators, POINTS), generators
        return aligned_sample(
            denoise, SCHEDULER, start, 4, 0.0, lambda points: points, goal, guidance, 1, lambda rows: unguided[rows]
        )

    perfect = torch.nn.functional.pad(goal.points, (0, 1))
    points, report = run(perfect)
    assert report.fell_back.all() and torch.equal(points, perfect) and report.gap_after.max() < 1e-10
    _, report = run(perfect + 1e6)
    assert not report.fell_back.any() and (report.gap_after > report.gap_before).all()
    assert report.gap_after.max() < 1e6


def test_reports_of_parts_are_joined_by_their_hypotheses() -> None:
    def part(hypotheses: int, active: float) -> GuidanceReport:
        gap = torch.full((2, hypotheses), float(hypotheses))
        return GuidanceReport(gap, gap / 2, torch.full((4, 2), active), gap > 1)

    whole = GuidanceReport.join([part(1, 1.0), part(3, 0.0)])
    assert (
        whole.gap_before.tolist() == [[1, 3, 3, 3]] * 2 and whole.fell_back.tolist() == [[False, True, True, True]] * 2
    )
    torch.testing.assert_close(whole.active, torch.full((4, 2), 0.25))
    assert math.isclose(whole.gap_after[0, 1].item(), 1.5)
