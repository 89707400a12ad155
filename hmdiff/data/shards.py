"""Prepared data sets: records and their pictures in Arrow IPC files, memory-mapped, written once and never changed.

    FOLDER/index.json          what is there: counts, sizes and checksums of the shards, how it was made
    FOLDER/shard_00000.arrow   one record batch, a row a record, its picture as encoded bytes

Arrow by pyarrow alone, our choice: random access without reading anything else, the same pages for all workers of a
machine, and a file that pandas, polars and datasets read too. A webdataset's tar is read in order only.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from hmdiff.data.record import SHAPES, Record
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file, make_folder

INDEX = "index.json"
VERSION = 1
_WORDS = ("name", "group", "body", "gender", "hand", "source")
_NAMES = ("joint_names", "keypoint_names")
_SCHEMA = pa.schema([
    *((word, pa.string()) for word in _WORDS),
    *((names, pa.list_(pa.string())) for names in _NAMES),
    ("side", pa.float64()),
    *((field, pa.list_(pa.float64() if field == "center" else pa.float32())) for field in SHAPES),
    ("picture", pa.large_binary()),
    ("region", pa.list_(pa.float64())),
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
    """A record and its picture, still encoded."""

    record: Record
    picture: np.ndarray | None  # bytes of a jpg or png, or None
    region: tuple[float, float, float, float] | None  # x0, y0, x1, y1 photo pixels that it shows; None: the whole photo


class RecordStore(Protocol):
    """Records by number: prepared ones, or raw files."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Stored: ...


class RecordFiles:
    """Records whose pictures are read from their own files, each time."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Stored:
        record = self.records[number]
        return Stored(record, None if record.image is None else np.fromfile(record.image, np.uint8), None)


class ShardWriter:
    """Writes a prepared folder; started again after a kill it goes on after the last whole shard.

    Raises:
        UserError: the folder was prepared from something else, or with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],  # whatever decides what is written: another call must give the same
        shard_records: int = 1000,
    ) -> None:
        self.folder = make_folder(folder)
        self.shard_records = shard_records
        self.index: dict[str, Any] = {
            "version": VERSION, "complete": False, "records": 0, "groups": {}, "shards": [],
            "settings": {**settings, "shard_records": shard_records},
        }  # fmt: skip
        self._rows: list[dict[str, Any]] = []
        found = _read_index(self.folder) if (self.folder / INDEX).exists() else None
        if found is not None and found["records"]:
            self._resume(found)
        else:
            self._write_index()

    def _resume(self, found: dict[str, Any]) -> None:
        for key, value in self.index["settings"].items():
            before = found["settings"].get(key)
            if before != json.loads(json.dumps(value)):
                raise UserError(
                    f"{self.folder}: was prepared with {key} {before!r}, now it is {value!r}; give the same, another "
                    "folder, or remove this one"
                )
        _check_sizes(self.folder, found)
        self.index = found

    @property
    def records(self) -> int:
        """Records that lie in whole shards."""
        return self.index["records"]

    @property
    def complete(self) -> bool:
        return self.index["complete"]

    def borders(self) -> dict[int, str]:
        """The names of each shard's first and last record, by their number: what a changed source would not match."""
        names, start = {}, 0
        for shard in self.index["shards"]:
            names[start], names[start + shard["records"] - 1] = shard["first"], shard["last"]
            start += shard["records"]
        return names

    def add(
        self,
        record: Record,
        picture: bytes | None,
        region: tuple[float, float, float, float] | None,
    ) -> None:
        """Take one more record; a full shard is written at once."""
        row: dict[str, Any] = {
            **{field: getattr(record, field) for field in (*_WORDS, *_NAMES)},
            "side": float(record.side),
            "picture": picture,
            "region": region,
        }
        for field in SHAPES:
            value = getattr(record, field)
            row[field] = None if value is None else np.asarray(value, np.float64).ravel()
        self._rows.append(row)
        if len(self._rows) == self.shard_records:
            self._flush()

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Write what is left, and say that it is all."""
        if self._rows:
            self._flush()
        self.index.update({**(facts or {}), "complete": True})
        self._write_index()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        columns = [pa.array([row[field.name] for row in rows], field.type) for field in _SCHEMA]
        name = f"shard_{len(self.index['shards']):05d}.arrow"
        with atomic_file(self.folder / name) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            size, checksum = temporary.stat().st_size, _checksum(temporary)
        self.index["shards"].append({
            "file": name, "records": len(rows), "bytes": size, "sha256": checksum, "first": rows[0]["name"],
            "last": rows[-1]["name"],
        })  # fmt: skip
        for row in rows:
            self.index["groups"][row["group"]] = self.index["groups"].get(row["group"], 0) + 1
        self.index["records"] += len(rows)
        self._write_index()

    def _write_index(self) -> None:
        with atomic_file(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(self.index, indent=1))


class PreparedShards:
    """A prepared folder, by random access. Nothing but the index is read at first; it may be sent to other processes.

    Raises:
        UserError: no such folder, not a prepared one, not finished, or its files are not those that were written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        if not self.index["complete"]:
            raise UserError(
                f"{self.folder}: only {self.index['records']} records are prepared; run the same hmdiff prepare again"
            )
        _check_sizes(self.folder, self.index)
        self._starts = np.cumsum([0, *(shard["records"] for shard in self.index["shards"])])
        self._batches: dict[int, pa.RecordBatch] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Stored:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return _stored(self._batch(shard), number - int(self._starts[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}  # each process maps the files itself

    def groups(self) -> np.ndarray:  # (len,) of str
        """The group (the sequence) of every record."""
        return self._words("group")

    def names(self) -> np.ndarray:  # (len,) of str
        """The name of every record; no picture is read for it."""
        return self._words("name")

    def _words(self, column: str) -> np.ndarray:  # (len,) of str
        columns = [self._batch(shard).column(column).to_pylist() for shard in range(len(self.index["shards"]))]
        return np.array([word for words in columns for word in words], dtype=str)

    def numbers_of(self, patterns: Sequence[str]) -> np.ndarray:  # (N,) ascending
        """The records whose group is one of these, or matches one (`*` for anything). Raises `UserError` for none."""
        groups = self.groups()
        chosen = np.zeros(len(groups), bool)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            fitting = [group for group in self.index["groups"] if fnmatch.fnmatchcase(group, str(pattern))]
            if not fitting:
                known = list(self.index["groups"])
                some = ", ".join(known[:8])
                raise UserError(f"{self.folder}: no group is {pattern!r}; there are {len(known)}, such as {some}")
            chosen |= np.isin(groups, fitting)
        return np.flatnonzero(chosen)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every byte. Raises `UserError` naming the first shard that is not what was written."""
        for number, shard in enumerate(self.index["shards"]):
            path = self.folder / shard["file"]
            if _checksum(path) != shard["sha256"]:
                raise UserError(f"{path}: its checksum is not the one in {INDEX}; prepare the data set again")
            if self._batch(number).num_rows != shard["records"]:
                raise UserError(f"{path}: {self._batch(number).num_rows} records, {INDEX} says {shard['records']}")
            if progress is not None:
                progress(shard["records"])

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            path = self.folder / self.index["shards"][shard]["file"]
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                batch = reader.get_batch(0)
            except (OSError, pa.ArrowInvalid) as error:
                raise UserError(f"{path}: a damaged shard ({error}); prepare the data set again") from None
            if not batch.schema.equals(_SCHEMA):
                raise UserError(f"{path}: its columns are not this version's; prepare the data set again")
            self._batches[shard] = batch
        return self._batches[shard]


def _stored(batch: pa.RecordBatch, row: int) -> Stored:
    words: dict[str, Any] = {word: batch.column(word)[row].as_py() for word in _WORDS}
    arrays: dict[str, Any] = {}
    for field, shape in SHAPES.items():
        value = batch.column(field)[row].values
        # Copied: the file's pages are read-only, and a caller may write into an array of its own.
        arrays[field] = None if value is None else np.array(value.to_numpy()).reshape(_sizes(shape))
    if arrays["joints_3d_valid"] is not None:
        arrays["joints_3d_valid"] = arrays["joints_3d_valid"] > 0
    names: dict[str, Any] = {field: tuple(batch.column(field)[row].as_py()) for field in _NAMES}
    picture, region = batch.column("picture")[row], batch.column("region")[row].as_py()
    pixels = None
    if picture.is_valid:
        pixels = np.frombuffer(picture.as_buffer(), np.uint8)
        pixels.flags.writeable = False  # it is the file's own page
    return Stored(
        Record(side=batch.column("side")[row].as_py(), **words, **names, **arrays),
        pixels,
        None if region is None else tuple(region),
    )


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except OSError:
        raise UserError(f"{folder}: not a prepared data set (no {INDEX}); make it with hmdiff prepare") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove the folder and prepare it again") from None
    wanted = {"version", "complete", "records", "settings", "shards", "groups"}
    if not isinstance(index, dict) or wanted - index.keys():
        raise UserError(f"{path}: not the index of a prepared data set; remove the folder and prepare it again")
    if index["version"] != VERSION:
        raise UserError(f"{path}: version {index['version']}, this hmdiff reads {VERSION}; prepare it again")
    total = sum(shard["records"] for shard in index["shards"])
    if total != index["records"]:
        raise UserError(f"{path}: {index['records']} records promised, its shards have {total}; prepare it again")
    return index


def _check_sizes(folder: Path, index: dict[str, Any]) -> None:
    """What a copy that broke off looks like."""
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise UserError(f"{path}: missing; copy it again, or prepare the data set again")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, {shard['bytes']} were written; copy it again, or prepare again"
            )


def _checksum(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
