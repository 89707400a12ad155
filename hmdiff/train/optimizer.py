"""The optimiser and the learning rate's course. Which the papers used is unknown: both are our choice.

"muon": the hidden matrices (two dimensions, neither of them an input's or an output's) take Muon's orthogonalised
momentum (Jordan et al., 2024; torch.optim.Muon), all else AdamW. "stable": warm-up, constant, then linearly to zero
(warm-up-stable-decay, Hu et al., arXiv 2404.06395), so that a run can be made longer until its decay begins.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hmdiff.config import TrainingConfig

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "stable")
HIDDEN = 64  # rows and columns from which a matrix counts as hidden: smaller ones read inputs or write outputs
_TABLES = ("identity", "feature_backbone.joint")  # one row a token: looked up, never multiplied


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimiser, so that one state is saved, resumed and wrapped."""

    def __init__(self, hidden: list[nn.Parameter], others: list[dict[str, Any]], values: TrainingConfig) -> None:
        self.muon = torch.optim.Muon(
            hidden, lr=values.muon_learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original"
        )
        self.adamw = torch.optim.AdamW(others, lr=values.learning_rate, betas=(0.9, 0.99))
        groups = [*self.muon.param_groups, *self.adamw.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # the two's own: a rate that is set here is theirs

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def build_optimizer(model: nn.Module, values: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of a config. Vectors (norms, biases) have no weight decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = []
    if values.optimizer == "muon":
        hidden = [p for name, p in named if p.dim() == 2 and min(p.shape) >= HIDDEN and not name.endswith(_TABLES)]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": values.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if not hidden:
        return torch.optim.AdamW(groups, lr=values.learning_rate, betas=(0.9, 0.99))
    return MuonWithAdamW(hidden, groups, values)


def rate_share(
    values: TrainingConfig,
    step: int,  # that is about to be taken, from 0
) -> float:
    """The learning rate of a step, as a share of the highest."""
    if step < values.warmup_steps:
        return (step + 1) / values.warmup_steps
    progress = min(1.0, (step - values.warmup_steps) / max(1, values.steps - values.warmup_steps))
    if values.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (1 - progress) / max(values.decay_share, 1e-9))
