"""Image loading speed: crops per second from prepared shards and from the data set's own files, with 0, 1, 2 workers.

Timed: reading the record, decoding the image, the augmented crop and batching. Not timed: body model, heatmaps,
training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hmdiff.config import Augment
from hmdiff.data.record_crops import read_crop
from hmdiff.data.shards import PreparedShards, RecordFiles, RecordStore
from hmdiff.data.transforms import crop_affine, sample_augmentation
from hmdiff.errors import UserError
from hmdiff.train.memory import peak_gigabytes

BATCHES = 40  # timed batches
WORKERS = (0, 1, 2)


class Crops(Dataset):
    """Batches of augmented crops in an endless random order, each with the memory use of the process that made it."""

    def __init__(self, store: RecordStore, batch_size: int, image_size: int, length: int) -> None:
        self.store, self.batch_size, self.image_size, self.length = store, batch_size, image_size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, float]:  # (B, 3, S, S) 0..1; GB
        generator = np.random.default_rng([7, index])
        pictures = []
        for number in generator.integers(len(self.store), size=self.batch_size):
            stored = self.store[int(number)]
            augmentation = sample_augmentation(Augment(), generator)
            affine = crop_affine(stored.record.center, stored.record.side, augmentation)
            pictures.append(read_crop(stored, affine, self.image_size, augmentation))
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        return batch, peak_gigabytes() or 0.0


def measure_loading(
    store: RecordStore,
    image_size: int = 224,
    batch_size: int = 32,
    batches: int = BATCHES,
    workers: int = 0,
) -> dict[str, float]:
    """Images per second, and the peak memory of the loading process."""
    loader = DataLoader(
        Crops(store, batch_size, image_size, batches + 2 * max(1, workers)), batch_size=None, num_workers=workers
    )
    stream = iter(loader)
    for _ in range(2 * max(1, workers)):  # warm up: workers start, files are memory-mapped
        next(stream)
    started = time.perf_counter()
    memory = [float(peak) for _, peak in islice(stream, batches)]
    seconds = time.perf_counter() - started
    return {"images_per_second": batch_size * batches / seconds, "peak_gigabytes": max(memory)}


def compare_loading(
    folder: str | Path,  # prepared shards
    source: str | Path | None = None,  # the original files; None: where the shards were prepared from, if still there
    image_size: int = 224,
    batch_size: int = 32,
    batches: int | None = None,
    workers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """A row for each store and number of workers. Reads from disk and from the page cache are not separated."""
    prepared = PreparedShards(folder)
    stores: dict[str, RecordStore] = {"shards": prepared}
    settings = prepared.index["settings"]
    raw_folder = Path(source or settings["source"] or "nowhere")
    if raw_folder.is_dir():
        from hmdiff.data.readers import open_reader

        reader = open_reader(settings["reader"], raw_folder, settings["split"] or None)
        stores["raw files"] = RecordFiles(list(reader.records()))
    elif source is not None:
        raise UserError(f"{source}: no such folder; give the data set's own files, or leave --raw out")
    if prepared[0].picture is None:
        raise UserError(f"{folder}: its records have no pictures, so there is nothing to load")
    rows = []
    for count in WORKERS if workers is None else workers:
        for name, store in stores.items():
            measured = measure_loading(store, image_size, batch_size, batches or BATCHES, count)
            rows.append({"store": name, "workers": count, **measured})
    return rows
