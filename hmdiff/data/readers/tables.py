"""Label files as validated tables of rows: npz archives (SPIN's format) and JSON. Errors name file and row.

numpy never unpickles: object arrays, as in some npz, are read by the restricted unpickler.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hmdiff.errors import UserError
from hmdiff.files import reading
from hmdiff.files.reading import ArrayArchive
from hmdiff.files.unpickling import unpickle

_MAX_BYTES = 8 << 30  # of a table's arrays; they are read one at a time
_MAX_JSON = 1 << 30  # bytes of a label file


class Table:
    """The arrays of an npz with one entry a row; number of rows and shape are checked on reading."""

    def __init__(
        self,
        path: Path,
        key: str = "imgname",  # a column that every table has; it defines the number of rows
    ) -> None:
        self.path = path
        self.archive = ArrayArchive(path, _MAX_BYTES, "download it again")
        self.keys = frozenset(self.archive.names)
        if key not in self.keys:
            raise UserError(f"{path}: no {key!r} among its arrays ({', '.join(sorted(self.keys))}); not a label file")
        self.names = [_text(name) for name in self._read(key).reshape(-1)]

    def __len__(self) -> int:
        return len(self.names)

    def column(
        self,
        key: str,
        *shapes: tuple[int, ...],  # allowed shapes of one row; empty: unchecked. Axes of length 1 are ignored
    ) -> np.ndarray:  # (rows, *shape) float64, or text
        """Raises `UserError` if the array is missing, or has another number of rows, or rows of another shape."""
        if key not in self.keys:
            raise UserError(f"{self.path}: no array {key!r}; it has {', '.join(sorted(self.keys))}")
        value = self._read(key)
        if value.ndim == 0 or len(value) != len(self):
            found = "no" if value.ndim == 0 else len(value)
            raise UserError(f"{self.path}: {key} has {found} rows, imgname has {len(self)}; the file is not whole")
        if value.dtype.kind in "OSU" and not shapes:
            return value
        if value.dtype.kind in "OSU":
            value = self._as_numbers(key, value)
        if shapes and value.shape[1:] not in shapes:
            for shape in shapes:
                if math.prod(value.shape[1:]) == math.prod(shape):
                    value = value.reshape(len(self), *shape)
                    break
            else:
                raise UserError(f"{self.path}: {key} has rows of shape {value.shape[1:]}, expected {shapes[0]}")
        return value.astype(np.float64)

    def _as_numbers(self, key: str, value: np.ndarray) -> np.ndarray:
        """Convert an array of objects, as saved in some copies, to numbers."""
        rows: list[np.ndarray] = []
        for number, row in enumerate(value):
            try:
                rows.append(np.asarray(row, np.float64))
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{self.location(number)}, {key}: damaged ({error}); download it again") from None
            if rows[-1].shape != rows[0].shape:
                raise UserError(f"{self.location(number)}, {key}: shape {rows[-1].shape}, others have {rows[0].shape}")
        return np.stack(rows) if rows else np.zeros(0)

    def optional(self, key: str, *shapes: tuple[int, ...]) -> np.ndarray | None:
        """`column`, or None where the file has no such array."""
        return self.column(key, *shapes) if key in self.keys else None

    def location(self, row: int) -> str:
        return f"{self.path}, row {row}"

    def image_folder(self, folders: Sequence[Path]) -> Path:
        return image_folder(folders, self.names[0] if self.names else None, self.location(0))

    def _read(self, key: str) -> np.ndarray:
        pickled = self.archive.pickled(key)
        if pickled is None:
            return self.archive.read(key)
        content, shape = pickled
        try:
            array = unpickle(content, f"{self.path}, array {key}")
            if not isinstance(array, np.ndarray):
                raise ValueError(f"its pickle is of a {type(array).__name__}")
            return array.reshape(shape)
        except ValueError as error:  # also a shape that differs from the header's
            raise UserError(f"{self.path}: array {key!r} is damaged ({error}); download the file again") from None


def _text(value: object) -> str:
    """A path with forward slashes, from text or bytes: files written on Windows have backslashes."""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).replace("\\", "/")


def label_files(
    source: Path,
    split: str,  # a file name without .npz; "": the folder must hold exactly one file
) -> list[Path]:
    """The npz files of a folder, or of its `dataset_extras`. Raises `UserError` listing those that exist."""
    files = {path.stem: path for folder in (source / "dataset_extras", source) for path in sorted(folder.glob("*.npz"))}
    if not files:
        raise UserError(f"{source}: no label file *.npz in it, nor in its dataset_extras/; put them there")
    if split:
        if split not in files:
            raise UserError(f"{source}: no {split}.npz; give one of {', '.join(sorted(files))} as the split")
        return [files[split]]
    if len(files) > 1:
        raise UserError(f"{source}: several label files; name one as the split, of {', '.join(sorted(files))}")
    return list(files.values())


def image_folder(
    folders: Sequence[Path],
    first: str | None,  # the first image; None: there is none
    where: str,  # named in the error
) -> Path:
    """The first of the places that contains the image. Raises `UserError` naming all of them."""
    if first is None:
        return folders[0]
    for folder in folders:
        if os.path.isfile(folder / first):  # False for an impossible name too
            return folder
    raise UserError(f"{where}: its image {first} is in none of {', '.join(map(str, folders))}; put the images there")


def read_json(path: Path) -> Any:
    """Raises `UserError` naming the file: missing, truncated, not JSON."""
    return reading.read_json(path, _MAX_JSON, "download it again")


def record_list(
    path: Path,
    data: dict[str, Any],  # the file's content
    key: str,
) -> list[Any]:
    """A list of the file. Raises `UserError` naming file and key if it is anything else."""
    value = data.get(key)
    if not isinstance(value, list):
        raise UserError(f"{path}: {key} is {value!r:.60}, a list was expected; download it again")
    return value


def _json_text(path: Path) -> str:
    try:
        return reading.read_bytes(path, _MAX_JSON).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON text ({error}); download it again") from None


def json_rows(
    path: Path,
    shape: tuple[int, ...],  # of one row; axes of length 1 are ignored
) -> Iterator[np.ndarray]:  # float64
    """Iterate over a JSON list of number arrays, without holding it as Python lists: FreiHAND's files are too large.

    Raises:
        UserError: not a list, truncated, or a row of another shape; names the row.
    """
    text, decoder = _json_text(path), json.JSONDecoder()
    position, row = _skip(text, 0), 0
    if not text[position : position + 1] == "[":
        raise UserError(f"{path}: not a JSON list of rows; download it again")
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        try:
            value, position = decoder.raw_decode(text, position)
            array = np.array(value, np.float64)
            if array.size != math.prod(shape):
                raise ValueError(f"shape {array.shape}, expected {shape}")
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, row {row}: damaged or cut short ({error}); download it again") from None
        yield array.reshape(shape)
        position, row = _skip(text, position), row + 1
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise UserError(f"{path}: cut short after row {row - 1}; download it again")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def stem_name(image: str) -> str:
    """An image's path without its suffix: the stable part of a record's name."""
    return str(PurePosixPath(image).with_suffix(""))
