"""Evaluation on the validation split during training, and on the test split at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hmdiff.config import EvaluationConfig
from hmdiff.data.sample import PeopleSource
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.evaluate.evaluation import evaluate
from hmdiff.evaluate.mean_mesh import mean_mesh_errors
from hmdiff.evaluate.store import save_report
from hmdiff.pipeline import HMDiffPipeline


def validate(pipeline: HMDiffPipeline, data: PeopleSource, values: EvaluationConfig) -> dict[str, Any]:
    """The report of `evaluate` on the validation split."""
    sampling = SamplingConfig(values.num_hypotheses, values.num_inference_steps)
    return evaluate(pipeline, data, "val", values.people, sampling)


def validation_row(report: dict[str, Any]) -> dict[str, float]:
    """All errors as a log row, named `val_METRIC_KIND`."""
    return {
        f"val_{metric}_{kind}": value["value"]
        for metric, kinds in report["errors"].items()
        for kind, value in kinds.items()
    }


def validation_line(report: dict[str, Any], row: dict[str, float]) -> str:
    return (
        f"validation PVE first {row['val_pve_first']:.1f}, mean {row['val_pve_mean']:.1f}, oracle of "
        f"{report['num_hypotheses']} {row['val_pve_oracle']:.1f} mm; PA-MPJPE of the mean "
        f"{row['val_pa_mpjpe_mean']:.1f} mm"
    )


def score_test_split(
    folder: Path,  # of the training
    data: PeopleSource,  # with the full mesh
    values: EvaluationConfig,
    device: torch.device,
) -> None:
    """Evaluate the finished pipeline and the mean mesh baseline on the test split; written to test.json."""
    pipeline = HMDiffPipeline.from_pretrained(folder / "pipeline", device)
    sampling = SamplingConfig(values.num_hypotheses, values.num_inference_steps)
    report = evaluate(pipeline, data, "test", values.test_people, sampling)
    report["mean_mesh"] = mean_mesh_errors(data, "test", values.test_people)
    save_report(report, folder / "test.json")
    found, baseline = report["errors"]["pve"]["mean"]["value"], report["mean_mesh"]["pve"]["value"]
    tqdm.write(
        f"test: PVE of the mean of {values.num_hypotheses} {found:.1f} mm, {found / baseline:.2f} of the mean "
        f"mesh's {baseline:.1f} mm; PA-MPJPE {report['errors']['pa_mpjpe']['mean']['value']:.1f} mm "
        f"({folder}/test.json)"
    )
