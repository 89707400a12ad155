"""`hmdiff train --dry-run`: each error has its row, and nothing is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from records import ListReader, make_records
from small import SMALL, small_config, small_pipeline

import hmdiff.train.check as module
import hmdiff.train.check_machine as machine
from hmdiff.cli.main import main
from hmdiff.config import save_config
from hmdiff.data.prepare import prepare_dataset
from hmdiff.errors import UserError
from hmdiff.train.check import CAREFUL, FINE, SKIPPED, WRONG, Check, DryRun, dry_run, print_dry_run
from hmdiff.train.loop import Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people on the free body, with photos."""
    folder = tmp_path_factory.mktemp("shards")
    prepare_dataset(ListReader(make_records(folder / "photos")), folder / "people")
    return folder / "people"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMED_STEPS", 1)
    monkeypatch.setattr("hmdiff.train.loop.mean_mesh_error", lambda *_: 0.0)  # slow (512 people), and tested elsewhere


def recorded(shards: Path, *more: str) -> tuple[str, ...]:
    source = f"data.sources=[{{path: {shards}, same_body: true}}]"
    split = f"data.splits.val={{path: {shards}, same_body: true}}"
    return ("data.kind=recorded", source, split, "data.block_size=2", "training.batch_size=2", *more)


def found(result: DryRun) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- results ----


@pytest.mark.slow
def test_synthetic_people(tmp_path: Path) -> None:
    told: list[str] = []
    result = dry_run(small_config(tmp_path / "run"), told.append)
    assert not result.failures and told == [check.name for check in result.checks]
    lines = found(result)
    for name in (
        "body",
        "data",
        "splits",
        "output",
        "model",
        "device",
        "resume",
        "disk",
        "loading",
        "step",
        "memory",
        "balance",
        "evaluation",
        "whole run",
    ):
        assert lines[name].state in (FINE, CAREFUL), name
    assert "12,410 vertices" in lines["body"].found and "mesh 4, 3D joints 4" in lines["data"].found
    assert lines["resume"].found == "a new run: no checkpoint is there"
    assert result.numbers["people_a_step"] == 4 and math.isfinite(result.numbers["loss"])
    assert not files(tmp_path)


@pytest.mark.slow
def test_recorded_people(shards: Path, tmp_path: Path) -> None:
    """Numbers of the config's data and of the projected run."""
    words = recorded(shards, "training.steps=30", "training.evaluate_every=10")
    result = dry_run(small_config(tmp_path / "run", *words))
    assert not result.failures
    lines, numbers = found(result), result.numbers
    assert f"{shards}: 6 records; of 2 people read: mesh 2" in lines["data 1"].found
    assert "val: 2 of 6 records; test: none" in lines["splits"].found
    assert numbers["records"] == 6 and "10.0 times as many people as there are records" in lines["whole run"].found
    expected = 30 * numbers["seconds_a_step"] + 3 * numbers["evaluation_seconds"]
    assert numbers["whole_seconds"] == pytest.approx(expected)
    loading = 2 / numbers["loaded_a_second"]
    assert numbers["seconds_a_step"] == pytest.approx(numbers["step_seconds"] + loading)


@pytest.mark.slow
def test_a_mixture(shards: Path, tmp_path: Path) -> None:
    source = f"data.sources=[{{path: {shards}, same_body: true, weight: 3}}, synthetic]"
    words = recorded(shards, "data.kind=mixture", source)
    lines = found(dry_run(small_config(tmp_path / "run", *words)))
    assert lines["mixture"].found == "shares of the blocks: 75.0%, 25.0%"
    assert "synthetic; of 2 people read: mesh 2" in lines["data 2"].found


@pytest.mark.slow
def test_the_step_is_the_trainings_own(tmp_path: Path) -> None:
    """Its first loss is the first loss that the training logs."""
    words = ("training.steps=1", "training.log_every=1")
    config = small_config(tmp_path / "run", *words)
    losses: list[float] = []
    real = Trainer._one_step

    def watched(self: Trainer, batches: Iterator) -> Any:
        terms = real(self, batches)
        losses.append(float(terms["loss"]))
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", watched)
        dry_run(config)
        dry, losses = losses, []
        Trainer(config).run()
    assert dry[0] == losses[0] and len(dry) > 1


@pytest.mark.slow
def test_what_would_be_resumed(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", "training.steps=2", "training.checkpoint_every=1")
    Trainer(config).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "all 2 steps are done, nothing would be trained" in found(dry_run(config))["resume"].found
    config.training.steps = 5
    lines = found(dry_run(config))
    assert "goes on from" in lines["resume"].found and lines["resume"].found.endswith("step 2 of 5")
    assert lines["whole run"].found.startswith("3 steps in about")
    other = small_config(tmp_path / "run", "seed=9")
    assert "holds a run with another 'seed' section" in found(dry_run(other))["resume"].found
    last = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    kept = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(kept[:100])
    line = found(dry_run(config))["resume"]
    assert line.state == WRONG and "model.safetensors: not what was written, by its checksum" in line.found
    (last / "model.safetensors").write_bytes(kept)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# ---- errors ----


def faulty(result: DryRun, name: str, message: str) -> None:
    line = found(result)[name]
    assert line.state == WRONG and message in line.found, line
    with pytest.raises(UserError) as caught:
        print_dry_run(result)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_body(tmp_path: Path) -> None:
    result = dry_run(small_config(tmp_path / "run", "body=nobody"))
    faulty(result, "body", "nobody")
    states = {check.name: check.state for check in result.checks}
    assert states["data"] == states["splits"] == states["model"] == states["step"] == SKIPPED
    assert states["output"] == FINE  # does not need the body, so it is still checked


@pytest.mark.parametrize(
    ("words", "name", "message"),
    [
        (["model.widht=32"], "model", "did you mean 'width'"),
        (["model.heads=5"], "model", "section 'model'"),
        (["training.learning_rate=0.1", "training.batch_size=6"], "model", "is not a multiple of data.block_size"),
        (["training.start_from=nowhere"], "model", "nowhere"),
        (["loss.points=l3"], "model", "loss.points 'l3' is not known"),
        (["data.kind=recorded"], "data", "data.kind recorded takes one source, data.sources has 0"),
        (["data.kind=films"], "data", "data.kind 'films' is not known"),
    ],
)
def test_a_config_that_cannot_be(tmp_path: Path, words: list[str], name: str, message: str) -> None:
    faulty(dry_run(small_config(tmp_path / "run", *words)), name, message)
    assert not files(tmp_path)


def spoilt(shards: Path, folder: Path, spoil: Callable[[Path], object]) -> Path:
    shutil.copytree(shards, folder)
    spoil(folder)
    return folder


def test_sources_have_their_own_lines(shards: Path, tmp_path: Path) -> None:
    """Three sources with different errors and a valid one: all are reported in one run."""
    cut = spoilt(shards, tmp_path / "cut", lambda f: (f / "shard_00000.arrow").write_bytes(b"short"))
    unfinished = spoilt(
        shards,
        tmp_path / "half",
        lambda f: (f / "index.json").write_text(
            json.dumps(json.loads((f / "index.json").read_text()) | {"complete": False})
        ),
    )
    sources = ", ".join(f"{{path: {place}, same_body: true}}" for place in (cut, unfinished, tmp_path / "gone", shards))
    words = recorded(shards, "data.kind=mixture", f"data.sources=[{sources}]")
    result = dry_run(small_config(tmp_path / "run", *words))
    lines = found(result)
    assert "5 bytes" in lines["data 1"].found and "run the same hmdiff prepare again" in lines["data 2"].found
    assert "not a prepared data set" in lines["data 3"].found and lines["data 4"].state == FINE
    assert [check.name for check in result.failures] == ["data 1", "data 2", "data 3"]
    with pytest.raises(UserError, match=r"5 bytes.* \(2 more above\)"):
        print_dry_run(result)


def test_pictures_that_are_not_there(shards: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    prepare_dataset(ListReader(make_records(tmp_path, photos=False)), bare)
    words = recorded(bare, "model.inputs=image", "model.backbone=resnet18", "data.image_size=64")
    faulty(dry_run(small_config(tmp_path / "run", *words)), "data 1", "it has no picture, and the model reads pictures")


def test_people_who_teach_nothing(tmp_path: Path) -> None:
    """Keypoints without meshes or camera: a warning, not an error."""
    nothing: dict[str, Any] = {"pose": None, "betas": None, "translation": None, "intrinsics": None}
    records = make_records(tmp_path, **nothing, keypoints_2d=None, keypoints_2d_confidence=None, keypoint_names=())
    prepare_dataset(ListReader(records), tmp_path / "unlabelled")
    words = recorded(tmp_path / "unlabelled", "evaluation.people=0")
    line = found(dry_run(small_config(tmp_path / "run", *words)))["data 1"]
    assert line.state == CAREFUL and "nobody of them teaches anything" in line.found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.splits={}"], "data.splits.val is missing"),
        (["evaluation.people=7"], "data.splits.val has 6 people, and evaluation.people is 7"),
        (["evaluation.test_people=3"], "data.splits.test is missing"),
        (["data.splits.val=nowhere"], "nowhere: not a prepared data set"),
    ],
)
def test_splits(shards: Path, tmp_path: Path, words: list[str], message: str) -> None:
    base = [word for word in recorded(shards) if not (words[0].startswith("data.splits") and "splits" in word)]
    result = dry_run(small_config(tmp_path / "run", *base, *words))
    faulty(result, "splits", message)
    assert found(result)["data 1"].state == FINE and found(result)["step"].state == SKIPPED


@pytest.mark.slow
def test_the_output_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    faulty(dry_run(small_config(tmp_path / "file" / "run")), "output", "a file of that name is in the way")
    monkeypatch.setattr(machine.os, "access", lambda place, mode: False)
    faulty(dry_run(small_config(tmp_path / "run")), "output", f"{tmp_path}: may not be written")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path / "run", "training.keep_checkpoints=3")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    result = dry_run(config)
    faulty(result, "disk", "0.0 GB free; free some, or lower training.keep_checkpoints")
    assert found(result)["step"].state == FINE  # reported together with the others


@pytest.mark.slow
def test_what_a_checkpoint_takes(tmp_path: Path) -> None:
    """The estimate is between 1 and 2 times the bytes written."""
    words = ("training.steps=2", "training.checkpoint_every=1", "training.keep_checkpoints=2")
    config = small_config(tmp_path / "run", *words)
    needed = dry_run(config).numbers["disk_bytes"]
    Trainer(config).run()
    folder = tmp_path / "run"
    written = sum(path.stat().st_size for part in ("checkpoints", "pipeline") for path in (folder / part).rglob("*"))
    assert written < needed < 2.5 * written


def test_not_enough_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer, batches: Iterator) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "_one_step", full)
    result = dry_run(small_config(tmp_path / "run"))
    faulty(result, "step", "not enough memory for 4 people a process; lower training.batch_size")
    assert found(result)["whole run"].state == SKIPPED


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Trainer, batches: Iterator) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "_one_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        dry_run(small_config(tmp_path / "run"))


def test_a_gradient_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._Checks.loading

    def poisoned(self: Any) -> None:
        real(self)
        self.batches = [(people, draws._replace(noise=draws.noise * float("nan"))) for people, draws in self.batches]

    monkeypatch.setattr(module._Checks, "loading", poisoned)
    faulty(dry_run(small_config(tmp_path / "run")), "step", "the gradient is not finite")


def test_weights_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(config: Any) -> Any:
        raise ConnectionError("the network cannot be reached")

    monkeypatch.setattr(module, "Trainer", offline)
    faulty(dry_run(small_config(tmp_path / "run")), "model", "network cannot be reached); where it is about weights")


# ---- data loading ----


def balance(workers: int, step: float, rate: float, cores: int, monkeypatch: pytest.MonkeyPatch) -> Check:
    """The row for given seconds per step and people per second of a worker."""
    config = small_config("unused", f"data.workers={workers}")
    run = module._Checks(config, lambda name: None)
    numbers = {"step_seconds": step, "loaded_a_second": rate, "people_a_step": 4.0}
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    run._check("balance", lambda: machine.describe_balance(config, numbers, 1))
    return found(run.result)["balance"]


@pytest.mark.parametrize(
    ("workers", "step", "rate", "cores", "state", "message"),
    [
        (0, 1.0, 400.0, 8, FINE, "the step takes 4 people/s, and loading in the same process 1% of the time"),
        (0, 0.1, 40.0, 8, CAREFUL, "50% of the time: data.workers=1"),
        (2, 0.1, 40.0, 8, FINE, "the step takes 40 people/s, 2 workers load about 80"),
        (2, 0.1, 5.0, 16, CAREFUL, "2 workers load about 10: loading starves the step; data.workers=8"),
        (2, 0.1, 5.0, 4, CAREFUL, "data.workers=8, and there are 4 cores for it"),
        (6, 0.1, 40.0, 4, CAREFUL, "on 4 cores: data.workers=4 is as many as they run at once"),
    ],
)
def test_balance(
    workers: int, step: float, rate: float, cores: int, state: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = balance(workers, step, rate, cores, monkeypatch)
    assert line.state == state and message in line.found, line


# ---- the command ----


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", *SMALL, "output=here"]) == 0
    output, error = capsys.readouterr()
    assert "would write to here/" in output and "nothing was written" in output and not error
    assert not files(tmp_path)
    assert main(["train", "--dry-run", *SMALL, "output=here", "body=nobody"]) == 2
    output, error = capsys.readouterr()
    assert "wrong" in output and error.startswith("hmdiff: error: ") and error.count("\n") == 1
    assert not files(tmp_path)


def test_only_the_main_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    result = DryRun([Check("body", WRONG, "no body")], main_process=False)
    with pytest.raises(UserError, match="no body"):
        print_dry_run(result)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_the_given_config_is_left_as_it_was(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", "training.compile=true")
    save_config(config, tmp_path / "before.yaml")
    dry_run(config)
    save_config(config, tmp_path / "after.yaml")
    assert (tmp_path / "before.yaml").read_text() == (tmp_path / "after.yaml").read_text()


@pytest.mark.slow
def test_it_starts_from_a_pipeline(tmp_path: Path) -> None:
    small_pipeline().save_pretrained(tmp_path / "start")
    result = dry_run(small_config(tmp_path / "run", f"training.start_from={tmp_path / 'start'}"))
    assert not result.failures


@pytest.mark.slow
def test_gates_that_start_at_zero_hide_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-initialised gates block gradients in the first steps; the check must not blame the data."""
    monkeypatch.setattr(module, "_TIMED_STEPS", 0)  # as on a slow machine, where one step exceeds the time limit
    result = dry_run(small_config(tmp_path / "run", "model.tokens=parts", "model.qk_norm=true", "model.depth=2"))
    assert result.numbers["without_gradient"] == 0


def test_a_gradient_of_zero_is_none() -> None:
    """A module without input in this data, such as depth layers without depth maps, has zero gradients."""
    watch = SimpleNamespace(unmoved={"a", "b"})
    look = module._Checks._moves(watch, "a")  # type: ignore[arg-type]
    look(torch.zeros(3))
    assert watch.unmoved == {"a", "b"}
    look(torch.tensor([0.0, 1e-9]))
    assert watch.unmoved == {"b"}
    state, words = machine.describe_gradients(["x.a", "b"], {"b"})
    assert state == CAREFUL and "1 of 2 parameters get none" in words and "b: 1 of 1" in words
    assert machine.describe_gradients(["x.a", "b"], set()) == "all 2 parameters get one"
