"""`hmdiff ablate` for tables whose models are trained first: plan, train, evaluate, print."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError
from hmdiff.evaluate.table import duration_text
from hmdiff.names import SPLITS

if TYPE_CHECKING:
    from hmdiff.lab.ablations import Comparison
    from hmdiff.lab.table_rows import RowCells
    from hmdiff.lab.trained_cells import EvaluationSettings
    from hmdiff.lab.trained_runs import Plan, Run, RunReport

OUTPUT = Path("runs/ablate")
SEEDS = 3
# Options of these tables only; None if not given.
OPTIONS = ("train", "list", "mode", "seeds", "base", "set", "splits", "denoising_steps", "costs")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tables that are trained: depth_rle, silhouette_masked, out_of_distribution, rendered_depth, recorded_depth, "
        "occlusion, lifting"
    )
    group.add_argument(
        "--train",
        action="store_true",
        default=None,
        help="train what is not trained yet (default: only make the tables of what is)",
    )
    group.add_argument(
        "--list", action="store_true", default=None, help="print what would be trained and what is, and stop"
    )
    group.add_argument("--mode", choices=("direct", "diffusion"), help="of every row's model (default: direct)")
    group.add_argument("--seeds", type=arguments.whole(1), metavar="N", help=f"trainings a row (default: {SEEDS})")
    group.add_argument("--base", metavar="FILE", help="another base config (default: the table's own)")
    group.add_argument(
        "--set", nargs="+", metavar="key=value", help="values over the base config, of every row (default: none)"
    )
    group.add_argument(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help="to evaluate on; SPLIT_blur: with motion blur (default: the table's own)",
    )
    group.add_argument(
        "--denoising-steps", type=arguments.whole(1), metavar="K", help="of a diffusion row (default: the base's)"
    )
    group.add_argument(
        "--costs",
        action="store_true",
        default=None,
        help="measure parameters, ms an image and ms a training step of every row (default: those measured before)",
    )


def check_absent(options: argparse.Namespace) -> None:
    """Reject the options of trained tables for tables of given checkpoints."""
    for name in OPTIONS:
        if getattr(options, name) is not None:
            given = name.replace("_", "-")
            raise UserError(f"--{given} is of the tables that are trained; name one, such as depth_rle")


def run_trained(options: argparse.Namespace, names: list[str]) -> int:
    from hmdiff.lab.trained_ablations import TRAINED
    from hmdiff.lab.trained_runs import make_plan

    _check_given(options)
    device = arguments.resolve_device(options.device)
    if device.type == "cpu":
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    tables = {name: TRAINED[name] for name in names}
    mode = options.mode or "direct"
    plan = make_plan(
        tables, options.output, options.seeds or SEEDS, mode, options.steps, options.set or (), options.base
    )
    _check_splits(options, tables)
    if options.list:
        _print_plan(options, plan)
        return 0
    if options.train:
        left = _train(plan)
        if left:
            print(
                f"{len(left)} of {len(plan.runs)} trainings are not finished (stopped, or another process is at "
                "them): the same command goes on"
            )
            return 0
    return _tables(options, plan, tables, mode)


def _check_given(options: argparse.Namespace) -> None:
    for name in ("direct", "stacked", "strength", "threshold", "estimator"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is of the tables that compare given checkpoints, not of trained ones")
    if options.list and options.train:
        raise UserError("--list trains nothing: leave --list or --train out")


def _check_splits(options: argparse.Namespace, tables: dict[str, Comparison]) -> None:
    """Raises `UserError` for unknown splits, before hours of training."""
    from hmdiff.data.motion_blur import SUFFIX

    for table in tables.values():
        for split in options.splits or table.splits:
            if split.removesuffix(SUFFIX) not in SPLITS:
                raise UserError(
                    f"split {split!r} is not known; choose one of {', '.join(SPLITS)}, or one of them with {SUFFIX}"
                )


def _print_plan(options: argparse.Namespace, plan: Plan) -> None:
    from hmdiff.evaluate.table import Table
    from hmdiff.lab.trained_runs import is_done, last_step, seconds_left

    for name, rows in plan.runs_of.items():
        lines = []
        for label, runs in rows.items():
            states = [
                "trained" if is_done(run) else f"at {last_step(run)}" if last_step(run) else "to train" for run in runs
            ]
            row = plan.rows[name][label]
            changes = " ".join((*row.overrides, *(f"tested:{text}" for text in row.evaluation_overrides)))
            lines.append([label, changes or "-", ", ".join(states), str(runs[0].folder.parent.name)])
        first = next(iter(rows.values()))[0].config.training
        title = f"{name}: {first.steps} steps of {first.batch_size * first.gradient_accumulation} people a training"
        Table(title, ["row", "over the base", "seeds", f"in {options.output}/runs"], lines).print()
    runs = plan.runs
    left = sum(not is_done(run) for run in runs)
    needed = sum(len(each) for rows in plan.runs_of.values() for each in rows.values())
    words = f"{len(runs)} trainings for {needed} rows and seeds of the tables, {left} of them still to do"
    print(f"{words}; about {duration_text(seconds_left(runs))}" if left else words)


def _one_each(plan: Plan) -> list[Run]:
    """One run of each distinct model, with the first seed."""
    return [run for run in plan.runs if run.seed == plan.runs[0].seed]


def _train(plan: Plan) -> list[Run]:
    from hmdiff.lab.trained_runs import is_done, train_one, train_runs

    runs = plan.runs
    there = sum(is_done(run) for run in runs)
    print(f"{len(runs)} trainings, {there} of them there already" if there else f"{len(runs)} trainings", flush=True)

    def told(trained: RunReport) -> None:
        left = "" if trained.done == trained.total else f"; about {duration_text(trained.seconds_left)} left"
        seconds = duration_text(trained.seconds)
        print(f"[{trained.done}/{trained.total}] {trained.run.name}: trained in {seconds}{left}", flush=True)

    return train_runs(runs, train_one, told)


def _tables(options: argparse.Namespace, plan: Plan, tables: dict[str, Comparison], mode: str) -> int:
    from hmdiff.evaluate.table import Table, save_csv
    from hmdiff.evaluate.visibility_bins import VISIBILITY_BINS
    from hmdiff.lab.table_rows import SPREAD, csv_rows, table_cells, visibility_table_cells
    from hmdiff.lab.trained_ablations import COSTS
    from hmdiff.lab.trained_cells import EvaluationSettings
    from hmdiff.lab.trained_plots import plot_differences, plot_visibility_bins
    from hmdiff.lab.trained_runs import is_done

    if not any(is_done(run) for run in plan.runs):
        raise UserError(f"{options.output}: nothing of {', '.join(tables)} is trained there; add --train")
    asked = EvaluationSettings(options.people, options.num_hypotheses, options.denoising_steps, options.seed)
    costs = _costs(options, plan, asked, mode)
    for name, table in tables.items():
        found = _evaluate(options, plan, name, table, asked, costs)
        lines: list[dict[str, Any]] = []
        by_visibility = table.by_visibility and all(
            row.has_visibility for rows in found.values() for row in rows if row.cells
        )
        for split, rows in found.items():
            lines += csv_rows(name, split, rows, mode, VISIBILITY_BINS if by_visibility else ())
            title = f"{table.title}: {mode}, {split}, {asked.people} people, mm (95 % interval)"
            if mode == "diffusion":
                title += f", N = {asked.num_hypotheses}"
            Table(title, *table_cells(table, rows, mode), table.note).print()
            if by_visibility:
                Table(f"PVE by visible part (people), {split}", *visibility_table_cells(rows, "pve")).print()
                Table(f"% of the reference's PVE, {split}", *visibility_table_cells(rows, "pve", relative=True)).print()
                if mode == "diffusion":
                    Table(f"spread by visible part, {split}", *visibility_table_cells(rows, SPREAD)).print()
                    Table(
                        f"PVE of the best by visible part, {split}", *visibility_table_cells(rows, "pve", "oracle")
                    ).print()
        if costs:
            any_rows = next(iter(found.values()))
            note = next(iter(costs.values()))
            title = f"cost: {note['device']}, {note['threads']} threads, medians"
            Table(title, *table_cells(table, any_rows, mode, COSTS)).print()
        place = options.output / f"{name}_{mode}"
        save_csv(lines, place.with_suffix(".csv"))
        written = [f"{place}.csv"]
        if plot_differences(found, f"{place}.png", title=table.title):
            written.append(f"{place}.png")
        if table.by_visibility and not by_visibility:
            print("no rows by visible part: these people carry none; --set data.map_size=64 draws what tells it")
        if by_visibility and plot_visibility_bins(found, f"{place}_bands.png", title=table.title):
            written.append(f"{place}_bands.png")
        missing = [run.name for runs in plan.runs_of[name].values() for run in runs if not is_done(run)]
        if missing:
            print(f"not trained yet, and left out: {'; '.join(missing)}; add --train")
        print(f"written: {', '.join(written)}")
    return 0


def _evaluate(
    options: argparse.Namespace,
    plan: Plan,
    name: str,
    table: Comparison,
    asked: EvaluationSettings,
    costs: dict[str, Any],
) -> dict[str, list[RowCells]]:  # split -> rows
    """Read stored cells and compute the others; each row's people are built once."""
    from tqdm import tqdm

    from hmdiff.evaluate.store import digest, model_hash, stored
    from hmdiff.lab.table_rows import RowCells
    from hmdiff.lab.trained_cells import NEEDS, cell_path, compute_cell, evaluation_config, evaluation_data
    from hmdiff.lab.trained_runs import identifying_config, is_done

    folder = options.output / "cells"
    splits = list(options.splits or table.splits)
    found: dict[str, list[RowCells]] = {split: [] for split in splits}
    for label, runs in plan.runs_of[name].items():
        row = plan.rows[name][label]
        cells: dict[str, dict[int, dict[str, Any]]] = {split: {} for split in splits}
        data = None
        for run in filter(is_done, runs):
            weights, pipeline = model_hash(run.pipeline), None
            for split in splits:
                settings = asked.settings(run, row, split, weights)
                cell = stored(cell_path(folder, settings), settings, NEEDS)
                if cell is None:
                    if pipeline is None:
                        pipeline = arguments.load_pipeline(str(run.pipeline), arguments.resolve_device(options.device))
                    if data is None:
                        data = evaluation_data(evaluation_config(run.config, row, run.folder), pipeline.body)
                    words = f"{label}, seed {run.seed}, {split}"
                    with tqdm(total=asked.people, desc=words, unit="person", disable=None, leave=False) as bar:
                        cell = compute_cell(folder, settings, pipeline, data, bar.update)
                cells[split][run.seed] = cell
        cost = costs.get(digest(identifying_config(runs[0].config)))
        for split in splits:
            found[split].append(RowCells(row, cells[split], cost))
    return found


def _costs(
    options: argparse.Namespace, plan: Plan, asked: EvaluationSettings, mode: str
) -> dict[str, Any]:  # by the run's digest
    """Measure or read the costs. All rows are timed in one call, since timings of separate calls are not comparable."""
    from tqdm import tqdm

    from hmdiff.evaluate.store import digest, save_report, stored
    from hmdiff.lab.trained_costs import REPEATS, measure_costs
    from hmdiff.lab.trained_runs import identifying_config

    rows = {digest(identifying_config(run.config)): run for run in _one_each(plan)}
    path = options.output / f"costs_{mode}_{digest([sorted(rows), asked.num_hypotheses, asked.steps])}.json"
    if not options.costs:
        return stored(path, {}, ()) or {}
    print(f"timing {len(rows)} models in turn", flush=True)
    with tqdm(total=len(rows) * (REPEATS + 1), desc="costs", disable=None, leave=False) as bar:
        measured = measure_costs(
            [run.config for run in rows.values()], asked.num_hypotheses, asked.steps, REPEATS, progress=bar.update
        )
    found = dict(zip(rows, measured, strict=True))
    save_report(found, path)
    return found
