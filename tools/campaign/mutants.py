"""Damaged and hostile files of every kind: `python -m tools.campaign.mutants --count 100 --output FOLDER`.

Mutant i of a family is a function of (seed, family, i). Each is read within limits (`tools.campaign.children`), with
one of the outcomes: right, refused in one line, or a failure. A restarted campaign continues; mutants.json holds the
counts. Exit code 1 if any mutant fails.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tools.campaign.children import Attempt, Notebook, attempts
from tools.campaign.families import FAMILIES
from tools.campaign.family import Family


def run(
    seed: int,
    count: int,  # per family
    output: Path,
    families: Sequence[Family] = FAMILIES,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the campaign; returns the summary."""
    torch.set_num_threads(1)
    notebook = Notebook(output / "mutants.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        for family in families:
            good = Path(scratch, "good")
            shutil.rmtree(good, ignore_errors=True)
            good.mkdir()
            family.write(good)
            names = sorted(set(family.files))
            for name, found in zip(names, attempts([_whole(family, good, scratch, n) for n in names]), strict=True):
                if found[0] != "right":
                    raise RuntimeError(f"{family.name}: its whole {name} is {found[0]}: {found[1]}")
            numbers = [n for n in range(max(1, round(count * family.share))) if (family.name, n) not in notebook.known]
            todo = [_mutant(family, good, scratch, seed, number) for number in numbers]
            bar = tqdm(numbers, family.name, disable=not progress)
            for number, (outcome, about) in zip(bar, attempts(todo), strict=True):
                name = _draw(seed, family, number).choice(family.files)
                notebook.add(family=family.name, number=number, file=name, outcome=outcome, about=about)
    return notebook.summary(output / "mutants.json", seed=seed, count=count)


def _draw(seed: int, family: Family, number: int) -> random.Random:
    return random.Random(f"{seed} {family.name} {number}")


def _whole(family: Family, good: Path, scratch: str, name: str) -> Attempt:
    """Reading of the undamaged files."""
    place = Path(scratch, "whole")
    return Attempt(
        place,
        lambda: family.read(place, name),
        lambda: _copy(good, place),
        lambda: shutil.rmtree(place),
        family.keeps,
    )


def _mutant(family: Family, good: Path, scratch: str, seed: int, number: int) -> Attempt:
    place = Path(scratch, f"mutant_{number}")  # a new name each time, since the package caches by file name
    draw = _draw(seed, family, number)
    name: list[str] = []

    def prepare() -> None:
        _copy(good, place)
        name.append(family.mutate(place, draw))

    return Attempt(place, lambda: family.read(place, name[0]), prepare, lambda: shutil.rmtree(place), family.keeps)


def _copy(good: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place, copy_function=shutil.copyfile)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=330, help="mutants of a usual family (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="families by name (default: all)")
    options = parser.parse_args(arguments)
    families = [family for family in FAMILIES if not options.only or family.name in options.only]
    found = run(options.seed, options.count, options.output, families)
    print(found["tried"], "tried:", ", ".join(f"{n} {outcome}" for outcome, n in sorted(found["total"].items())))
    for line in found["bad"][:40]:
        print(f"  {line['family']} {line['number']} ({line['file']}): {line['outcome']}: {line['about']}")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
