"""Shared parts of `hmdiff sweep` and `hmdiff ablate`: models, people, guidance options, progress, tables."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.cli.show import progress
from hmdiff.diffusion.guidance import CHOICES
from hmdiff.errors import UserError
from hmdiff.evaluate.table import duration_text
from hmdiff.names import SPLITS

if TYPE_CHECKING:
    import torch

    from hmdiff.lab.sweep import Progress, Setting, Study


def add_people(parser: argparse.ArgumentParser, split: str, people: int) -> None:
    parser.add_argument("--split", default=split, choices=SPLITS, metavar="SPLIT", help=f"of {', '.join(SPLITS)}")
    parser.add_argument("--people", type=arguments.whole(2), default=people, help="first people of the split")
    parser.add_argument("--seed", type=arguments.whole(0), default=0, help="of the noise")
    parser.add_argument(
        "--batch-size", type=arguments.whole(1), default=8, metavar="B", help="people at once: changes the times alone"
    )
    parser.add_argument(
        "--estimator",
        metavar="FOLDER",
        help="a heatmap network of hmdiff prepare estimator, in place of the split's heatmaps (default: those)",
    )
    arguments.add_device(parser)


def add_guidance(parser: argparse.ArgumentParser) -> None:
    arguments.add_preset(parser)
    for name, choices in CHOICES.items():
        parser.add_argument(
            "--step-length" if name == "step" else f"--{name}",
            dest=name,
            choices=choices,
            metavar="NAME",
            help=f"DAT's: {' or '.join(choices)} (default: {choices[0]}, or the preset's)",
        )
    parser.add_argument(
        "--sharpness",
        type=arguments.number(0),
        metavar="P",
        help="power to which DAT raises the heatmaps (default: DAT's own)",
    )


def make_guidance(
    options: argparse.Namespace,
    mode: str,
    strength: float | None = None,
    threshold: float | None = None,
    last: float | None = None,
) -> Any:
    """A `Guidance` of the given mode; options that are not given keep the preset's values."""
    from hmdiff.diffusion.guidance import PRESETS

    values: dict[str, Any] = {"strength": strength, "threshold": threshold, "last": last}
    values |= {name: getattr(options, name) for name in (*CHOICES, "sharpness")}
    asked = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(PRESETS[options.preset], mode=mode, **asked)


def make_study(options: argparse.Namespace, names: Sequence[str], folder: Path) -> Study:
    """Load the checkpoints; the study's pipelines are keyed by label, in order."""
    from hmdiff.cli.splits import people_for
    from hmdiff.evaluate.store import model_hash
    from hmdiff.files.storage import make_folder
    from hmdiff.lab.sweep import Study

    make_folder(folder)
    device = arguments.resolve_device(options.device)
    checkpoints = arguments.load_checkpoints(options, list(names))
    estimate, heatmaps, picture = None, "synthetic", None
    if options.estimator is not None:
        if not Path(options.estimator).is_dir():
            raise UserError(f"--estimator {options.estimator}: no such folder; 'hmdiff prepare estimator' writes one")
        estimate, picture = load_estimator(options.estimator, device)
        heatmaps = f"{Path(options.estimator).resolve().name} {model_hash(Path(options.estimator))}"
    return Study(
        pipelines={label: each.pipeline for label, each in checkpoints.items()},
        hashes={label: each.model_hash for label, each in checkpoints.items()},
        people_of=lambda pipeline: people_for(pipeline, picture=picture),
        folder=folder,
        split=options.split,
        people=options.people,
        batch=options.batch_size,
        estimate=estimate,
        heatmaps=heatmaps,
    )


def load_estimator(
    folder: str, device: torch.device
) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:  # the estimator, and the size of the images that it reads
    from hmdiff.estimators.pose_network import SyntheticEstimator

    network = SyntheticEstimator.load(folder, device)
    return network.estimate, network.image_size


def compute(study: Study, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Run the cells with progress; stored cells are summarised in one line."""
    from hmdiff.lab.sweep import code_digest, resolved, run_cells

    cells = {resolved(setting, study.pipelines[setting.model]) for setting in settings}
    there = sum(study.stored(setting) is not None for setting in cells)
    words = f"{len(cells)} cells of {study.people} people of {study.split}"
    print(f"{words}, {there} of them there already" if there else words, flush=True)

    def told(one: Progress) -> None:
        errors, time = one.result["errors"]["pve"], one.result["time"]
        found = ", ".join(f"{kind} {errors[kind]['value']:.1f}" for kind in ("mean", "oracle"))
        left = "" if one.done == one.total else f"; about {duration_text(one.seconds_left)} left"
        line = f"[{one.done}/{one.total}] {name_of(one.setting)}: PVE {found} mm, "
        print(f"{line}{time['milliseconds_per_image']:.0f} ms an image{left}", flush=True)

    results = run_cells(study, settings, told, lambda setting: progress(name_of(setting), study.people))
    older = sum(result.get("code") != code_digest() for result in results)
    if older:
        print(f"{older} cells are of another version of the code; remove them from {study.folder} to compute them anew")
    machines = {(result["time"]["device"], result["time"]["threads"]) for result in results}
    if len(machines) > 1:
        named = ", ".join(f"{device} with {threads} threads" for device, threads in sorted(machines))
        print(f"the times are not comparable: cells were computed on {named}; use another --output to time them anew")
    return results


def name_of(setting: Setting) -> str:
    asked, guidance = setting.sampling, setting.sampling.guidance
    guided = "" if guidance is None else f", {guided_as(dataclasses.asdict(guidance))}"
    steps = f"{asked.num_inference_steps} step{'' if asked.num_inference_steps == 1 else 's'}"
    return f"{setting.model}, {asked.scheduler}, {steps}, N {asked.num_hypotheses}{guided}"


def guided_as(guidance: dict[str, Any]) -> str:
    from hmdiff.diffusion.guidance import Guidance

    last = "" if guidance["last"] == Guidance.last else f", last {guidance['last']:g}"
    form = " (paper's form)" if guidance.get("decision") == "image" else ""
    return f"{guidance['mode']}{form} s {guidance['strength']:g}, R {guidance['threshold']:g}{last}"
