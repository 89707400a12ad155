"""COCO person keypoints (Lin et al., ECCV 2014): 2D labels only, of people in the wild.

SOURCE/annotations/person_keypoints_SPLIT.json and SOURCE/SPLIT/*.jpg (or SOURCE/images/SPLIT/). Reads every person with
keypoints who is not marked as a crowd. The crop is the square around the box, times 1.2. A labelled but occluded
keypoint (1) has confidence 0.5, a visible one (2) has 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.skeletons import COCO17
from hmdiff.data.readers.boxes import square_of_box
from hmdiff.data.readers.labels import RowReader, naming
from hmdiff.data.readers.tables import image_folder, read_json, record_list, stem_name
from hmdiff.data.record import Record
from hmdiff.errors import UserError

VISIBILITY = np.array([0.0, 0.5, 1.0])  # unlabelled, labelled but occluded, visible: our choice


def read(source: Path, split: str) -> RowReader:
    """Records of train2017, val2017, train2014 or val2014."""
    path = source / "annotations" / f"person_keypoints_{split}.json"
    return read_file("coco", path, (source / split, source / "images" / split))


def read_file(
    name: str,
    path: Path,  # a COCO annotation file
    places: Sequence[Path],  # possible image folders
) -> RowReader:
    """Records of one annotation file, whose categories' keypoints are COCO17."""
    data = read_json(path)
    if not isinstance(data, dict) or not {"images", "annotations"} <= data.keys():
        raise UserError(f"{path}: no 'images' and 'annotations' in it; a COCO annotation file is expected")
    files: dict[Any, str] = {}
    for row, image in enumerate(record_list(path, data, "images")):
        with naming(f"{path}, image {row}"):
            files[image["id"]] = str(image["file_name"])
    people = []
    for row, item in enumerate(record_list(path, data, "annotations")):
        with naming(f"{path}, annotation {row}"):
            if not item.get("iscrowd") and item.get("num_keypoints", 1) > 0 and "keypoints" in item:
                people.append((row, item))
    with naming(f"{path}, image of annotation {people[0][0] if people else 0}"):
        image_root = image_folder(places, files[people[0][1]["image_id"]] if people else None, str(path))
    crowd = len(data["annotations"]) - len(people)
    notes = [f"{path}, images in {image_root}", f"{crowd} annotations without keypoints, or of crowds, were left out"]
    return RowReader(
        name,
        people,
        lambda row: _record(name, path, image_root, files, *row),
        notes,
        location=lambda row: f"{path}, annotation {row[0]}",
    )


def _record(name: str, path: Path, image_root: Path, files: dict[Any, str], row: int, item: dict[str, Any]) -> Record:
    source = f"{path}, annotation {row} (id {item.get('id')})"
    try:
        image = files[item["image_id"]]
        points = np.array(item["keypoints"], np.float64).reshape(17, 3)
        x, y, width, height = (float(number) for number in item["bbox"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{source}: damaged ({error!r}); 17 keypoints, a box and an image are expected") from None
    if not np.isin(points[:, 2], (0, 1, 2)).all():
        raise UserError(f"{source}: visibility {points[:, 2].max():g}; 0, 1 or 2 is expected")
    center, side = square_of_box(x, y, x + width, y + height)
    return Record(
        name=f"{name}/{stem_name(image)}/{item.get('id', row)}",
        center=center,
        side=side,
        source=source,
        image=image_root / image,
        group=image_root.name,
        mask=item.get("segmentation") or None,
        keypoints_2d=points[:, :2],
        keypoints_2d_confidence=VISIBILITY[points[:, 2].astype(int)],
        keypoint_names=COCO17,
    )
