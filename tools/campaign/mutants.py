"""Damaged and hostile files of every kind: `python -m tools.campaign.mutants --count 100 --output FOLDER`.

Mutant i of a family is a function of (seed, family, i). Each is read in a process of its own: right, refused by one
line, or one of the outcomes that must not be (`tools.campaign.children`). Started again it goes on; summary.json holds
the figures. Exit code 1 where one is bad.
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

from tools.campaign.children import Notebook, attempt
from tools.campaign.families import FAMILIES, Family


def run(
    seed: int,
    count: int,  # of each family
    output: Path,
    families: Sequence[Family] = FAMILIES,
    progress: bool = True,
) -> dict[str, Any]:
    """The summary."""
    torch.set_num_threads(1)
    notebook = Notebook(output / "mutants.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        for family in families:
            good, place = Path(scratch, "good"), Path(scratch, "mutant")
            shutil.rmtree(good, ignore_errors=True)
            good.mkdir()
            family.write(good)
            outcome, about = attempt(lambda: family.read(good), good)  # noqa: B023  used at once
            if outcome != "right":
                raise RuntimeError(f"{family.name}: its whole files are {outcome}: {about}")
            bar = tqdm(range(count), family.name, disable=not progress)
            for number in bar:
                if (family.name, number) in notebook.known:
                    continue
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(good, place)
                name = family.mutate(place, random.Random(f"{seed} {family.name} {number}"))
                outcome, about = attempt(lambda: family.read(place), place)  # noqa: B023
                notebook.add(family=family.name, number=number, file=name, outcome=outcome, about=about)
    return notebook.summary(output / "mutants.json", seed=seed, count=count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=600, help="mutants of each family (default: %(default)s)")
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
