"""Atomic writing: a kill, a power cut, a full disk or a second process never leaves a partial file.

A file or folder is written under a temporary name in the same folder, flushed to disk (contents and directory entry),
and renamed. Temporary names are unpredictable and never opened through a symbolic link.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hmdiff.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def _full(path: Path) -> UserError:
    return UserError(f"{path}: no space left on the disk; nothing already saved was touched: free some and run again")


def _write_error(path: Path, error: OSError) -> UserError:
    if error.errno in _NO_SPACE:
        return _full(path)
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{str(path)[:150]}...: the name is too long for this file system; choose a shorter one")
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
        # safetensors and torch.save report a full disk with exceptions of their own.
        if "No space left" in str(error) or _nearly_full(path.parent):
            raise _full(path) from error
        raise


def _nearly_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 2**16
    except OSError:
        return False


def make_folder(path: str | Path) -> Path:
    """Create a folder with its parents. Raises `UserError` for a file in the way or a read-only location."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file of that name is in the way of a folder; move it or choose another") from None
    except OSError as error:
        raise _write_error(path, error) from None
    except ValueError as error:  # a null character
        raise UserError(f"{str(path)[:150]!r}: not a folder's name ({error})") from None
    return path


def _prefix(path: Path, process: int | str) -> str:
    name = path.name
    if len(os.fsencode(name)) > 120:  # keeps the temporary name within the length limit
        name = f"{name[:24]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.{platform.node()[:40]}-{process}."


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f"{_prefix(path, os.getpid())}{secrets.token_hex(6)}.part{suffix}")


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` left by killed writers on this machine."""
    start = _prefix(path, "")[:-1]
    for left in path.parent.glob(f"{glob.escape(start)}*.part*"):
        process = left.name.removeprefix(start).split(".")[0]
        if not left.name.startswith(start) or not process.isdigit() or _alive(int(process)):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink()


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere, signal 0 does not test for existence
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
    """Yield a temporary path beside `path` with the same suffix; move it into place only if the block succeeds.

    Raises:
        UserError: the disk is full or the location is not writable; an older file at `path` is kept.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = _temporary(path, path.suffix if len(path.suffix) < 12 else "")
    try:
        with _reporting(path):
            _sweep(path)
            # Create the file here, without following links and with the umask's permissions; the caller overwrites it.
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666))
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            os.chmod(temporary, mode)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # must not hide the original error
            temporary.unlink()


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk: only then does a rename survive a power cut."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise  # some network file systems cannot flush a folder
    finally:
        os.close(handle)


def share_files(folder: Path) -> None:
    """Give files in a folder the folder's read and write permissions: some writers make them private."""
    mode = folder.stat().st_mode & 0o666
    for place, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(os.path.join(place, name)):
                os.chmod(os.path.join(place, name), mode)


def sync_tree(folder: Path) -> None:
    """`sync` the folder with all its files and subfolders."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(place, name)):
                sync(Path(place, name))
        sync(Path(place))


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; move it to `path` only if the block succeeds. An older folder is replaced.

    Raises:
        UserError: the disk is full or the location is not writable; an older folder at `path` is kept.
    """
    path = Path(path)
    make_folder(path.parent)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path}: a file of that name is in the way of a folder; move it or choose another")
    temporary = _temporary(path, "")
    with _reporting(path):
        _sweep(path)
        os.mkdir(temporary)
    try:
        with _reporting(path):
            yield temporary
            share_files(temporary)
            sync_tree(temporary)
            replace_folder(temporary, path)
    finally:
        if temporary.is_symlink():  # it stood at the new folder's place
            with contextlib.suppress(OSError):
                temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Move a folder into place; an older one of that name is then at `temporary`, or deleted."""
    if os.path.lexists(path):
        _exchange(temporary, path)
    else:
        os.rename(temporary, path)
    sync(path.parent)


def _exchange(temporary: Path, path: Path) -> None:
    """Swap two folders. On Linux atomically: after a kill, either the old or the new folder is in place."""
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
