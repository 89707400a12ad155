"""A small part of each campaign, and that the campaigns detect failures."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hmdiff.errors import UserError
from tools.campaign import calls, disks, kills, mutants, mutations, offline
from tools.campaign.children import Attempt, Bounds, Notebook, Wrong, attempt, attempts
from tools.campaign.families import FAMILIES
from tools.campaign.kill_scenarios import Scenario, sampled, trained
from tools.campaign.mutations import mutate_bytes, mutate_csv, mutate_json, mutate_text


def refuse() -> None:
    raise UserError("a.json: not JSON; write it again")


def two_lines() -> None:
    raise UserError("a.json:\nnot JSON")


def trace() -> None:
    raise KeyError("x")


def crash() -> None:
    os.abort()


def hang() -> None:
    while True:
        pass


def eat() -> None:
    bytearray(4 << 30)


def wrong() -> None:
    raise Wrong("NaN")


def execute() -> None:
    os.system("true")


def remove_outside() -> None:
    with contextlib.suppress(OSError):
        os.remove("/var/tmp/hmdiff_campaign_outside")


def exit_early() -> None:
    os._exit(3)


def write_outside() -> None:
    open("/var/tmp/hmdiff_campaign_outside", "w").close()
    os.unlink("/var/tmp/hmdiff_campaign_outside")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        (lambda: None, "right"),
        (refuse, "refused"),
        (two_lines, "traceback"),
        (trace, "traceback"),
        (crash, "crashed"),
        (hang, "hung"),
        (eat, "memory"),
        (wrong, "wrong"),
        (execute, "executed"),
        (write_outside, "outside"),
        (remove_outside, "outside"),
        (exit_early, "crashed"),
    ],
)
def test_every_outcome_is_seen(tmp_path: Path, work: Callable[[], None], outcome: str) -> None:
    found, about = attempt(work, tmp_path, Bounds(seconds=1))
    assert found == outcome, about


@pytest.mark.slow
def test_attempts_go_on_after_one_that_ends_its_process(tmp_path: Path) -> None:
    todo = [Attempt(tmp_path, work) for work in (lambda: None, crash, hang, refuse, execute, wrong)]
    found = [outcome for outcome, _ in attempts(todo, Bounds(seconds=1))]
    assert found == ["right", "crashed", "hung", "refused", "executed", "wrong"]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text("other")])
def test_a_file_that_was_there_and_is_damaged_is_seen(tmp_path: Path, change: Callable[[Path], None]) -> None:
    place = tmp_path / "inside"
    prepare = [lambda: place.write_text("whole"), lambda: None]
    (found,) = attempts([Attempt(tmp_path, lambda: change(place), prepare[0])])
    assert found == ("damaged", str(place))


def test_pickles_that_call_do_not_unpickle_and_would_execute(tmp_path: Path) -> None:
    """The campaign's hostile pickles are effective: Python's own unpickler executes them."""
    content = mutations.HOSTILE[0] + b"."
    (found,) = attempts([Attempt(tmp_path, lambda: pickle.loads(content))])
    assert found[0] == "executed"


def marked(family: mutants.Family) -> object:
    heavy = family.name.startswith(("trainings", "hmdiff sample"))
    return pytest.param(family, id=family.name, marks=[pytest.mark.slow] if heavy else [])


@pytest.mark.slow
@pytest.mark.parametrize("family", [marked(family) for family in FAMILIES])
def test_mutants_of_every_family(tmp_path: Path, family: mutants.Family) -> None:
    found = mutants.run(seed=1, count=3, output=tmp_path, families=[family], progress=False)
    assert found["tried"] >= 1 and not found["bad"], found["bad"]


@pytest.mark.slow
def test_a_campaign_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    (family,) = [family for family in FAMILIES if family.name == "configs"]
    whole = mutants.run(5, 4, tmp_path / "whole", [family], progress=False)
    mutants.run(5, 2, tmp_path / "parts", [family], progress=False)
    with open(tmp_path / "parts" / "mutants.jsonl", "a") as handle:
        handle.write('{"family": "configs", "numb')
    parts = mutants.run(5, 4, tmp_path / "parts", [family], progress=False)
    assert parts == whole and json.loads((tmp_path / "parts" / "mutants.json").read_text()) == whole


def test_mutations_repeat_and_change_something() -> None:
    content = json.dumps({"a": [1, 2, {"b": "c"}], "d": 1.5}).encode()
    for mutate in (mutate_bytes, mutate_json, mutate_text, mutate_csv):
        found = [mutate(content, random.Random(number)) for number in range(30)]
        assert found == [mutate(content, random.Random(number)) for number in range(30)]
        assert sum(each != content for each in found) > 20


@pytest.mark.slow
def test_kills_of_a_preparation(tmp_path: Path) -> None:
    found = kills.run(0, 3, tmp_path, ["preparation"])
    assert set(found["total"]) == {"same"} and found["kills"]["preparation"] >= 3, found["bad"]


@pytest.mark.slow
def test_kills_of_a_sampling(tmp_path: Path) -> None:
    found = kills.run(0, 1, tmp_path, ["sampling"])
    assert found["total"] == {"same": 1}, found["bad"]


@pytest.mark.slow
def test_one_of_several_processes_is_found_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two children with ranks; the parent exits with them."""

    def ranks(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        children = []
        for rank in range(2):
            if (child := os.fork()) == 0:
                Path("/proc/self/comm").write_text(f"rank{rank}")
                time.sleep(1.5)
                os._exit(0)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        (folder / "ends").write_text(str(ends))
        if any(ends):
            raise RuntimeError(str(ends))

    code = kills.in_a_child(ranks, tmp_path / "a", 0.3, 1)
    assert code is None and (tmp_path / "a" / "ends").read_text() == "[0, -9]"
    assert kills.in_a_child(ranks, tmp_path / "b", None) == 0


def test_a_moment_that_differs_in_one_bit_is_seen(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "step_00000006"
    place.mkdir(parents=True)
    (tmp_path / "log.csv").write_text("loss\n0.5\n")
    for name in ("model.safetensors", "ema.safetensors"):
        (place / name).write_bytes(b"x")
    found = []
    for moment in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])):  # with the same sum
        torch.save({"state": {0: {"exp_avg": moment, "step": torch.tensor(3.0)}}}, place / "optimizer.bin")
        found.append(trained(tmp_path))
    assert found[0]["moments"] != found[1]["moments"] and found[0]["losses"] == ["0.5"]


def test_results_of_photos_are_compared_by_their_arrays(tmp_path: Path) -> None:
    def left(value: float, *names: str) -> dict[str, object]:
        np.savez(tmp_path / "a.npz", vertices=np.array([value]), selected=np.array(3))
        (tmp_path / "results.jsonl").write_text("".join(json.dumps({"npz": name}) + "\n" for name in names))
        return sampled(tmp_path)

    first = left(1.0, "a", "b")
    assert kills.same(first, left(1.0 + 1e-6, "b", "a"))
    assert not kills.same(first, left(1.01, "a", "b")) and not kills.same(first, left(1.0, "a"))
    (tmp_path / ".a.npz.part").touch()  # left by a kill
    assert not kills.same(first, left(1.0, "a", "b"))


@pytest.mark.slow
def test_a_loss_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "count").write_text(str(len(list(folder.iterdir()))))  # differs on a second run
        time.sleep(0.3)

    def left(folder: Path) -> dict[str, str]:
        return {"count": (folder / "count").read_text()}

    monkeypatch.setitem(kills.SCENARIOS, "loses", Scenario(loses, left))
    found = kills.run(0, 4, tmp_path, ["loses"])
    assert found["total"].get("lost", 0) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", disks.FAULTS)
def test_disks_that_fail_under_a_preparation(tmp_path: Path, fault: str) -> None:
    if not offline.available():
        pytest.skip("no namespaces here")
    found = disks.run(0, 2, tmp_path, ["preparation"], [fault])
    assert sum(found["total"].values()) == 2 and not found["bad"], found["bad"]
    assert set(found["total"]) <= {"same", "refused, then same"}


@pytest.mark.slow
def test_calls_in_threads_and_memory(tmp_path: Path) -> None:
    found = calls.run(7, 3, tmp_path, progress=False)
    assert found["different"] == [] and len(found["megabytes"]) >= 3


def test_without_a_network() -> None:
    if not offline.available():
        pytest.skip("no namespaces here")
    code = "import socket, sys\ntry:\n socket.create_connection(('192.0.2.1', 80), 2)\nexcept OSError:\n sys.exit(7)"
    assert subprocess.run([*offline.UNSHARE, sys.executable, "-c", code]).returncode == 7


def test_a_notebook_keeps_whole_lines(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "a.jsonl")
    notebook.add(family="a", number=0, outcome="right")
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + '{"cut')
    assert Notebook(tmp_path / "a.jsonl").known == {("a", 0)}
