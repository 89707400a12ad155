"""`hmdiff sweep`: steps x sampler x N x DAT's strength x threshold x last over a fixed split; CSV and a plot."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments, studies
from hmdiff.diffusion.guidance import MODES
from hmdiff.errors import UserError
from hmdiff.names import METRICS, SAMPLERS

if TYPE_CHECKING:
    from hmdiff.lab.sweep import Setting, Study


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "sweep",
        "errors and times over a grid of sampling settings, with a plot",
        "hmdiff sweep --steps 2 5 10 20 --sampler ddim dpm++\n"
        "  hmdiff sweep --steps 10 --guidance none dat --strength 0.1 0.3 1 --threshold 0.05 0.2",
        "All cells see the same people and the same noise. A cell that was computed is not computed again, and a grid "
        "may grow; a killed sweep goes on by the same command. Strength, threshold and steps are to be chosen on val: "
        "report the test splits with what val chose.",
    )
    arguments.add_checkpoint(parser, several=True)
    parser.add_argument(
        "--steps",
        nargs="+",
        type=arguments.whole(1),
        default=[1, 2, 3, 5, 10, 20, 40],
        metavar="K",
        help="denoising steps (default: 1 2 3 5 10 20 40)",
    )
    parser.add_argument(
        "--sampler", nargs="+", metavar="NAME", help=f"of {', '.join(SAMPLERS)} (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--num-hypotheses",
        nargs="+",
        type=arguments.whole(1),
        default=[25],
        metavar="N",
        help="bodies a person (default: 25)",
    )
    parser.add_argument(
        "--eta",
        nargs="+",
        type=arguments.number(0),
        metavar="ETA",
        help="ddim's share of fresh noise (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--guidance",
        nargs="+",
        choices=MODES,
        default=["none"],
        metavar="MODE",
        help=f"of {', '.join(MODES)} (default: none)",
    )
    parser.add_argument(
        "--strength", nargs="+", type=arguments.number(0), metavar="S", help="of the guidance (default: DAT's own)"
    )
    parser.add_argument(
        "--threshold",
        nargs="+",
        type=arguments.number(0),
        metavar="R",
        help="relative gap under which the guidance is off (default: DAT's own)",
    )
    parser.add_argument("--last", nargs="+", type=arguments.number(0), metavar="Q", help=arguments.LAST)
    studies.add_guidance(parser)
    studies.add_people(parser, "val", 128)
    parser.add_argument("--metric", choices=tuple(METRICS), default="pve", help="of the table and the plot")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"), metavar="FOLDER")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from hmdiff.evaluate.table import save_csv
    from hmdiff.lab.comparison import table_row
    from hmdiff.lab.sweep import resolved
    from hmdiff.lab.sweep_plots import plot_sweep

    if (options.strength or options.threshold or options.last) and set(options.guidance) == {"none"}:
        raise UserError("--strength, --threshold and --last are of guidance: add --guidance dat (or disrupted)")
    study = studies.make_study(options, options.checkpoint, options.output / "cells")
    settings = [
        resolved(setting, pipeline) for label, pipeline in study.pipelines.items() for setting in grid(label, options)
    ]
    cells = studies.compute(study, list(dict.fromkeys(settings)))
    reference = reference_of(study, cells)
    save_csv([table_row(cell, reference) for cell in cells], options.output / "sweep.csv")
    title = f"hmdiff sweep, {', '.join(study.pipelines)}"
    plot_sweep(cells, options.output / "sweep.png", options.metric, reference=reference, title=title)
    print_cells(cells, reference, options.metric)
    print(f"written: {options.output}/sweep.csv, {options.output}/sweep.png, and a JSON for each cell in cells/")
    return 0


def grid(label: str, options: argparse.Namespace) -> list[Setting]:
    """Every combination. Without guidance, strength and threshold are not varied."""
    from hmdiff.diffusion.sampling_config import SamplingConfig
    from hmdiff.lab.sweep import Setting

    guidances: list[Any] = []
    for mode in options.guidance:
        if mode == "none":
            guidances.append(None)
            continue
        asked = (options.strength or [None], options.threshold or [None], options.last or [None])
        for values in itertools.product(*asked):
            guidances.append(studies.make_guidance(options, mode, *values))
    return [
        Setting(label, SamplingConfig(count, steps, options.seed, sampler, eta, guidance))
        for guidance, sampler, eta, count, steps in itertools.product(
            guidances, options.sampler or [None], options.eta or [None], options.num_hypotheses, options.steps
        )
    ]


def reference_of(study: Study, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cell with the pipeline's own sampling settings, unguided, if the grid has it; else the first."""
    for label, pipeline in study.pipelines.items():
        for cell in cells:
            settings = cell["settings"]
            own = settings["model"] == label and settings["steps"] == pipeline.num_inference_steps
            if own and settings["guidance"] is None:
                return cell
    return cells[0]


def print_cells(cells: Sequence[dict[str, Any]], reference: dict[str, Any], metric: str) -> None:
    from hmdiff.evaluate.table import Table, difference_text, interval_text
    from hmdiff.lab.comparison import difference, pareto_front

    points = [(cell["time"]["milliseconds_per_image"], cell["errors"][metric]["mean"]["value"]) for cell in cells]
    front = set(pareto_front(points))
    rows = []
    for number, cell in enumerate(cells):
        settings, errors = cell["settings"], cell["errors"][metric]
        guidance = settings["guidance"]
        mean, apart = errors["mean"], difference(cell, reference, metric)
        ece = cell.get("expected_calibration_error")
        rows.append(
            [
                settings["model"],
                settings["sampler"] + (f" eta {settings['eta']:g}" if settings["eta"] else ""),
                str(settings["steps"]),
                str(settings["num_hypotheses"]),
                "-" if guidance is None else studies.guided_as(guidance),
                interval_text(mean),
                "reference" if cell is reference else difference_text(apart),
                f"{errors['oracle']['value']:.1f}",
                f"{errors['selected']['value']:.1f}" if "selected" in errors else "-",
                "-" if ece is None else f"{ece:.2f}",
                f"{points[number][0]:.0f}",
                "*" if number in front else "",
            ]
        )
    first, name = cells[0]["settings"], METRICS[metric]
    columns = (
        "checkpoint",
        "sampler",
        "steps",
        "N",
        "guidance",
        f"{name} mean",
        "paired difference",
        "oracle",
        "selected",
        "ECE",
        "ms/image",
        "front",
    )
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    Table(
        f"{first['split']}: {first['people']} people, mm (95 % interval)",
        [columns[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        "s: strength, R: threshold, last: share of the steps that is guided; front: on the Pareto front of the mean's "
        "error against milliseconds",
    ).print()
