"""Plant the faults of tools/faults/ROOM.yaml, one at a time, and run the tests that must notice: `python -m tools.plant
models --only fu-never dp-mask`.

mutmut (tools/mutation.py) makes small faults everywhere; these are what a person gets wrong: a term dropped, a sign, a
mask or an argument ignored, a missing detach, a skipped layer, the wrong person of the batch. They are planted in a
copy of the repository's files. The exit code is 1 if a fault survives. A fault takes some ten seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ROOMS = tuple(sorted(path.stem for path in (ROOT / "tools" / "faults").glob("*.yaml")))
_COPIED = ("hmdiff", "tests", "tools", "configs", "assets", "docs", "README.md", "setup.cfg", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    file: str  # relative to the repository, likewise `tests`
    old: str  # its first occurrence is replaced
    new: str
    tests: list[str]


def faults_of(room: str) -> list[Fault]:
    return [Fault(**entry) for entry in yaml.safe_load((ROOT / "tools" / "faults" / f"{room}.yaml").read_text())]


def noticed(fault: Fault, copy: Path) -> bool:
    """Whether a quick test fails with the fault planted in the copy, which is left as it was."""
    path = copy / fault.file
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new, 1))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
        ran = subprocess.run([*command, *fault.tests], cwd=copy, capture_output=True, timeout=600, text=True)
    finally:
        path.write_text(whole)
    if ran.returncode not in (0, 1, 2):  # passed, failed, or an import failed
        raise RuntimeError(f"{fault.name}: pytest ended with {ran.returncode}: {ran.stdout[-300:]}{ran.stderr[-300:]}")
    return ran.returncode != 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the file (default: all)")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in faults_of(options.room) if options.only is None or fault.name in options.only]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        for name in _COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, Path(folder) / name)
        for fault in tqdm(chosen, unit="fault"):
            if not noticed(fault, Path(folder)):
                survivors.append(fault.name)
                tqdm.write(f"survives: {fault.name} ({fault.file})")
    print(f"{options.room}: {len(chosen) - len(survivors)} of {len(chosen)} faults noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
