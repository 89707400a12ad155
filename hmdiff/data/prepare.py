"""Convert a data set's original files to prepared shards: checked, cropped around each person, fast to load.

Each photo is cropped to a square around the person of `margin` times the crop's side, so that every augmentation (scale
1.25, any rotation: 1.25 * sqrt 2) still finds image content. It is scaled down to at most `resolution` pixels a crop
side, 1.5 times the input of a 256-pixel model, and stored as jpg. A photo that lies wholly inside the square and needs
no scaling keeps its original bytes. Size against speed (our choice): of 1920 x 1080 frames of 391 KB, 65 KB a person
remain, and a crop of 224 pixels is read 5 times as fast (243 against 46 a second on one core).
"""

from __future__ import annotations

import io
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from hmdiff.data.person_maps import encode_depth, encode_mask, read_mask
from hmdiff.data.record import Reader, Record
from hmdiff.data.shards import PreparedShards, ShardWriter
from hmdiff.errors import UserError
from hmdiff.files.images import open_image
from hmdiff.files.locks import claim
from hmdiff.files.reading import read_bytes
from hmdiff.files.storage import make_folder
from hmdiff.heatmaps.distribution import BOX_PADDING

MARGIN = 1.8  # at least 1.25 * sqrt 2
RESOLUTION = 384
QUALITY = 92


class EncodedPerson(NamedTuple):
    """What is stored for one person of a photo."""

    picture: bytes | None  # None: the record has no photo
    region: tuple[float, float, float, float] | None  # x0, y0, x1, y1 photo pixels
    depth: bytes | None = None
    mask: bytes | None = None


# From a photo's pixels (H, W, 3) and path to its depth (h, w), larger = farther, NaN = unknown; None: no depth.
DepthFunction = Callable[[np.ndarray, Path], np.ndarray | None]
# From the pixels, the path and a person's box (x1, y1, x2, y2 photo pixels) to a mask (H, W) bool; None: no person.
MaskFunction = Callable[[np.ndarray, Path, tuple[float, float, float, float]], np.ndarray | None]


def prepare_dataset(
    reader: Reader,
    folder: str | Path,
    margin: float = MARGIN,
    resolution: int = RESOLUTION,  # maximum pixels of the crop's side
    quality: int = QUALITY,  # jpg quality
    shard_records: int = 1000,
    workers: int = 2,  # threads that read, crop and encode
    name: str = "",  # key of `hmdiff.data.readers.READERS`, kept in the index with the next two
    source: str | Path = "",  # the reader's folder
    split: str = "",
    depth: DepthFunction | None = None,  # D2A-HMR's pseudo-depth
    depth_name: str = "",  # source of the depth, kept in the index
    masks: bool = True,  # keep the data set's masks, where it has them
    mask_function: MaskFunction | None = None,  # makes a mask where the data set has none
    mask_name: str = "",  # source of those masks, kept in the index
) -> dict[str, Any]:
    """Write every record of a reader. If interrupted, the same call continues after the last complete shard.

    Raises:
        UserError: a fault in the source, by file and row; more or fewer records than announced; a duplicate name; the
            folder holds another data set, or the source has changed since it was begun.
    """
    started = time.perf_counter()
    settings = {
        "reader": name or reader.name,
        "source": str(Path(source).absolute()) if source else "",
        "split": split,
        "margin": margin,
        "resolution": resolution,
        "quality": quality,
    }
    if depth_name or not masks:  # so that folders begun by versions without maps can be continued
        settings |= {"depth": depth_name, "masks": masks}
    if mask_name:
        settings["masks of"] = mask_name
    folder = make_folder(folder)
    with claim(folder, "wait for it, or give another folder", name=None):
        writer = ShardWriter(folder, settings, shard_records)
        maps: dict[str, int] = {}
        expected = reader.count()
        already_written = writer.records
        if expected == 0:
            raise UserError(f"{source or reader.name}: no record in it; check the folder and the split")
        if not writer.complete:
            counts = _write(
                reader, writer, expected, _Cropper(margin, resolution, quality, depth, masks, mask_function), workers
            )
            writer.finish({"summary": list(reader.summary)})
            requested = {"depth": depth is not None, "masks": mask_function is not None}
            maps = {f"with {what}, of those new": count for what, count in counts.items() if count or requested[what]}
    prepared = PreparedShards(folder)
    if len(prepared) != expected:
        raise UserError(f"{folder}: {len(prepared)} records are prepared, the source has {expected}; remove the folder")
    with tqdm(total=expected, desc="verifying", unit="record") as bar:
        prepared.verify(bar.update)
    size = sum(shard["bytes"] for shard in prepared.index["shards"])
    seconds = time.perf_counter() - started
    return {
        "records": expected,
        "of them there already": already_written,
        "groups": len(prepared.index["groups"]),
        "shards": len(prepared.index["shards"]),
        "megabytes": size / 1e6,
        "kilobytes a record": size / 1e3 / expected,
        "records a second": (expected - already_written) / seconds,
        **maps,
    }


def _write(reader: Reader, writer: ShardWriter, expected: int, cropper: _Cropper, workers: int) -> dict[str, int]:
    """Number of written records with depth and with a mask."""
    counts = {"depth": 0, "masks": 0}
    with tqdm(total=expected, initial=writer.records, desc=reader.name, unit="record") as bar:
        for record, encoded in _encode_in_threads(_remaining(reader, writer), cropper, workers):
            writer.add(record, *encoded)
            counts["depth"] += encoded.depth is not None
            counts["masks"] += encoded.mask is not None
            bar.update(1)
    return counts


def _remaining(reader: Reader, writer: ShardWriter) -> Iterator[Record]:
    """The records that are not written yet. Checks that written ones are unchanged and that names are unique."""
    known_names, names, number = writer.boundary_names(), set[str](), -1
    for number, record in enumerate(reader.records()):
        if record.name in names:
            raise record.error(f"a second record of the name {record.name!r}; the reader must tell them apart")
        names.add(record.name)
        if known_names.get(number, record.name) != record.name:
            raise record.error(
                f"record {number} is {record.name!r}, and was {known_names[number]!r} when {writer.folder} was begun; "
                "the source has changed: remove the folder and start again"
            )
        if number >= writer.records:
            yield record
    if number + 1 != reader.count():
        raise UserError(f"{reader.name}: {number + 1} records found, {reader.count()} promised; its files disagree")


def _encode_in_threads(
    records: Iterable[Record], cropper: _Cropper, workers: int
) -> Iterator[tuple[Record, EncodedPerson]]:
    """Encode in threads (PIL and OpenCV release the GIL); results in order."""
    read = lru_cache(maxsize=2 * workers)(_read_photo)  # people of one photo are consecutive
    pending: deque[tuple[Record, Future[EncodedPerson]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for record in records:
                pending.append((record, pool.submit(cropper, record, read)))
                if len(pending) > 4 * workers:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        finally:
            for _, future in pending:
                future.cancel()


class _Photo(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    original: bytes
    is_jpg: bool


def _read_photo(path: Path) -> _Photo:
    """A photo in the orientation of its labels: EXIF orientation is ignored. Raises `UserError`."""
    original = read_bytes(path)
    with open_image(io.BytesIO(original), path) as opened:
        opened.load()  # detects truncated files, which OpenCV fills with grey
        pixels = np.asarray(opened.convert("RGB"))
        return _Photo(pixels, original, opened.format == "JPEG" and opened.mode == "RGB")


class _Cropper:
    """Cuts the stored crop and maps of one person from a photo."""

    def __init__(
        self,
        margin: float,
        resolution: int,
        quality: int,
        depth: DepthFunction | None,
        masks: bool,
        mask_function: MaskFunction | None = None,
    ) -> None:
        self.margin, self.resolution, self.quality, self.masks = margin, resolution, quality, masks
        self.depth, self.mask_function, self._lock = depth, mask_function, threading.Lock()
        self._last: tuple[Path, np.ndarray | None] | None = None  # people of one photo are consecutive

    def __call__(self, record: Record, read: Any) -> EncodedPerson:
        if record.image is None:
            return EncodedPerson(None, None)
        try:
            photo = read(record.image)
        except UserError as error:
            raise record.error(f"its image cannot be read ({error})") from None
        height, width = photo.pixels.shape[:2]
        half = self.margin * record.side / 2
        x0, y0 = (max(0, math.floor(coordinate - half)) for coordinate in record.center.tolist())
        x1, y1 = (
            min(end, math.ceil(coordinate + half))
            for coordinate, end in zip(record.center.tolist(), (width, height), strict=True)
        )
        if x1 - x0 < 2 or y1 - y0 < 2:
            raise record.error(
                f"its crop, centre ({record.center[0]:.0f}, {record.center[1]:.0f}) and side {record.side:.0f}, lies "
                f"outside the {width} x {height} photo {record.image}; mend its box"
            )
        region = (float(x0), float(y0), float(x1), float(y1))
        scale = min(1.0, self.resolution / record.side)
        size = (max(2, round((x1 - x0) * scale)), max(2, round((y1 - y0) * scale)))
        return EncodedPerson(
            self._picture(photo, region, scale, size), region, *self._maps(record, photo, region, size)
        )

    def _picture(
        self, photo: _Photo, region: tuple[float, float, float, float], scale: float, size: tuple[int, int]
    ) -> bytes:
        height, width = photo.pixels.shape[:2]
        if scale == 1 and region == (0, 0, width, height) and photo.is_jpg:
            return photo.original
        x0, y0, x1, y1 = (int(value) for value in region)
        part = photo.pixels[y0:y1, x0:x1]
        if scale < 1:
            part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
        options = [cv2.IMWRITE_JPEG_QUALITY, self.quality]
        encoded, data = cv2.imencode(".jpg", cv2.cvtColor(part, cv2.COLOR_RGB2BGR), options)
        assert encoded
        return data.tobytes()

    def _maps(
        self, record: Record, photo: _Photo, region: tuple[float, float, float, float], size: tuple[int, int]
    ) -> tuple[bytes | None, bytes | None]:  # depth, mask
        height, width = photo.pixels.shape[:2]
        size = (max(2, size[0] // 2), max(2, size[1] // 2))  # models read maps at a third of the image's resolution
        mask = None
        person_mask = None
        if self.masks and record.mask is not None:
            person_mask = read_mask(record.mask, (width, height), record.source)
        elif self.masks and self.mask_function is not None and record.image is not None:
            person_mask = self.mask_function(photo.pixels, record.image, _box(record, width, height))
        if person_mask is not None:
            mask = encode_mask(person_mask, (width, height), region, size)
        depth = None if self.depth is None else self._photo_depth(record, photo)
        return None if depth is None else encode_depth(depth, (width, height), region, size), mask

    def _photo_depth(self, record: Record, photo: _Photo) -> np.ndarray | None:
        assert record.image is not None and self.depth is not None
        with self._lock:  # one network call at a time
            if self._last is None or self._last[0] != record.image:
                self._last = (record.image, self.depth(photo.pixels, record.image))
            return self._last[1]


def _box(record: Record, width: int, height: int) -> tuple[float, float, float, float]:
    """The person's box, clipped to the photo: the crop without its padding."""
    (x, y), half = record.center.tolist(), record.side / BOX_PADDING / 2
    return max(0.0, x - half), max(0.0, y - half), min(float(width), x + half), min(float(height), y + half)
