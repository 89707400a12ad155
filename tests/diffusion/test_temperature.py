"""Temperatures, evidence factors and confidence: per person, per kind, by their settings, and through JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from hmdiff.diffusion.confidence import Confidence, fit_confidence
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.image_evidence import EvidenceFactor, fit_evidence_factor, image_evidence
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.schedule import PREDICTION_TYPES, SCHEDULER_NAMES, load_scheduler, make_scheduler, sampler_name
from hmdiff.diffusion.temperature import Sampling, Temperature

FACTOR = EvidenceFactor((0.5, -1.0, 0.25), (0.1, 0.6, -3.0))
FITTED = Confidence(
    {
        "joints": {50: (1.0, -2.0, 0.5), 100: (2.0, -2.0, 0.3)},
        "vertices": {50: (0.5, -1.0, -0.7), 100: (1.5, -1.0, 0.0)},
    },
    {"joints": {0.5: 0.9, 0.9: 2.0}, "vertices": {0.5: 0.7, 0.9: 1.5}},
)


def test_a_temperature_is_the_fitted_one_times_the_persons_factor() -> None:
    evidence = torch.tensor([[0.1, 0.6, -3.0], [0.5, 0.2, -2.0]])
    sampling = Sampling(10, "ddim")
    torch.testing.assert_close(Temperature(sampling, 1.7).of(evidence), torch.full((2,), 1.7))
    found = Temperature(sampling, 1.7, evidence=FACTOR).of(evidence)
    torch.testing.assert_close(found, 1.7 * torch.tensor([1.0, math.exp(0.5 * 0.4 + 0.4 + 0.25)]))


def test_settings_that_change_the_spread_are_told_apart() -> None:
    """eta is DDIM's alone; guidance that does nothing is none."""

    def of(**values: object) -> Sampling:
        return Sampling.of(SamplingConfig(num_inference_steps=5, **{"scheduler": "ddim", "eta": 0.0, **values}))  # type: ignore[arg-type]

    plain = of()
    assert of(eta=0.5) != plain and of(scheduler="dpm++", eta=0.5) == of(scheduler="dpm++", eta=0.0) != plain
    assert of(guidance=Guidance()) != of(guidance=Guidance(strength=0.5)) != plain
    assert of(guidance=Guidance(strength=0.0)) == of(guidance=Guidance(mode="none")) == plain


def test_a_temperature_comes_back_from_json() -> None:
    guided = Sampling.of(SamplingConfig(num_inference_steps=5, scheduler="ddim", eta=0.3, guidance=Guidance(last=0.5)))
    whole = Temperature(guided, 1.3, {"split": "val"}, FITTED, FACTOR)
    stored = json.loads(json.dumps(whole.as_json()))
    assert Temperature.from_json(stored) == whole and stored["guidance"]["last"] == 0.5
    del stored["guidance"]["peaks"], stored["confidence"], stored["evidence"]  # as written before there were these
    assert Temperature.from_json(stored) == Temperature(guided, 1.3, {"split": "val"})
    plain = Temperature(Sampling(4, "dpm++"), 0.8)
    assert Temperature.from_json(json.loads(json.dumps(plain.as_json()))) == plain


def test_confidence_is_its_logistic_formula_by_kind() -> None:
    joints, vertices = torch.tensor([[60.0, 0.2]]), torch.tensor([[120.0, 240.0, 60.0]])
    found, person = FITTED.within(50, joints, vertices), math.log(140 / 60)

    def probability(a: float, b: float, c: float, spread: float) -> float:
        return 1 / (1 + math.exp(-(a + b * math.log(max(spread, 1.0) / 60) + c * person)))

    expected = [probability(1.0, -2.0, 0.5, spread) for spread in (60.0, 1.0)]
    torch.testing.assert_close(found.joints[0], torch.tensor(expected))
    expected = [probability(0.5, -1.0, -0.7, spread) for spread in (120.0, 240.0, 60.0)]
    torch.testing.assert_close(found.vertices[0], torch.tensor(expected))
    torch.testing.assert_close(found.person[0], torch.tensor(expected).mean())
    spread = torch.tensor([0.1, 50.0])
    torch.testing.assert_close(FITTED.interval(0.9, spread), torch.tensor([2.0, 100.0]))
    torch.testing.assert_close(FITTED.interval(0.5, spread, "vertices"), torch.tensor([0.7, 35.0]))


def test_a_fit_leaves_out_the_root_and_what_has_no_label() -> None:
    """Quantiles of the error over the spread, the ceil(level (n + 1))-th smallest; the root's error is 0."""
    generator = torch.Generator().manual_seed(0)
    spread = 20 + 60 * torch.rand(12, 6, generator=generator)
    error = spread * torch.rand(12, 6, generator=generator) * 3
    error[:, 0], error[3, 2:4], error[7] = 0.0, torch.nan, torch.nan
    found = fit_confidence(spread, error, spread, error.nan_to_num(40.0))
    ratio = (error / spread)[:, 1:]
    ratio = ratio[ratio.isfinite()].double().sort().values
    for level, quantile in found.quantiles["joints"].items():
        assert quantile == pytest.approx(ratio[math.ceil(level * (len(ratio) + 1)) - 1].item(), rel=1e-5)
    assert all(
        math.isfinite(value) for kind in found.coefficients.values() for three in kind.values() for value in three
    )
    # The logistic fit is the maximum: its residuals are orthogonal to the features, but for the ridge.
    known = error[:, 1:].isfinite()
    within = found.within(50, spread, spread).joints[:, 1:][known]
    inside = (error[:, 1:][known] < 50).float()
    own = (spread[:, 1:] / 60).log()[known]
    person = (spread.mean(-1, keepdim=True) / 60).log().expand(-1, 5)[known]
    for feature in (torch.ones_like(own), own, person):
        assert abs(((within - inside) * feature).mean().item()) < 2e-3


def test_evidence_is_bounded_and_centred() -> None:
    joints = torch.randn(3, 4, 24, 3)
    confidence = torch.full((3, 26), 2.5)  # peaks of heatmaps that are no probabilities
    assert image_evidence(joints, confidence)[:, 1].tolist() == [1.0] * 3
    generator = torch.Generator().manual_seed(0)
    evidence = torch.randn(40, 3, generator=generator) + torch.tensor([5.0, -2.0, 1.0])
    samples = torch.randn(40, 6, 4, 3, generator=generator)
    factor = fit_evidence_factor(samples, torch.randn(40, 4, 3, generator=generator), evidence)
    assert factor.middle == pytest.approx(evidence.double().mean(0).tolist(), rel=1e-5)
    assert EvidenceFactor.from_json({"weights": factor.weights, "middle": factor.middle}) == factor


def test_the_evidence_fit_is_the_maximum_of_its_penalised_likelihood() -> None:
    """Errors are Student-t with 5 degrees of freedom in three dimensions; the ridge of 1e-3 is on w alone."""
    generator = torch.Generator().manual_seed(1)
    evidence = torch.randn(60, 3, generator=generator)
    samples = torch.randn(60, 30, 4, 3, generator=generator)
    error = (evidence @ torch.tensor([1.2, -0.8, 0.5])).exp()[:, None, None] * torch.randn(
        60, 4, 3, generator=generator
    )
    mean = samples.mean(1)
    factor = fit_evidence_factor(samples, mean - error, evidence)
    weights = torch.tensor(factor.weights, dtype=torch.float64).requires_grad_()
    away = evidence.double() - evidence.double().mean(0)
    squared = error.double().square().sum(-1) / (samples.var(1).sum(-1).double() + 1e-8)

    def loss(level: Tensor) -> Tensor:
        scale = (level + away @ weights)[:, None]
        return (4 * torch.log1p(squared * (-2 * scale).exp() / 5) + 3 * scale).mean() + 1e-3 * weights.square().sum()

    level = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    for _ in range(30):  # Newton's method for the level, which the fit discards
        (slope,) = torch.autograd.grad(loss(level), level, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, level)
        level = (level - slope / curvature).detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(level), weights)
    assert slope.abs().max() < 3e-4 and weights.abs().max() > 0.8


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_saved_schedule_comes_back(name: str, kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = make_scheduler(name, 50, "cosine", 2.0, kind)
    made.save_pretrained(tmp_path)
    found = load_scheduler(tmp_path / "scheduler_config.json", name)
    assert sampler_name(found) == name and found.config.prediction_type == kind
    assert torch.equal(found.alphas_cumprod, made.alphas_cumprod)
    for scheduler in (made, found):
        scheduler.set_timesteps(7)
    assert torch.equal(found.timesteps, made.timesteps) and found.timesteps[0] == 49


def test_settings_are_shown_in_a_line() -> None:
    assert str(Sampling(10, "ddim", 0.5, "{}")) == "ddim, 10 steps, eta 0.5, guided"
    assert str(Sampling(3, "dpm++")) == "dpm++, 3 steps"
