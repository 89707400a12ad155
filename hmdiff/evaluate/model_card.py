"""The model card of a checkpoint: a description, and results of `hmdiff evaluate` for these weights.

Format of the Hugging Face Hub: YAML header, then Markdown (Mitchell et al., Model Cards for Model Reporting, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.errors import UserError

if TYPE_CHECKING:
    from hmdiff.pipeline import HMDiffPipeline

METRICS = {"pve": "PVE", "mpjpe": "MPJPE", "pa_mpjpe": "PA-MPJPE"}
HEAD = """---
license: apache-2.0
library_name: hmdiff
pipeline_tag: image-to-3d
tags: [human-mesh-recovery, diffusion, 3d-human-pose]
---
"""


def read_reports(
    path: str | Path,  # all.json of `hmdiff evaluate`
    model_hash: str,  # of the checkpoint's files
) -> list[dict[str, Any]]:
    """The reports of this checkpoint. Raises `UserError` if the file has none."""
    from hmdiff.files.reading import read_json

    try:
        found = [each for each in read_json(path)["reports"] if each.get("model") == model_hash]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no reports of hmdiff evaluate; give its all.json") from None
    if not found:
        raise UserError(f"{path}: no figures of these weights in it; run hmdiff evaluate with this checkpoint first")
    return found


def model_card(
    name: str,
    pipeline: HMDiffPipeline,
    reports: Sequence[Mapping[str, Any]],  # of `read_reports`
    reliability: Mapping[str, Mapping[str, Any]] | None = None,  # split -> report of `hmdiff evaluate --reliability`
) -> str:  # Markdown
    """The card. All figures are from the reports, and given with the command that measures them."""
    config = pipeline.model.config
    parameters = sum(each.numel() for each in pipeline.model.parameters())
    sampler = f"{pipeline.num_inference_steps} steps" if config.mode == "diffusion" else "one step"
    lines = [
        HEAD + f"# {name}",
        "",
        f"Human mesh recovery by hmdiff: several bodies of every person from {_inputs(config.inputs)}, "
        f"{config.num_vertices:,} vertices each, body {config.body!r}; {parameters / 1e6:.1f} M parameters, {sampler}.",
        "",
        "```python",
        "from hmdiff import HMDiffPipeline",
        "",
        f'pipe = HMDiffPipeline.from_pretrained("{name}")',
        "```",
        "",
        "## Measured",
        "",
        *_errors(reports),
    ]
    if reliability is not None:
        lines += ["", *_confidence(reliability)]
    lines += [
        "",
        "## Limits",
        "",
        "- The splits are synthetic people of hmdiff: these figures compare with no published number on real photos.",
        "- Depth and whatever is hidden are guessed: look at spread, modes and confidence, not at one body.",
        "- The confidence was fitted on the split val: how well it holds on other people is in the table above."
        if reliability is not None
        else "- No reliability report was given to this card: see `hmdiff evaluate --reliability`.",
        "- Not for identifying people, nor for judging health or fitness from a photo.",
    ]
    return "\n".join(lines) + "\n"


def _inputs(inputs: str) -> str:
    return {"image": "a photo", "heatmaps": "2D joint heatmaps", "both": "a photo and 2D joint heatmaps"}[inputs]


def _errors(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    first = reports[0]
    lines = [
        f"`hmdiff evaluate --people {first['people']} --num-hypotheses {first['num_hypotheses']} --steps "
        f"{first['num_inference_steps']}`, mm, 95 % bootstrap intervals over people:",
        "",
        f"| split | guidance | hypothesis | {' | '.join(METRICS.values())} |",
        "|---|---|---|" + "---|" * len(METRICS),
    ]
    for report in reports:
        guided = (report.get("guided_by") or {}).get("mode", "none")
        for kind in report["errors"]["pve"]:
            cells = [report["errors"][metric][kind] for metric in METRICS]
            numbers = " | ".join(f"{v['value']:.1f} ({v['low']:.1f}-{v['high']:.1f})" for v in cells)
            lines.append(f"| {report['split']} | {guided} | {kind} | {numbers} |")
    return lines


def _confidence(reliability: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "The confidence (`hmdiff evaluate --reliability`): vertices within the radius, how many are and how many were "
        "predicted, expected calibration error, and the coverage of the 90 % conformal interval:",
        "",
        "| split | radius | observed | predicted | ECE | 90 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for split, report in reliability.items():
        interval = report["intervals"]["vertices"]["0.9"]
        for radius, found in report["vertices"].items():
            lines.append(
                f"| {split} | {radius} mm | {found['counted']:.0%} | {found['said']:.0%} | {found['ece']:.3f} | "
                f"{interval['coverage']:.0%} in {interval['radius_mm']:.0f} mm |"
            )
    return lines
