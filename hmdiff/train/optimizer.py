"""Optimiser and learning rate schedule; the papers do not publish theirs.

"muon": Muon's orthogonalised momentum (Jordan et al., 2024; torch.optim.Muon) for hidden weight matrices (no input or
output layers), AdamW for all other parameters. "stable": warm-up, constant, then linear decay to zero (Hu et al.,
arXiv 2404.06395), so that a run can be extended until its decay begins.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hmdiff.config import TrainingConfig

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "stable")
HIDDEN = 64  # least rows and columns of a hidden matrix: smaller ones belong to input or output layers
_TABLES = ("identity", "feature_backbone.joint")  # embedding tables, one row per token


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimiser, with one state to save, resume and wrap."""

    def __init__(self, hidden: list[nn.Parameter], others: list[dict[str, Any]], values: TrainingConfig) -> None:
        self.muon = torch.optim.Muon(
            hidden, lr=values.muon_learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original"
        )
        self.adamw = torch.optim.AdamW(others, lr=values.learning_rate, betas=(0.9, 0.99))
        groups = [*self.muon.param_groups, *self.adamw.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # shared with both: a learning rate set here applies to them

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both optimisers."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def build_optimizer(model: nn.Module, values: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of a config. Norms and biases have no weight decay."""
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


def set_rates(optimizer: torch.optim.Optimizer, values: TrainingConfig, step: int) -> None:
    """Give every group the learning rate of a step that is about to be taken.

    Muon's matrices follow the same schedule from `training.muon_learning_rate`.
    """
    share = rate_share(values, step)
    for group in optimizer.param_groups:
        highest = values.muon_learning_rate if "ns_steps" in group else values.learning_rate
        group["lr"] = highest * share


def rate_share(
    values: TrainingConfig,
    step: int,  # from 0
) -> float:
    """The learning rate of a step, as a factor of its peak."""
    if step < values.warmup_steps:
        return (step + 1) / values.warmup_steps
    progress = min(1.0, (step - values.warmup_steps) / max(1, values.steps - values.warmup_steps))
    if values.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (1 - progress) / max(values.decay_share, 1e-9))
