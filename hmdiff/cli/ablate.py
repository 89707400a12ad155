"""`hmdiff ablate`: the papers' comparisons as tables, over fixed splits, with bootstrap intervals.

This file compares given checkpoints; `ablate_trained` trains the models of a table first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import ablate_trained, arguments, studies
from hmdiff.errors import UserError

if TYPE_CHECKING:
    from hmdiff.lab.ablations import Comparison

OUTPUT = Path("outputs/ablation")
UNGUIDED = "none"  # a row's mode; repeated here because importing `lab.comparison` takes a second


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "ablate",
        "tables: diffusion or not; no guidance, disrupted or DAT; how many hypotheses; the optional paths, trained",
        "hmdiff ablate diffusion dat hypotheses --checkpoint hmdiff_small --direct direct_small\n"
        "  hmdiff ablate dat --preset paper\n"
        "  hmdiff ablate depth_rle --train --steps 600 --seeds 3 --people 200",
        "Tables: diffusion (against the same network in one step, and stacked), dat (no guidance, disrupted and DAT at "
        "5, 10, 20 and 40 steps), hypotheses (the best, the mean and the selected of 1, 5, 10, 25, 100). A cell that "
        "was computed is not computed again. Strength and threshold are to be chosen on val, by hmdiff sweep. The "
        "other tables train a model for each row and seed, all with one budget: see below.",
    )
    parser.add_argument(
        "tables",
        nargs="*",
        metavar="TABLE",
        help="of diffusion, dat, hypotheses, all of them if none is named; or of those that are trained, below",
    )
    parser.add_argument(
        "--checkpoint",
        default=arguments.DEFAULT_CHECKPOINT,
        metavar="NAME",
        help="the diffusion model: a shipped checkpoint, or the folder of a training or of save_pretrained",
    )
    parser.add_argument("--direct", metavar="NAME", help="baseline A, in one step (default: none, its row is left out)")
    parser.add_argument("--stacked", metavar="NAME", help="baseline B, stacked (default: none, its row is left out)")
    parser.add_argument(
        "--num-hypotheses",
        type=arguments.whole(1),
        default=25,
        metavar="N",
        help="bodies a person, where the table does not say",
    )
    parser.add_argument(
        "--steps",
        type=arguments.whole(1),
        metavar="K",
        help="denoising steps, where the table does not say (default: the checkpoint's own); training steps of a table "
        "that is trained (default: the base config's)",
    )
    parser.add_argument(
        "--strength", type=arguments.number(0), metavar="S", help="of DAT and disrupted (default: DAT's own)"
    )
    parser.add_argument(
        "--threshold",
        type=arguments.number(0),
        metavar="R",
        help="relative gap under which the guidance is off (default: DAT's own)",
    )
    parser.add_argument("--last", type=arguments.number(0), metavar="Q", help=arguments.LAST)
    studies.add_guidance(parser)
    studies.add_people(parser, "test", 500)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"(default: {OUTPUT}, of a table that is trained {ablate_trained.OUTPUT})",
    )
    ablate_trained.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from hmdiff.diffusion.sampling_config import SamplingConfig
    from hmdiff.evaluate.table import Table, save_csv
    from hmdiff.lab.ablations import ROLES, TABLES, settings_of
    from hmdiff.lab.table_rows import RowCells, csv_rows, table_cells
    from hmdiff.lab.trained_ablations import TRAINED

    names = list(dict.fromkeys(options.tables)) or list(TABLES)
    for name in names:
        if name not in TABLES and name not in TRAINED:
            raise UserError(f"table {name!r} is not known; choose one of {', '.join((*TABLES, *TRAINED))}")
    trained = [name for name in names if name in TRAINED]
    options.output = options.output or (ablate_trained.OUTPUT if trained else OUTPUT)
    if trained:
        if len(trained) < len(names):
            others = ", ".join(name for name in names if name not in TRAINED)
            raise UserError(f"{', '.join(trained)} is trained, {others} is of given checkpoints: ask for them apart")
        return ablate_trained.run_trained(options, names)
    ablate_trained.check_absent(options)
    tables = {name: TABLES[name] for name in names}
    given = {role: getattr(options, role) for role in ROLES if getattr(options, role) is not None}
    study = studies.make_study(options, list(given.values()), options.output / "cells")
    roles = dict(zip(given, study.pipelines, strict=True))
    _check_modes(study, roles)

    def guide(mode: str) -> Any:
        return studies.make_guidance(options, mode, options.strength, options.threshold, options.last)

    sampling = SamplingConfig(options.num_hypotheses, options.steps, options.seed)
    rows = {name: [row for row in table.rows if row.role in roles] for name, table in tables.items()}
    settings = {name: settings_of(rows[name], roles, guide, sampling) for name in tables}
    # Compute all tables together: shared cells are computed once, and the remaining time covers all tables.
    results = studies.compute(study, [setting for each in settings.values() for setting in each])
    files = {name: options.output / f"{name}{_preset_suffix(options, table)}.csv" for name, table in tables.items()}
    for name, table in tables.items():
        found = [RowCells(row, {options.seed: results.pop(0)}) for row in rows[name]]
        save_csv(list(csv_rows(name, study.split, found)), files[name])
        title = f"{table.title}: {study.split}, {study.people} people, mm (95 % interval)"
        if any(row.num_hypotheses is None for row in rows[name]):
            title += f", N = {options.num_hypotheses}"
        guided = next((row.mode for row in table.rows if row.mode != UNGUIDED), None)
        if guided is not None:
            used = guide(guided)
            title += f"; DAT by preset {options.preset}, s {used.strength:g}, R {used.threshold:g}"
        Table(title, *table_cells(table, found), table.note).print()
        left_out = [f"--{role}" for role in dict.fromkeys(row.role for row in table.rows) if role not in roles]
        if left_out:
            print(f"left out, since no model was given for them: the rows of {', '.join(left_out)}")
    written = ", ".join(str(path) for path in files.values())
    print(f"written: {written}, and a JSON for each cell in cells/")
    return 0


def _preset_suffix(options: argparse.Namespace, table: Comparison) -> str:
    """Suffix of the file names, so that tables of different presets do not overwrite each other."""
    return f"_{options.preset}" if options.preset != "ours" and any(row.mode != UNGUIDED for row in table.rows) else ""


def _check_modes(study: Any, roles: dict[str, str]) -> None:
    for role, label in roles.items():
        mode = study.pipelines[label].model.config.mode
        expected = "diffusion" if role == "checkpoint" else "direct"
        if role in ("checkpoint", "direct", "stacked") and mode != expected:
            raise UserError(f"--{role} {label}: a model of mode {mode!r}, {expected!r} is expected; see hmdiff info")
