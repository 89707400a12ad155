"""SIGKILL at random instants: `python -m tools.campaign.kills --count 20 --output FOLDER`.

A training, the preparation of a data set, `hmdiff sample FOLDER`, and a training in two processes of which one is
killed: each is run whole once; then again and again killed at instants drawn from (seed, number) and started again by
the same command until it ends. What is left must be the uninterrupted one's: the weights, the averaged weights and the
optimiser's moments bit for bit, the losses of log.csv; shards byte for byte; of photos the arrays within rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from tools.campaign.kill_scenarios import SCENARIOS, same

_MOST_STARTS = 12  # of one run, the last of which is left alone


def in_a_child(
    work: Callable[[Path], None],
    folder: Path,
    kill_after: float | None,  # seconds
    rank: int | None = None,  # of several processes, the one to kill; None: the child itself
) -> int | None:
    """The exit code, None where something was killed."""
    child = os.fork()
    if child == 0:
        with open(folder.with_suffix(".txt"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            work(folder)
        except UserError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            if os.waitpid(child, os.WNOHANG)[0]:
                return 0
            time.sleep(0.01)
        victim = child if rank is None else _process_of(child, rank)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _process_of(parent: int, rank: int) -> int | None:
    """The process below `parent` that torchrun gave this rank; None where it is not there yet, or no more."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    for process in parents:
        above: int | None = process
        while above is not None and above != parent:
            above = parents.get(above)
        with contextlib.suppress(OSError):
            if above and f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                return process
    return None


def run(seed: int, count: int, output: Path, kinds: Sequence[str] = tuple(SCENARIOS)) -> dict[str, Any]:
    """The summary; `count` interrupted runs of each kind."""
    notebook = Notebook(output / "kills.jsonl")
    for kind in kinds:
        scenario = SCENARIOS[kind]
        work, left = scenario.work, scenario.left
        whole = output / f"{kind}_whole"
        shutil.rmtree(whole, ignore_errors=True)
        started = time.monotonic()
        code = in_a_child(work, whole, None)
        if code != 0:
            raise RuntimeError(f"{kind}: the uninterrupted run ended with {code}; see {whole}.txt")
        lasted, expected = time.monotonic() - started, left(whole)
        for number in tqdm(range(count), kind):
            if (kind, number) in notebook.known:
                continue
            draw, folder, kills = random.Random(f"{seed} {kind} {number}"), output / f"{kind}_{number}", 0
            shutil.rmtree(folder, ignore_errors=True)
            code = None
            while code is None and kills < _MOST_STARTS:
                last = kills == _MOST_STARTS - 1
                rank = draw.randrange(scenario.ranks) if scenario.ranks > 1 else None
                code = in_a_child(work, folder, None if last else draw.uniform(0, 1.1 * lasted), rank)
                kills += code is None
            outcome, about = "traceback" if code == 1 else "refused after a kill", f"exit {code}"
            if code == 0:
                found = left(folder)
                different = [name for name in expected if not same(expected[name], found.get(name))]
                different += [name for name in found if name not in expected]
                outcome, about = ("lost", ", ".join(different)) if different else ("same", "")
            notebook.add(family=kind, number=number, outcome=outcome, about=about, kills=kills)
            if outcome == "same":
                shutil.rmtree(folder)
    total = sum(line["kills"] for line in notebook.lines)
    return notebook.summary(output / "kills.json", seed=seed, count=count, kills=total)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10, help="interrupted runs of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=tuple(SCENARIOS), default=list(SCENARIOS))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    found = run(options.seed, options.count, options.output.resolve(), options.only)
    print(json.dumps({name: found[name] for name in ("seed", "kills", "tried", "families", "bad")}, indent=1))
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
