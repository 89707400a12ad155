"""Prepared data sets: records and their pictures in Arrow IPC files, memory-mapped, written once and never changed.

    FOLDER/index.json          what is there: counts, sizes and checksums of the shards, how it was made
    FOLDER/shard_00000.arrow   one record batch, a row a record, its picture as encoded bytes

Arrow by pyarrow alone, our choice: random access without reading anything else, the same pages for all workers of a
machine, and a file that pandas, polars and datasets read too. A webdataset's tar is read in order only.

A shard is not trusted: Arrow takes a file's offsets for pointers. When it is opened it is validated in full, and each
record is held against the checksum that the index has of it when it is read. Of folders prepared before there were
checksums of records, the whole shard's is verified when it is opened.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from hmdiff.data.record import SHAPES, Record
from hmdiff.data.shard_index import INDEX, VERSION, check_sizes, checksum, read_index, verify_shard
from hmdiff.errors import UserError
from hmdiff.files.reading import read_bytes
from hmdiff.files.storage import atomic_file, make_folder

_WORDS = ("name", "group", "body", "gender", "hand", "source")
_NAMES = ("joint_names", "keypoint_names")
_SCHEMA = pa.schema(
    [
        *((word, pa.string()) for word in _WORDS),
        *((names, pa.list_(pa.string())) for names in _NAMES),
        ("side", pa.float64()),
        *((field, pa.list_(pa.float64() if field == "center" else pa.float32())) for field in SHAPES),
        ("picture", pa.large_binary()),
        ("region", pa.list_(pa.float64())),
        ("depth", pa.large_binary()),
        ("mask", pa.large_binary()),
    ]
)
_BEFORE_MAPS = pa.schema(list(_SCHEMA)[:-2])  # of folders prepared before depth and masks were kept


@dataclasses.dataclass(frozen=True)
class Stored:
    """A record and its picture, still encoded."""

    record: Record
    picture: np.ndarray | None  # bytes of a jpg or png, or None
    region: tuple[float, float, float, float] | None  # x0, y0, x1, y1 photo pixels that it shows; None: the whole photo
    depth: np.ndarray | None = None  # bytes of `person_maps.encode_depth`, of the same region
    mask: np.ndarray | None = None  # bytes of `person_maps.encode_mask`


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
        picture = None if record.image is None else np.frombuffer(read_bytes(record.image), np.uint8)
        return Stored(record, picture, None)


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
            "version": VERSION,
            "complete": False,
            "records": 0,
            "groups": {},
            "shards": [],
            "settings": {**settings, "shard_records": shard_records},
        }
        self._rows: list[dict[str, Any]] = []
        found = read_index(self.folder) if (self.folder / INDEX).exists() else None
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
        check_sizes(self.folder, found)
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
        depth: bytes | None = None,
        mask: bytes | None = None,
    ) -> None:
        """Take one more record; a full shard is written at once."""
        row: dict[str, Any] = {
            **{field: getattr(record, field) for field in (*_WORDS, *_NAMES)},
            "side": float(record.side),
            "picture": picture,
            "region": region,
            "depth": depth,
            "mask": mask,
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
        batch = pa.record_batch(columns, schema=_SCHEMA)
        name = f"shard_{len(self.index['shards']):05d}.arrow"
        with atomic_file(self.folder / name) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
                writer.write_batch(batch)
            size, digest = temporary.stat().st_size, checksum(temporary)
        self.index["shards"].append(
            {
                "file": name,
                "records": len(rows),
                "bytes": size,
                "sha256": digest,
                "first": rows[0]["name"],
                "last": rows[-1]["name"],
                "crc32": [_row_checksum(batch, row) for row in range(len(rows))],
            }
        )
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
        self.index = read_index(self.folder)
        if not self.index["complete"]:
            raise UserError(
                f"{self.folder}: only {self.index['records']} records are prepared; run the same hmdiff prepare again"
            )
        check_sizes(self.folder, self.index)
        self._starts = np.cumsum([0, *(shard["records"] for shard in self.index["shards"])])
        self._batches: dict[int, pa.RecordBatch] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Stored:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch, row = self._batch(shard), number - int(self._starts[shard])
        about = self.index["shards"][shard]
        path = self.folder / about["file"]
        if "crc32" in about and _row_checksum(batch, row) != about["crc32"][row]:
            raise UserError(f"{path}: record {row} has another checksum than when it was written; prepare it again")
        try:
            return _stored(batch, row)
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{path}: record {row} is damaged ({error}); prepare the data set again") from None

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
            verify_shard(self.folder / shard["file"], shard)
            self._batch(number)
            if progress is not None:
                progress(shard["records"])

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            about = self.index["shards"][shard]
            path = self.folder / about["file"]
            if "crc32" not in about:
                verify_shard(path, about)
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                batch = reader.get_batch(0)
                # Offsets, lengths and UTF-8: a file that lies about them would be read beyond its end.
                batch.validate(full=True)
            except (OSError, MemoryError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: a damaged shard ({reason}); prepare the data set again") from None
            if not (batch.schema.equals(_SCHEMA) or batch.schema.equals(_BEFORE_MAPS)):
                raise UserError(f"{path}: its columns are not this version's; prepare the data set again")
            if batch.num_rows != about["records"]:
                raise UserError(f"{path}: {batch.num_rows} records, {INDEX} says {about['records']}; prepare it again")
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
    region = batch.column("region")[row].as_py()
    kept = [
        _bytes(batch.column(name)[row]) if name in batch.schema.names else None for name in ("picture", "depth", "mask")
    ]
    record = Record(side=batch.column("side")[row].as_py(), **words, **names, **arrays).check()
    if region is not None and not (len(region) == 4 and np.isfinite(region).all()):
        raise ValueError(f"a region of {region}")
    return Stored(record, kept[0], None if region is None else tuple(region), *kept[1:])


def _bytes(value: pa.LargeBinaryScalar) -> np.ndarray | None:
    if not value.is_valid:
        return None
    content = np.frombuffer(value.as_buffer(), np.uint8)
    content.flags.writeable = False  # it is the file's own page
    return content


def _row_checksum(batch: pa.RecordBatch, row: int) -> int:
    """CRC-32 over every field of a record, each behind its length, so that no byte can change its field."""
    checksum = 0
    for column in batch.columns:
        value = column[row]
        if not value.is_valid:
            content: Any = b""
        elif isinstance(value, pa.ListScalar):
            part = value.values
            text = pa.types.is_string(part.type)
            content = "\0".join(part.to_pylist()).encode() if text else part.to_numpy(zero_copy_only=False).tobytes()
        else:
            content = value.as_buffer() if isinstance(value, pa.LargeBinaryScalar) else repr(value.as_py()).encode()
        checksum = zlib.crc32(f"{value.is_valid} {len(content)}".encode(), checksum)
        checksum = zlib.crc32(content, checksum)
    return checksum


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in shape)
