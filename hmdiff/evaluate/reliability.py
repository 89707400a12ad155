"""Reliability of the confidence by split: ECE, Brier skill, conformal coverage and rank correlation.

ECE: mean absolute difference between predicted and observed frequency over bins of the prediction, weighted by bin size
(Naeini et al., AAAI 2015). Brier skill score: 1 - Brier score / Brier score of predicting the split's frequency, 0 for
an uninformative confidence (Murphy 1973). Conformal intervals are those of `hmdiff.diffusion.confidence`; they have no
guarantee outside the distribution they were fitted on. P people, K joints, V vertices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.diffusion.confidence import KINDS, LEVELS, RADII, Confidence
from hmdiff.diffusion.hypotheses import spread
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.temperature import Temperature
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import measure, split_batches
from hmdiff.evaluate.measured import Measured
from hmdiff.evaluate.uncertainty_metrics import rank_correlation
from hmdiff.output import MeshOutput

if TYPE_CHECKING:
    from hmdiff.pipeline import HMDiffPipeline

BINS = 10
COLUMNS = (
    "split",
    "of",
    "within",
    "observed",
    "predicted",
    "ECE",
    "skill",
    *(f"{level:.0%} interval" for level in LEVELS),
    "rank",
)


class SpreadAndError(NamedTuple):
    """Uncalibrated spread of the hypotheses and error of their mean, both mm and relative to the pelvis."""

    joint_spread: Tensor  # (P, K)
    joint_error: Tensor  # (P, K)
    vertex_spread: Tensor  # (P, V)
    vertex_error: Tensor  # (P, V)
    evidence: Tensor  # (P, 3) see `hmdiff.diffusion.image_evidence`

    def scaled_by(self, fitted: Temperature) -> SpreadAndError:
        """The same with the spread multiplied by each person's temperature."""
        temperature = fitted.of(self.evidence)[:, None]
        return self._replace(
            joint_spread=temperature * self.joint_spread, vertex_spread=temperature * self.vertex_spread
        )


class SpreadCollector:
    """Callback of an evaluation that collects `SpreadAndError`."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, ...]] = []

    def __call__(self, sample: Sample, output: MeshOutput) -> None:
        if sample.vertices is None or sample.joints_3d is None:
            raise UserError("confidence is fitted to vertices and joints: build the data with full_mesh=True")
        values = []
        for samples, true in ((output.joints, sample.joints_3d), (output.vertices, sample.vertices)):
            error = (samples.mean(1) - true.to(samples)).norm(dim=-1)
            values += [1000 * spread(samples).cpu(), 1000 * error.cpu()]
        assert output.evidence is not None
        values.append(output.evidence.cpu())
        self.parts.append(tuple(values))

    def result(self) -> SpreadAndError:
        return SpreadAndError(*(torch.cat(values) for values in zip(*self.parts, strict=True)))


@torch.no_grad()
def measure_spread(
    pipeline: HMDiffPipeline,
    data: PeopleSource,  # with the full mesh
    split: str,
    people: int,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,  # called with the number of people done
) -> tuple[Measured, SpreadAndError]:
    """Run the pipeline on a split, as `hmdiff.evaluate.evaluation.measure`."""
    collector = SpreadCollector()
    samples = split_batches(data, split, people)
    measured = measure(pipeline, samples, sampling, progress=progress, on_batch=collector)[sampling.num_hypotheses]
    return measured, collector.result()


def reliability(
    measured: SpreadAndError,  # with calibrated spread
    confidence: Confidence,
) -> dict[str, Any]:
    """kind -> radius -> said (mean prediction), counted (observed frequency), ece, skill, curve; "intervals": coverage
    and mean radius; "person": rank correlation with PVE."""
    report: dict[str, Any] = {kind: {} for kind in KINDS}
    report["intervals"] = {kind: {} for kind in KINDS}
    person: dict[int, float] = {}
    for radius in RADII:
        probability = confidence.within(radius, measured.joint_spread, measured.vertex_spread)
        for kind, predicted, error in (
            ("joints", probability.joints[:, 1:], measured.joint_error[:, 1:]),
            ("vertices", probability.vertices, measured.vertex_error),
        ):
            report[kind][radius] = _calibration_curve(predicted.flatten().double(), (error < radius).flatten().double())
        person[radius] = rank_correlation(-probability.person, measured.vertex_error.mean(1))
    for kind, spread_of_kind, error in (
        ("joints", measured.joint_spread[:, 1:], measured.joint_error[:, 1:]),
        ("vertices", measured.vertex_spread, measured.vertex_error),
    ):
        for level in LEVELS:
            interval = confidence.interval(level, spread_of_kind, kind)
            report["intervals"][kind][level] = {
                "coverage": (error <= interval).double().mean().item(),
                "radius_mm": interval.mean().item(),
            }
    report["person"] = {"rank_correlation": person}
    return report


def _calibration_curve(predicted: Tensor, inside: Tensor) -> dict[str, Any]:  # (M,) probabilities; (M,) 0 or 1
    bin_index = (predicted * BINS).long().clamp(max=BINS - 1)
    count = torch.zeros(BINS, dtype=predicted.dtype).index_add(0, bin_index, torch.ones_like(predicted))
    mean_predicted, frequency = (
        torch.zeros(BINS, dtype=predicted.dtype).index_add(0, bin_index, values) / count.clamp_min(1)
        for values in (predicted, inside)
    )
    base_rate = inside.mean()
    reference_brier = (base_rate * (1 - base_rate)).item()
    brier = (predicted - inside).square().mean().item()
    return {
        "said": predicted.mean().item(),
        "counted": base_rate.item(),
        "ece": ((mean_predicted - frequency).abs() * count / count.sum()).sum().item(),
        "skill": 1 - brier / reference_brier if reference_brier > 0 else float("nan"),
        "curve": [
            {"said": s, "counted": f, "share": c}
            for s, f, c in zip(mean_predicted.tolist(), frequency.tolist(), (count / count.sum()).tolist(), strict=True)
            if c > 0
        ],
    }


def reliability_rows(split: str, report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `COLUMNS` for a table."""
    rows: list[list[str]] = []
    for kind in KINDS:
        for number, radius in enumerate(RADII):
            found = report[kind][radius]
            intervals = [report["intervals"][kind][level] for level in LEVELS]
            rows.append(
                [
                    split if not rows else "",
                    kind if number == 0 else "",
                    f"{radius} mm",
                    f"{found['counted']:.0%}",
                    f"{found['said']:.0%}",
                    f"{found['ece']:.3f}",
                    f"{found['skill']:.2f}",
                    *(
                        f"{each['coverage']:.0%} in {each['radius_mm']:.0f} mm" if number == 0 else ""
                        for each in intervals
                    ),
                    f"{report['person']['rank_correlation'][radius]:.2f}" if kind == "vertices" else "",
                ]
            )
    return rows


def plot_reliability(reports: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Reliability diagram: predicted against observed frequency, a panel per radius and kind, a line per split."""
    from matplotlib.figure import Figure

    from hmdiff.files.storage import atomic_file

    figure = Figure(figsize=(3.2 * len(RADII) * len(KINDS), 3.6), layout="constrained")
    panels = figure.subplots(1, len(RADII) * len(KINDS), sharey=True)
    for panel, (kind, radius) in zip(panels, [(kind, radius) for kind in KINDS for radius in RADII], strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for split, report in reports.items():
            curve = [point for point in report[kind][radius]["curve"] if point["share"] >= 0.005]
            predicted, observed = [[point[key] for point in curve] for key in ("said", "counted")]
            panel.plot(
                predicted, observed, marker="o", markersize=3, label=f"{split}, ECE {report[kind][radius]['ece']:.2f}"
            )
        panel.set(
            title=f"{kind} within {radius} mm", xlabel="predicted probability", xlim=(0, 1), ylim=(0, 1), aspect="equal"
        )
        panel.legend(fontsize=6, loc="upper left", frameon=False)
    panels[0].set_ylabel("observed frequency")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=140)
