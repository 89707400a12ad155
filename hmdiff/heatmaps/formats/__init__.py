"""Readers of common keypoint files: one per family, recognised by content; joints are mapped by name.

A family's module converts a document to `Entry`s; `entry.person_of` validates each and converts it to photo pixels.
docs/keypoints.md lists every supported format with its test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmdiff.errors import UserError
from hmdiff.files.reading import naming
from hmdiff.heatmaps.formats import coco, detectors, mmpose, named_points, openpose, plain
from hmdiff.heatmaps.formats.document import Document, load_document
from hmdiff.heatmaps.formats.entry import Entry, check_extent, person_of
from hmdiff.heatmaps.formats.picture_names import find_picture, last_name
from hmdiff.heatmaps.keypoints import PersonKeypoints
from hmdiff.heatmaps.photo import PhotoInfo

__all__ = ["about_many", "has_keypoints", "read_keypoints", "read_people_of"]
MEND = "write it again with the tool that made it"


def read_keypoints(
    path: str | Path,
    photo: str | Path | None = None,  # name of the photo, to find it in a file about several
    photo_size: tuple[int, int] | None = None,  # width, height in pixels; enables the checks of places and sizes
) -> list[PersonKeypoints]:
    """Everyone with keypoints in the file, in the file's order.

    Raises:
        UserError: the file is missing, empty or of an unknown family; it holds no person, or none that is usable; sizes
            that contradict the photo's.
    """
    info = None if photo_size is None else PhotoInfo(*photo_size)
    return read_people_of(path, photo, info)[0]


def read_people_of(
    path: str | Path,
    photo: str | Path | None,
    info: PhotoInfo | None,
) -> tuple[list[PersonKeypoints], list[str]]:  # people; notes: corrections and omissions, one line each
    """As `read_keypoints`, with notes for the user. An invalid person does not affect the others."""
    path = Path(path)
    notes: list[str] = []
    with naming(path, MEND):
        entries = _entries(load_document(path), photo, notes)
    if not entries:
        raise UserError(f"{path}: no person in it; run the keypoint detector on a photo with somebody in it")
    found: list[PersonKeypoints] = []
    first: UserError | None = None
    unseen = 0
    for index, entry in enumerate(entries):
        try:
            with naming(f"{path}, person {index}", MEND):
                person = person_of(path, entry, info, notes)
            if not (person.points[:, 2] > 0).any():
                unseen += 1
                continue
            check_extent(path, index, person, info)
        except UserError as error:
            first = first or error
            notes.append(f"{error} (person {index} left out)")
            continue
        found.append(person)
    if not found:
        if first is not None:
            raise first
        raise UserError(f"{path}: the confidences of all keypoints are zero; give keypoints that were found")
    return found, list(dict.fromkeys(notes))


def about_many(path: str | Path) -> bool:
    """Whether a file names each person's photo, so that it can serve several photos."""
    try:
        document = load_document(path)
        with naming(path, MEND):
            return coco.about_many(document) or _by_picture(document.data)
    except UserError:
        return False


def has_keypoints(path: str | Path) -> bool:
    """False for other JSON, such as a box only."""
    document = load_document(path)
    data = document.data
    if isinstance(data, dict):
        with naming(path, MEND):
            return _is_known(data)
    return True


def _is_known(data: dict[str, Any]) -> bool:
    known = coco.is_dataset(data) or openpose.recognised(data) or mmpose.recognised(data)
    known = known or named_points.recognised(data) or detectors.is_rcnn(data) or _by_picture(data)
    return known or plain.keypoints_key(data) is not None


def _by_picture(data: Any) -> bool:
    """AlphaPose's grouped files, keyed by image name."""
    return (
        isinstance(data, dict)
        and bool(data)
        and all(isinstance(value, dict) and openpose.recognised(value) for value in data.values())
    )


def _entries(document: Document, photo: str | Path | None, notes: list[str]) -> list[Entry]:
    path, data = document.path, document.data
    if _by_picture(data):
        named = [(key, key) for key in data if photo is not None and last_name(key) == last_name(Path(photo).name)]
        found = find_picture(photo or "", named, str(path))
        if found is None:
            raise UserError(f"{path}: none of its {len(data)} pictures is {Path(photo or '').name!r}")
        data = data[found]
    if detectors.is_label_text(path, data):
        return detectors.label_entries(path, data)
    if coco.is_dataset(data):
        return coco.dataset_entries(document, photo, notes)
    if openpose.recognised(data):
        return openpose.entries(path, data)
    if mmpose.recognised(data):
        return mmpose.entries(path, data, notes)
    if detectors.is_ultralytics(data):
        return detectors.ultralytics_entries(path, data)
    if detectors.is_rcnn(data):
        return detectors.rcnn_entries(path, data)
    if detectors.is_transformers(data):
        return detectors.transformers_entries(path, data)
    if named_points.recognised(data):
        return named_points.entries(path, data, notes)
    if coco.is_results(data):
        return coco.result_entries(document, photo)
    return plain.entries(path, data, notes)
