"""The reverse process against oracles (a perfect denoiser, the exact one of a Gaussian), and its random numbers."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hmdiff.diffusion.sampling import Denoise, hypothesis_generators, initial_noise, sample
from hmdiff.diffusion.schedule import PREDICTION_TYPES, SCHEDULER_NAMES, SCHEDULES, make_scheduler
from hmdiff.errors import UserError

STOCHASTIC = (("ddpm", 0.0), ("ddim", 1.0), ("sde-dpm++", 0.0))


def knowing(clean_of: Denoise, scheduler: object, kind: str) -> Denoise:
    """A denoiser of prediction type `kind` whose x0 prediction is `clean_of`."""
    shares: Tensor = scheduler.alphas_cumprod  # type: ignore[attr-defined]

    def denoise(points: Tensor, step: Tensor) -> Tensor:
        clean = clean_of(points, step)
        if kind == "sample":
            return clean
        share = shares[(step * len(shares) - 1).round().long()][:, None, None]
        noise = (points - share.sqrt() * clean) / (1 - share).sqrt()
        return noise if kind == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * clean

    return denoise


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_perfect_denoiser_recovers_the_mesh(name: str, kind: str, schedule: str) -> None:
    clean = torch.randn(3, 7, 3)
    scheduler = make_scheduler(name, 200, schedule, 4.0, kind)
    for steps in (1, 2, 3, 5, 7, 10, 40):
        generators = hypothesis_generators(0, range(3), 1)
        denoise = knowing(lambda points, step: clean, scheduler, kind)
        result = sample(denoise, scheduler, initial_noise(generators, 7), steps, generators)
        # One step from x_K divides by sqrt(alpha_bar_K), which needs double precision.
        torch.testing.assert_close(result, clean, rtol=0, atol=1e-3 if steps == 1 else 5e-6)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_perfect_denoiser_through_noisy_ddim(kind: str) -> None:
    clean = torch.randn(3, 7, 3)
    scheduler = make_scheduler("ddim", 200, "cosine", 4.0, kind)
    for steps in (2, 3, 8, 10, 40, 200):  # at 3, 8 and 10 diffusers' step takes the root of -6e-8
        generators = hypothesis_generators(0, range(3), 1)
        denoise = knowing(lambda points, step: clean, scheduler, kind)
        result = sample(denoise, scheduler, initial_noise(generators, 7), steps, generators, eta=1.0)
        torch.testing.assert_close(result, clean, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "eta", "steps"),
    [
        ("ddpm", 0.0, 200),
        ("ddim", 1.0, 200),
        ("ddim", 0.0, 100),
        ("dpm++", 0.0, 40),
        ("unipc", 0.0, 40),
        ("euler", 0.0, 100),
        ("heun", 0.0, 40),
        ("sde-dpm++", 0.0, 100),
    ],
)
@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_the_exact_denoiser_of_a_gaussian_gives_that_gaussian(name: str, eta: float, steps: int, kind: str) -> None:
    mean, spread = 0.7, 0.4
    scheduler = make_scheduler(name, 200, "cosine", 1.0, kind)
    shares = scheduler.alphas_cumprod

    def posterior_mean(points: Tensor, step: Tensor) -> Tensor:
        share = shares[(step * len(shares) - 1).round().long()][:, None, None]
        gain = share.sqrt() * spread**2 / (share * spread**2 + 1 - share)
        return mean + gain * (points - share.sqrt() * mean)

    generators = hypothesis_generators(7, range(4), 1)
    noise = initial_noise(generators, 2500)
    result = sample(knowing(posterior_mean, scheduler, kind), scheduler, noise, steps, generators, eta)
    assert result.mean().item() == pytest.approx(mean, abs=0.02)
    assert result.std().item() == pytest.approx(spread, rel=0.05)
    # The tails are normal too.
    assert ((result - mean).abs() > 2 * spread).float().mean().item() == pytest.approx(0.0455, abs=0.012)


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), *STOCHASTIC])
def test_rows_do_not_depend_on_their_batch(name: str, eta: float) -> None:
    scheduler = make_scheduler(name, 200, "cosine", 4.0, "sample")

    def run(people: list[int]) -> Tensor:
        generators = hypothesis_generators(3, people, 2)
        noise = initial_noise(generators, 6)
        result = sample(lambda points, step: 0.5 * points.tanh(), scheduler, noise, 6, generators, eta)
        return result.unflatten(0, (-1, 2))

    together = run([0, 1, 2, 3])
    for person in range(4):
        torch.testing.assert_close(run([person])[0], together[person])
    torch.testing.assert_close(run([3, 1]), together[[3, 1]])
    assert torch.equal(run([0, 1, 2, 3]), together)  # and no state is left in the scheduler


@pytest.mark.parametrize(("name", "eta"), STOCHASTIC)
def test_stochastic_samplers_are_stochastic(name: str, eta: float) -> None:
    scheduler = make_scheduler(name, 200, "cosine", 4.0, "sample")
    start = initial_noise(hypothesis_generators(0, [0], 1), 6).expand(2, -1, -1)
    generators = hypothesis_generators(1, [0, 1], 1)
    result = sample(lambda points, step: 0.5 * points.tanh(), scheduler, start, 6, generators, eta)
    assert (result[0] - result[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_threads_that_share_a_scheduler_give_what_one_gives(name: str) -> None:
    """Concurrent calls with different steps and etas; the pauses interleave the threads within a call."""
    scheduler = make_scheduler(name, 200, "cosine", 4.0, "sample")
    before = copy.deepcopy(scheduler.__dict__)

    def run(call: int) -> Tensor:
        generators = hypothesis_generators(call, [0], 2)

        def denoise(points: Tensor, step: Tensor) -> Tensor:
            time.sleep(0.001)
            return 0.5 * points.tanh()

        return sample(denoise, scheduler, initial_noise(generators, 6), 2 + call % 5, generators, eta=call % 3 / 2)

    serial = [run(call) for call in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for mine, theirs in zip(pool.map(run, range(12)), serial, strict=True):
            assert torch.equal(mine, theirs)
    for key, value in scheduler.__dict__.items():
        assert torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]


def test_generators_differ_and_repeat() -> None:
    def first_draws(seed: int, people: list[int], hypotheses: int, first: int = 0) -> list[float]:
        return initial_noise(hypothesis_generators(seed, people, hypotheses, first), 1)[:, 0, 0].tolist()

    many = first_draws(0, list(range(20)), 25)
    assert len(set(many)) == 500
    assert first_draws(0, [4], 5) == many[100:105]  # the first 5 of 25
    assert first_draws(0, [4], 20, 5) == many[105:125]  # the rest, as a separate chunk
    seeds = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**64, 2**64 + 1]
    assert len({draw for seed in seeds for draw in first_draws(seed, [0, 1, 2], 3)}) == 9 * len(seeds)
    # The two words of a long seed must not collide with a seed and a person.
    assert first_draws(2**32, [5], 1) != first_draws(0, [1], 1, 5)
    with pytest.raises(UserError, match="seed -1: a whole number from 0 on"):
        hypothesis_generators(-1, [0], 1)


def test_noise_is_standard_normal() -> None:
    noise = initial_noise(hypothesis_generators(0, range(10), 10), 200)
    assert noise.shape == (100, 200, 3)
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.01)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(100)
    assert correlation.abs().max() < 0.25  # 600 numbers per row: 1 / sqrt(600) = 0.04


def test_steps_and_callback() -> None:
    scheduler = make_scheduler("ddim", 200, "cosine", 4.0, "sample")
    seen: list[tuple[int, float]] = []
    fractions: list[float] = []

    def denoise(points: Tensor, step: Tensor) -> Tensor:
        assert step.shape == (2,)
        fractions.append(step[0].item())
        return torch.full_like(points, 0.25)

    sample(
        denoise,
        scheduler,
        torch.randn(2, 3, 3),
        4,
        callback=lambda number, timestep, points, prediction: seen.append((number, prediction.mean().item())),
    )
    assert fractions == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [number for number, _ in seen] == [0, 1, 2, 3] and all(mean == 0.25 for _, mean in seen)


def test_noise_prediction_is_bounded_by_its_clean_estimate() -> None:
    """At alpha_bar_K = 1e-4 an error in eps is a hundredfold error in x̂_0: it is clamped to 6 standard deviations."""
    scheduler = make_scheduler("ddim", 200, "cosine", 4.0, "epsilon")
    points = torch.randn(2, 50, 3)
    result = sample(lambda points, step: torch.zeros_like(points), scheduler, points, 1)
    assert result.abs().max() == pytest.approx(6, abs=1e-3)
    free = sample(lambda points, step: torch.zeros_like(points), scheduler, points, 1, clip=1e9)
    torch.testing.assert_close(free, points / 1e-4**0.5, rtol=1e-2, atol=1e-2)
