"""Mutation score of the tests: a seeded sample of a package's mutmut mutants, and the names of the survivors.

    python -m tools.mutation diffusion --sample 100 --seed 0        # or losses, models, train
    uv run mutmut show NAME                                          # what a survivor changed

mutmut (BSD licence) writes every mutant of the packages listed in pyproject.toml into mutants/, runs the tests there
once to learn which tests reach which function, and forks a process for each sampled mutant. The score is the fraction
of mutants that a test kills; mutants that no test reaches count as survivors.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOMS = ("diffusion", "losses", "models", "train")
MUTANTS = Path("mutants")
KILLED = {1, 3, 24, 36, 152, 255, -24, -11, -9}  # mutmut's exit codes: failed, or out of time or memory
SURVIVED = {0: "survives", 5: "is reached by no test", 33: "is reached by no test"}


def exit_codes(room: str) -> dict[str, int | None]:
    """Exit code of every mutant that mutmut wrote for a package; None: not run."""
    found: dict[str, int | None] = {}
    for path in sorted(MUTANTS.rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return {name: code for name, code in sorted(found.items()) if name.startswith(f"hmdiff.{room}.")}


def run(names: list[str], processes: int) -> bool:
    return not subprocess.run(
        [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes), *names]
    ).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=100, help="mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other mutants (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="at once (default: %(default)s)")
    options = parser.parse_args()
    if not exit_codes(options.room):
        # No mutant has this name: mutmut writes the mutants, runs the tests once, and ends with an assertion.
        run([f"hmdiff.{options.room}.none"], options.processes)
    names = list(exit_codes(options.room))
    sample = random.Random(options.seed).sample(names, min(options.sample, len(names)))
    if not sample or not run(sample, options.processes):
        sys.exit("mutmut failed: do the tests pass?")
    codes = exit_codes(options.room)
    counted = Counter("killed" if codes[name] in KILLED else SURVIVED.get(codes[name] or 0, "?") for name in sample)
    for name in sorted(sample):
        if codes[name] not in KILLED:
            print(f"{SURVIVED.get(codes[name] or 0, codes[name])}: {name}")
    print(f"{options.room}: {counted['killed']} of {len(sample)} mutants killed, {counted['killed'] / len(sample):.0%}")


if __name__ == "__main__":
    main()
