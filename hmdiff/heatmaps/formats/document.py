"""A parsed keypoint file, cached so that a file about many photos is parsed once per run."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

from hmdiff.errors import UserError
from hmdiff.files.reading import parse_json, read_bytes
from hmdiff.heatmaps.formats.picture_names import last_name

KEPT = 4  # cached documents


@dataclasses.dataclass(frozen=True)
class Document:
    path: Path
    data: Any  # parsed JSON; for a text of numbers, lines of numbers

    @functools.cached_property
    def images(self) -> dict[str, list[dict[str, Any]]]:
        """For a COCO data set: `last_name` -> its images with that name."""
        found = defaultdict(list)
        for image in self.data.get("images") or []:
            if isinstance(image, dict):
                found[last_name(str(image.get("file_name", image.get("id", ""))))].append(image)
        return dict(found)

    @functools.cached_property
    def annotations(self) -> dict[str, list[dict[str, Any]]]:
        """For a COCO data set: image id as text -> its annotations with keypoints."""
        found = defaultdict(list)
        for item in self.data["annotations"]:
            if isinstance(item, dict) and "keypoints" in item:
                found[str(item.get("image_id"))].append(item)
        return dict(found)

    @functools.cached_property
    def results(self) -> dict[str, list[dict[str, Any]]]:
        """For a result list: image id as text -> its results with keypoints."""
        found = defaultdict(list)
        for item in self.data:
            if isinstance(item, dict) and "keypoints" in item:
                found[str(item.get("image_id", ""))].append(item)
        return dict(found)


def load_document(path: str | Path) -> Document:
    """Raises `UserError` if the file is missing, empty, or neither JSON nor lines of numbers."""
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); check the path") from None
    return _load(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=KEPT)
def _load(path: Path, changed: int, size: int) -> Document:
    content = read_bytes(path)
    if not content.strip():
        raise UserError(f"{path}: the file is empty; keypoints as JSON are expected")
    if path.suffix.lower() != ".txt":
        return Document(path, parse_json(content, path, "COCO or OpenPose keypoints are expected"))
    try:
        lines = content.decode("utf-8-sig").splitlines()
        return Document(path, [[float(word) for word in line.split()] for line in lines if line.strip()])
    except ValueError as error:
        raise UserError(f"{path}: not lines of numbers ({error}); labels of a pose model are expected") from None
