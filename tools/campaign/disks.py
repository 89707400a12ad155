"""Failing disks: `python -m tools.campaign.disks --count 10 --output FOLDER`.

A training, a data set preparation and `hmdiff sample FOLDER` write to a small in-memory file system, a new one per run.
Faults: a random size up to what the uninterrupted run needs (full); remounted read-only at a random time (read-only); a
limit on the file size (limit). A run that hits the fault must exit by itself with one line and exit code 2. On a
repaired disk, the same command must then produce the output of an uninterrupted run. Needs the right to create user
namespaces; exits with 3 without it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.campaign import offline
from tools.campaign.children import Notebook
from tools.campaign.kill_scenarios import SCENARIOS, Scenario, same
from tools.campaign.kills import in_a_child, uninterrupted

FAULTS = ("full", "read-only", "limit")
KINDS = ("training", "preparation", "sampling")
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT = 1, 32


def _new_namespace() -> None:
    """Enter a mount namespace in which an unprivileged user may mount."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_USER | _NEW_MOUNTS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _mount(folder: Path, size: int, flags: int = 0) -> None:
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode())


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _hit(scenario: Scenario, folder: Path, fault: str, share: float, lasted: float, needs: tuple[int, int]) -> Any:
    """Exit codes of the run on a failing disk and of the run after it."""
    total, largest = needs  # bytes of the uninterrupted run, and of its largest file
    if fault == "full":
        _mount(folder, max(4096, int(share * total)))
        first = in_a_child(scenario.work, folder, None)
    elif fault == "limit":
        _mount(folder, 4 * total)
        most = max(1, int(share * largest))

        def limited(place: Path) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            scenario.work(place)

        first = in_a_child(limited, folder, None)
    else:
        _mount(folder, 4 * total)
        turner = os.fork()
        if turner == 0:
            time.sleep(share * lasted)
            while True:  # remounting fails while a file is open for writing
                with contextlib.suppress(OSError):
                    _mount(folder, 4 * total, _REMOUNT | _READ_ONLY)
                    os._exit(0)
                time.sleep(0.001)
        first = in_a_child(scenario.work, folder, None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(turner, 9)
        os.waitpid(turner, 0)
    _mount(folder, 8 * total, _REMOUNT)
    return first, in_a_child(scenario.work, folder, None)


def _attempt(scenario: Scenario, folder: Path, expected: dict[str, Any], *about: Any) -> dict[str, str]:
    """Run in a child process; its file system disappears with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        found: dict[str, str] = {"outcome": "traceback", "about": ""}
        try:
            _new_namespace()
            first, second = _hit(scenario, folder, *about)
            found["about"] = f"exit {first}, then {second}"
            if first not in (0, 2) or second != 0:
                found["outcome"] = "traceback" if 1 in (first, second) else "not gone on with"
            else:
                left = scenario.left(folder)
                lost = [name for name in {**expected, **left} if not same(expected.get(name), left.get(name))]
                found["outcome"] = "lost" if lost else "refused, then same" if first else "same"
                found["about"] += "".join(f", {name}" for name in lost)
        except BaseException as error:
            found["about"] += f" {error!r:.300}"
        os.write(writer, json.dumps(found).encode()[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return json.loads(content) if content else {"outcome": "crashed", "about": ""}


def run(
    seed: int,
    count: int,  # per scenario and fault
    output: Path,
    kinds: Sequence[str] = KINDS,
    faults: Sequence[str] = FAULTS,
) -> dict[str, Any]:
    """Run the campaign; returns the summary."""
    notebook = Notebook(output / "disks.jsonl")
    for kind in kinds:
        scenario, whole = SCENARIOS[kind], output / f"{kind}_whole"
        lasted = uninterrupted(scenario, whole)
        expected = scenario.left(whole)
        sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
        for fault in faults:
            for number in tqdm(range(count), f"{kind}, {fault}"):
                if (f"{kind}, {fault}", number) in notebook.known:
                    continue
                folder = output / f"{kind}_{number}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                share = random.Random(f"{seed} {kind} {fault} {number}").random()
                line = _attempt(scenario, folder, expected, fault, share, lasted, (sum(sizes), max(sizes)))
                notebook.add(family=f"{kind}, {fault}", number=number, **line)
                folder.rmdir()  # only the child saw the mount
                if line["outcome"] in ("same", "refused, then same"):
                    folder.with_suffix(".txt").unlink(missing_ok=True)
    return notebook.summary(output / "disks.json", seed=seed, count=count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10, help="of each command and fault (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    options = parser.parse_args(arguments)
    if not offline.available():
        print(f"no namespace can be made here ({os.strerror(errno.EPERM)})", file=sys.stderr)
        return 3
    options.output.mkdir(parents=True, exist_ok=True)
    found = run(options.seed, options.count, options.output.resolve(), options.only)
    print(json.dumps({name: found[name] for name in ("seed", "tried", "families", "bad")}, indent=1))
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
