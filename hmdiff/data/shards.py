"""Prepared data sets: records and their images in memory-mapped Arrow IPC files, written once.

    FOLDER/index.json          counts, sizes and checksums of the shards, and the settings they were made with
    FOLDER/shard_00000.arrow   one record batch, one row per record, its image as encoded bytes

Arrow by pyarrow alone (our choice): random access without reading anything else, memory pages shared by all workers of
a machine, and files that pandas, polars and datasets can read. A webdataset tar allows sequential reads only.

Shards are not trusted, because Arrow uses a file's offsets as pointers: a shard is fully validated when it is opened,
and each record is checked against its checksum in the index when it is read. Folders prepared before there were
checksums of records have the checksum of the whole shard verified on opening.
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

_STRINGS = ("name", "group", "body", "gender", "hand", "source")
_NAMES = ("joint_names", "keypoint_names")
_SCHEMA = pa.schema(
    [
        *((word, pa.string()) for word in _STRINGS),
        *((names, pa.list_(pa.string())) for names in _NAMES),
        ("side", pa.float64()),
        *((field, pa.list_(pa.float64() if field == "center" else pa.float32())) for field in SHAPES),
        ("picture", pa.large_binary()),
        ("region", pa.list_(pa.float64())),
        ("depth", pa.large_binary()),
        ("mask", pa.large_binary()),
    ]
)
_SCHEMA_WITHOUT_MAPS = pa.schema(list(_SCHEMA)[:-2])  # folders prepared before depth and masks were stored


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A record and its encoded image."""

    record: Record
    picture: np.ndarray | None  # bytes of a jpg or png, or None
    region: tuple[float, float, float, float] | None  # x0, y0, x1, y1 photo pixels of the image; None: the whole photo
    depth: np.ndarray | None = None  # bytes from `person_maps.encode_depth`, of the same region
    mask: np.ndarray | None = None  # bytes from `person_maps.encode_mask`


class RecordStore(Protocol):
    """Records by number: prepared, or read from the original files."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> StoredRecord: ...


class RecordFiles:
    """Records whose images are read from their original files on every access."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> StoredRecord:
        record = self.records[number]
        picture = None if record.image is None else np.frombuffer(read_bytes(record.image), np.uint8)
        return StoredRecord(record, picture, None)


class ShardWriter:
    """Writes a prepared folder; after an interruption it continues after the last complete shard.

    Raises:
        UserError: the folder was prepared from another source, or with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],  # all settings that affect the output: a later call must give the same
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
        existing = read_index(self.folder) if (self.folder / INDEX).exists() else None
        if existing is not None and existing["records"]:
            self._resume(existing)
        else:
            self._write_index()

    def _resume(self, existing: dict[str, Any]) -> None:
        for key, value in self.index["settings"].items():
            previous = existing["settings"].get(key)
            if previous != json.loads(json.dumps(value)):
                raise UserError(
                    f"{self.folder}: was prepared with {key} {previous!r}, now it is {value!r}; give the same, another "
                    "folder, or remove this one"
                )
        check_sizes(self.folder, existing)
        self.index = existing

    @property
    def records(self) -> int:
        """Number of records in complete shards."""
        return self.index["records"]

    @property
    def complete(self) -> bool:
        return self.index["complete"]

    def boundary_names(self) -> dict[int, str]:
        """Names of each shard's first and last record by record number, to detect a changed source."""
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
        """Add one record; a full shard is written at once."""
        row: dict[str, Any] = {
            **{field: getattr(record, field) for field in (*_STRINGS, *_NAMES)},
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
        """Write the remaining records and mark the folder as complete."""
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
    """Random access to a prepared folder. Reads only the index at first; can be sent to other processes.

    Raises:
        UserError: the folder is missing, not prepared, incomplete, or its files are not those that were written.
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

    def __getitem__(self, number: int) -> StoredRecord:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch, row = self._batch(shard), number - int(self._starts[shard])
        entry = self.index["shards"][shard]
        path = self.folder / entry["file"]
        if "crc32" in entry and _row_checksum(batch, row) != entry["crc32"][row]:
            raise UserError(f"{path}: record {row} has another checksum than when it was written; prepare it again")
        try:
            return _decode_row(batch, row)
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{path}: record {row} is damaged ({error}); prepare the data set again") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}  # each process maps the files itself

    def groups(self) -> np.ndarray:  # (len,) of str
        """The group (the sequence) of every record."""
        return self._strings("group")

    def names(self) -> np.ndarray:  # (len,) of str
        """The name of every record, without reading its image."""
        return self._strings("name")

    def _strings(self, column: str) -> np.ndarray:  # (len,) of str
        columns = [self._batch(shard).column(column).to_pylist() for shard in range(len(self.index["shards"]))]
        return np.array([value for values in columns for value in values], dtype=str)

    def select_groups(self, patterns: Sequence[str]) -> np.ndarray:  # (N,) ascending
        """The records whose group matches a pattern (`*` for anything). Raises `UserError` if one matches none."""
        groups = self.groups()
        selected = np.zeros(len(groups), bool)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matching = [group for group in self.index["groups"] if fnmatch.fnmatchcase(group, str(pattern))]
            if not matching:
                known = list(self.index["groups"])
                examples = ", ".join(known[:8])
                raise UserError(f"{self.folder}: no group is {pattern!r}; there are {len(known)}, such as {examples}")
            selected |= np.isin(groups, matching)
        return np.flatnonzero(selected)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every byte. Raises `UserError` naming the first shard whose content has changed."""
        for number, shard in enumerate(self.index["shards"]):
            verify_shard(self.folder / shard["file"], shard)
            self._batch(number)
            if progress is not None:
                progress(shard["records"])

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            entry = self.index["shards"][shard]
            path = self.folder / entry["file"]
            if "crc32" not in entry:
                verify_shard(path, entry)
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                batch = reader.get_batch(0)
                # Checks offsets, lengths and UTF-8: a file with wrong ones would be read beyond its end.
                batch.validate(full=True)
            except (OSError, MemoryError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{path}: a damaged shard ({reason}); prepare the data set again") from None
            if not (batch.schema.equals(_SCHEMA) or batch.schema.equals(_SCHEMA_WITHOUT_MAPS)):
                raise UserError(f"{path}: its columns are not this version's; prepare the data set again")
            if batch.num_rows != entry["records"]:
                raise UserError(f"{path}: {batch.num_rows} records, {INDEX} says {entry['records']}; prepare it again")
            self._batches[shard] = batch
        return self._batches[shard]


def _decode_row(batch: pa.RecordBatch, row: int) -> StoredRecord:
    strings: dict[str, Any] = {name: batch.column(name)[row].as_py() for name in _STRINGS}
    arrays: dict[str, Any] = {}
    for field, shape in SHAPES.items():
        value = batch.column(field)[row].values
        # Copied: the mapped pages are read-only, and a caller may write into its array.
        arrays[field] = None if value is None else np.array(value.to_numpy()).reshape(_sizes(shape))
    if arrays["joints_3d_valid"] is not None:
        arrays["joints_3d_valid"] = arrays["joints_3d_valid"] > 0
    name_lists: dict[str, Any] = {field: tuple(batch.column(field)[row].as_py()) for field in _NAMES}
    region = batch.column("region")[row].as_py()
    blobs = [
        _bytes(batch.column(name)[row]) if name in batch.schema.names else None for name in ("picture", "depth", "mask")
    ]
    record = Record(side=batch.column("side")[row].as_py(), **strings, **name_lists, **arrays).check()
    if region is not None and not (len(region) == 4 and np.isfinite(region).all()):
        raise ValueError(f"a region of {region}")
    return StoredRecord(record, blobs[0], None if region is None else tuple(region), *blobs[1:])


def _bytes(value: pa.LargeBinaryScalar) -> np.ndarray | None:
    if not value.is_valid:
        return None
    content = np.frombuffer(value.as_buffer(), np.uint8)
    content.flags.writeable = False  # a page of the mapped file
    return content


def _row_checksum(batch: pa.RecordBatch, row: int) -> int:
    """CRC-32 over every field of a record, each preceded by its length, so that no byte can move between fields."""
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
