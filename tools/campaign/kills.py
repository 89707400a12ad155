"""SIGKILL at random instants: `python -m tools.campaign.kills --count 20 --output FOLDER`.

A training, and the preparation of a data set, are each run whole once; then again and again killed at instants drawn
from (seed, number) and started again by the same command until they end. What they leave must be the uninterrupted
one's: the weights, the averaged weights and the optimiser bit for bit, the losses of log.csv; the shards byte for byte.
"""

from __future__ import annotations

import argparse
import csv
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

import torch
from tqdm import tqdm

from hmdiff.config import load_config
from hmdiff.data.shards import PreparedShards, ShardWriter
from hmdiff.errors import UserError
from tools.campaign.children import Notebook
from tools.campaign.families import SMALL, sample_record

STEPS, RECORDS = 6, 60
_MOST_STARTS = 12  # of one run, the last of which is left alone


def train(folder: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from hmdiff.train.loop import Trainer

    torch.set_num_threads(1)
    values = (
        *SMALL, f"output={folder}", f"training.steps={STEPS}", "training.checkpoint_every=1", "training.log_every=2",
        "training.evaluate_every=100", "data.block_size=4", "training.batch_size=4", "training.warmup_steps=2",
        "evaluation.people=2", "evaluation.num_hypotheses=1", "evaluation.num_inference_steps=1",
        "evaluation.test_people=0", "training.picture_every=1000",
    )  # fmt: skip
    Trainer(load_config(None, values)).run()


def prepare(folder: Path) -> None:
    writer = ShardWriter(folder, {"of": "the campaign"}, shard_records=4)
    for number in range(writer.records, RECORDS):
        writer.add(sample_record(number), None, None)
        time.sleep(0.002)
    writer.finish()


def trained(folder: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    place = folder / "checkpoints" / f"step_{STEPS:08d}"
    with open(folder / "log.csv", newline="") as handle:
        losses = [row["loss"] for row in csv.DictReader(handle) if row.get("loss")]
    names = ("model.safetensors", "ema.safetensors")
    state = torch.load(place / "optimizer.bin", weights_only=True)["state"]
    moments = [value.double().sum().item() for each in state.values() for value in map(torch.as_tensor, each.values())]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"losses": losses, "moments": moments, "kept": kept, **{n: (place / n).read_bytes() for n in names}}


def prepared(folder: Path) -> dict[str, Any]:
    PreparedShards(folder).verify()
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], dict[str, Any]]]] = {
    "training": (train, trained),
    "preparation": (prepare, prepared),
}


def in_a_child(work: Callable[[Path], None], folder: Path, kill_after: float | None) -> int | None:
    """The exit code, None where it was killed."""
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
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run(seed: int, count: int, output: Path, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Any]:
    """The summary; `count` interrupted runs of each kind."""
    notebook = Notebook(output / "kills.jsonl")
    for kind in kinds:
        work, left = KINDS[kind]
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
                code = in_a_child(work, folder, None if last else draw.uniform(0, 1.1 * lasted))
                kills += code is None
            outcome, about = "traceback" if code == 1 else "refused after a kill", f"exit {code}"
            if code == 0:
                found = left(folder)
                different = [name for name in expected if found.get(name) != expected[name]]
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
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), default=list(KINDS))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    found = run(options.seed, options.count, options.output.resolve(), options.only)
    print(json.dumps({name: found[name] for name in ("seed", "kills", "tried", "families", "bad")}, indent=1))
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
