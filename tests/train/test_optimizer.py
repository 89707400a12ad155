"""Optimiser: which matrices use Muon, one state for both optimisers, and the learning rate schedule."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from small import free_body, small_config
from torch import nn

from hmdiff.build import build_model
from hmdiff.config import TrainingConfig
from hmdiff.train.loop import Trainer
from hmdiff.train.optimizer import MuonWithAdamW, build_optimizer, rate_share


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Parameter(torch.randn(70, 70))  # a token embedding table
        self.hidden = nn.Linear(64, 96)
        self.out = nn.Linear(96, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(x))) + self.identity.mean()


def descended(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 64, generator=generator)
    target = x[:, :3] - x[:, 3:6] * x[:, :3]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss)


def test_muon_takes_hidden_matrices_alone() -> None:
    net = Net()
    optimizer = build_optimizer(net, TrainingConfig(optimizer="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    (muon, *adamw) = optimizer.param_groups
    assert [id(p) for p in muon["params"]] == [id(net.hidden.weight)]
    assert sum(len(group["params"]) for group in adamw) == 4
    vectors = [group for group in adamw if all(p.dim() == 1 for p in group["params"])]
    assert [group["weight_decay"] for group in vectors] == [0.0]
    assert not isinstance(build_optimizer(Net(), TrainingConfig()), MuonWithAdamW)


def test_it_learns_and_its_rates_are_those_that_are_set() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(net, TrainingConfig(optimizer="muon", learning_rate=3e-3))
    before = descended(net, optimizer, 1)
    assert descended(net, optimizer, 40) < 0.7 * before
    weight = net.hidden.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    descended(net, optimizer, 3)
    assert torch.equal(net.hidden.weight, weight)


def test_one_state_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    net, other = Net(), Net()
    optimizer = build_optimizer(net, TrainingConfig(optimizer="muon"))
    descended(net, optimizer, 5)
    other.load_state_dict(net.state_dict())
    resumed = build_optimizer(other, TrainingConfig(optimizer="muon"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert descended(net, optimizer, 5) == descended(other, resumed, 5)
    assert torch.equal(net.hidden.weight, other.hidden.weight)


@pytest.mark.parametrize("schedule", ["cosine", "stable"])
def test_the_rate_warms_up_and_ends_at_zero(schedule: str) -> None:
    values = TrainingConfig(steps=1000, warmup_steps=100, schedule=schedule, decay_share=0.2)
    rates = [rate_share(values, step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[100] == pytest.approx(1.0) and rates[1000] == pytest.approx(0.0)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates[100:]))
    assert rates[700] == (pytest.approx(1.0) if schedule == "stable" else pytest.approx(0.25, abs=0.01))


def test_a_stable_run_is_made_longer_without_a_change_before_its_decay() -> None:
    short = TrainingConfig(steps=1000, warmup_steps=10, schedule="stable", decay_share=0.2)
    long = dataclasses.replace(short, steps=5000)
    assert [rate_share(short, step) for step in range(700)] == [rate_share(long, step) for step in range(700)]


def test_the_models_own_matrices_are_found() -> None:
    wide = ("model.width=64", "model.encoder_width=64", "model.tokens=parts")
    model = build_model(small_config("unused", *wide), *free_body())
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    assert "denoisers.0.blocks.0.self_attention.to_query.weight" in taken
    assert not any("identity" in name or name.endswith("bias") or "read" in name for name in taken)


def test_each_optimiser_has_its_own_rate_on_one_schedule(tmp_path: Path) -> None:
    values = ["training.optimizer=muon", "training.learning_rate=1e-3", "training.muon_learning_rate=0.02"]
    trainer = Trainer(small_config(tmp_path / "run", *values, "training.warmup_steps=4", "model.width=64"))
    trainer.step = 1  # half of the warm-up
    trainer._one_step(itertools.repeat(trainer.stream[0]))
    muon, *adamw = trainer.optimizer.param_groups
    assert muon["lr"] == pytest.approx(0.01) and [group["lr"] for group in adamw] == pytest.approx([5e-4, 5e-4])
