"""One step of the optimisation loop: clipped and accumulated gradients, the average of the weights, its optimisers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from small import small_config
from torch import Tensor, nn

from hmdiff.config import TrainingConfig
from hmdiff.train.loop import Trainer
from hmdiff.train.optimizer import build_optimizer, rate_share

pytestmark = pytest.mark.usefixtures("on_the_processor")


def gradients(trainer: Trainer, batches: list) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the optimiser is given in one step, and the logged terms; the step itself is not taken."""
    found: list[Tensor] = []
    kept = trainer.optimizer.step
    learned = [p for p in trainer.plain.parameters() if p.requires_grad]
    trainer.optimizer.step = lambda: found.extend(  # type: ignore[method-assign]
        torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in learned
    )
    terms = trainer._one_step(iter(batches))
    trainer.optimizer.step = kept  # type: ignore[method-assign]
    return found, terms


def test_gradients_are_clipped_and_averaged_over_the_parts_of_a_step(tmp_path: Path) -> None:
    free = ("training.gradient_clip=1e9", "training.muon_learning_rate=0.02")
    trainer = Trainer(small_config(tmp_path / "run", *free))
    first, second = trainer.stream[0], trainer.stream[1]
    (one, terms), (two, other) = gradients(trainer, [first]), gradients(trainer, [second])
    whole = torch.cat([gradient.flatten() for gradient in one]).norm()
    trainer.config.training.gradient_accumulation = 2
    both, logged = gradients(trainer, [first, second])
    for mine, a, b in zip(both, one, two, strict=True):
        torch.testing.assert_close(mine, (a + b) / 2, rtol=1e-4, atol=1e-7)
    assert all(torch.allclose(logged[name], (terms[name] + other[name]) / 2) for name in terms)
    trainer.config.training.gradient_accumulation = 1
    trainer.config.training.gradient_clip = 0.1 * float(whole)
    clipped, _ = gradients(trainer, [first])
    for mine, a in zip(clipped, one, strict=True):
        torch.testing.assert_close(mine, 0.1 * a, rtol=1e-3, atol=1e-7)


def test_the_average_is_shown_and_the_weights_come_back(tmp_path: Path) -> None:
    trainer = Trainer(small_config(tmp_path / "run", "training.ema_decay=0.9"))
    trainer._one_step(itertools.repeat(trainer.stream[0]))
    trainer._one_step(itertools.repeat(trainer.stream[1]))
    own = [p.detach().clone() for p in trainer.plain.parameters()]
    averaged = [p.clone() for p in trainer.ema.shadow_params]
    assert max((a - b).abs().max() for a, b in zip(own, averaged, strict=True)) > 1e-4
    with trainer._showing(averaged):
        assert not trainer.plain.training and trainer.pipeline.model is trainer.plain
        assert all(torch.equal(p, a) for p, a in zip(trainer.plain.parameters(), averaged, strict=True))
    assert trainer.plain.training
    assert all(torch.equal(p, a) for p, a in zip(trainer.plain.parameters(), own, strict=True))
    weight = trainer.plain.upsample_weight
    assert weight is not None and not weight.requires_grad  # fitted in closed form


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_optimisers_take_a_step_with_their_own_settings(name: str) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 3))
    values = TrainingConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(net, values)
    groups = [group for group in optimizer.param_groups if "betas" in group]
    assert [group["betas"] for group in groups] == [(0.9, 0.99)] * 2
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_the_decay_of_a_stable_schedule_takes_its_share() -> None:
    for share in (0.1, 0.5):
        values = TrainingConfig(steps=1000, warmup_steps=0, schedule="stable", decay_share=share)
        assert rate_share(values, round(1000 * (1 - share))) == pytest.approx(1.0)
        assert rate_share(values, round(1000 * (1 - share / 2))) == pytest.approx(0.5)
