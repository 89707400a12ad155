"""The forward process: targets and x0 predictions are inverse, weights agree, timesteps are stratified."""

from __future__ import annotations

import pytest
import torch

from hmdiff.diffusion.noising import (
    WEIGHTINGS,
    alpha_bar_at,
    draw_steps,
    loss_weight,
    predict_x0,
    training_target,
)
from hmdiff.diffusion.schedule import PREDICTION_TYPES, make_scheduler


def noisy(share: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return share.sqrt()[..., None, None] * clean + (1 - share).sqrt()[..., None, None] * noise


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_estimate_inverts_target(kind: str) -> None:
    share = torch.tensor([[0.9999, 0.7, 0.3], [0.05, 1e-4, 0.5]], dtype=torch.float64)
    clean, noise = torch.randn(2, 2, 3, 5, 3, dtype=torch.float64)
    points = noisy(share, clean, noise)
    target = training_target(clean, noise, share, kind)
    torch.testing.assert_close(predict_x0(target, points, share, kind), clean, rtol=1e-6, atol=1e-6)
    wrong = predict_x0(target + 0.1, points, share, kind)
    assert (wrong - clean).abs().amax((-1, -2)).min() > 1e-4


def test_targets_at_the_ends() -> None:
    clean, noise = torch.randn(2, 1, 4, 3)
    nothing, everything = torch.zeros(1), torch.ones(1)
    assert torch.equal(training_target(clean, noise, nothing, "v_prediction"), -clean)
    assert torch.equal(training_target(clean, noise, everything, "v_prediction"), noise)
    # At pure noise the velocity determines x_0, whatever x_K is.
    assert torch.equal(predict_x0(-clean, noise, nothing, "v_prediction"), clean)
    assert predict_x0(noise, noise, nothing, "epsilon").isfinite().all()


def test_diffusers_agrees_about_noise_and_velocity() -> None:
    scheduler = make_scheduler("ddpm", 200, "cosine", 4.0, "v_prediction")
    clean, noise, steps = torch.randn(3, 5, 3), torch.randn(3, 5, 3), torch.tensor([0, 90, 199])
    share = alpha_bar_at(scheduler, steps)
    torch.testing.assert_close(noisy(share, clean, noise), scheduler.add_noise(clean, noise, steps))
    velocity = scheduler.get_velocity(clean, noise, steps)
    torch.testing.assert_close(training_target(clean, noise, share, "v_prediction"), velocity)


@pytest.mark.parametrize("weighting", ["min_snr", "truncated_snr"])
def test_the_same_mesh_is_weighted_the_same_whatever_is_predicted(weighting: str) -> None:
    share = torch.tensor([0.999, 0.9, 0.5, 0.1, 1e-3], dtype=torch.float64)
    clean, noise, guess = torch.randn(3, 5, 4, 3, dtype=torch.float64)
    points = noisy(share, clean, noise)
    errors = []
    for kind in PREDICTION_TYPES:
        alpha, sigma = share.sqrt()[:, None, None], (1 - share).sqrt()[:, None, None]
        implied = {
            "sample": guess,
            "epsilon": (points - alpha * guess) / sigma,
            "v_prediction": (alpha * points - guess) / sigma,
        }
        prediction = implied[kind]
        torch.testing.assert_close(predict_x0(prediction, points, share, kind), guess)
        target = training_target(clean, noise, share, kind)
        errors.append(loss_weight(share, kind, weighting) * (prediction - target).square().mean((1, 2)))
    torch.testing.assert_close(errors[0], errors[1])
    torch.testing.assert_close(errors[2], errors[1])


def test_weights_of_the_clean_mesh() -> None:
    share = torch.tensor([0.0, 0.25, 0.75, 0.99])  # SNR 0, 1/3, 3, 99
    assert loss_weight(share, "sample", "uniform").tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(loss_weight(share, "sample", "min_snr"), torch.tensor([0, 1 / 3, 3, 5]))
    torch.testing.assert_close(loss_weight(share, "sample", "truncated_snr", 4.0), torch.tensor([1.0, 1, 3, 4]))
    for weighting in WEIGHTINGS:
        for kind in PREDICTION_TYPES:
            weight = loss_weight(torch.tensor([0.0, 1e-4, 1.0]), kind, weighting)
            assert weight.isfinite().all() and (weight >= 0).all()
    with pytest.raises(ValueError, match="'snr' is none of"):
        loss_weight(share, "sample", "snr")


def test_steps_are_stratified_with_a_share_at_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = draw_steps((2000, 4), 200, 0.0, generator)
    assert steps.dtype == torch.long and steps.min() == 0 and steps.max() == 199
    for level in range(4):
        column = steps[:, level]
        assert column.min() >= 50 * level and column.max() < 50 * (level + 1)
        counts = torch.bincount(column - 50 * level, minlength=50)
        assert counts.min() > 10 and counts.max() < 80  # 40 of each, Poisson
    ended = draw_steps((5000, 4), 200, 0.3, generator)
    share = (ended == 199).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.3, 0.3, 0.3, 0.3 + 0.7 / 50]), rtol=0, atol=0.03)
    assert (draw_steps((64,), 200, 1.0, generator) == 199).all()
    flat = draw_steps((4000,), 200, 0.0, generator)
    assert flat.float().mean().item() == pytest.approx(99.5, abs=4) and flat.max() == 199
    same = [draw_steps((3, 2), 200, 0.2, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*same)
