"""SHA-256 checksums of the files of a folder, stored beside them and verified on reading."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hmdiff.errors import UserError
from hmdiff.files.reading import read_failure


def file_checksum(path: str | Path) -> str:  # 64 hexadecimal digits
    """Raises `UserError` if the file cannot be read."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise read_failure(path, error) from None


def folder_checksums(
    folder: Path,
    without: Sequence[str] = (),  # file names to skip, relative to the folder
) -> dict[str, str]:  # by file name relative to the folder, with forward slashes
    """Checksums of every file in the folder and its subfolders, ordered by name."""
    names = [Path(place, name).relative_to(folder).as_posix() for place, _, files in os.walk(folder) for name in files]
    return {name: file_checksum(folder / name) for name in sorted(names) if name not in without}


def verify_checksums(
    folder: Path,
    expected: Any,  # from `folder_checksums`, as stored in a file
    mend: str,
) -> None:
    """Raises `UserError` naming the first file that is missing or does not match."""
    if not isinstance(expected, Mapping) or not all(isinstance(value, str) for value in expected.values()):
        raise UserError(f"{folder}: its checksums are not names with text; {mend}")
    for name, value in expected.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\0" in name:
            raise UserError(f"{folder}: a checksum of {name!r:.80}, which is not a file in it; {mend}")
        if not os.path.isfile(folder / name):
            raise UserError(f"{folder / name}: missing; {mend}")
        if file_checksum(folder / name) != value:
            raise UserError(f"{folder / name}: not what was written, by its checksum; {mend}")
