"""SIGKILL at random times: `python -m tools.campaign.kills --kills 50 --output FOLDER`.

Scenarios: a training, a data set preparation, `hmdiff sample FOLDER`, and a training in two processes of which one is
killed. Each runs once uninterrupted; then it is repeatedly killed at times drawn from (seed, number) and restarted with
the same command until it completes. Two of three kills come at a uniformly random time; the third waits until a
temporary file is being written, such as a checkpoint. The result must match the uninterrupted run: weights, EMA weights
and optimiser state bit-exactly, and the losses of log.csv; shards byte for byte; for photos, the arrays up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hmdiff.errors import UserError
from tools.campaign.children import Notebook
from tools.campaign.kill_scenarios import SCENARIOS, Scenario, same

_MOST_STARTS = 12  # per run; the last start is not killed


def in_a_child(
    work: Callable[[Path], None],
    folder: Path,
    kill_after: float | None,  # seconds
    rank: int | None = None,  # of several processes, the one to kill; None: the child itself
    writing: bool = False,  # then wait until a file in the folder is being written
) -> int | None:
    """The exit code, or None if a process was killed."""
    child = os.fork()
    if child == 0:
        with open(folder.with_suffix(".txt"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            work(folder)
            folder.with_suffix(".modules").write_text("\n".join(sys.modules))
        except UserError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    deadline = math.inf if kill_after is None else time.monotonic() + kill_after
    while deadline < math.inf:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if time.monotonic() < deadline:
            time.sleep(0.01)
            continue
        victim = child if rank is None else _process_of(child, rank)
        if victim is not None and (not writing or half_written(folder)):
            os.kill(victim, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def half_written(folder: Path) -> bool:
    """Whether a temporary file exists, see `hmdiff.files.storage` and `hmdiff.train.checkpoint`."""
    return any(".part" in name for _, folders, files in os.walk(folder) for name in (*folders, *files))


def _process_of(parent: int, rank: int) -> int | None:
    """Process id of the given rank below `parent`; None if it has not started or has exited."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            name, _, state = (place / "stat").read_text().partition("(")[2].rpartition(")")
            if name == f"rank{rank}" and int(state.split()[1]) == parent:
                return int(place.name)
    return None


def run(seed: int, wanted: int, output: Path, kinds: Sequence[str] = tuple(SCENARIOS)) -> dict[str, Any]:
    """Run the campaign; returns the summary. Each scenario is interrupted until it has been killed `wanted` times."""
    notebook = Notebook(output / "kills.jsonl")
    for kind in kinds:
        scenario = SCENARIOS[kind]
        whole = output / f"{kind}_whole"
        lasted = uninterrupted(scenario, whole)
        expected = scenario.left(whole)
        before = sum(line["kills"] for line in notebook.lines if line["family"] == kind)
        with tqdm(total=wanted, initial=before, desc=kind, unit="kill") as bar:
            for number in itertools.count():
                if (kind, number) in notebook.known:
                    continue
                if bar.n >= wanted or number >= 10 * wanted:
                    break
                folder = output / f"{kind}_{number}"
                line = _interrupted(scenario, folder, random.Random(f"{seed} {kind} {number}"), lasted, expected)
                notebook.add(family=kind, number=number, **line)
                if line["outcome"] == "same":
                    shutil.rmtree(folder)
                    folder.with_suffix(".txt").unlink(missing_ok=True)
                bar.update(line["kills"])
    kills, halves = ({kind: 0 for kind in kinds} for _ in range(2))
    for line in notebook.lines:
        kills[line["family"]] = kills.get(line["family"], 0) + line["kills"]
        halves[line["family"]] = halves.get(line["family"], 0) + line["while_writing"]
    return notebook.summary(output / "kills.json", seed=seed, kills=kills, while_writing=halves)


def uninterrupted(scenario: Scenario, folder: Path) -> float:  # seconds
    """Run twice without interruption; the first run imports the modules in this process, the second is timed."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        if (code := in_a_child(scenario.work, folder, None)) != 0:
            raise RuntimeError(f"the uninterrupted run ended with {code}; see {folder}.txt")
        lasted = time.monotonic() - started
        for name in folder.with_suffix(".modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return lasted


def _interrupted(
    scenario: Scenario,
    folder: Path,
    draw: random.Random,
    lasted: float,  # seconds of the uninterrupted run
    expected: dict[str, Any],  # results of the uninterrupted run
) -> dict[str, Any]:  # outcome, description, kills, and kills while a file was being written
    shutil.rmtree(folder, ignore_errors=True)
    code, kills, halves = None, 0, 0
    while code is None:
        last = kills == _MOST_STARTS - 1
        rank = draw.randrange(scenario.ranks) if scenario.ranks > 1 else None
        instant, writing = draw.uniform(0, 1.1 * lasted), draw.random() < 1 / 3
        code = in_a_child(scenario.work, folder, None if last else instant, rank, writing)
        if code is None:
            kills, halves = kills + 1, halves + half_written(folder)
    outcome, about = "traceback" if code == 1 else "refused after a kill", f"exit {code}"
    if code == 0:
        found = scenario.left(folder)
        different = [name for name in expected if not same(expected[name], found.get(name))]
        different += [name for name in found if name not in expected]
        outcome, about = ("lost", ", ".join(different)) if different else ("same", "")
    return {"outcome": outcome, "about": about, "kills": kills, "while_writing": halves}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50, help="of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=tuple(SCENARIOS), default=list(SCENARIOS))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    found = run(options.seed, options.kills, options.output.resolve(), options.only)
    print(
        json.dumps(
            {name: found[name] for name in ("seed", "kills", "while_writing", "tried", "families", "bad")}, indent=1
        )
    )
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
