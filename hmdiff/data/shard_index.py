"""The index of a prepared folder (fully validated when read), and sizes and checksums of its shards.

{"version": 1, "complete": true, "records": 6, "groups": {"sequence": 6}, "settings": {...}, "shards": [
  {"file": "shard_00000.arrow", "records": 6, "bytes": 9000, "sha256": "...", "first": NAME, "last": NAME,
   "crc32": [a checksum for each record]}]}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmdiff.errors import UserError
from hmdiff.files.reading import read_failure, read_json

INDEX = "index.json"
VERSION = 1
MAX_INDEX = 1 << 30  # bytes
# Fields of the index and of each shard in it; numbers must be >= 0.
_FIELDS: dict[str, type] = {
    "version": int,
    "complete": bool,
    "records": int,
    "settings": dict,
    "shards": list,
    "groups": dict,
}
_SHARD_FIELDS: dict[str, type] = {"file": str, "records": int, "bytes": int, "sha256": str, "first": str, "last": str}
_SHARD_FILE = re.compile(r"shard_\d{5,9}\.arrow")


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder}: not a prepared data set (no {INDEX}); make it with hmdiff prepare")
    index = read_json(path, MAX_INDEX, "remove the folder and prepare it again")
    if not isinstance(index, dict) or _FIELDS.keys() - index.keys():
        raise UserError(f"{path}: not the index of a prepared data set; remove the folder and prepare it again")
    if index["version"] != VERSION:
        raise UserError(f"{path}: version {index['version']}, this hmdiff reads {VERSION}; prepare it again")
    _check_fields(path, "", index, _FIELDS)
    for number, shard in enumerate(index["shards"]):
        where = f"shards[{number}]"
        if not isinstance(shard, dict):
            raise UserError(f"{path}: {where} is {shard!r:.80}, a mapping was expected; prepare it again")
        _check_fields(path, f"{where}.", shard, _SHARD_FIELDS)
        if not _SHARD_FILE.fullmatch(shard["file"]):
            raise UserError(f"{path}: {where}.file {shard['file']!r:.80} is not a shard's name; prepare it again")
        checksums = shard.get("crc32")
        if checksums is not None and not (
            isinstance(checksums, list)
            and len(checksums) == shard["records"]
            and all(isinstance(value, int) for value in checksums)
        ):
            raise UserError(f"{path}: {where}.crc32 is not a number for each record; prepare it again")
    for group, count in index["groups"].items():
        if not isinstance(count, int):
            raise UserError(f"{path}: groups[{group!r:.80}] is {count!r:.80}, a number was expected; prepare it again")
    total = sum(shard["records"] for shard in index["shards"])
    if total != index["records"]:
        raise UserError(f"{path}: {index['records']} records promised, its shards have {total}; prepare it again")
    return index


def verify_shard(path: Path, shard: Mapping[str, Any]) -> None:
    if checksum(path) != shard["sha256"]:
        raise UserError(f"{path}: its checksum is not the one in {INDEX}; prepare the data set again")


def check_sizes(folder: Path, index: dict[str, Any]) -> None:
    """Detect an incomplete copy by its file sizes."""
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise UserError(f"{path}: missing; copy it again, or prepare the data set again")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, {shard['bytes']} were written; copy it again, or prepare again"
            )


def checksum(path: Path) -> str:
    try:
        handle = open(path, "rb")
    except OSError as error:
        raise read_failure(path, error) from None
    with handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_fields(path: Path, where: str, found: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        value = found.get(name)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (isinstance(value, int) and value < 0):
            raise UserError(f"{path}: {where}{name} is {value!r:.80}, {kind.__name__} expected; prepare it again")
