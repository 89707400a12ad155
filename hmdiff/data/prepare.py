"""A data set's own files to prepared shards: read once, checked, cut around the person, and written to be loaded fast.

Of each photo is kept the square about the person, `margin` times the crop's side, so that every augmentation (scale
1.25, any rotation: 1.25 * sqrt 2) still finds its context; brought to at most `resolution` pixels a crop's side, which
is a half more than a model of 256 pixels reads; as a jpg. Photos that lie inside it whole, and need no scaling, keep
their own bytes. Our choice, size against speed: of 1920 x 1080 frames of 391 KB 65 KB a person are left, and a crop of
224 pixels is read 5 times as fast (243 against 46 a second of one core's time).
"""

from __future__ import annotations

import io
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from hmdiff.data.record import Reader, Record
from hmdiff.data.shards import PreparedShards, ShardWriter
from hmdiff.errors import UserError
from hmdiff.files.images import open_image
from hmdiff.files.reading import read_bytes

MARGIN = 1.8  # at least 1.25 * sqrt 2
RESOLUTION = 384
QUALITY = 92


class Kept(NamedTuple):
    """What is stored of a photo for one person."""

    picture: bytes | None  # None: the record has no photo
    region: tuple[float, float, float, float] | None  # x0, y0, x1, y1 photo pixels


def prepare_dataset(
    reader: Reader,
    folder: str | Path,
    margin: float = MARGIN,
    resolution: int = RESOLUTION,  # pixels of the crop's side, at most
    quality: int = QUALITY,  # of the jpgs
    shard_records: int = 1000,
    workers: int = 2,  # threads that read, cut and encode
    name: str = "",  # of `hmdiff.data.readers.READERS`, kept in the index with the next two
    source: str | Path = "",  # the folder that the reader reads
    split: str = "",
) -> dict[str, Any]:
    """Write every record of a reader. Killed at any moment, the same call goes on after the last whole shard.

    Raises:
        UserError: a fault of the source, by file and row; more or fewer records than promised; two of one name; the
            folder holds another data set, or the source has changed since it was begun.
    """
    started = time.perf_counter()
    settings = {
        "reader": name or reader.name, "source": str(Path(source).absolute()) if source else "", "split": split,
        "margin": margin, "resolution": resolution, "quality": quality,
    }  # fmt: skip
    writer = ShardWriter(folder, settings, shard_records)
    promised = reader.count()
    resumed = writer.records
    if promised == 0:
        raise UserError(f"{source or reader.name}: no record in it; check the folder and the split")
    if not writer.complete:
        _write(reader, writer, promised, margin, resolution, quality, workers)
        writer.finish({"summary": list(reader.summary)})
    prepared = PreparedShards(folder)
    if len(prepared) != promised:
        raise UserError(f"{folder}: {len(prepared)} records are prepared, the source has {promised}; remove the folder")
    with tqdm(total=promised, desc="verifying", unit="record") as bar:
        prepared.verify(bar.update)
    size = sum(shard["bytes"] for shard in prepared.index["shards"])
    seconds = time.perf_counter() - started
    return {
        "records": promised, "of them there already": resumed, "groups": len(prepared.index["groups"]),
        "shards": len(prepared.index["shards"]), "megabytes": size / 1e6, "kilobytes a record": size / 1e3 / promised,
        "records a second": (promised - resumed) / seconds,
    }  # fmt: skip


def _write(
    reader: Reader, writer: ShardWriter, promised: int, margin: float, resolution: int, quality: int, workers: int
) -> None:
    with tqdm(total=promised, initial=writer.records, desc=reader.name, unit="record") as bar:
        remaining = _remaining(reader, writer)
        for record, kept in _encoded(remaining, margin, resolution, quality, workers):
            writer.add(record, kept.picture, kept.region)
            bar.update(1)


def _remaining(reader: Reader, writer: ShardWriter) -> Iterator[Record]:
    """The records that are not written yet. Those that are must be the same as before; no name may come twice."""
    borders, names, number = writer.borders(), set[str](), -1
    for number, record in enumerate(reader.records()):
        if record.name in names:
            raise record.error(f"a second record of the name {record.name!r}; the reader must tell them apart")
        names.add(record.name)
        if borders.get(number, record.name) != record.name:
            raise record.error(
                f"record {number} is {record.name!r}, and was {borders[number]!r} when {writer.folder} was begun; the "
                "source has changed: remove the folder and start again"
            )
        if number >= writer.records:
            yield record
    if number + 1 != reader.count():
        raise UserError(f"{reader.name}: {number + 1} records found, {reader.count()} promised; its files disagree")


def _encoded(
    records: Iterable[Record], margin: float, resolution: int, quality: int, workers: int
) -> Iterator[tuple[Record, Kept]]:
    """In order, a few at once: PIL and OpenCV let go of Python's lock."""
    read = lru_cache(maxsize=2 * workers)(_read_photo)  # people of one photo follow each other
    waiting: deque[tuple[Record, Future[Kept]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for record in records:
                waiting.append((record, pool.submit(_keep, record, read, margin, resolution, quality)))
                if len(waiting) > 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _Photo(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    original: bytes
    is_jpg: bool


def _read_photo(path: Path) -> _Photo:
    """A photo as its labels were made on it: no EXIF orientation. Raises `UserError`."""
    original = read_bytes(path)
    with open_image(io.BytesIO(original), path) as opened:
        opened.load()  # notices a file that ends early, which OpenCV fills with grey
        pixels = np.asarray(opened.convert("RGB"))
        return _Photo(pixels, original, opened.format == "JPEG" and opened.mode == "RGB")


def _keep(record: Record, read: Any, margin: float, resolution: int, quality: int) -> Kept:
    if record.image is None:
        return Kept(None, None)
    try:
        photo = read(record.image)
    except UserError as error:
        raise record.error(f"its image cannot be read ({error})") from None
    height, width = photo.pixels.shape[:2]
    half = margin * record.side / 2
    x0, y0 = (max(0, math.floor(place - half)) for place in record.center.tolist())
    x1, y1 = (
        min(end, math.ceil(place + half)) for place, end in zip(record.center.tolist(), (width, height), strict=True)
    )
    if x1 - x0 < 2 or y1 - y0 < 2:
        raise record.error(
            f"its crop, centre ({record.center[0]:.0f}, {record.center[1]:.0f}) and side {record.side:.0f}, lies "
            f"outside the {width} x {height} photo {record.image}; mend its box"
        )
    region = (float(x0), float(y0), float(x1), float(y1))
    scale = min(1.0, resolution / record.side)
    if scale == 1 and region == (0, 0, width, height) and photo.is_jpg:
        return Kept(photo.original, region)
    part = photo.pixels[y0:y1, x0:x1]
    if scale < 1:
        size = (max(2, round((x1 - x0) * scale)), max(2, round((y1 - y0) * scale)))
        part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(part, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert encoded
    return Kept(data.tobytes(), region)
