"""Runs attempts in child processes: the outcome of each, limits on time and memory, and forbidden side effects.

Children are forked from a parent that has imported everything and run attempts in sequence, so an attempt costs only
the reading itself. If an attempt kills the child (a crash, a timeout), a new child continues with the next attempt. An
audit hook records what reading a file must never do: start a program, open a connection, or modify anything outside its
folder. The folder's original files must still be there afterwards, unchanged.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hmdiff.errors import UserError

OUTCOMES = (
    "right",
    "refused",
    "traceback",
    "crashed",
    "hung",
    "memory",
    "executed",
    "outside",
    "damaged",
    "wrong",
)
_GOOD = ("right", "refused", "same", "refused, then same")
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_SCRATCH = ("/dev/", "/proc/self", "/tmp/torchinductor")
_ATTEMPTS_A_CHILD = 100


class Wrong(Exception):
    """The attempt finished without an error but its result is invalid, e.g. NaN."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt. Only its folder may be written to."""

    folder: Path
    read: Callable[[], None]  # raises `UserError` to refuse the file, `Wrong` for an invalid result
    prepare: Callable[[], None] = lambda: None  # fills the folder; without limits
    clear: Callable[[], None] = lambda: None
    keeps: bool = True  # the folder's original files must stay unchanged


@dataclasses.dataclass(frozen=True)
class Bounds:
    seconds: float = 10  # CPU time; wall time is limited to twelve times that, for busy machines
    megabytes: int = 2048  # memory beyond what the child starts with


BOUNDS = Bounds()


def attempt(read: Callable[[], None], folder: Path, bounds: Bounds = BOUNDS) -> tuple[str, str]:
    """Run one attempt; returns one of OUTCOMES and a one-line description."""
    (found,) = attempts([Attempt(folder, read)], bounds)
    return found


def attempts(todo: Sequence[Attempt], bounds: Bounds = BOUNDS) -> Iterator[tuple[str, str]]:
    """The outcome of each attempt, in order, as soon as it is known."""
    done = 0
    while done < len(todo):
        batch = todo[done : done + _ATTEMPTS_A_CHILD]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(batch, bounds, writer)
        os.close(writer)
        answered = done
        for line in _lines(reader, 12 * bounds.seconds):
            outcome, about = json.loads(line)
            done += 1
            yield outcome, about
        os.close(reader)
        status = _ended(child)
        if done - answered < len(batch):  # the next attempt killed the child
            done += 1
            if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF):
                yield "hung", f"more than {bounds.seconds} s of the processor, or {12 * bounds.seconds} s"
            else:
                about = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status}"
                yield "crashed", about


def _lines(reader: int, seconds: float) -> Iterator[bytes]:
    """Lines until the end, or until none arrives for the given time."""
    buffer = b""
    while select.select([reader], [], [], seconds)[0]:
        content = os.read(reader, 65536)
        if not content:
            return
        *lines, buffer = (buffer + content).split(b"\n")
        yield from lines


def _ended(child: int) -> int | None:
    """Exit status of a child that closed its pipe; a child that still runs is killed and gives None."""
    for _ in range(500):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _child(batch: Sequence[Attempt], bounds: Bounds, writer: int) -> NoReturn:
    """Runs the batch in the child and never returns, so that the child cannot continue as a second parent."""
    try:
        gc.freeze()  # exclude the parent's objects from garbage collection
        faulthandler.disable()  # crashes are counted, not printed
        sink = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(sink, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        watch = _Watch()
        sys.addaudithook(watch.hook)
        for each in batch:
            try:
                each.prepare()
                found = _bounded(each, bounds, watch)
                each.clear()
            except BaseException as error:  # a bug in the campaign itself
                found = ("traceback", f"not in the reading: {error!r}"[:300])
            os.write(writer, json.dumps(found).encode()[:60000] + b"\n")
    finally:
        os._exit(0)


class _Watch:
    """Records forbidden side effects of an attempt."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None  # None: recording is off
        self.notes: list[tuple[str, str]] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event.startswith(_PROGRAMS):
            self.notes.append(("executed", f"{event} {arguments!r:.200}"))
        elif event == "open":
            if isinstance(arguments[2], int) and arguments[2] & _WRITES:
                self._changed(arguments[0])
        elif event in _CHANGES and (event == "os.truncate" or arguments[-1] in (-1, None)):  # only without dir_fd
            ends = {"os.rename": arguments[:2], "os.link": arguments[1:2], "os.symlink": arguments[1:2]}
            for name in ends.get(event, arguments[:1]):
                self._changed(name)

    def _changed(self, name: Any) -> None:
        if isinstance(name, str | bytes | os.PathLike) and self.allowed is not None:
            place = os.path.abspath(os.fsdecode(name))
            if not place.startswith(self.allowed):
                self.notes.append(("outside", place))


def _bounded(each: Attempt, bounds: Bounds, watch: _Watch) -> tuple[str, str]:
    os.chdir(each.folder)
    before = _state(each.folder) if each.keeps else {}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    watch.notes, watch.allowed = [], (str(each.folder), *_SCRATCH)
    resource.setrlimit(resource.RLIMIT_AS, (used + bounds.megabytes * 2**20, most))
    signal.setitimer(signal.ITIMER_PROF, bounds.seconds)  # the default action of its signal ends the process
    try:
        found = _ending(each.read)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        watch.allowed = None
    if watch.notes:
        return watch.notes[0]
    after = _state(each.folder) if each.keeps else {}
    changed = [name for name, state in before.items() if after.get(name) != state]
    return ("damaged", ", ".join(changed)[:300]) if changed else found


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file."""
    names = [os.path.join(place, name) for place, _, files in os.walk(folder) for name in files]
    return {name: (about.st_size, about.st_mtime_ns) for name in names for about in [os.lstat(name)]}


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
    """One JSON line per attempt, appended at once: a restarted campaign continues after the last line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.started = path, time.time()
        self.lines: list[dict[str, Any]] = []
        if path.is_file():
            for text in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(text))
                except ValueError:  # the last line, truncated by a kill
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
        bad = [line for line in self.lines if line["outcome"] not in _GOOD]
        result = {**about, "tried": len(self.lines), "total": total, "families": counts, "bad": bad[:100]}
        path.write_text(json.dumps(result, indent=1) + "\n")
        return result
