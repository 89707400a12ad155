"""A lock on a folder for one process at a time. The system releases it when the process ends in any way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hmdiff.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def try_claim(
    folder: Path,
    name: str | None = LOCK,  # lock file, one per purpose. None: lock the folder itself
) -> Iterator[bool]:
    """Yields whether this process holds the folder until the block ends.

    Always True on Windows and on file systems without locks, such as some NFS: there, two processes are not detected.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    flags = os.O_RDONLY if name is None else os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(folder if name is None else folder / name, flags, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if name is not None:
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
        except BlockingIOError:
            yield False
            return
        except OSError:  # no locks here, or a full disk: the process number is only for the message
            pass
        yield True
    finally:
        os.close(handle)


@contextlib.contextmanager
def claim(
    folder: Path,
    mend: str,
    name: str | None = LOCK,  # as in `try_claim`
) -> Iterator[None]:
    """Hold the folder for this process. Raises `UserError` if another process holds it."""
    try:
        context = try_claim(folder, name)
        mine = context.__enter__()
    except OSError as error:
        raise UserError(f"{folder / (name or '')}: may not be written ({error.strerror}); {mend}") from None
    try:
        if not mine:
            raise UserError(f"{folder}: another process{_owner(folder) if name == LOCK else ''} works in it; {mend}")
        yield
    finally:
        context.__exit__(None, None, None)


def _owner(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (number {int((folder / LOCK).read_text())})"
    return ""
