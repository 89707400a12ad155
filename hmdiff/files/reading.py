"""Reading of untrusted files within limits: bytes, JSON and numpy archives, with uniform error messages.

For any damage, every function raises a `UserError` that names the file and a remedy. It checks what a file claims (its
size, an array's shape, an archive's unpacked size) before allocating. Nothing is unpickled. The limits are our choice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from hmdiff.errors import UserError

MAX_JSON = 1 << 28  # bytes; COCO's largest keypoint file is slightly smaller
MAX_ARRAYS = 1 << 31  # bytes of all arrays read from one archive
_DIGITS = 18  # of integers that are kept as integers


def read_failure(path: str | Path, error: OSError) -> UserError:
    """The error message for a file that the system could not read."""
    reasons = {
        errno.ENOENT: "no such file; check the name",
        errno.EISDIR: "is a folder, a file was expected",
        errno.ENOTDIR: "a file stands where a folder was expected; check the path",
        errno.EACCES: "may not be read; check its permissions",
        errno.EPERM: "may not be read; check its permissions",
        errno.ENAMETOOLONG: "the name is too long for this file system; shorten it",
        errno.ELOOP: "a symbolic link that leads back to itself; check the path",
    }
    name = str(path) if len(str(path)) < 300 else f"{str(path)[:150]}...{str(path)[-100:]}"
    return UserError(f"{name}: {reasons.get(error.errno or 0) or f'cannot be read ({error.strerror or error})'}")


def read_bytes(
    path: str | Path,
    most: int = MAX_JSON,  # bytes
) -> bytes:
    """A whole file. Raises `UserError` if it is missing, a folder or device, not readable, or larger than `most`."""
    try:
        # Non-blocking, since a named pipe would hang.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as handle:
            about = os.fstat(handle.fileno())
            if not _regular(about):
                raise UserError(f"{path}: is a folder or a device, a file was expected")
            if about.st_size > most:
                raise UserError(f"{path}: {about.st_size:,} bytes, at most {most:,} are read; is it the right file?")
            return handle.read(most)
    except OSError as error:
        raise read_failure(path, error) from None
    except ValueError as error:  # a name with a null character
        raise UserError(f"{str(path)[:150]!r}: not a file name ({error})") from None


def _regular(about: os.stat_result) -> bool:
    return stat.S_ISREG(about.st_mode)


def read_json(
    path: str | Path,
    most: int = MAX_JSON,  # bytes
    mend: str = "write it again",
) -> Any:
    """The value of a JSON file. Integers of more than 18 digits become floats, at worst infinity.

    Raises:
        UserError: the file cannot be read, or is not JSON; gives the position.
    """
    return parse_json(read_bytes(path, most), path, mend)


def parse_json(
    content: bytes,
    path: str | Path,  # for the message
    mend: str = "write it again",
) -> Any:
    """`read_json` for bytes that were already read."""
    try:
        return json.loads(content.decode("utf-8-sig"), parse_int=_bounded_integer)
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read (nested too deeply); {mend}") from None
    except ValueError as error:  # includes UnicodeDecodeError
        raise UserError(f"{path}: not JSON, or cut short ({_one_line(error)}); {mend}") from None


def _bounded_integer(text: str) -> int | float:
    return int(text) if len(text) <= _DIGITS else float(text)


@contextlib.contextmanager
def reading_arrays(path: str | Path, mend: str) -> Iterator[None]:
    """Convert the errors that numpy and zipfile raise for a damaged archive to one line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise read_failure(path, error) from None
    except Exception as error:  # zipfile, zlib, numpy and struct raise various types
        raise UserError(f"{path}: a damaged file of arrays ({_one_line(error)}); {mend}") from None


# Errors raised when a damaged value has another type than expected.
_DAMAGE = (ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)


@contextlib.contextmanager
def naming(
    place: str | Path,  # file, row and, if known, field
    mend: str,
) -> Iterator[None]:
    """Convert the errors of damaged values in the block to a `UserError` that names the place."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:  # for a file named in the data: name too long, or unreadable
        raise UserError(f"{place}: {read_failure(error.filename or 'a file', error)}") from None
    except _DAMAGE as error:
        raise UserError(f"{place}: damaged ({type(error).__name__}: {_one_line(error)[:120]}); {mend}") from None


class ArrayArchive:
    """An npz, or a single npy (its array is named ""), whose arrays are checked and read one by one.

    Raises:
        UserError: another file type, damaged, encrypted, contains objects, or claims more than `most` bytes.
    """

    def __init__(
        self,
        path: str | Path,
        most: int = MAX_ARRAYS,  # limit on all bytes read
        mend: str = "write it again with numpy.savez",
    ) -> None:
        self.path, self.mend, self.left = Path(path), mend, most
        with reading_arrays(path, mend):
            with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as handle:
                if not _regular(os.fstat(handle.fileno())):
                    raise UserError(f"{path}: is a folder or a device, a file was expected")
                self.single = handle.read(6) == npy_format.MAGIC_PREFIX
            if self.single:
                self.names: tuple[str, ...] = ("",)
                return
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path}: not an npz or npy file; {mend}")
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
            self.names = tuple(dict.fromkeys(name[:-4] for name in members if name.endswith(".npy")))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> np.ndarray:
        """An array of numbers, booleans or text."""
        with self._member(name) as (member, shape, dtype, size):
            if dtype.hasobject:
                what = f"array {name!r} holds" if name else "it holds"
                raise UserError(f"{self.path}: {what} pickled Python objects, which are never loaded; {self.mend}")
            count = math.prod(shape)
            self._spend(name, max(count * dtype.itemsize, count), size)
            found: np.ndarray = npy_format.read_array(member, allow_pickle=False)  # type: ignore[no-untyped-call]
            if dtype.kind == "U" and found.size and int(np.ascontiguousarray(found).view(np.uint32).max()) > 0x10FFFF:
                raise ValueError(f"array {name!r} is text that is not Unicode")
            return found

    def pickled(self, name: str) -> tuple[bytes, tuple[int, ...]] | None:
        """The pickle and the shape of an object array; None for other arrays."""
        with self._member(name) as (member, shape, dtype, size):
            if not dtype.hasobject:
                return None
            self._spend(name, size, size)
            start = self._header(member)
            return member.read(size - start), shape

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the array's header."""
        with self._member(name) as (_, shape, _, _):
            return shape

    def holds_objects(self, name: str) -> bool:
        """Whether the array is pickled; `read` refuses it."""
        with self._member(name) as (_, _, dtype, _):
            return bool(dtype.hasobject)

    def read_all(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named arrays, or all."""
        return {name: self.read(name) for name in (self.names if names is None else names) if name in self}

    @contextlib.contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype, int]]:
        """A stream at its beginning, with shape and dtype from the header, and the unpacked size."""
        if name not in self.names:
            found = ", ".join(sorted(self.names)[:12]) or "none"
            raise UserError(f"{self.path}: no array {name!r} (found: {found}); {self.mend}")
        with reading_arrays(self.path, self.mend):
            if self.single:
                with open(self.path, "rb") as handle:
                    shape, dtype = self._shape(handle)
                    handle.seek(0)
                    yield handle, shape, dtype, os.fstat(handle.fileno()).st_size
                return
            with zipfile.ZipFile(self.path) as archive:
                about = archive.getinfo(f"{name}.npy")
                if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"array {name!r} is packed by method {about.compress_type}")
                with archive.open(about) as member:
                    shape, dtype = self._shape(member)
                with archive.open(about) as member:
                    yield member, shape, dtype, about.file_size

    def _shape(self, member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
        version = npy_format.read_magic(member)  # type: ignore[no-untyped-call]
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy format {version}")
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read(member)
        if any(size < 0 for size in shape):
            raise ValueError(f"an array of shape {shape}")
        return shape, dtype

    def _header(self, member: IO[bytes]) -> int:
        """Reads the header and returns its length."""
        self._shape(member)
        return member.tell()

    def _spend(self, name: str, size: int, unpacked: int) -> None:
        self.left -= size
        if self.left < 0:
            found = f"array {name!r} claims {size:,} bytes, more than is read"
            raise UserError(f"{self.path}: {found}; is it the right file?")
        if size > unpacked:
            raise ValueError(f"array {name!r} claims {size:,} bytes and holds {unpacked:,}")


def read_npz(
    path: str | Path,
    names: Sequence[str] | None = None,  # None: all
    most: int = MAX_ARRAYS,  # bytes
    mend: str = "write it again with numpy.savez",
) -> dict[str, np.ndarray]:
    """The arrays of an npz in `names`; the others are not unpacked. Raises as `ArrayArchive`."""
    archive = ArrayArchive(path, most, mend)
    if archive.single:
        raise UserError(f"{path}: not an npz file but a single array; {mend}")
    return archive.read_all(names)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
