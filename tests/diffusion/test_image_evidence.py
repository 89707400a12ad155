"""Image evidence: the three features, the fitted factor, and its effect on calibration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.diffusion.hypotheses import apply_temperature
from hmdiff.diffusion.image_evidence import LARGEST, EvidenceFactor, fit_evidence_factor, image_evidence
from hmdiff.errors import UserError
from hmdiff.evaluate.metrics import expected_calibration_error


def drawn(people: int, seed: int, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Samples with the same spread for all people; errors scale with exp(weight x confidence) of each."""
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.full((people, 3), float("nan"))
    evidence[:, 1] = torch.rand(people, generator=generator)
    sigma = 0.05 * (weight * (evidence[:, 1] - 0.5)).exp()
    truth = torch.randn(people, 14, 3, generator=generator)
    mean = truth + sigma[:, None, None] * torch.randn(people, 14, 3, generator=generator)
    return mean[:, None] + 0.05 * torch.randn(people, 40, 14, 3, generator=generator), truth, evidence


def test_the_numbers_are_what_they_are_called() -> None:
    joints = torch.zeros(2, 2, 24, 3)
    joints[0, 0, :, 0], joints[0, 1, :, 0] = 0.06, -0.06  # each lies 60 mm from their mean
    confidence = torch.zeros(2, 26)
    confidence[:, HALPE26.index("nose")] = 1  # no limb
    confidence[1, [HALPE26.index(name) for name in ("left_wrist", "right_hip", "left_knee")]] = 0.8
    found = image_evidence(joints, confidence, torch.tensor([0.0, 0.0975]))
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, math.log(0.0025)]), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1, 1:], torch.tensor([3 * 0.8 / 12, math.log(0.1)]), rtol=0, atol=1e-4)
    assert image_evidence(joints)[:, 1:].isnan().all() and image_evidence(joints).shape == (2, 3)


@pytest.mark.parametrize("weight", [-1.5, 0.8])
def test_the_fit_finds_how_the_error_grows_and_calibrates_every_kind_of_person(weight: float) -> None:
    samples, truth, evidence = drawn(600, 0, weight)
    factor = fit_evidence_factor(samples, truth, evidence)
    assert factor.weights[1] == pytest.approx(weight, abs=0.15)
    assert factor.weights[0] == factor.weights[2] == 0  # unknown features
    others, their_truth, their_evidence = drawn(600, 1, weight)
    scaled = apply_temperature(others, factor(their_evidence))
    for part in (their_evidence[:, 1] < 0.2, their_evidence[:, 1] > 0.8):
        before = expected_calibration_error(others[part], their_truth[part])
        assert expected_calibration_error(scaled[part], their_truth[part]) < 0.05 < 0.08 < before


def test_nothing_is_added_to_a_spread_that_follows_the_error_already() -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = torch.full((600, 3), float("nan"))
    evidence[:, 1] = torch.rand(600, generator=generator)
    sigma = 0.05 * (1.5 * (evidence[:, 1] - 0.5)).exp()[:, None, None]
    truth = torch.randn(600, 14, 3, generator=generator)
    mean = truth + sigma * torch.randn(600, 14, 3, generator=generator)
    samples = mean[:, None] + sigma[:, None] * torch.randn(600, 40, 14, 3, generator=generator)
    assert fit_evidence_factor(samples, truth, evidence).weights[1] == pytest.approx(0, abs=0.15)


def test_what_is_not_known_and_what_is_extreme() -> None:
    factor = EvidenceFactor((1.0, 2.0, 3.0), (0.5, 0.5, -3.0))
    nan = float("nan")
    found = factor(torch.tensor([[nan, nan, nan], [0.5, 0.7, -3.0], [9.0, 9.0, 9.0], [-9.0, 0.0, -9.0]]))
    expected = torch.tensor([1.0, math.exp(0.4), LARGEST, 1 / LARGEST])
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="finite weights"):
        EvidenceFactor((1.0, nan, 0.0), (0.0, 0.0, 0.0))
    with pytest.raises(UserError, match="3 weights and means"):
        EvidenceFactor((1.0,), (0.0,))
