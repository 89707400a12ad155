"""Weights and scores of hypotheses against independent formulas: likelihood, nearness, weighted mean, modes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from hmdiff.diffusion.hypotheses import (
    Reprojection,
    apply_temperature,
    heatmap_log_likelihood,
    keypoint_nearness,
    modes,
    select,
    weighted_mean,
)
from hmdiff.heatmaps.distribution import gaussian_heatmaps


def test_the_likelihood_equals_scipys() -> None:
    """Background off, to the fourth power, blurred by one pixel, a density over the crop, a fifth of it uniform."""
    heatmaps = gaussian_heatmaps(torch.tensor([[[0.2, -0.3]]]), torch.tensor([[0.7]]), 4.0)
    relative = heatmaps[0, 0].double().numpy() / 0.7
    sharp = np.clip(relative / relative.max() - 0.1, 0, None) ** 4
    density = gaussian_filter(sharp, 1.0, mode="constant", truncate=3.0)
    density /= density.mean()
    rows, columns = np.array([22, 24, 26, 40]), np.array([38, 40, 42, 10])
    places = torch.tensor(np.stack([(columns + 0.5) / 32 - 1, (rows + 0.5) / 32 - 1], -1)).float()  # centres of pixels
    expected = heatmaps.max().item() * np.log(0.8 * density[rows, columns] + 0.2)
    found = heatmap_log_likelihood(places[None, :, None], heatmaps)[0]
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=2e-3, rtol=1e-3)
    assert expected.max() > 1 > expected[3] + 1


def test_outside_the_crop_there_is_no_density() -> None:
    """A joint seen at the border is not seen beyond it."""
    heatmaps = gaussian_heatmaps(torch.tensor([[[0.98, 0.0]]]), torch.ones(1, 1), 2.0)
    inside, outside = heatmap_log_likelihood(torch.tensor([[[[0.97, 0.0]], [[1.5, 0.0]]]]), heatmaps)[0]
    assert inside > 2 and abs(outside.item() - heatmaps.max().item() * math.log(0.2)) < 1e-5


def test_nearness_is_a_softmax_over_distances_in_body_heights() -> None:
    """The same for a body and for one of half the size; a larger reach is wider."""
    vertices, keypoints = torch.randn(20, 3), torch.randn(4, 3)
    height = (vertices.max(0).values - vertices.min(0).values).max()
    distance = (vertices[:, None] - keypoints).norm(dim=-1)
    for reach in (0.06, 0.3):
        expected = torch.softmax(-distance / (reach * height), -1)
        torch.testing.assert_close(keypoint_nearness(vertices, keypoints, reach), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keypoint_nearness(vertices / 2, keypoints / 2), keypoint_nearness(vertices, keypoints))


def test_the_weighted_mean_equals_its_formula() -> None:
    points, error = torch.randn(2, 5, 7, 3), torch.rand(2, 5, 4) * 0.05
    error[0, 1, 2] = 0.9  # of a false detection: counts as a tenth of the crop
    confidence, nearness = torch.rand(2, 4), torch.rand(7, 4).softmax(-1)
    found = weighted_mean(points, Reprojection(error, confidence, nearness))
    for person in range(2):
        for vertex in range(7):
            cost = []
            for number in range(5):
                bounded = [min(e, 0.1) for e in error[person, number].tolist()]
                weighted = [e * c for e, c in zip(bounded, confidence[person].tolist(), strict=True)]
                near = sum(w * n for w, n in zip(weighted, nearness[vertex].tolist(), strict=True))
                cost.append(near / 0.01 + sum(weighted) / confidence[person].sum().item() / 0.005)
            weight = torch.softmax(-torch.tensor(cost), 0)
            expected = (weight[:, None] * points[person, :, vertex]).sum(0)
            torch.testing.assert_close(found[person, vertex], expected, rtol=1e-3, atol=1e-4)


def test_likelihoods_lower_the_score_by_their_weights() -> None:
    """Two hypotheses, equally near the mean: the standardised likelihoods differ by 2, weighted 0.25 and 0.35."""
    vertices = torch.zeros(1, 2, 1, 3)
    vertices[0, :, 0, 0] = torch.tensor([-0.1, 0.1])
    root, first, second = torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert select(vertices, root, first).item() == 0 and select(vertices, root, second).item() == 1
    assert select(vertices, root, first, second).item() == 1 and select(vertices, root, second, first).item() == 0


def test_ties_between_modes_go_to_the_lowest_hypothesis_and_rounding_makes_none() -> None:
    joints = torch.zeros(1, 4, 2, 3)
    joints[0, :, 1, 0] = torch.tensor([0.5, -0.5, -0.5, 0.5])
    joints[0, 2:, 1] += 1e-6  # rounding of two copies of one mesh
    found = modes(joints, 4)
    assert found.weights.tolist() == [[0.5, 0.5, 0, 0]] and found.label.tolist() == [[0, 1, 1, 0]]
    assert found.index[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rounding_makes_no_mode_wherever_it_falls(count: int) -> None:
    """On a grid of 0.1 mm two copies may lie on either side of a line."""
    mesh = torch.rand(1, 1, 24, 3).double()
    joints = mesh + torch.linspace(-1, 1, 4).view(1, 4, 1, 1) * torch.rand(1, 1, 24, 3).double() * 1e-5
    found = modes(joints, count)
    assert found.label.eq(0).all() and found.weights[0].tolist() == [1.0] + [0.0] * (count - 1)


def test_every_person_has_a_temperature() -> None:
    points = torch.randn(2, 5, 7, 3)
    hot = apply_temperature(points, torch.tensor([0.5, 3.0]))
    for person, factor in enumerate((0.5, 3.0)):
        torch.testing.assert_close(hot[person], apply_temperature(points, factor)[person])


def test_where_a_mesh_is_does_not_count() -> None:
    """Root-relative: each hypothesis may be moved as a whole."""
    vertices = 0.1 * torch.randn(20, 6, 5, 3)
    moved = torch.randn(20, 6, 1, 3)
    root = vertices[:, :, 0]
    assert torch.equal(select(vertices + moved, root + moved[:, :, 0]), select(vertices, root))


def test_modes_come_with_the_largest_first() -> None:
    sizes = torch.tensor([[1, 2, 5], [5, 2, 1], [2, 5, 1], [1, 5, 2], [5, 1, 2], [2, 1, 5]])
    for counts in sizes.tolist():
        joints = torch.zeros(1, 8, 2, 3)
        joints[0, :, 1, 0] = torch.tensor([0.3, 1.0, 2.2]).repeat_interleave(torch.tensor(counts))
        joints[..., 1, 1] = 0.01 * torch.randn(8)
        found = modes(joints, 3)
        assert found.weights.tolist() == [[5 / 8, 2 / 8, 1 / 8]]
        assert torch.bincount(found.label[0]).tolist() == [5, 2, 1]


def test_the_errors_of_the_first_hypotheses_are_theirs() -> None:
    seen = Reprojection(torch.rand(2, 5, 4), torch.rand(2, 4), torch.rand(7, 4))
    first = seen.first(2)
    assert torch.equal(first.error, seen.error[:, :2])
    assert first.confidence is seen.confidence and first.nearness is seen.nearness


def test_a_persons_selection_does_not_depend_on_the_level_of_the_others() -> None:
    vertices, root = 0.1 * torch.randn(30, 6, 5, 3), torch.zeros(30, 6, 3)
    likelihood = torch.randn(30, 6) * torch.linspace(0.01, 50, 30)[:, None] + 1e3 * torch.randn(30, 1)
    together = select(vertices, root, likelihood, -likelihood.flip(1))
    alone = [
        select(vertices[i : i + 1], root[:1], likelihood[i : i + 1], -likelihood[i : i + 1].flip(1)) for i in range(30)
    ]
    assert torch.equal(together, torch.cat(alone))
