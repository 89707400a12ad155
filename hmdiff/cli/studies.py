"""What `hmdiff sweep` and `hmdiff ablate` share: their models and people, the guidance's options, progress, tables."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.diffusion.guidance import CHOICES
from hmdiff.errors import UserError
from hmdiff.evaluate.table import duration_text
from hmdiff.names import SPLITS

if TYPE_CHECKING:
    import torch

    from hmdiff.data.sample import PeopleSource
    from hmdiff.lab.sweep import Progress, Setting, Study
    from hmdiff.pipeline import HMDiffPipeline


def add_people(parser: argparse.ArgumentParser, split: str, people: int) -> None:
    parser.add_argument(
        "--split", default=split, choices=SPLITS, metavar="SPLIT", help=f"of {', '.join(SPLITS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--people", type=arguments.whole(2), default=people, help="first people of the split (default: %(default)s)"
    )
    parser.add_argument("--seed", type=arguments.whole(0), default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=arguments.whole(1),
        default=8,
        metavar="B",
        help="people at once: changes the times alone (default: %(default)s)",
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
    """A `Guidance` of the mode; what is not asked for is as in the preset."""
    from hmdiff.diffusion.guidance import PRESETS

    values: dict[str, Any] = {"strength": strength, "threshold": threshold, "last": last}
    values |= {name: getattr(options, name) for name in (*CHOICES, "sharpness")}
    asked = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(PRESETS[options.preset], mode=mode, **asked)


def make_study(options: argparse.Namespace, names: Sequence[str], folder: Path) -> Study:
    """Load the checkpoints; their labels are the pipelines' keys, in order."""
    from hmdiff.cli.splits import test_people
    from hmdiff.evaluate.store import model_hash
    from hmdiff.files.storage import make_folder
    from hmdiff.lab.sweep import Study

    make_folder(folder)
    device = arguments.resolve_device(options.device)
    labels = arguments.labels(list(names))
    pipelines = {label: arguments.load_pipeline(name, device) for name, label in zip(names, labels, strict=True)}
    hashes = {
        label: model_hash(arguments.checkpoint_folder(name)) for name, label in zip(names, pipelines, strict=True)
    }
    estimate, heatmaps, picture = None, "synthetic", None
    if options.estimator is not None:
        if not Path(options.estimator).is_dir():
            raise UserError(f"--estimator {options.estimator}: no such folder; 'hmdiff prepare estimator' writes one")
        estimate, picture = load_estimator(options.estimator, device)
        heatmaps = f"{Path(options.estimator).resolve().name} {model_hash(Path(options.estimator))}"
    made: dict[tuple[str, int | None], PeopleSource] = {}

    def people_of(pipeline: HMDiffPipeline) -> PeopleSource:
        model, body = pipeline.model.config, pipeline.body
        size = picture if model.inputs == "heatmaps" else model.image_size
        if (body.name, size) not in made:
            made[body.name, size] = test_people(body, size)
        return made[body.name, size]

    return Study(
        pipelines, hashes, people_of, folder, options.split, options.people, options.batch_size, estimate, heatmaps
    )


def load_estimator(
    folder: str, device: torch.device
) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:  # and the side of the pictures that it reads
    from hmdiff.estimators.pose_network import SyntheticEstimator

    network = SyntheticEstimator.load(folder, device)
    return network.estimate, network.image_size


class Teller:
    """A bar over the people of the running cell on a terminal; a line after every cell, with the time that is left."""

    def __init__(self) -> None:
        self.bar: Any = None

    def start(self, setting: Setting, people: int) -> Callable[[int], None]:
        from tqdm import tqdm

        self.close()
        self.bar = tqdm(total=people, desc=name_of(setting), unit="person", disable=None, leave=False)
        update: Callable[[int], None] = self.bar.update
        return update

    def told(self, progress: Progress) -> None:
        self.close()
        errors = progress.result["errors"]["pve"]
        found = ", ".join(f"{kind} {errors[kind]['value']:.1f}" for kind in ("mean", "oracle"))
        milliseconds = progress.result["time"]["milliseconds_per_image"]
        left = "" if progress.done == progress.total else f"; about {duration_text(progress.seconds_left)} left"
        print(
            f"[{progress.done}/{progress.total}] {name_of(progress.setting)}: PVE {found} mm, "
            f"{milliseconds:.0f} ms an image{left}",
            flush=True,
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def compute(study: Study, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Run the cells with bars and lines; what was there already is told in one line."""
    from hmdiff.lab.sweep import code_digest, resolved, run_cells

    cells = {resolved(setting, study.pipelines[setting.model]) for setting in settings}
    there = sum(study.stored(setting) is not None for setting in cells)
    words = f"{len(cells)} cells of {study.people} people of {study.split}"
    print(f"{words}, {there} of them there already" if there else words, flush=True)
    teller = Teller()
    try:
        results = run_cells(study, settings, teller.told, lambda setting: teller.start(setting, study.people))
    finally:
        teller.close()
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
    last = "" if guidance["last"] == 1 else f", last {guidance['last']:g}"
    form = " (paper's form)" if guidance.get("decision") == "image" else ""
    return f"{guidance['mode']}{form} s {guidance['strength']:g}, R {guidance['threshold']:g}{last}"
