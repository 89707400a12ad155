"""One attempt in a process of its own: how it ended, within bounds on time and memory, and what it tried to do.

The child is forked from a parent that has imported everything, so that an attempt costs milliseconds. An audit hook in
it notes what no reading of a file may do: start a program, open a connection, or write outside its folder.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmdiff.errors import UserError

OUTCOMES = ("right", "refused", "traceback", "crashed", "hung", "memory", "executed", "outside", "wrong")
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Wrong(Exception):
    """The attempt ended well and its result is not right: NaN, say."""


def attempt(
    work: Callable[[], None],  # raises `UserError` to refuse, `Wrong` where its result is not right
    folder: Path,  # the only place that may be written
    seconds: int = 10,  # of the processor; twelve times that on the clock, for machines that do much else
    megabytes: int = 2048,  # of memory beyond what the parent has
) -> tuple[str, str]:  # one of OUTCOMES, and a line about it
    """Run `work` in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            found = _inside(work, folder, seconds, megabytes)
        except BaseException as error:
            found = ("traceback", repr(error)[:300])
        try:
            os.write(writer, json.dumps(found).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 12 * seconds)
    content = os.read(reader, 4096) if ready else b""
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "hung", f"more than {seconds} s of the processor, or {12 * seconds} s"
    if not content:
        return "crashed", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status}"
    outcome, about = json.loads(content)
    return outcome, about


def _inside(work: Callable[[], None], folder: Path, seconds: int, megabytes: int) -> tuple[str, str]:
    notes: list[tuple[str, str]] = []
    faulthandler.disable()  # a crash is counted, not printed
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(sink, stream)
    os.chdir(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spent = int(time.process_time()) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent + 1))
    allowed = (str(folder), "/dev/", "/proc/self", "/tmp/torchinductor")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_PROGRAMS):
            notes.append(("executed", f"{event} {arguments!r:.200}"))
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            if arguments[2] & _WRITES and not os.path.abspath(arguments[0]).startswith(allowed):
                notes.append(("outside", arguments[0]))

    sys.addaudithook(hook)
    found = _ending(work)
    return notes[0] if notes else found


def _ending(work: Callable[[], None]) -> tuple[str, str]:
    try:
        work()
    except UserError as error:
        text = str(error)
        return ("refused", text[:300]) if "\n" not in text else ("traceback", f"of several lines: {text[:300]!r}")
    except Wrong as error:
        return "wrong", str(error)
    except MemoryError:
        return "memory", "beyond the bound"
    except RecursionError as error:
        return "traceback", repr(error)[:300]
    except Exception as error:
        if "allocate memory" in str(error) or "bad_alloc" in str(error):
            return "memory", str(error)[:200]
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "?"
        return "traceback", f"{type(error).__name__} at {where}: {error}"[:300]
    return "right", ""


class Notebook:
    """A line of JSON an attempt, appended at once: a campaign that is started again goes on after the last."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.started = path, time.time()
        self.lines: list[dict[str, Any]] = []
        if path.is_file():
            for text in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(text))
                except ValueError:  # the last, cut by a kill
                    continue
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.known = {(line["family"], line["number"]) for line in self.lines}

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with open(self.path, "a") as handle:
            handle.write(json.dumps(line) + "\n")

    def summary(self, path: Path, **about: Any) -> dict[str, Any]:
        """Counts by family and outcome, and every line that is neither right nor refused; written to `path`."""
        counts: dict[str, dict[str, int]] = {}
        for line in self.lines:
            family = counts.setdefault(line["family"], {})
            family[line["outcome"]] = family.get(line["outcome"], 0) + 1
        total: dict[str, int] = {}
        for family in counts.values():
            for outcome, count in family.items():
                total[outcome] = total.get(outcome, 0) + count
        bad = [line for line in self.lines if line["outcome"] not in ("right", "refused", "same")]
        result = {**about, "tried": len(self.lines), "total": total, "families": counts, "bad": bad[:100]}
        path.write_text(json.dumps(result, indent=1) + "\n")
        return result
