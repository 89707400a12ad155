"""Sweeps: resumable and nested cells, paired differences, the Pareto front, tables, and the two commands."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import people, small_pipeline
from torch import Tensor

from hmdiff.cli.main import main
from hmdiff.data.sample import Sample
from hmdiff.diffusion.guidance import CHOICES, MODES, Guidance
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import evaluate
from hmdiff.evaluate.hypothesis_rows import COUNTS
from hmdiff.evaluate.table import duration_text, save_csv
from hmdiff.lab import sweep as experiments
from hmdiff.lab import sweep_plots as plots
from hmdiff.lab.ablations import ROLES, TABLES, Row, check_table, settings_of
from hmdiff.lab.comparison import difference, pareto_front, table_row
from hmdiff.lab.sweep import Progress, Setting, Study, cost_per_person, resolved, run_cells
from hmdiff.lab.table_rows import RowCells, csv_rows, table_cells
from hmdiff.names import METRICS
from hmdiff.pipeline import HMDiffPipeline, MeshOutput


class Counted:
    """A pipeline that counts its calls, and optionally fails at one of them."""

    def __init__(self, pipe: HMDiffPipeline) -> None:
        self.pipe, self.calls, self.fail_at = pipe, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, *words: Any, **options: Any) -> MeshOutput:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.pipe(*words, **options)


@functools.cache
def pipeline(*overrides: str) -> HMDiffPipeline:
    return small_pipeline(*overrides)


def study(folder: Path, **changes: Any) -> Study:
    pipelines: Any = {"a": Counted(pipeline()), "d": Counted(pipeline("model.mode=direct"))}
    values: dict[str, Any] = {"people": 4, "batch": 2}
    return Study(pipelines, {"a": "1", "d": "2"}, lambda pipe: people(True), folder, **{**values, **changes})


def calls(of: Study, model: str = "a") -> int:
    counted: Any = of.pipelines[model]
    return counted.calls  # type: ignore[no-any-return]


def test_settings_that_ask_for_the_same_are_equal() -> None:
    pipe = pipeline()
    plain = resolved(Setting("a", SamplingConfig()), pipe)
    assert plain == resolved(Setting("a", SamplingConfig(25, 5, 0, "ddim", 0.0, Guidance("none"))), pipe)
    assert plain == resolved(Setting("a", SamplingConfig(guidance=Guidance("dat", strength=0))), pipe)
    assert plain != resolved(Setting("a", SamplingConfig(guidance=Guidance("dat"))), pipe)
    # Only DDIM has an eta; a model without diffusion has neither steps nor hypotheses.
    assert resolved(Setting("a", SamplingConfig(scheduler="unipc", eta=0.7)), pipe).sampling.eta == 0.0
    assert resolved(Setting("a", SamplingConfig(eta=0.7)), pipe).sampling.eta == 0.7
    direct = resolved(Setting("d", SamplingConfig(25, 40, guidance=Guidance("dat"))), pipeline("model.mode=direct"))
    assert direct == Setting("d", SamplingConfig(1, 1, 0, "none", 0.0))
    with pytest.raises(UserError, match="steps 201: a was trained with 200 steps; give 1 to 200"):
        resolved(Setting("a", SamplingConfig(num_inference_steps=201)), pipe)
    with pytest.raises(UserError, match="number of hypotheses 0: at least 1"):
        resolved(Setting("a", SamplingConfig(0)), pipe)
    with pytest.raises(UserError, match="scheduler 'ddmi' is not known; choose one of ddim"):
        resolved(Setting("a", SamplingConfig(scheduler="ddmi")), pipe)


@pytest.mark.slow
def test_cells_are_what_evaluation_gives(tmp_path: Path) -> None:
    here = study(tmp_path)
    settings = [Setting("a", SamplingConfig(count, 2)) for count in (1, 3)]
    settings += [Setting("a", SamplingConfig(3, 2, guidance=Guidance("dat"))), Setting("d", SamplingConfig())]
    found = run_cells(here, settings)
    for setting, result in zip(settings, found, strict=True):
        guidance = setting.sampling.guidance
        direct = evaluate(
            here.pipelines[setting.model],
            people(True),
            "val",
            4,
            SamplingConfig(result["settings"]["num_hypotheses"], 2, guidance=guidance),
        )
        for metric in METRICS:
            for kind, value in direct["errors"][metric].items():
                assert result["errors"][metric][kind]["value"] == pytest.approx(value["value"], rel=1e-3)
                values = result["values"][metric][kind]
                assert len(values) == 4
                assert sum(values) / 4 == pytest.approx(result["errors"][metric][kind]["value"], rel=1e-5)
        assert ("guidance" in result) == (guidance is not None)
    assert [result["settings"]["num_hypotheses"] for result in found] == [1, 3, 3, 1]
    assert found[2]["errors"]["pve"]["mean"] != found[1]["errors"]["pve"]["mean"]
    assert set(found[2]["guidance"]) == {"gap_before", "gap_after", "active", "fell_back"} <= set(found[2]["values"])


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [None, Guidance("disrupted", 0.5)])
def test_numbers_of_hypotheses_share_a_run(tmp_path: Path, guidance: Guidance | None) -> None:
    here = study(tmp_path / "together")
    together = run_cells(here, [Setting("a", SamplingConfig(count, 2, guidance=guidance)) for count in (3, 1)])
    # Two calls of two people, the missing ones of five timings each, and one warm-up call.
    assert calls(here) == 2 + 3 + (5 + 1) + 1
    apart = study(tmp_path / "apart")
    for count, result in zip((3, 1), together, strict=True):
        (alone,) = run_cells(apart, [Setting("a", SamplingConfig(count, 2, guidance=guidance))])
        assert result["settings"] == alone["settings"]
        for metric in METRICS:
            for kind, values in alone["values"][metric].items():
                assert result["values"][metric][kind] == pytest.approx(values, rel=1e-3)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    settings = [Setting("a", SamplingConfig(2, steps)) for steps in (1, 2)]
    first = run_cells(study(tmp_path), settings)
    again = study(tmp_path)
    assert run_cells(again, settings) == first and calls(again) == 0
    assert len(list(tmp_path.iterdir())) == 2
    # A larger grid computes only its new cell.
    more = run_cells(again, [*settings, Setting("a", SamplingConfig(2, 3))])
    assert more[:2] == first and len(list(tmp_path.iterdir())) == 3
    for changes in ({"people": 3}, {"split": "test"}, {"batch": 4}, {"heatmaps": "net 12"}):
        other = study(tmp_path, **changes)
        assert other.stored(resolved(settings[0], pipeline())) is None
    other = study(tmp_path)
    other.hashes["a"] = "another model of the same name"
    assert other.stored(resolved(settings[0], pipeline())) is None

    damaged = again.path(resolved(settings[0], pipeline()))
    for text in ("", "[1]", "{}", damaged.read_text()[:-100], json.dumps({"settings": first[0]["settings"]})):
        damaged.write_text(text)
        assert again.stored(resolved(settings[0], pipeline())) is None
    before = calls(again)
    (mended,) = run_cells(again, settings[:1])
    assert mended["values"] == first[0]["values"] and calls(again) > before


@pytest.mark.slow
def test_a_killed_grid_goes_on(tmp_path: Path) -> None:
    settings = [Setting("a", SamplingConfig(2, steps)) for steps in (3, 1, 2)]
    whole = run_cells(study(tmp_path / "whole"), settings)
    killed = study(tmp_path / "killed")
    counted: Any = killed.pipelines["a"]
    counted.fail_at = 1 + 5 + 1  # the cheapest cell is finished, the next has begun
    with pytest.raises(KeyboardInterrupt):
        run_cells(killed, settings)
    (kept,) = (tmp_path / "killed").iterdir()
    assert json.loads(kept.read_text())["settings"]["steps"] == 1  # cheapest first
    resumed = run_cells(study(tmp_path / "killed"), settings)
    for one, other in zip(whole, resumed, strict=True):
        assert one["settings"] == other["settings"] and one["values"] == other["values"]
        assert one["errors"] == other["errors"]


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that advances by `seconds` per call."""
    now = [0.0]

    def look() -> float:
        now[0] += seconds
        return now[0]

    return look


@pytest.mark.slow
def test_times_and_what_is_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    here = study(tmp_path, people=5)
    bars: list[int] = []

    @contextlib.contextmanager
    def bar(setting: Setting) -> Iterator[Callable[[int], None]]:
        yield bars.append

    settings = [Setting("a", SamplingConfig(2, steps)) for steps in (4, 1, 1, 2)]
    found = run_cells(here, settings, told.append, bar, ticking(0.5))
    assert found[1] == found[2] and len(found) == 4
    for result in found:
        # Half a second per call of two people; the last call, of one person, does not count.
        assert result["time"]["milliseconds_per_image"] == result["time"]["low"] == result["time"]["high"] == 250
        assert result["time"]["calls"] == 5 and result["time"]["batch"] == 2 and result["time"]["device"] == "cpu"
    assert [(progress.done, progress.total, progress.setting.sampling.num_inference_steps) for progress in told] == [
        (1, 3, 1),
        (2, 3, 2),
        (3, 3, 4),
    ]
    assert bars == [2, 2, 1] * 3
    # Each run reads the clock equally often: after two of them, half of the time has passed, and so on.
    one, two, four = (cost_per_person(each.setting) for each in told)
    assert told[0].seconds_left / (two + four) == pytest.approx(told[1].seconds_left * (one + two) / (2 * four) / one)
    assert told[2].seconds_left == 0


def test_work_grows_with_steps_hypotheses_and_guidance() -> None:
    plain = Setting("a", SamplingConfig(10, 5, 0, "ddim", 0.0))
    others = ({"num_inference_steps": 20}, {"num_hypotheses": 20}, {"guidance": Guidance("dat")}, {"scheduler": "heun"})
    for changes in others:
        assert cost_per_person(Setting("a", plain.sampling.but(**changes))) > 1.3 * cost_per_person(plain), changes


def cell(errors: list[float], milliseconds: float = 10.0, **settings: Any) -> dict[str, Any]:
    """A made-up cell in the format of `run_cells`: the oracle is 10 mm better than the mean."""
    values = {
        metric: {"first": errors, "mean": errors, "oracle": [error - 10 for error in errors]} for metric in METRICS
    }
    mean = sum(errors) / len(errors)
    interval = {
        kind: {"value": mean - lower, "low": mean - lower - 1, "high": mean - lower + 1}
        for kind, lower in (("first", 0), ("mean", 0), ("oracle", 10))
    }
    known = {
        "model": "a",
        "split": "val",
        "people": len(errors),
        "seed": 0,
        "heatmaps": "synthetic",
        "sampler": "ddim",
        "steps": 10,
        "num_hypotheses": 25,
        "eta": 0.0,
        "guidance": None,
    }
    time = {
        "milliseconds_per_image": milliseconds,
        "low": milliseconds,
        "high": milliseconds,
        "batch": 8,
        "device": "cpu",
        "threads": 1,
    }
    return {
        "settings": known | settings,
        "errors": {metric: interval for metric in METRICS},
        "values": values,
        "time": time,
        "expected_calibration_error": 0.2,
        "expected_calibration_error_interval": {"low": 0.1, "high": 0.3},
        "coverage": {"level": 0.9, "value": 0.7, "low": 0.6, "high": 0.8},
    }


def test_differences_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    people_differ = torch.randn(200, generator=generator) * 50 + 150
    noise = torch.randn(200, generator=generator)
    one = cell((people_differ + 1 + noise).tolist())
    other = cell(people_differ.tolist())
    found = difference(one, other, "pve")
    # People differ by 50 mm, the cells by 1: the interval is that of the noise, about 2 * 1.96 / sqrt(200).
    assert found["value"] == pytest.approx(1 + noise.mean().item(), abs=1e-3)
    assert 0.2 < found["high"] - found["low"] < 0.35 and found["low"] > 0
    same = difference(other, other, "pve")
    assert same == {"value": 0, "low": 0, "high": 0}
    assert difference(other, other, "pve", "oracle", "mean")["value"] == pytest.approx(-10)
    for name, value in (("people", 100), ("split", "test"), ("seed", 1)):
        with pytest.raises(UserError, match=f"cells to compare: {name} .*only cells of the same people are paired"):
            difference(cell([1.0, 2.0]), cell([1.0, 2.0], **{name: value}), "pve")


def test_pareto_front_against_the_definition() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [(float(draw.randint(1, 8)), float(draw.randint(1, 8))) for _ in range(draw.randint(1, 12))]
        front = pareto_front(points)
        beaten = {
            i
            for i, (cost, error) in enumerate(points)
            if any(c <= cost and e <= error and (c, e) != (cost, error) for c, e in points)
        }
        # Of equal points, one suffices.
        assert {points[i] for i in front} == {points[i] for i in range(len(points)) if i not in beaten}
        assert not beaten & set(front) and len({points[i] for i in front}) == len(front)
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
    assert pareto_front([(1.0, math.nan), (2.0, 3.0)]) == [1] and pareto_front([]) == []


def test_csv_rows_come_back(tmp_path: Path) -> None:
    guided = cell([110.0, 130.0], guidance={"mode": "dat", "strength": 0.5, "threshold": 0.05, "joint_weights": None})
    guided["guidance"] = {"gap_before": {"value": 0.5, "low": 0.4, "high": 0.6}}
    save_csv([table_row(cell([100.0, 120.0])), table_row(guided, cell([100.0, 120.0]))], tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as handle:
        plain, other = csv.DictReader(handle)
    assert (plain["guidance"], plain["strength"], plain["gap_before"]) == ("none", "", "")
    assert plain["pve_mean"] == "110" and plain["pve_oracle_low"] == "99" and plain["ece_high"] == "0.3"
    assert (other["guidance"], other["strength"], other["gap_before"]) == ("dat", "0.5", "0.5")
    assert other["pve_mean_difference"] == other["mpjpe_oracle_difference_low"] == "10"
    assert plain["pve_mean_difference"] == "" and other["coverage"] == "0.7" and other["milliseconds"] == "10"


def grid_of_cells() -> list[dict[str, Any]]:
    dat = {"mode": "dat", "strength": 0.5, "threshold": 0.05, "joint_weights": None}
    return [
        cell([90 + 60 / steps + extra, 120 + 60 / steps], steps * scale, steps=steps, guidance=guidance)
        for guidance, extra, scale in ((None, 0.0, 1.0), (dat, -4.0, 3.0))
        for steps in (1, 3, 10)
    ]


@pytest.mark.slow
def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *words: Any, **options: Any) -> None:
        drawn.append(self)
        save(self, *words, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    monkeypatch.setattr(plots, "RESOLUTION", 70)
    cells = grid_of_cells()
    plots.plot_sweep(cells, tmp_path / "sweep.png", reference=cells[1], title="grid")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50  # type: ignore[arg-type]
    axes = drawn[0].axes
    assert len(axes) == 6  # mean, oracle, calibration; against steps and against milliseconds
    points = [(result["time"]["milliseconds_per_image"], result["errors"]["pve"]["mean"]["value"]) for result in cells]
    front = pareto_front(points)
    labels = [text.get_text() for text in axes[1].texts]
    steps = [cells[i]["settings"]["steps"] for i in front]
    assert labels == [f"{step} step{'' if step == 1 else 's'}" for step in steps] and len(labels) > 2
    line = next(line for line in axes[1].lines if line.get_color() == "black" and len(line.get_xdata()) == len(front))
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [points[i] for i in front]
    assert axes[0].get_xlabel() == "" and axes[4].get_xlabel() == "denoising steps"
    assert axes[5].get_xlabel().startswith("milliseconds an image, on 1 processor thread")
    assert axes[0].get_ylabel() == "PVE of the mean, mm"

    # No calibration row without calibration, no error bars without a reference.
    for result in cells:
        del result["expected_calibration_error"]
    plots.plot_sweep(cells, tmp_path / "few.svg", "pa_mpjpe", title="few")
    assert len(drawn[1].axes) == 4 and (tmp_path / "few.svg").read_text().startswith("<?xml")


def test_series_are_named_by_what_tells_them_apart() -> None:
    cells = grid_of_cells()
    found = plots.group_series(cells[::-1])
    assert list(found) == ["dat", "unguided"]
    assert [result["settings"]["steps"] for result in found["unguided"]] == [1, 3, 10]
    assert list(plots.group_series(cells[:3])) == ["a, ddim"]
    three = [*cells[:3], cell([1.0, 2.0], num_hypotheses=5, eta=0.5)]
    assert list(plots.group_series(three)) == ["N 25", "eta 0.5, N 5"]
    dat = {"mode": "dat", "strength": 1.0, "threshold": 0.05, "joint_weights": None}
    several = [*cells, cell([1.0, 2.0], guidance=dat), cell([1.0, 2.0], guidance=dat | {"joint_weights": [1.0, 2.0]})]
    assert list(plots.group_series(several)) == [
        "unguided",
        "dat, strength 0.5",
        "dat, strength 1",
        "dat, strength 1, joint_weights [1.0, 2.0]",
    ]


def test_the_tables_are_sound() -> None:
    for name, table in TABLES.items():
        check_table(name, table)
        assert {row.role for row in table.rows} <= set(ROLES), name
        assert any(row.role == "checkpoint" for row in table.rows), name
    dat = [(row.mode, row.steps) for row in TABLES["dat"].rows]
    assert sorted(dat) == sorted((mode, steps) for mode in MODES for steps in (5, 10, 20, 40))
    assert [row.num_hypotheses for row in TABLES["hypotheses"].rows] == list(COUNTS)


def test_a_row_is_a_setting() -> None:
    rows = TABLES["diffusion"].rows
    settings = settings_of(rows, {"checkpoint": "x", "direct": "y", "stacked": "z"}, Guidance, SamplingConfig(7, 3))
    assert [setting.model for setting in settings] == ["y", "z", *["x"] * 4]
    assert all(setting.sampling == SamplingConfig(7, 3) for setting in settings)
    rows = TABLES["dat"].rows
    settings = settings_of(rows, {"checkpoint": "x"}, lambda mode: Guidance(mode, 0.3), SamplingConfig(7, 3))
    assert {(setting.mode, setting.sampling.num_inference_steps) for setting in settings} == {
        (mode, steps) for mode in MODES for steps in (5, 10, 20, 40)
    }
    assert all(setting.sampling.guidance is None or setting.sampling.guidance.strength == 0.3 for setting in settings)


def test_a_printed_table() -> None:
    table = TABLES["diffusion"]
    base, ours = cell([100.0, 140.0], 4.0), cell([95.0, 135.0], 30.0)
    cells = {"A: one step": base, "diffusion, mean": ours, "diffusion, selected": ours}
    rows = [RowCells(row, {0: cells[row.label]}) for row in table.rows if row.label in cells]
    _, lines = table_cells(table, rows)
    assert lines[0][:2] == ["A: one step", "120.0 (100.0-140.0)"]
    assert lines[0][-2:] == ["-", "4.0"]  # the reference has nothing to compare with
    assert lines[1][-2:] == ["-5.0 (-5.0 to -5.0)", "30.0"]
    assert lines[2][1:] == ["-"] * 5 + ["30.0"]  # this model selects no hypothesis
    assert table_cells(table, rows[1:2])[1][0][-2] == "-"  # its reference is missing

    oracle = next(row for row in table.rows if row.label == "diffusion, oracle")
    found = list(csv_rows("diffusion", "val", [rows[0], RowCells(oracle, {0: ours})]))
    assert "pve_mean_difference_reference" not in found[0] and found[1]["row"] == "diffusion, oracle"
    assert found[1]["pve_mean_difference_reference"] == pytest.approx(-5) and found[1]["model"] == "a"
    # The oracle against A's single mesh: each row uses its own kind.
    assert table_cells(table, [rows[0], RowCells(oracle, {0: ours})])[1][1][-2] == "-15.0 (-15.0 to -15.0)"
    guided = cell([95.0, 135.0]) | {
        "guidance": {
            name: {"value": value, "low": 0.0, "high": 1.0}
            for name, value in {"gap_before": 0.5, "gap_after": 0.25, "active": 0.6, "fell_back": 0.05}.items()
        }
    }
    pair = [
        RowCells(Row("none, 5", steps=5), {0: base}),
        RowCells(Row("dat, 5", steps=5, mode="dat", reference="none, 5"), {0: guided}),
    ]
    unguided, line = table_cells(TABLES["dat"], pair)[1]
    assert line[1:] == [
        "115.0 (95.0-135.0)",
        "-5.0 (-5.0 to -5.0)",
        "115.0 (95.0-135.0)",
        "105.0 (85.0-125.0)",
        "0.20 (0.10-0.30)",
        "0.500",
        "0.250",
        "60",
        "5",
        "10.0",
    ]
    assert unguided[6:10] == ["-"] * 4


def pictured(count: int = 4) -> Iterator[Sample]:
    sample = people(True).block("val", 0).map(lambda tensor: tensor[:count])
    yield dataclasses.replace(sample, image=torch.linspace(0, 1, count)[:, None, None, None].expand(-1, 3, 8, 8))


@pytest.mark.slow
def test_an_estimator_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "split_batches", lambda data, split, count: pictured(count))
    asked = []

    def estimate(images: Tensor) -> Tensor:
        asked.append(len(images))
        maps = torch.zeros(len(images), 26, 64, 64)
        maps[:, :, 20:24, 30] = images[:, :1, :1, 0] + 0.1
        return maps

    here = study(tmp_path, estimate=estimate, heatmaps="net 1234")
    settings = [Setting("a", SamplingConfig(2, steps)) for steps in (1, 2)]
    found = run_cells(here, settings)
    assert asked == [4]
    assert found[0]["settings"]["heatmaps"] == "net 1234"
    synthetic = run_cells(study(tmp_path), settings)
    assert found[0]["values"]["pve"]["mean"] != synthetic[0]["values"]["pve"]["mean"]
    with pytest.raises(UserError, match="experiments need the full mesh"):
        run_cells(
            dataclasses.replace(here, people_of=lambda pipe: people(False)),
            [Setting("a", SamplingConfig(2, 1, seed=8))],
        )


def test_the_first_choice_of_guidance_is_the_default() -> None:
    for name, choices in CHOICES.items():
        assert getattr(Guidance(), name) == choices[0]


def test_durations() -> None:
    words = {0.2: "1 s", 89: "89 s", 100: "2 min", 5300: "88 min", 5400: "1.5 h", None: "an unknown time"}
    assert {seconds: duration_text(seconds) for seconds in words} == words


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    pipeline().save_pretrained(folder / "small")
    pipeline("model.mode=direct").save_pretrained(folder / "direct")
    return folder


@pytest.fixture
def few_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 people instead of the commands' 32, two timings, and low-resolution plots."""
    monkeypatch.setattr("hmdiff.cli.splits.test_people", lambda *_: people(True))
    monkeypatch.setattr(experiments, "REPEATS", 2)
    monkeypatch.setattr(plots, "RESOLUTION", 40)


@pytest.mark.slow
@pytest.mark.usefixtures("few_people")
def test_sweep_command(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sweep",
        "--checkpoint",
        str(checkpoints / "small"),
        "--steps",
        "1",
        "2",
        "--num-hypotheses",
        "2",
        "5",
        "--guidance",
        "none",
        "dat",
        "--strength",
        "0",
        "1",
        "--people",
        "3",
        "--output",
        str(tmp_path),
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "another version" not in text and "not comparable" not in text
    # Strength 0 means no guidance: 2 step counts, 2 hypothesis counts, with and without guidance.
    assert "8 cells of 3 people of val\n" in text and "[8/8]" in text and "[9/" not in text
    assert re.search(
        r"\[1/8\] small, ddim, 1 step, N 2: PVE mean [\d.]+, oracle [\d.]+ mm, \d+ ms an image; "
        r"about (\d+ s|\d+ min) left",
        text,
    )
    assert "dat s 1, R 0.05" in text and "reference" in text
    with open(tmp_path / "sweep.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 8 and len({(row["steps"], row["num_hypotheses"], row["guidance"]) for row in rows}) == 8
    for row in rows:
        assert float(row["pve_oracle"]) <= float(row["pve_first"]) and float(row["milliseconds"]) > 0
        assert (row["ece"] == "") == (row["num_hypotheses"] == "2")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size[0] > 300
    for path in list((tmp_path / "cells").iterdir())[:2]:  # as if computed earlier, on another machine
        cell = json.loads(path.read_text()) | {"code": "older"}
        cell["time"]["device"] = "cuda:0"
        path.write_text(json.dumps(cell))
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "8 cells of 3 people of val, 8 of them there already" in text
    assert f"2 cells are of another version of the code; remove them from {tmp_path / 'cells'}" in text
    assert "the times are not comparable: cells were computed on cpu with 1 threads, cuda:0 with 1 threads" in text


@pytest.mark.slow
@pytest.mark.usefixtures("few_people")
def test_ablate_command(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "ablate",
        "diffusion",
        "--checkpoint",
        str(checkpoints / "small"),
        "--direct",
        str(checkpoints / "direct"),
        "--num-hypotheses",
        "2",
        "--steps",
        "1",
        "--people",
        "3",
        "--output",
        str(tmp_path),
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "2 cells of 3 people of test" in text and "the rows of --stacked" in text and "N = 2" in text
    with open(tmp_path / "diffusion.csv", newline="") as handle:
        rows = {row["row"]: row for row in csv.DictReader(handle)}
    assert set(rows) == {"A: one step", *(f"diffusion, {kind}" for kind in ("first", "mean", "selected", "oracle"))}
    apart = float(rows["diffusion, mean"]["pve_mean"]) - float(rows["A: one step"]["pve_mean"])
    assert float(rows["diffusion, mean"]["pve_mean_difference_reference"]) == pytest.approx(apart, abs=1e-2)
    assert not rows["A: one step"]["pve_mean_difference_reference"] and rows["A: one step"]["sampler"] == "none"


@pytest.mark.slow
@pytest.mark.usefixtures("few_people")
def test_the_tables_of_dat_say_which_preset_they_are_of(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = TABLES["dat"]
    monkeypatch.setitem(TABLES, "dat", dataclasses.replace(table, rows=table.rows[:3]))  # 5 steps
    words = ["ablate", "dat", "--checkpoint", str(checkpoints / "small"), "--num-hypotheses", "2", "--people", "2"]
    for preset, title, file in (
        ("ours", "DAT by preset ours, s 1, R 0.05", "dat.csv"),
        ("paper", "DAT by preset paper, s 3000, R 0.3", "dat_paper.csv"),
    ):
        assert main([*words, "--preset", preset, "--output", str(tmp_path)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert title in text and file in text
        with open(tmp_path / file, newline="") as handle:
            rows = {row["row"]: row for row in csv.DictReader(handle)}
        assert set(rows) == {"none, 5", "disrupted, 5", "dat, 5"}
    cells = [json.loads(path.read_text())["settings"]["guidance"] for path in (tmp_path / "cells").iterdir()]
    forms = {(each["mode"], each["decision"], each["step"]) for each in cells if each is not None}
    assert forms == {
        (m, d, s) for m in ("dat", "disrupted") for d, s in (("hypothesis", "line"), ("image", "gradient"))
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep --sampler ddmi", "scheduler 'ddmi' is not known; choose one of ddim"),
        ("sweep --steps 1 900", "steps 900: small was trained with 200 steps; give 1 to 200"),
        ("sweep --steps 0", "'0': a whole number of at least 1 is expected"),
        ("sweep --guidance dta", "invalid choice: 'dta'"),
        ("sweep --strength 1", "--strength, --threshold and --last are of guidance: add --guidance dat"),
        ("sweep --split tset", "invalid choice: 'tset'"),
        ("sweep --estimator nowhere", "--estimator nowhere: no such folder; 'hmdiff prepare estimator' writes one"),
        ("ablate dta", "table 'dta' is not known; choose one of diffusion, dat, hypotheses"),
        ("ablate dat --pairing pair", "invalid choice: 'pair'"),
        ("ablate dat --strength -1", "'-1': a number of at least 0 is expected"),
        ("ablate diffusion --direct SMALL", "--direct small-2: a model of mode 'diffusion', 'direct' is expected"),
    ],
)
def test_bad_words_are_one_line(
    words: str, message: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = str(checkpoints / "small")
    given = [small if word == "SMALL" else word for word in words.split()]
    try:
        code = main([*given, "--checkpoint", small, "--output", str(tmp_path)])
    except SystemExit as stop:  # argparse
        code = stop.code  # type: ignore[assignment]
    found = capsys.readouterr().err
    assert code == 2 and message in found and len(found.strip().splitlines()) == 1, found
