"""Evaluation of a trained run on a split. The stored cells hold the errors of every person; tables are built from them.

A cell is a JSON file, keyed by the run's config, weights and evaluation settings, and written atomically. Per person it
holds the errors of `hmdiff.evaluate.evaluation`, the spread of the hypotheses, the visible fraction and, for models
with RLE, the rank correlation between RLE's scale and the joint errors. A split named SPLIT_blur has motion blur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.build import build_mesh, build_source
from hmdiff.config import Config, load_config
from hmdiff.data.motion_blur import Blurred
from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.evaluate.evaluation import measure, split_batches
from hmdiff.evaluate.measured import Measured
from hmdiff.evaluate.store import digest, save_report
from hmdiff.evaluate.uncertainty_metrics import uncertainty_correlations
from hmdiff.lab.ablations import Row
from hmdiff.lab.trained_runs import Run, identifying_config
from hmdiff.output import MeshOutput
from hmdiff.pipeline import HMDiffPipeline

FORMAT = 1
NEEDS = ("settings", "values")  # keys of a complete cell, see `store.stored`
_DIGITS = 4


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation settings, the same for all rows."""

    people: int = 200
    num_hypotheses: int = 25  # for diffusion models
    steps: int | None = None  # denoising steps; None: the config's
    seed: int = 0  # noise seed

    def settings(self, run: Run, row: Row, split: str, weights: str) -> dict[str, Any]:
        """Everything that a cell depends on."""
        diffusion = run.config.model["mode"] == "diffusion"
        return {
            "format": FORMAT,
            "run": digest(identifying_config(run.config)),
            "trained_seed": run.seed,
            "weights": weights,
            "tested": list(row.evaluation_overrides),
            "split": split,
            "people": self.people,
            "seed": self.seed,
            "num_hypotheses": self.num_hypotheses if diffusion else 1,
            "steps": (self.steps or run.config.diffusion.num_inference_steps) if diffusion else 1,
        }


def cell_path(folder: Path, settings: dict[str, Any]) -> Path:
    return folder / f"{settings['run']}_s{settings['trained_seed']}_{settings['split']}_{digest(settings)}.json"


def evaluation_config(config: Config, row: Row, folder: Path) -> Config:
    """The evaluation data's config: the training config with the row's `evaluation_overrides`."""
    if not row.evaluation_overrides:
        return config
    return load_config(folder / "config.yaml", row.evaluation_overrides)


def evaluation_data(config: Config, body: Body) -> PeopleSource:
    """Every split and its blurred variant, with the inputs that the config's model reads."""
    return Blurred(build_source(config, body, build_mesh(config, body), full_mesh=True))


def compute_cell(
    folder: Path,  # folder of the cells
    settings: dict[str, Any],  # from `EvaluationSettings.settings`
    pipeline: HMDiffPipeline,
    data: PeopleSource,
    progress: Callable[[int], None] | None = None,  # called with the number of people done
) -> dict[str, Any]:
    """Evaluate, and write the cell. Raises `UserError` for an unknown split."""
    collector = _UncertaintyCollector()
    count = settings["num_hypotheses"]
    sampling = SamplingConfig(count, settings["steps"], settings["seed"])
    people = split_batches(data, settings["split"], settings["people"])
    measured = measure(pipeline, people, sampling, progress=progress, on_batch=collector)[count]
    values: dict[str, Any] = {
        metric: {kind: _rounded(errors) for kind, errors in kinds.items()} for metric, kinds in measured.errors.items()
    }
    if count > 1:
        values["spread"] = _rounded(spread_of(measured))
    if collector.fractions:
        values["visible_fraction"] = _rounded(torch.cat(collector.fractions))
    cell = {"settings": settings, "values": values}
    if collector.uncertainty:
        correlations = uncertainty_correlations(torch.cat(collector.uncertainty), torch.cat(collector.errors))
        cell["correlation"] = {name: list(interval) for name, interval in correlations.items()}
    save_report(cell, cell_path(folder, settings))
    return cell


def spread_of(measured: Measured) -> Tensor:  # (P,) mm
    """Mean distance of the hypotheses' joints to their mean."""
    joints = measured.joints  # (P, n, 14, 3)
    return 1000 * (joints - joints.mean(1, keepdim=True)).norm(dim=-1).mean((1, 2))


class _UncertaintyCollector:
    """Callback that collects visibility and RLE's scale with the joint errors during evaluation."""

    def __init__(self) -> None:
        self.fractions: list[Tensor] = []  # (B,)
        self.uncertainty: list[Tensor] = []  # (B, K)
        self.errors: list[Tensor] = []  # (B, K) mm

    def __call__(self, sample: Sample, output: MeshOutput) -> None:
        if sample.visible_fraction is not None:
            self.fractions.append(sample.visible_fraction.detach().cpu())
        if output.joint_scale is not None and sample.joints_3d is not None:
            truth = sample.joints_3d.to(output.joints)
            self.errors.append(1000 * (output.mean_joints - truth).norm(dim=-1).cpu())
            self.uncertainty.append(output.joint_scale.detach().cpu().mean(-1))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in values.double().cpu().tolist()]
