"""Rank correlation of uncertainty and error: known values, a readable reference, intervals over people."""

from __future__ import annotations

import math

import pytest
import torch

from hmdiff.evaluate.uncertainty_metrics import rank_correlation, uncertainty_correlations


def test_ranks_by_hand() -> None:
    up = torch.tensor([1.0, 2.0, 5.0, 100.0])
    assert rank_correlation(up, up.log()) == pytest.approx(1)
    assert rank_correlation(up, -up) == pytest.approx(-1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert rank_correlation(up, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
    # Ties get their mean rank: Pearson's correlation of 1 2 3 4 and 1.5 1.5 3 4.
    ranks = torch.tensor([[1.0, 2, 3, 4], [1.5, 1.5, 3, 4]])
    expected = torch.corrcoef(ranks)[0, 1].item()
    assert rank_correlation(up, torch.tensor([0.0, 0.0, 1.0, 2.0])) == pytest.approx(expected)


def test_what_has_no_label_or_no_order() -> None:
    uncertainty, error = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, math.nan, 2, 3])
    assert rank_correlation(uncertainty, error) == pytest.approx(1)
    assert math.isnan(rank_correlation(torch.ones(4), uncertainty))
    assert math.isnan(rank_correlation(uncertainty[:1], error[:1]))
    found = uncertainty_correlations(torch.ones(5, 3), torch.rand(5, 3), resamples=5)
    assert all(math.isnan(number) for numbers in found.values() for number in numbers)
    assert math.isnan(uncertainty_correlations(torch.ones(0, 3), torch.ones(0, 3))["pooled"][0])


def test_a_table_of_the_joints_is_pooled_and_nothing_else() -> None:
    """A constant σ̂ per joint correlates pooled over joints, but neither within joints nor by person."""
    scale = torch.linspace(0.1, 3, 6)
    error = torch.rand(150, 6) * scale
    constant = uncertainty_correlations(scale.expand(150, -1), error, resamples=40)
    assert constant["pooled"][0] > 0.5
    assert math.isnan(constant["within_joint"][0]) and math.isnan(constant["by_person"][0])
    hard = torch.rand(150, 1) + 0.1
    knows = uncertainty_correlations(hard * scale, error * hard, resamples=40)
    for value, low, high in knows.values():
        assert value > 0.3 and low < value < high
    assert knows == uncertainty_correlations(hard * scale, error * hard, resamples=40)
    nothing = uncertainty_correlations(torch.rand(150, 6), error, resamples=40)
    for _, low, high in nothing.values():
        assert low < 0.1 and high > -0.1


def test_a_missing_joint_counts_in_neither_mean() -> None:
    error = torch.tensor([[1.0, math.nan], [2.0, 2.0], [3.0, 3.0]])
    uncertainty = torch.tensor([[1.0, 1000.0], [2.0, 2.0], [3.0, 3.0]])
    assert uncertainty_correlations(uncertainty, error, resamples=5)["by_person"][0] == pytest.approx(1)
