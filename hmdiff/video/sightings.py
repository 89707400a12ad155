"""Results per person and frame before smoothing, stored in chunks.

A chunk of frames is one npz in a folder beside the results, written when complete: an interrupted video resumes after
the last one. S sightings, N hypotheses, K body joints, B betas, J keypoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.errors import UserError
from hmdiff.files.reading import read_npz
from hmdiff.files.storage import atomic_file, make_folder

ABOUT = "settings.json"
Rows = dict[str, np.ndarray]
# One row per sighting: frame, time (S,); track (S,); points (S, J, 3) photo pixels and confidence; pose (S, N, K, 3);
# betas (S, N, B); root (S, N, 3) the pelvis in the camera frame; joints (S, N, K, 3) relative to it;
# log_likelihood (S, N); distance (S,) pixels; side (S,); spread_mm (S,); confidence (S,); focal (S,);
# principal_point (S, 2).
COLUMNS = 2  # version of the columns: chunks of earlier versions are recovered again
PER_CHUNK = ("frame_times", "lost")  # (frames,) seconds; numbers of the frames that follow undecodable ones


def joined(chunks: Sequence[Rows]) -> Rows:
    """All rows of a video; empty chunks have no sighting columns."""
    names = {name for chunk in chunks for name in chunk}
    return {name: np.concatenate([chunk[name] for chunk in chunks if name in chunk]) for name in names}


def remove_chunks(folder: Path) -> None:
    """Delete the chunks once the results are written; other files are kept."""
    for path in [*folder.glob("[0-9]*.npz"), folder / ABOUT]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class Kept:
    """The chunk folder of one video, or nothing if the caller wants no files."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        about = json.dumps(settings, sort_keys=True, default=str)
        known = folder / ABOUT
        if folder.exists() and not known.is_file() and any(folder.iterdir()):
            raise UserError(f"{folder}: is there already and was not written by hmdiff; move it")
        if known.is_file() and known.read_text(encoding="utf-8") != about:
            remove_chunks(folder)  # chunks of other settings, or of another video with this name
        make_folder(folder)
        if not known.is_file():
            with atomic_file(known) as temporary:
                temporary.write_text(about, encoding="utf-8")

    def read(self) -> list[Rows]:
        """The chunks in order, up to the first missing or damaged one; the rest is recovered again."""
        chunks: list[Rows] = []
        while self.folder is not None and (path := self._path(len(chunks))).is_file():
            try:
                chunk = read_npz(path)
            except UserError:
                break
            if not set(PER_CHUNK) <= set(chunk):
                break
            chunks.append(chunk)
        return chunks

    def write(self, number: int, rows: Rows) -> None:
        if self.folder is None:
            return
        with atomic_file(self._path(number)) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, allow_pickle=False, **rows)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:05d}.npz"
