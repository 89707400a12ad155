"""Trained ablations: tables as data, resumable and shared runs, noisy labels, motion blur, tables, the command."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import inspect
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from small import SMALL, free_body, people, small_config, small_pipeline

from hmdiff.build import build_source
from hmdiff.cli.main import main
from hmdiff.config import Config, load_config, save_config
from hmdiff.data.label_noise import NoisyLabels
from hmdiff.data.motion_blur import Blurred, blur_along_lines, line_kernels
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import evaluate
from hmdiff.evaluate.store import stored
from hmdiff.files.locks import try_claim
from hmdiff.lab import trained_plots as ablation_plots
from hmdiff.lab.ablations import Comparison, Row, check_table
from hmdiff.lab.table_rows import RowCells, csv_rows, difference_of, mean_of, table_cells, visibility_table_cells
from hmdiff.lab.trained_ablations import COSTS, TRAINED
from hmdiff.lab.trained_cells import NEEDS, EvaluationSettings, cell_path, compute_cell
from hmdiff.lab.trained_costs import measure_costs
from hmdiff.lab.trained_runs import (
    Plan,
    Run,
    RunReport,
    identifying_config,
    is_done,
    last_step,
    make_plan,
    row_config,
    run_name,
    seconds_left,
    train_runs,
)
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.train import loop as training
from hmdiff.train.loop import Trainer

# -- the tables as data ------------------------------------------------------------------------------------------------


def stored_cell(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    return stored(cell_path(folder, settings), settings, NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_every_row_is_a_config(name: str) -> None:
    table = TRAINED[name]
    check_table(name, table)
    known = inspect.signature(MeshRecoveryModel.__init__).parameters
    plain = row_config(table, table.rows[0], 1, "direct")
    for row in table.rows:
        config = row_config(table, row, 1, "direct")
        assert set(config.model) <= set(known) and config.model["mode"] == "direct" and config.seed == 1
        assert config.training == plain.training and config.evaluation == plain.evaluation
        assert (identifying_config(config) == identifying_config(plain)) == (not row.overrides)
        assert config.evaluation.test_people == 0 and config.training.evaluate_every == config.training.steps
    assert table.rows[0].reference is None and not table.rows[0].overrides
    assert all(row.reference is not None for row in table.rows[1:])


@pytest.mark.slow
def test_rows_of_several_tables_share_their_runs(tmp_path: Path) -> None:
    names = ("depth_rle", "silhouette_masked", "rendered_depth")
    plan = make_plan({name: TRAINED[name] for name in names}, tmp_path, 2)
    first = plan.runs_of["depth_rle"]
    assert (
        first["neither"] == plan.runs_of["silhouette_masked"]["neither"] == plan.runs_of["rendered_depth"]["no depth"]
    )
    assert first["depth"] == plan.runs_of["rendered_depth"]["rendered, tested degraded"]
    assert first["depth"] != plan.runs_of["rendered_depth"]["degraded"]
    # 4 + 4 + 3 models, with "neither" and "depth" shared; two seeds, ordered by seed.
    assert len(plan.runs) == 2 * 8 and [run.seed for run in plan.runs] == [0] * 8 + [1] * 8


def test_a_row_wins_over_what_is_asked_of_all() -> None:
    table = Comparison("t", (Row("a", ("model.depth=1",)), Row("b", reference="a")), base="quickstart")
    changes = ("model.depth=2", "training.batch_size=32")
    deep = [row_config(table, row, 0, "diffusion", 70, changes) for row in table.rows]
    assert [config.model["depth"] for config in deep] == [1, 2]
    assert all(config.training.batch_size == 32 and config.training.steps == 70 for config in deep)
    assert deep[0].training.warmup_steps == 10  # quickstart's 100 of 700
    assert row_config(table, table.rows[0], 0, "direct", 70, ["training.warmup_steps=9"]).training.warmup_steps == 9
    with pytest.raises(UserError, match="mode 'drect' is not known; choose one of diffusion, direct"):
        row_config(table, table.rows[0], 0, "drect")
    with pytest.raises(UserError, match=r"quickstrat\.yaml: no such config; did you mean 'quickstart'"):
        row_config(table, table.rows[0], 0, base="quickstrat")


def test_what_a_run_is() -> None:
    plain = small_config("a", "model.mode=direct")
    same = small_config("b", "model.mode=direct", "seed=3", "data.workers=2", "training.steps=7", "loss.rle=0.0")
    assert identifying_config(plain) == identifying_config(same) and run_name(plain, ()) == run_name(same, ())
    for change in ("data.label_noise=0.01", "model.width=64", "loss.joints=2", "model.mode=diffusion"):
        assert identifying_config(small_config("a", "model.mode=direct", change)) != identifying_config(plain), change
    one, other = ("model.depth=2", "data.block_size=2"), ("data.block_size=2", "model.depth=2")
    config = small_config("a", "model.mode=direct", *one)
    assert run_name(config, one) == run_name(config, other) == run_name(config, (*one, "loss.joints=1.0"))
    assert run_name(config, one).startswith("direct_block-size-2_depth-2_")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((Row("a"), Row("a")), "two rows have the same label"),
        ((Row("a"), Row("b", (), "c")), "row 'b': there is no other row 'c' to compare with"),
        ((Row("a", (), "a"),), "row 'a': there is no other row 'a'"),
        ((Row("a", ("training.steps=3",)),), "'training.steps=3' is not of the model, the loss or the data"),
        (
            (Row("a", evaluation_overrides=("model.depth=2",)),),
            "'model.depth=2' is not of the data that it is tested on",
        ),
    ],
)
def test_tables_that_cannot_mean_what_they_say(rows: tuple[Row, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_table("t", Comparison("t", rows, base="quickstart"))


# -- the runs ----------------------------------------------------------------------------------------------------------

TINY = Comparison(
    "two depths",
    (Row("one"), Row("two", ("model.depth=2",), "one")),
    TRAINED["depth_rle"].columns,
    base="base.yaml",
    splits=("val",),
)


def tiny_plan(folder: Path, seeds: int = 2, steps: int = 4, **options: Any) -> Plan:
    base = folder / "base.yaml"
    folder.mkdir(exist_ok=True)
    save_config(small_config("unused"), base)
    return make_plan({"tiny": TINY}, folder / "out", seeds, steps=steps, base=str(base), **options)


class Stub:
    """Writes the files of a training without training; can be stopped or killed in one of its runs."""

    def __init__(self, stop_at: int = 0, kill_at: int = 0) -> None:
        self.seen: list[str] = []
        self.stop_at, self.kill_at = stop_at, kill_at

    def __call__(self, config: Config) -> int:
        self.seen.append(config.name)
        folder, total = Path(config.output), config.training.steps
        half = folder / "checkpoints" / f"step_{total // 2:08d}"
        if len(self.seen) in (self.stop_at, self.kill_at):
            half.mkdir(parents=True)
            if len(self.seen) == self.kill_at:
                raise KeyboardInterrupt
            return total // 2
        (folder / "pipeline").mkdir(parents=True)
        (folder / "pipeline" / "hmdiff.json").write_text(json.dumps(identifying_config(config) | {"seed": config.seed}))
        return total


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again(tmp_path: Path) -> None:
    plan, told = tiny_plan(tmp_path), list[RunReport]()
    first = Stub()
    now = itertools.count(0, 10)
    assert train_runs(plan.runs, first, told.append, lambda: float(next(now))) == []
    assert first.seen == ["one, seed 0", "two, seed 0", "one, seed 1", "two, seed 1"]
    assert [(each.done, each.total, each.seconds, each.seconds_left) for each in told] == [
        (1, 4, 10, 30),
        (2, 4, 10, 20),
        (3, 4, 10, 10),
        (4, 4, 10, 0),
    ]
    assert all(is_done(run) and load_config(run.folder / "config.yaml") == run.config for run in plan.runs)
    again = Stub()
    assert train_runs(tiny_plan(tmp_path).runs, again) == [] and again.seen == []
    assert train_runs(tiny_plan(tmp_path, 3).runs, again) == [] and again.seen == ["one, seed 2", "two, seed 2"]
    # Incomplete without its model or its mark.
    (plan.runs[1].pipeline / "hmdiff.json").unlink()
    (plan.runs[2].folder / "done.json").write_text("{")
    assert [is_done(run) for run in plan.runs] == [True, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop_at", "kill_at"])
def test_a_stopped_training_goes_on(tmp_path: Path, how: str) -> None:
    plan = tiny_plan(tmp_path)
    with pytest.raises(KeyboardInterrupt) if how == "kill_at" else contextlib.nullcontext():
        assert [run.name for run in train_runs(plan.runs, Stub(**{how: 2}))] == [run.name for run in plan.runs[1:]]
    assert [last_step(run) for run in plan.runs] == [4, 2, 0, 0]
    assert seconds_left(plan.runs[1:]) is None and seconds_left(plan.runs[:1]) == 0
    rest, told = Stub(), list[RunReport]()
    now = itertools.count(0, 10)
    assert train_runs(plan.runs, rest, told.append, lambda: float(next(now))) == []
    assert rest.seen == [run.name for run in plan.runs[1:]]
    assert told[0].seconds == 20  # half of it took ten seconds


def test_order_changes_nothing(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        runs = tiny_plan(tmp_path / str(number)).runs
        random.shuffle(runs)
        train_runs(runs, Stub())
        found.append(
            {run.folder.relative_to(tmp_path / str(number)): (run.pipeline / "hmdiff.json").read_text() for run in runs}
        )
    assert found[0] == found[1] and len(set(found[0].values())) == 4


@pytest.mark.slow
def test_another_budget_is_refused(tmp_path: Path) -> None:
    train_runs(tiny_plan(tmp_path).runs, Stub())
    with pytest.raises(UserError, match="holds a run with steps 4, and 5 is asked for; rows of a table have one"):
        tiny_plan(tmp_path, steps=5)
    with pytest.raises(UserError, match=r"holds a run with learning_rate 0\.003, and 0\.1 is asked for"):
        tiny_plan(tmp_path, changes=["training.learning_rate=0.1"])
    # Another model is another folder; options that do not affect results do not change the budget.
    assert not is_done(tiny_plan(tmp_path, changes=["loss.joints=2"]).runs[0])
    assert is_done(tiny_plan(tmp_path, changes=["training.threads=1", "data.workers=1"]).runs[0])
    stored = tiny_plan(tmp_path).runs[0].folder / "config.yaml"
    save_config(load_config(stored, ["model.width=64"]), stored)
    with pytest.raises(UserError, match=r"holds a run with model\.width 64, and 32 is asked for"):
        tiny_plan(tmp_path)


def test_a_run_in_other_hands_is_left_alone(tmp_path: Path) -> None:
    plan, stub = tiny_plan(tmp_path, 1), Stub()
    plan.runs[0].folder.mkdir(parents=True)
    with try_claim(plan.runs[0].folder, ".ablation_lock") as mine:
        assert mine
        assert train_runs(plan.runs, stub) == [plan.runs[0]]
    assert stub.seen == ["two, seed 0"]
    assert train_runs(plan.runs, stub) == [] and stub.seen[1:] == ["one, seed 0"]


# -- noisy labels ------------------------------------------------------------------------------------------------------


def noisy(noise: float, seed: int = 0) -> NoisyLabels:
    body, mesh = free_body()
    return NoisyLabels(people(False), body, mesh.coarse_ids, noise, seed)


@pytest.mark.slow
def test_labels_are_displaced_in_training_alone() -> None:
    clean, source = people(False).block("train", 3), noisy(0.05)
    sample = source.block("train", 3)
    body, mesh = free_body()
    assert sample.joints_3d is not None and clean.joints_3d is not None
    moved = sample.joints_3d - clean.joints_3d
    assert (moved[:, 0] == 0).all() and (moved[:, 1:] != 0).all()
    # Skin moves with its joints; a keypoint is still where the regressor puts it on the displaced mesh.
    assert sample.coarse_vertices is not None and clean.coarse_vertices is not None
    skin = body.lbs_weights[mesh.coarse_ids] @ moved
    torch.testing.assert_close(sample.coarse_vertices - clean.coarse_vertices, skin, atol=1e-6, rtol=0)
    assert sample.keypoints_3d is not None and clean.keypoints_3d is not None
    torch.testing.assert_close(
        sample.keypoints_3d - clean.keypoints_3d, body.keypoints(body.lbs_weights @ moved), atol=1e-5, rtol=0
    )
    labels = {"joints_3d", "coarse_vertices", "keypoints_3d"}
    for field in dataclasses.fields(sample):
        mine, other = getattr(sample, field.name), getattr(clean, field.name)
        if mine is not None and field.name not in labels:
            assert torch.equal(mine, other), field.name
    for stream in ("val", "test"):
        assert torch.equal(source.block(stream, 0).joints_3d, people(False).block(stream, 0).joints_3d)  # type: ignore
    again = noisy(0.05).block("train", 3).joints_3d
    assert again is not None and torch.equal(again, sample.joints_3d)
    for other in (noisy(0.05, 1).block("train", 3), noisy(0.05).block("train", 4)):
        assert not torch.equal(other.joints_3d, sample.joints_3d)  # type: ignore[arg-type]


def test_the_noise_is_what_was_asked_for() -> None:
    moved = noisy(0.04).displacements(20000, torch.Generator().manual_seed(0))[:, 1:]
    assert moved.square().mean().sqrt().item() == pytest.approx(0.04, rel=0.02)
    assert moved.mean().abs() < 1e-3
    person = moved.square().mean((1, 2)).sqrt()
    assert person.log().std().item() == pytest.approx(0.5, rel=0.1)  # label quality varies between people


def test_noise_is_of_the_training_source_of_a_config() -> None:
    body, mesh = free_body()
    for noise, kind in ((0.0, "SyntheticHumans"), (0.05, "NoisyLabels")):
        config = small_config("unused", f"data.label_noise={noise}")
        assert type(build_source(config, body, mesh)).__name__ == kind
        assert type(build_source(config, body, mesh, full_mesh=True)).__name__ == "SyntheticHumans"
    for bad in (-0.1, math.nan):  # refused when the config is read
        with pytest.raises(UserError, match=rf"data\.label_noise {bad}: 0 to 0\.5 is possible"):
            small_config("unused", f"data.label_noise={bad}")
    for bad in (-0.1, 0.6, math.nan):
        with pytest.raises(UserError, match=rf"data\.label_noise {bad}: metres from 0 to 0\.5 are expected"):
            NoisyLabels(people(False), body, mesh.coarse_ids, bad, 0)
    with pytest.raises(UserError, match="is of training labels: these people have the full mesh"):
        NoisyLabels(people(True), body, mesh.coarse_ids, 0.1, 0)


# -- motion blur -------------------------------------------------------------------------------------------------------


def test_line_kernels() -> None:
    length, angle = torch.tensor([0.0, 4.0, 4.0, 5.3]), torch.tensor([1.0, 0.0, math.pi / 2, 0.7])
    kernels = line_kernels(length, angle, 9)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(4))
    point = torch.zeros(9, 9)
    point[4, 4] = 1
    assert torch.equal(kernels[0], point)
    row = torch.zeros(9, 9)
    row[4, 2:7] = 0.2
    torch.testing.assert_close(kernels[1], row)
    torch.testing.assert_close(kernels[2], row.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(kernels[3], kernels[3].flip(0, 1))  # centred


def test_smearing_is_an_average_along_the_line(generator: torch.Generator) -> None:
    maps = torch.zeros(2, 3, 32, 32)
    maps[:, :, 8:24, 8:24] = torch.rand(2, 3, 16, 16, generator=generator)
    # 0.25 half-sides of 32 pixels are 4: the mean of five shifts, along x for the first, along y for the second.
    found = blur_along_lines(maps, torch.tensor([0.25, 0.25]), torch.tensor([0.0, math.pi / 2]))
    for person, axis in ((0, -1), (1, -2)):
        expected = torch.stack([maps[person].roll(shift, axis) for shift in range(-2, 3)]).mean(0)
        torch.testing.assert_close(found[person], expected, atol=1e-6, rtol=0)
        alone = blur_along_lines(
            maps[person : person + 1], torch.tensor([0.25]), torch.tensor([[0.0, math.pi / 2][person]])
        )
        torch.testing.assert_close(alone[0], found[person])
    flat = torch.full((1, 3, 16, 16), 0.7)
    torch.testing.assert_close(blur_along_lines(flat, torch.tensor([0.4]), torch.tensor([0.5]), "replicate"), flat)


def test_blurred_splits_are_the_same_people() -> None:
    source = Blurred(people(True))
    sharp, blurred = source.block("test", 0), source.block("test_blur", 0)
    assert torch.equal(sharp.heatmaps, people(True).block("test", 0).heatmaps)  # type: ignore[arg-type]
    for field in dataclasses.fields(sharp):
        mine, other = getattr(blurred, field.name), getattr(sharp, field.name)
        if mine is not None and field.name != "heatmaps":
            assert torch.equal(mine, other), field.name
    assert blurred.heatmaps is not None and sharp.heatmaps is not None
    peaks, before = blurred.heatmaps.flatten(2).amax(-1), sharp.heatmaps.flatten(2).amax(-1)
    there = before > 0
    assert (peaks[there] < before[there]).all() and (peaks[~there] == 0).all()
    assert torch.equal(source.block("test_blur", 0).heatmaps, blurred.heatmaps)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="split 'tset' is not known"):
        source.block("tset_blur", 0)


# -- cells and tables --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cell_is_what_evaluation_gives(tmp_path: Path) -> None:
    pipeline = small_pipeline("model.mode=diffusion")
    run = Run(tmp_path, small_config("unused", "model.mode=diffusion"))
    settings = EvaluationSettings(5, 3, 2, 7).settings(run, Row("a"), "val", "weights")
    assert stored_cell(tmp_path, settings) is None
    done: list[int] = []
    cell = compute_cell(tmp_path, settings, pipeline, people(True), done.append)
    assert sum(done) == 5 and stored_cell(tmp_path, settings) == json.loads(json.dumps(cell))
    direct = evaluate(pipeline, people(True), "val", 5, SamplingConfig(3, 2, 7))
    for metric, kinds in direct["errors"].items():
        for kind, value in kinds.items():
            assert sum(cell["values"][metric][kind]) / 5 == pytest.approx(value["value"], rel=1e-5)
    assert len(cell["values"]["spread"]) == 5 and min(cell["values"]["spread"]) > 0
    assert "correlation" not in cell and "visible_fraction" not in cell
    for other in (
        EvaluationSettings(4, 3, 2, 7),
        EvaluationSettings(5, 2, 2, 7),
        EvaluationSettings(5, 3, 1, 7),
        EvaluationSettings(5, 3, 2, 8),
    ):
        assert stored_cell(tmp_path, other.settings(run, Row("a"), "val", "weights")) is None
    for row, split, weights in (
        (Row("a", evaluation_overrides=("data.workers=1",)), "val", "weights"),
        (Row("a"), "test", "weights"),
        (Row("a"), "val", "others"),
    ):
        assert stored_cell(tmp_path, EvaluationSettings(5, 3, 2, 7).settings(run, row, split, weights)) is None
    cell_path(tmp_path, settings).write_text("{")
    assert stored_cell(tmp_path, settings) is None
    blurred = EvaluationSettings(5, 3, 2, 7).settings(run, Row("a"), "val_blur", "weights")
    found = compute_cell(tmp_path, blurred, pipeline, Blurred(people(True)))
    assert found["values"]["pve"]["mean"] != cell["values"]["pve"]["mean"]
    run = Run(tmp_path, small_config("unused", "model.mode=direct"))
    alone = EvaluationSettings(5, 25, 9).settings(run, Row("a"), "val", "")
    assert (alone["num_hypotheses"], alone["steps"]) == (1, 1)


def made_up(errors: list[float], split: str = "test", fractions: list[float] | None = None, **more: Any) -> Any:
    kinds = {"mean": errors, "oracle": [error - 10 for error in errors]}
    values: dict[str, Any] = {"pve": kinds, "pa_mpjpe": kinds, "spread": [error / 10 for error in errors]}
    if fractions is not None:
        values["visible_fraction"] = fractions
    settings = {"split": split, "people": len(errors), "seed": 0, "num_hypotheses": 5, "steps": 2} | more
    return {"settings": settings, "values": values}


def rows_of(fractions: list[float] | None = None) -> list[RowCells]:
    plain = {0: made_up([100.0, 200.0], fractions=fractions), 1: made_up([120.0, 180.0], fractions=fractions)}
    better = {0: made_up([90.0, 180.0], fractions=fractions), 1: made_up([120.0, 150.0], fractions=fractions)}
    better[1]["correlation"] = {"pooled": [0.5, 0.4, 0.6], "within_joint": [0.3, 0, 1], "by_person": [0.2, 0, 1]}
    cost = {"parameters": 1234567, "milliseconds": 4.25, "step_milliseconds": 250.0}
    return [RowCells(Row("plain"), plain, cost), RowCells(Row("new", (), "plain", "plain"), better)]


def test_differences_are_of_the_same_seed_and_person() -> None:
    plain, new = rows_of()
    found = mean_of(new, "pve")
    assert found is not None and found["value"] == 135 and found["low"] == 105 and found["high"] == 165
    apart = difference_of(new, plain, "pve")
    assert apart is not None
    # Per person, averaged over seeds: -5 and -25, so the interval lies between; in percent of 110 and 190.
    assert (apart.absolute["value"], apart.absolute["low"], apart.absolute["high"]) == (-15, -25, -5)
    assert apart.relative["value"] == pytest.approx(-0.1)
    assert apart.relative["low"] == pytest.approx(-25 / 190) and apart.relative["high"] == pytest.approx(-5 / 110)
    assert apart.by_seed == {0: pytest.approx(-0.1), 1: pytest.approx(-0.1)}
    one_seed = dataclasses.replace(new, cells={1: new.cells[1]})
    apart = difference_of(one_seed, plain, "pve")
    assert apart is not None and apart.absolute["value"] == -15 and list(apart.by_seed) == [1]
    assert difference_of(dataclasses.replace(new, cells={2: new.cells[1]}), plain, "pve") is None
    assert difference_of(new, None, "pve") is None and mean_of(new, "pve", "selected") is None
    others = dataclasses.replace(new, cells={0: made_up([1.0, 2.0], split="test_ood")})
    with pytest.raises(
        UserError, match="cells to compare: split test_ood and test; only cells of the same people are paired"
    ):
        difference_of(others, plain, "pve")


def test_the_printed_table() -> None:
    table = Comparison("t", (), columns=TRAINED["occlusion"].columns + TRAINED["depth_rle"].columns[-1:])
    titles, lines = table_cells(table, rows_of(), "diffusion")
    assert len(titles) == len(lines[0]) == len(lines[1])
    shown = dict(zip(titles, lines[1], strict=True))
    assert shown["PVE"] == "135.0 (105.0-165.0)" and shown["seeds"] == "2"
    assert shown["% of ref."] == shown["% of the row it adds to"] == "-10.0 (-13.2 to -4.5)"
    assert shown["each seed"] == "-10.0 -10.0" and shown["rank corr."] == "0.50"
    assert dict(zip(titles, lines[0], strict=True))["% of ref."] == "-"
    assert "PVE oracle" in titles and "PVE oracle" not in table_cells(table, rows_of(), "direct")[0]
    _, costs = table_cells(table, rows_of(), "direct", COSTS)
    assert costs == [["plain", "1,234,567", "4.2", "250.0"], ["new", "-", "-", "-"]]


def test_bands_are_of_people() -> None:
    rows = rows_of([0.9, 0.5])
    titles, lines = visibility_table_cells(rows, "pve")
    assert titles == ["visible", "over 80 % (1)", "60-80 % (0)", "40-60 % (1)", "under 40 % (0)"]
    assert lines == [
        ["plain", "110.0 (110.0-110.0)", "-", "190.0 (190.0-190.0)", "-"],
        ["new", "105.0 (105.0-105.0)", "-", "165.0 (165.0-165.0)", "-"],
    ]
    shares = visibility_table_cells(rows, "pve", relative=True)[1][1]
    assert shares[1:] == ["-4.5 (-4.5 to -4.5)", "-", "-13.2 (-13.2 to -13.2)", "-"]
    # Any function of the visible fraction works.
    halves = visibility_table_cells(rows, "pve", bins=("low", "high"), bin_of=lambda seen: (seen > 0.7).long())
    assert halves[0] == ["visible", "low (1)", "high (1)"] and halves[1][0][1].startswith("190.0")
    with pytest.raises(UserError, match="row 'plain': its people do not tell how much of them is visible"):
        visibility_table_cells(rows_of(), "pve")


def test_csv_has_every_number() -> None:
    bands = ("over", "b", "c", "under")
    lines = list(csv_rows("t", "test", rows_of([0.9, 0.5]), "diffusion", bands))
    assert [(line["row"], line["band"]) for line in lines[:5]] == [("plain", band) for band in ("all", *bands)]
    new = lines[5]
    assert new["pve_mean"] == 135 and new["pve_oracle"] == 125 and new["seeds"] == "0 1" and new["people"] == 2
    assert new["pve_mean_share_reference"] == pytest.approx(-0.1) == new["pve_mean_share_reference_seed_1"]
    assert new["spread"] == pytest.approx(13.5) and new["correlation"] == 0.5
    assert lines[0]["parameters"] == 1234567 and "parameters" not in new
    assert lines[7]["people"] == 0 and "pve_mean" not in lines[7]
    assert lines[8]["people"] == 1 and lines[8]["pve_mean"] == 165


@pytest.mark.slow
def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_plots, "RESOLUTION", 40)
    rows = rows_of([0.9, 0.5])
    assert ablation_plots.plot_differences({"test": rows}, tmp_path / "a.png")
    assert ablation_plots.plot_visibility_bins({"test": rows}, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))
    assert not ablation_plots.plot_differences({"test": rows[:1]}, tmp_path / "c.png")
    assert not ablation_plots.plot_visibility_bins({"test": [RowCells(Row("a"), {})]}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


# -- costs and the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips parts of the training's evaluation that have their own tests; runs on the CPU."""
    monkeypatch.setattr(Trainer, "_picture", lambda trainer: None)
    monkeypatch.setattr(training, "mean_mesh_error", lambda *_: 300.0)
    monkeypatch.setattr(ablation_plots, "RESOLUTION", 40)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_costs_are_medians_of_rows_in_turn() -> None:
    configs = [small_config("unused", "model.mode=direct", f"model.depth={depth}") for depth in (1, 2)]
    now, looks = [0.0], itertools.cycle([0.0, 0.5, 0.0, 0.25])  # half a second per step, a quarter per image call

    def clock() -> float:
        now[0] += next(looks)
        return now[0]

    turns: list[int] = []
    first, second = measure_costs(configs, repeats=2, clock=clock, progress=turns.append)
    assert len(turns) == 2 * 3  # the first turn is a warm-up
    assert first["step_milliseconds"] == second["step_milliseconds"] == 500
    assert first["milliseconds"] == second["milliseconds"] == 250 / 4  # blocks of four people
    assert first["parameters"] < second["parameters"]
    assert not Path("unused").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(small_config("unused", *SMALL), tmp_path / "base.yaml")
    monkeypatch.setitem(TRAINED, "tiny", dataclasses.replace(TINY, splits=("val", "val_blur"), by_visibility=True))
    words = [
        "ablate",
        "tiny",
        "--base",
        str(tmp_path / "base.yaml"),
        "--steps",
        "2",
        "--seeds",
        "1",
        "--people",
        "4",
        "--set",
        "data.label_noise=0.02",
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*words, "--list"]) == 0
    text = capsys.readouterr().out
    assert "2 trainings for 2 rows and seeds of the tables, 2 of them still to do; about an unknown time" in text
    assert "model.depth=2" in text and not (tmp_path / "out").exists()
    assert main(words) == 2
    assert "nothing of tiny is trained there; add --train" in capsys.readouterr().err

    assert main([*words, "--train"]) == 0
    text = capsys.readouterr().out
    assert "[1/2] one, seed 0: trained in" in text and "[2/2] two, seed 0: trained in" in text
    # A table by visible part, of people who carry none: the rest of it is still there.
    assert "no rows by visible part" in text and "PVE by visible part" not in text
    with open(tmp_path / "out" / "tiny_direct.csv", newline="") as handle:
        rows = {(row["row"], row["split"]): row for row in csv.DictReader(handle)}
    assert set(rows) == {(row, split) for row in ("one", "two") for split in ("val", "val_blur")}
    apart = float(rows["two", "val"]["pve_mean"]) - float(rows["one", "val"]["pve_mean"])
    assert float(rows["two", "val"]["pve_mean_difference_reference"]) == pytest.approx(apart, abs=0.01)
    assert (tmp_path / "out" / "tiny_direct.png").is_file()

    cells = sorted((tmp_path / "out" / "cells").iterdir())
    stamps = [path.stat().st_mtime_ns for path in cells]
    assert main([*words, "--train"]) == 0
    text = capsys.readouterr().out
    assert "2 trainings, 2 of them there already" in text and "trained in" not in text
    assert len(cells) == 4 and [path.stat().st_mtime_ns for path in cells] == stamps
    assert main([*words[:4], "--steps", "3", *words[6:]]) == 2
    assert "holds a run with steps 2, and 3 is asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("detph_rle", "table 'detph_rle' is not known; choose one of diffusion, dat, hypotheses, depth_rle"),
        ("depth_rle dat", "depth_rle is trained, dat is of given checkpoints: ask for them apart"),
        ("diffusion --train", "--train is of the tables that are trained; name one, such as depth_rle"),
        ("diffusion --seeds 2", "--seeds is of the tables that are trained"),
        ("depth_rle --direct x", "--direct is of the tables that compare given checkpoints, not of trained ones"),
        ("depth_rle --list --train", "--list trains nothing: leave --list or --train out"),
        (
            "depth_rle --splits tset",
            "split 'tset' is not known; choose one of test, test_occluded, test_guessed, test_ood, test_postures, val",
        ),
        ("depth_rle --set training.stpes=3", "there is no key 'stpes'; did you mean 'steps'"),
        ("depth_rle --base nowhere.yaml", "nowhere.yaml: no such config"),
        ("depth_rle --mode drect", "invalid choice: 'drect'"),
    ],
)
def test_bad_words_are_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["ablate", *words.split(), "--output", str(tmp_path / "out")])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
