"""Schedules: alpha_bar, and that diffusers' schedulers hold the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from small import people_block

from hmdiff.diffusion.ddim import ListedDDIMScheduler
from hmdiff.diffusion.schedule import (
    EPSILON_TERMINAL,
    PREDICTION_TYPES,
    SCHEDULER_NAMES,
    SCHEDULES,
    alpha_bars,
    change_scheduler,
    make_scheduler,
    sampler_name,
)
from hmdiff.errors import UserError
from hmdiff.models.recovery import MeshRecoveryModel


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_step_is_noise(name: str, kind: str, schedule: str) -> None:
    scheduler = make_scheduler(name, 200, schedule, 4.0, kind)
    shares = scheduler.alphas_cumprod.double()
    assert (shares.diff() < 0).all() and shares[0] > 0.95
    if kind == "epsilon":
        assert shares[-1].item() == pytest.approx(EPSILON_TERMINAL, rel=1e-2)
    elif name in ("ddim", "ddpm"):
        assert shares[-1] == 0
    else:
        assert 0 < shares[-1] <= 2.0**-24 * 1.01  # solvers need a finite log SNR
    terminal = {"epsilon": EPSILON_TERMINAL}.get(kind, 0.0 if name in ("ddim", "ddpm") else 2.0**-24)
    np.testing.assert_allclose(shares, alpha_bars(200, schedule, 4.0, terminal), rtol=1e-3, atol=1e-8)


def test_the_linear_trap() -> None:
    """DDPM's betas over the paper's 200 steps leave a third of the amplitude; ours none."""
    plain = np.cumprod(1 - np.linspace(1e-4, 0.02, 200))
    assert plain[-1] == pytest.approx(0.13, abs=0.005)
    assert alpha_bars(200, "linear")[-1] == 0
    assert alpha_bars(200, "linear")[0] == pytest.approx(plain[0])


def test_cosine_without_shift_is_nichol_and_dhariwal() -> None:
    steps = np.arange(1, 201) / 200
    expected = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bars(200), expected, atol=2e-6)


@pytest.mark.parametrize("shift", [0.5, 2.0, 4.0])
def test_shift_divides_the_snr(shift: float) -> None:
    plain, shifted = alpha_bars(200, "cosine"), alpha_bars(200, "cosine", shift)
    middle = slice(0, 150)  # away from the end, where the rescaling to zero matters
    ratio = (plain / (1 - plain))[middle] / (shifted / (1 - shifted))[middle]
    np.testing.assert_allclose(ratio, shift**2, rtol=0.03)
    assert ((shifted < plain) == (shift > 1))[:-1].all() and shifted[-1] == plain[-1] == 0


def test_normalised_meshes_have_about_unit_spread() -> None:
    """The signal-to-noise ratio assumes data of unit variance."""
    sample = people_block("train", 0, 32)
    assert sample.coarse_vertices is not None
    default = MeshRecoveryModel(num_vertices=8, num_coarse=8, encoder_depth=1, depth=1).config.mesh_scale
    assert 0.7 < (sample.coarse_vertices / default).std().item() < 1.3


def test_changing_the_sampler_keeps_the_schedule() -> None:
    for kind in PREDICTION_TYPES:
        trained = make_scheduler("ddim", 200, "cosine", 4.0, kind)
        for name in SCHEDULER_NAMES:
            other = change_scheduler(trained, name)
            assert sampler_name(other) == name
            assert other.config.prediction_type == kind and other.config.timestep_spacing == "trailing"
            # The training schedule, except for the solvers' lower bound on the last value.
            expected = trained.alphas_cumprod.clamp_min(0 if name in ("ddim", "ddpm") else 2.0**-24)
            torch.testing.assert_close(other.alphas_cumprod, expected, rtol=1e-4, atol=1e-10)
            again = type(other).from_config(other.config)
            assert sampler_name(again) == name and torch.equal(again.alphas_cumprod, other.alphas_cumprod)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("steps", [1, 3, 7, 40])
def test_sampling_starts_at_the_last_training_step(name: str, steps: int) -> None:
    scheduler = make_scheduler(name, 200, "cosine", 4.0, "sample")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[0] == 199 and len(set(scheduler.timesteps.tolist())) == steps


def test_ddim_equals_diffusers_where_that_is_right() -> None:
    ours = make_scheduler("ddim", 200, "cosine", 4.0, "v_prediction")
    assert isinstance(ours, ListedDDIMScheduler)
    theirs = DDIMScheduler.from_config(ours.config)
    points, prediction = torch.randn(2, 4, 5, 3)
    for steps in (2, 5, 40, 200):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        for timestep in ours.timesteps[[0, steps // 2, -1]]:
            for eta in (0.0, 0.5):
                seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
                mine, clean = ours.step(prediction, timestep, points, eta, generator=seeds[0], return_dict=False)
                other = theirs.step(prediction, timestep, points, eta, generator=seeds[1])
                torch.testing.assert_close(mine, other.prev_sample, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(clean, other.pred_original_sample, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="set_timesteps"):
        make_scheduler("ddim").step(prediction, 199, points)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="scheduler 'pndm' is not known; choose one of ddim"):
        make_scheduler("pndm")
    with pytest.raises(UserError, match="prediction_type 'x0'"):
        make_scheduler("ddim", prediction_type="x0")
    with pytest.raises(UserError, match="schedule 'sigmoid'"):
        make_scheduler("ddim", schedule="sigmoid")
    with pytest.raises(UserError, match="'nothing' is not known"):
        change_scheduler(make_scheduler("ddim"), "nothing")
    with pytest.raises(UserError, match="DDIMScheduler: not one of our"):
        sampler_name(DDIMScheduler())
