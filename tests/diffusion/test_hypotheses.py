"""Hypotheses: likelihood, selection, modes, temperature; independent of the batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hmdiff.diffusion.hypotheses import (
    Reprojection,
    apply_temperature,
    heatmap_log_likelihood,
    keypoint_nearness,
    modes,
    select,
    spread,
    take,
    weighted_mean,
)
from hmdiff.errors import UserError
from hmdiff.evaluate.calibration import fit_temperature, tempered_error
from hmdiff.evaluate.metrics import coverage, expected_calibration_error
from hmdiff.heatmaps.distribution import gaussian_heatmaps


def one_map(x: float, y: float, sigma: float = 2.0, peak: float = 1.0) -> Tensor:
    """(1, 1, 64, 64), a joint at crop coordinates (x, y)."""
    return gaussian_heatmaps(torch.tensor([[[x, y]]]), torch.tensor([[peak]]), sigma)


def at(*points: tuple[float, float]) -> Tensor:
    """(1, N, 1, 2)"""
    return torch.tensor(points)[None, :, None]


def test_the_likelihood_falls_with_the_distance_and_never_below_the_floor() -> None:
    points = at((0.1, -0.3), (0.12, -0.3), (0.2, -0.3), (0.9, 0.9), (5.0, 0.0))
    found = heatmap_log_likelihood(points, one_map(0.1, -0.3))[0]
    assert found[0] > found[1] > found[2] > found[3]
    torch.testing.assert_close(found[3:], torch.full((2,), math.log(0.2)), rtol=0, atol=0.03)


def test_the_likelihood_is_a_density() -> None:
    """exp of it averages to 1 over the crop, for any heatmap."""
    side = (torch.arange(256) + 0.5) / 128 - 1
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(1, -1, 1, 2)
    middle, left, right = 1 / 64, -31 / 64, 33 / 64  # centres of pixels, so that the peak is 1
    two = torch.maximum(one_map(left, middle), one_map(right, middle))
    for maps in (one_map(middle, middle), one_map(left, right, 5.0), two):
        assert heatmap_log_likelihood(grid, maps).exp().mean() == pytest.approx(1, abs=0.01)


def test_a_peak_between_pixels_is_not_penalised() -> None:
    """A peak may lie anywhere on the grid; even a one-pixel peak is blurred."""
    pixel = 2 / 64
    for shift in (0.0, 0.25, 0.5):
        x, y = (0.5 + shift) * pixel, 0.5 * pixel
        there, *around = heatmap_log_likelihood(
            at((x, y), (0.5 * pixel, y), (1.5 * pixel, y), (x, -0.5 * pixel)), one_map(x, y)
        )[0]
        assert max(around) - 0.05 < there < min(around) + 0.3  # bilinear sampling alone prefers a pixel's centre
    spike = torch.zeros(1, 1, 64, 64)
    spike[0, 0, 32, 32] = 1.0
    middle, beside = heatmap_log_likelihood(at((0.5 * pixel, 0.5 * pixel), (pixel, 0.5 * pixel)), spike.mul(2))[0]
    assert 0 < middle - beside < 0.3


def test_two_peaks_are_both_likely_and_their_middle_is_not() -> None:
    maps = torch.maximum(one_map(-0.5, 0.0), one_map(0.5, 0.0))
    left, middle, right = heatmap_log_likelihood(at((-0.5, 0.0), (0.0, 0.0), (0.5, 0.0)), maps)[0]
    assert abs(left - right) < 1e-4 and left > middle + 3


def test_joints_count_by_their_confidence_and_those_without_mass_not_at_all() -> None:
    hit, miss = at((0.1, 0.1)), at((-0.9, 0.5))
    sure = one_map(0.1, 0.1)
    difference = heatmap_log_likelihood(hit, sure) - heatmap_log_likelihood(miss, sure)
    unsure = sure * 0.25
    torch.testing.assert_close(
        heatmap_log_likelihood(hit, unsure) - heatmap_log_likelihood(miss, unsure), difference * 0.25
    )
    faint = one_map(-0.9, 0.5, peak=0.01)  # under the floor of `normalised`
    both = torch.cat([sure, faint], 1)
    together = heatmap_log_likelihood(torch.cat([hit, hit], 2), both)
    torch.testing.assert_close(together, heatmap_log_likelihood(hit, sure))
    assert (heatmap_log_likelihood(torch.cat([hit, hit], 2), both * 0) == 0).all()


def test_a_constant_background_does_not_count() -> None:
    clean, noisy = one_map(0.3, 0.2), one_map(0.3, 0.2).clamp_min(0.08)
    points = at((0.3, 0.2), (0.35, 0.2), (-0.8, -0.8))
    torch.testing.assert_close(
        heatmap_log_likelihood(points, noisy), heatmap_log_likelihood(points, clean), rtol=0.02, atol=0.02
    )


def people(count: int = 3, hypotheses: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(count, hypotheses, 24, 3, generator=generator) * 0.1,
        torch.randn(count, hypotheses, generator=generator),
    )


def selected(joints: Tensor, *log_likelihoods: Tensor | None) -> Tensor:
    """Select by joints; the first is the root."""
    return select(joints, joints[:, :, 0], *log_likelihoods)


def test_selection_is_near_the_mean_and_pulled_by_the_likelihood() -> None:
    joints = torch.zeros(1, 5, 2, 3)
    joints[0, :, 1, 0] = torch.tensor([-0.2, -0.1, 0.05, 0.06, 0.19])  # mean 0: the third is nearest
    assert selected(joints).tolist() == [2]
    assert selected(joints, torch.zeros(1, 5)).tolist() == [2]
    assert selected(joints, torch.tensor([[0.0, 0.0, 0.0, 3.0, 0.0]])).tolist() == [3]  # a neighbour that fits better
    assert selected(joints, torch.tensor([[0.0, 0.0, 3.0, 3.1, 0.0]])).tolist() == [2]
    moved = joints + torch.randn(1, 5, 1, 3)  # somewhere else in space: only what is relative to the root counts
    assert selected(moved).tolist() == [2]


def test_the_weighted_mean_follows_what_the_photo_shows_vertex_by_vertex() -> None:
    rest = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.7, 0.0]])  # feet and head, a keypoint at each
    nearness = keypoint_nearness(rest, rest)
    assert nearness.diagonal().min() > 0.999 and torch.allclose(nearness.sum(-1), torch.ones(2))
    points = torch.zeros(1, 2, 2, 3)
    points[0, 1] = 1.0  # two hypotheses, at 0 and at 1
    error = torch.tensor([[[0.0, 0.03], [0.03, 0.0]]])  # the first fits at the feet, the second at the head
    seen = Reprojection(error, torch.ones(1, 2), nearness)
    feet, head = weighted_mean(points, seen)[0, :, 0]
    assert feet < 0.06 and head > 0.94
    unseen = weighted_mean(points, dataclasses.replace(seen, confidence=torch.zeros(1, 2)))
    torch.testing.assert_close(unseen, points.mean(1))
    # Large errors in all hypotheses are clamped and have no effect; a larger mean error lowers the weight everywhere.
    far = dataclasses.replace(seen, error=torch.tensor([[[0.4, 0.03], [0.9, 0.0]]]))
    assert torch.allclose(*(weighted_mean(points, replaced)[0, 1] for replaced in (far, seen)), atol=0.12)
    blind = dataclasses.replace(seen, error=torch.tensor([[[0.0, 0.0], [0.05, 0.0]]]))
    assert weighted_mean(points, blind)[0, 1, 0] < 0.2


def test_selection_is_near_the_weighted_mean() -> None:
    joints = torch.zeros(1, 5, 2, 3)
    joints[0, :, 1, 0] = torch.tensor([-0.2, -0.1, 0.05, 0.06, 0.19])
    error = torch.tensor([[0.05, 0.0, 0.05, 0.05, 0.05]])[..., None]
    seen = Reprojection(error, torch.ones(1, 1), torch.ones(2, 1))
    assert select(joints, joints[:, :, 0], seen=seen).tolist() == [1]
    assert select(joints[:, :3], joints[:, :3, 0], seen=seen.first(3)).tolist() == [1]


def test_selection_uses_the_regressions_likelihood_where_there_is_one() -> None:
    joints, likelihood = people()
    regression = torch.zeros(3, 9)
    assert torch.equal(selected(joints, likelihood, regression), selected(joints, likelihood))
    regression[torch.arange(3), torch.tensor([4, 0, 7])] = 1e4  # eight are equal, one is 2.8 deviations above
    copies = joints[:, :1].expand(-1, 9, -1, -1)
    assert selected(copies, None, regression).tolist() == [4, 0, 7]  # nothing else tells them apart
    line = torch.zeros(1, 5, 2, 3)
    line[0, :, 1, 0] = torch.tensor([-0.2, -0.1, 0.05, 0.06, 0.19])  # mean 0: the third is nearest
    assert selected(line, None, torch.tensor([[0.0, 0.0, 0.0, 3.0, 0.0]])).tolist() == [3]
    assert selected(line, None, torch.tensor([[0.0, 0.0, 3.0, 3.1, 0.0]])).tolist() == [2]


def test_selection_of_one_of_copies_and_of_a_constant_likelihood() -> None:
    joints, likelihood = people()
    assert selected(joints[:, :1], likelihood[:, :1]).tolist() == [0, 0, 0]
    copies = joints[:, :1].expand(-1, 4, -1, -1)
    assert selected(copies, torch.full((3, 4), -7.3)).tolist() == [0, 0, 0]
    assert torch.equal(selected(joints, likelihood * 0 - 2.5), selected(joints))
    assert torch.equal(selected(joints, likelihood * 5 + 3), selected(joints, likelihood))  # its unit does not matter


def test_selection_has_less_error_than_a_draw() -> None:
    """If ground truth and hypotheses come from one posterior, the one nearest the mean beats a random one."""
    generator = torch.Generator().manual_seed(2)
    truth, joints = (torch.randn(200, n, 3, 3, generator=generator) for n in (1, 25))
    error = ((joints - joints[:, :, :1]) - (truth - truth[:, :, :1])).norm(dim=-1).mean(-1)
    chosen = take(error, selected(joints)[:, None])[:, 0]
    assert chosen.mean() < 0.88 * error.mean()


def test_modes_find_the_groups_with_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.3, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, -0.3]])
    belongs = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0, 1, 0])
    joints = torch.zeros(1, 10, 2, 3)
    joints[0, :, 1] = centres[belongs] + 0.01 * torch.randn(10, 3, generator=generator)
    found = modes(joints + torch.randn(1, 10, 1, 3, generator=generator), 3)
    assert torch.equal(found.label[0], belongs)  # the largest first
    torch.testing.assert_close(found.weights, torch.tensor([[0.6, 0.3, 0.1]]))
    for group in range(3):
        members = (belongs == group).nonzero()[:, 0]
        distance = (joints[0, members, 1][:, None] - joints[0, members, 1]).norm(dim=-1).sum(1)
        assert found.index[0, group] == members[distance.argmin()]
    assert torch.equal(found.pick(joints)[0], joints[0, found.index[0]])


def test_modes_of_fewer_hypotheses_than_groups_and_of_copies() -> None:
    joints, _ = people(2, 3)
    found = modes(joints, 5)
    assert found.index.shape == (2, 5) and sorted(found.index[0, :3].tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.weights[0], torch.tensor([1 / 3] * 3 + [0.0, 0.0]))
    copies = modes(joints[:, :1].expand(-1, 4, -1, -1), 2)
    assert copies.weights.tolist() == [[1, 0], [1, 0]] and copies.index.tolist() == [[0, 0], [0, 0]]
    assert (copies.label == 0).all()
    alone = modes(joints[:, :1], 1)
    assert alone.index.tolist() == [[0], [0]] and alone.weights.tolist() == [[1], [1]]
    everybody = modes(joints, 1)
    assert (everybody.label == 0).all() and (everybody.weights == 1).all()
    with pytest.raises(UserError, match="modes: 0 groups; at least 1 is needed"):
        modes(joints, 0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_batch_equals_single(count: int) -> None:
    joints, likelihood = people(count)
    generator = torch.Generator().manual_seed(1)
    projected = torch.rand(count, 9, 5, 2, generator=generator) * 2 - 1
    maps = gaussian_heatmaps(torch.rand(count, 5, 2, generator=generator) - 0.5, torch.ones(count, 5), 2.0)
    whole = heatmap_log_likelihood(projected, maps)
    together = modes(joints, 4)
    for person in range(count):
        one = slice(person, person + 1)
        torch.testing.assert_close(heatmap_log_likelihood(projected[one], maps[one]), whole[one], rtol=1e-5, atol=1e-5)
        assert torch.equal(selected(joints[one], likelihood[one]), selected(joints, likelihood)[one])
        single = modes(joints[one], 4)
        for name in ("index", "weights", "label"):
            assert torch.equal(getattr(single, name), getattr(together, name)[one])


def test_the_order_of_the_hypotheses_does_not_matter() -> None:
    joints, likelihood = people()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(order[selected(joints[:, order], likelihood[:, order])], selected(joints, likelihood))
    first, second = modes(joints, 3), modes(joints[:, order], 3)
    groups = [{frozenset(order[(row == g).nonzero()[:, 0]].tolist()) for g in range(3)} for row in second.label]
    assert groups == [{frozenset((row == g).nonzero()[:, 0].tolist()) for g in range(3)} for row in first.label]


def test_a_temperature_scales_the_spread_and_keeps_the_mean() -> None:
    points, _ = people()
    hot = apply_temperature(points, 2.5)
    torch.testing.assert_close(hot.mean(1), points.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(spread(hot), 2.5 * spread(points))
    torch.testing.assert_close(apply_temperature(points, 1.0), points)
    regressor = torch.rand(5, 24)
    torch.testing.assert_close(regressor @ hot, apply_temperature(regressor @ points, 2.5))
    torch.testing.assert_close(spread(points)[1, 7], (points[1, :, 7] - points[1, :, 7].mean(0)).norm(dim=-1).mean())


def test_the_quick_error_is_that_of_the_tempered_samples() -> None:
    """Medians and distances scale with the temperature, so they are computed once for all temperatures."""
    generator = torch.Generator().manual_seed(5)
    samples, truth = torch.randn(30, 7, 5, 3, generator=generator), torch.randn(30, 5, 3, generator=generator)
    quick = tempered_error(samples, truth)
    for temperature in (0.3, 1.0, 1.7):
        expected = expected_calibration_error(apply_temperature(samples, temperature), truth)
        assert quick(temperature) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_the_fitted_temperature_undoes_a_wrong_spread(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(250, 1, 4, 3, generator=generator)
    truth = (centre + 0.1 * torch.randn(250, 1, 4, 3, generator=generator))[:, 0]
    samples = centre + 0.1 * factor * torch.randn(250, 60, 4, 3, generator=generator)
    found = fit_temperature(samples, truth)
    assert found == pytest.approx(1 / factor, rel=0.08)
    fitted = apply_temperature(samples, found)
    assert expected_calibration_error(fitted, truth) < 0.03
    assert coverage(fitted, truth).mean() == pytest.approx(0.9, abs=0.04)
    if factor != 1.0:
        assert expected_calibration_error(samples, truth) > 0.15


def test_nothing_to_fit_is_named() -> None:
    copies = torch.zeros(3, 1, 4, 3).expand(-1, 5, -1, -1)
    with pytest.raises(UserError, match="the hypotheses are all the same"):
        fit_temperature(copies, copies[:, 0])
    with pytest.raises(UserError, match="3 people with 1 samples each; give more"):
        fit_temperature(copies[:, :1], copies[:, 0])


def test_a_likelihood_that_differs_by_little_still_chooses() -> None:
    """Likelihoods are standardised over the hypotheses: their absolute differences do not matter."""
    vertices = torch.zeros(1, 3, 4, 3)
    vertices[0, :, 0, 0] = torch.tensor([-0.1, 0.1, 0.0]) * 1e-3  # the third is the mean, the two others alike
    root, likely = torch.zeros(1, 3, 3), torch.tensor([[0.0, 0.2, -0.5]])
    assert select(vertices, root, rle_log_likelihood=likely).item() == 2
    assert select(vertices, root, rle_log_likelihood=100 * likely).item() == 2
    alike = torch.zeros(1, 3, 4, 3)
    assert select(alike, root, rle_log_likelihood=likely).item() == 1
    assert select(alike, root, rle_log_likelihood=1e-2 * likely).item() == 1


def test_a_faint_photo_weighs_as_a_clear_one_by_the_persons_error() -> None:
    """The mean error is weighted by confidence: a common factor on all confidences cancels."""
    points = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    error = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(1)) * 0.05
    nearness = torch.zeros(5, 3)  # no keypoint is near: only the mean error counts
    clear, faint = (
        weighted_mean(points, Reprojection(error, torch.full((1, 3), confidence), nearness))
        for confidence in (1.0, 0.01)
    )
    torch.testing.assert_close(faint, clear)
    assert (clear - points.mean(1)).abs().max() > 1e-3
