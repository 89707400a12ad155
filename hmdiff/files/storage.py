"""Writing files so that a kill, a full disk or a second process never leaves half of one behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hmdiff.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def _full(path: Path) -> UserError:
    return UserError(f"{path}: no space left on the disk; nothing already saved was touched: free some and run again")


def _write_error(path: Path, error: OSError) -> UserError:
    if error.errno in _NO_SPACE:
        return _full(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{path}: may not be written ({error.strerror}); choose another output folder")
    return UserError(f"{path}: could not be written ({error.strerror or error})")


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error
    except UserError:
        raise
    except Exception as error:
        # safetensors and torch.save tell of a full disk in exceptions of their own.
        if "No space left" in str(error) or shutil.disk_usage(path.parent).free < 2**16:
            raise _full(path) from error
        raise


def make_folder(path: str | Path) -> Path:
    """Create a folder with its parents; a file in the way or a read-only place is a `UserError`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file of that name is in the way of a folder; move it or choose another") from None
    except OSError as error:
        raise _write_error(path, error) from None
    return path


def _prefix(path: Path, process: int | str) -> str:
    return f".{path.name}.{platform.node()}-{process}."


def _sweep(path: Path) -> None:
    """Remove what writers of `path` on this machine left behind when they were killed."""
    start = _prefix(path, "")[:-1]
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part*"):
        process = left.name.removeprefix(start).split(".")[0]
        if not left.name.startswith(start) or not process.isdigit() or _alive(int(process)):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with the same suffix; move it into place only when the block succeeds.

    Raises:
        UserError: the disk is full or the place may not be written; an older file at `path` stays as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f"{_prefix(path, os.getpid())}part{path.suffix}")
    try:
        with _reporting(path):
            _sweep(path)
            yield temporary
            with open(temporary, "rb") as handle:  # a rename is only durable once the bytes are
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; swap it into place as `path` only when the block succeeds. An older one is replaced.

    Raises:
        UserError: the disk is full or the place may not be written; an older folder at `path` stays as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file of that name is in the way of a folder; move it or choose another")
    with _reporting(path):
        _sweep(path)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path, os.getpid()), suffix=".part", dir=path.parent))
        os.chmod(temporary, 0o755)  # mkdtemp makes it private, but the result is an ordinary folder
    try:
        with _reporting(path):
            yield temporary
            if path.exists():
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(temporary: Path, path: Path) -> None:
    """Swap two folders. Linux does it in one step: a kill then finds the old folder or the new one, never neither."""
    with contextlib.suppress(OSError, AttributeError):
        at_cwd, exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(at_cwd, os.fsencode(temporary), at_cwd, os.fsencode(path), exchange) == 0:
            return
    retired = temporary.with_name(temporary.name.removesuffix(".part") + ".old")
    os.rename(path, retired)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(retired, path)
        raise
    os.rename(retired, temporary)
