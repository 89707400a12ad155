"""Confidence: calibrated, informative about the error, and saved with the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import chi
from small import people, small_pipeline

from hmdiff.cli.main import main
from hmdiff.diffusion.confidence import Confidence, fit_confidence
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.calibration import calibrate
from hmdiff.evaluate.reliability import SpreadAndError, measure_spread, plot_reliability, reliability, reliability_rows
from hmdiff.pipeline import HMDiffPipeline


def observed(people: int, seed: int, scale: float = 1.0) -> SpreadAndError:
    """Gaussian errors with the hypotheses' standard deviation; `scale` miscalibrates the spread."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.exp(0.5 * torch.randn(people, 1, generator=generator))
    parts = []
    for points in (24, 300):
        sigma = 40 * whole * torch.exp(0.4 * torch.randn(people, points, generator=generator))
        error = (sigma[..., None] * torch.randn(people, points, 3, generator=generator)).norm(dim=-1)
        parts += [scale * 1.6 * sigma, error]  # the mean distance of a Gaussian to its middle is 1.6 sigma
    return SpreadAndError(*parts, torch.full((people, 3), float("nan")))


@pytest.fixture(scope="module")
def fitted() -> Confidence:
    return fit_confidence(*observed(300, 0)[:4])


def test_it_is_the_probability_of_a_gaussian_error(fitted: Confidence) -> None:
    spread = torch.tensor([[20.0, 60.0, 64.0, 130.0, 300.0]])
    # One person whose mean spread is the population's: the probabilities are those of the chi distribution.
    found = fitted.within(50, spread, torch.full((1, 300), 64.0))
    expected = torch.from_numpy(chi.cdf(50 / (spread.numpy() / 1.6), 3)).float()
    assert (found.joints - expected).abs().max() < 0.1
    assert (found.joints.diff() < 0).all() and found.joints.min() > 0 and found.joints.max() < 1
    wider = fitted.within(100, spread, torch.full((1, 300), 64.0))
    assert (wider.joints > found.joints).all()
    torch.testing.assert_close(found.person, found.vertices.mean(1))


def test_new_people_are_within_as_often_as_it_says_and_misleading_spread_shows(fitted: Confidence) -> None:
    honest = reliability(observed(300, 1), fitted)
    misled = reliability(observed(300, 1, scale=0.5), fitted)
    for kind in ("joints", "vertices"):
        for radius in (50, 100):
            assert honest[kind][radius]["ece"] < 0.05 < 0.1 < misled[kind][radius]["ece"]
            assert honest[kind][radius]["skill"] > 0.1
        for level in (0.5, 0.9):
            coverage = honest["intervals"][kind][level]["coverage"]
            assert coverage == pytest.approx(level, abs=0.03)
            assert misled["intervals"][kind][level]["coverage"] < coverage
    assert honest["person"]["rank_correlation"][100] > 0.8
    shuffled = observed(300, 1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = shuffled._replace(vertex_error=shuffled.vertex_error[order])
    assert abs(reliability(shuffled, fitted)["person"]["rank_correlation"][100]) < 0.2


def test_what_always_is_within_keeps_finite_numbers() -> None:
    certain = SpreadAndError(
        torch.full((20, 24), 5.0),
        torch.full((20, 24), 2.0),
        torch.full((20, 50), 5.0),
        torch.full((20, 50), 2.0),
        torch.zeros(20, 3),
    )
    found = fit_confidence(*certain[:4]).within(50, certain.joint_spread, certain.vertex_spread)
    assert found.joints.min() > 0.9 and found.joints.isfinite().all()
    with pytest.raises(UserError, match="3 people; give at least 10"):
        fit_confidence(*(each[:3] for each in certain[:4]))


def test_it_travels_as_json_and_refuses_what_it_is_not(fitted: Confidence) -> None:
    assert Confidence.from_json(json.loads(json.dumps(fitted.as_json()))) == fitted
    with pytest.raises(UserError, match="finite numbers"):
        Confidence({"joints": {50: (0.0, float("nan"), 0.0)}, "vertices": {}}, {})
    with pytest.raises(UserError, match="within 75 mm was not fitted; choose one of 50, 100"):
        fitted.within(75, torch.ones(1, 24), torch.ones(1, 5))


@pytest.mark.slow
def test_a_pipeline_learns_it_with_the_temperature_and_keeps_it(tmp_path: Path) -> None:
    pipe = small_pipeline()
    data = people(True)
    _, before = measure_spread(pipe, data, "val", 8, SamplingConfig(4, 2))
    temperature = calibrate(pipe, data, "val", 16, SamplingConfig(4, 2)).temperature
    block = data.block("val", 0)
    from hmdiff.evaluate.evaluation import as_heatmaps, predict_batch

    output = predict_batch(pipe, block, as_heatmaps(block), SamplingConfig(4, 2))
    own = output.temperature[:, None]
    assert own.unique().numel() > 1 and own.min() < temperature < own.max()
    torch.testing.assert_close(output.joint_spread, before.joint_spread * own, rtol=1e-3, atol=1e-2)
    within = output.within(100)
    assert within is not None and within.vertices.shape == output.spread.shape and within.joints.shape == (8, 24)
    found = output.confidences(3)
    assert set(found) == {
        "confidence",
        "confidence_50mm",
        "confidence_100mm",
        "joint_confidence_50mm",
        "joint_confidence_100mm",
    }
    torch.testing.assert_close(found["confidence"], within.person[3])
    pipe.save_pretrained(tmp_path / "saved")
    again = HMDiffPipeline.from_pretrained(tmp_path / "saved")
    mine, saved = (each.calibration(SamplingConfig(num_inference_steps=2)) for each in (pipe, again))
    assert mine is not None and saved is not None and saved.confidence == mine.confidence is not None
    other = predict_batch(again, block, as_heatmaps(block), SamplingConfig(4, 3))  # three steps: not fitted
    assert other.within(50) is None and other.confidences(0) == {}


@pytest.mark.slow
def test_the_command_prints_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmdiff.cli.splits.test_people", lambda *_: people(True))
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    command = [
        "evaluate",
        "--reliability",
        "--checkpoint",
        str(tmp_path / "pipe"),
        "--people",
        "8",
        "--steps",
        "2",
        "--num-hypotheses",
        "3",
        "--split",
        "val",
        "test",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert "no confidence was fitted" in capsys.readouterr().err
    calibrate(pipe, people(True), "val", 16, SamplingConfig(3, 2))
    pipe.save_pretrained(tmp_path / "pipe")
    assert main(command) == 0
    reports = json.loads((tmp_path / "out" / "reliability_pipe.json").read_text())
    assert set(reports) == {"val", "test"} and "vertices" in capsys.readouterr().out
    assert (tmp_path / "out" / "reliability_pipe.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_diagram_and_the_table_have_every_split(fitted: Confidence, tmp_path: Path) -> None:
    reports = {"val": reliability(observed(60, 1), fitted), "ood": reliability(observed(60, 2, 0.6), fitted)}
    plot_reliability(reports, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    rows = reliability_rows("ood", reports["ood"])
    assert [row[0] for row in rows] == ["ood", "", "", ""] and rows[3][2] == "100 mm"
