"""COCO data sets (`images`, `annotations`, `categories`), result lists, and tools that write the same formats.

A data set's joints are those named in `categories[].keypoints`, the only difference between COCO, Human3.6M, PoseTrack,
MPII, CrowdPose, AIC and Halpe. COCO-WholeBody adds `foot_kpts`, or 133 joints. AlphaPose and Detectron2 write results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmdiff.body.skeletons import COCO17, HALPE26
from hmdiff.errors import UserError
from hmdiff.heatmaps.formats.document import Document
from hmdiff.heatmaps.formats.entry import CONFIDENCE, EITHER, FLAGS, Entry, as_list, numbers
from hmdiff.heatmaps.formats.joint_names import BY_COUNT, WHOLEBODY_FEET, map_names
from hmdiff.heatmaps.formats.picture_names import find_picture, last_name, stem_of

_IDENTITY = {
    "annotation": ("id", "annotation_id"),
    "track": ("track_id", "track", "idx"),
    "instance": ("instance_id",),
    "person": ("person_id",),
}


def is_dataset(data: Any) -> bool:
    return isinstance(data, dict) and "annotations" in data


def is_results(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(item, dict) for item in data)


def about_many(document: Document) -> bool:
    """Whether the file names each person's photo."""
    if is_dataset(document.data):
        return isinstance(document.data.get("images"), list)
    return is_results(document.data) and len({str(each.get("image_id")) for each in document.data}) > 1


# ---- data sets ----


def dataset_entries(document: Document, photo: str | Path | None, notes: list[str]) -> list[Entry]:
    data, path = document.data, document.path
    as_list(path, data["annotations"], "'annotations'")
    images = [image for image in as_list(path, data.get("images", []), "'images'") if isinstance(image, dict)]
    size, image_id = None, None
    if len(images) > 1 or (images and photo is not None):
        name = "" if photo is None else Path(photo).name
        named = document.images.get(last_name(name), [])
        found = find_picture(
            photo or "",
            [(index, str(image.get("file_name", image.get("id")))) for index, image in enumerate(named)],
            str(path),
        )
        if found is None:
            raise UserError(f"{path}: none of its {len(images)} images is {name!r}; give the photo it is about")
        image = named[found]
        image_id, size = str(image.get("id")), _size(image)
        items = document.annotations.get(image_id, [])
    else:
        items = [item for each in document.annotations.values() for item in each]
        size = _size(images[0]) if images else None
    items = [item for item in items if not item.get("iscrowd") and item.get("num_keypoints", 1)]
    names = {}
    for category in {str(item.get("category_id")) for item in items}:
        names[category] = _category_names(path, data.get("categories"), category, notes)
    return [_annotation(path, item, names[str(item.get("category_id"))], size) for item in items]


def _size(image: dict[str, Any]) -> tuple[float, float] | None:
    width, height = image.get("width"), image.get("height")
    if not (isinstance(width, int | float) and isinstance(height, int | float)):
        return None
    return float(width), float(height)


def _category_names(path: Path, categories: Any, category_id: str, notes: list[str]) -> tuple[str, ...] | None:
    for category in categories if isinstance(categories, list) else []:
        if isinstance(category, dict) and str(category.get("id")) == category_id and category.get("keypoints"):
            names, unknown = map_names(category["keypoints"], str(path))
            if unknown:
                notes.append(f"{path}: joints {', '.join(unknown)} are not known: left out")
            return names
    return None


def _annotation(
    path: Path, item: dict[str, Any], names: tuple[str, ...] | None, size: tuple[float, float] | None
) -> Entry:
    keypoints, names = with_feet(path, item, names)
    return Entry(
        keypoints,
        names,
        third=FLAGS,
        box=item.get("bbox"),
        size=size,
        identity=identity_of(item),
    )


def with_feet(path: Path, item: dict[str, Any], names: tuple[str, ...] | None) -> tuple[Any, tuple[str, ...] | None]:
    """Append COCO-WholeBody's feet, which are stored separately from the body's joints."""
    feet = item.get("foot_kpts")
    keypoints = item["keypoints"]
    if not isinstance(feet, list) or item.get("foot_valid") is False:
        return keypoints, names
    body, more = numbers(path, keypoints), numbers(path, feet)
    if len(body) != 3 * len(COCO17) or len(more) != 3 * len(WHOLEBODY_FEET):
        return keypoints, names
    return body + more, (*COCO17, *WHOLEBODY_FEET)


def identity_of(item: dict[str, Any]) -> dict[str, str]:
    """Identifiers of a person in the file: annotation, track, instance; -1 is OpenPose's 'none'."""
    found = {}
    for kind, keys in _IDENTITY.items():
        for key in keys:
            value = item.get(key)
            while isinstance(value, list) and len(value) == 1:
                value = value[0]
            if isinstance(value, bool) or not isinstance(value, int | float | str) or value in ("", -1):
                continue
            found[kind] = f"{value:g}" if isinstance(value, float) else str(value)
            break
    return found


# ---- results ----


def result_entries(document: Document, photo: str | Path | None) -> list[Entry]:
    """A result list. AlphaPose names its images; COCO's tools give the id that is in the file name."""
    path = document.path
    groups = document.results
    if not groups:
        raise UserError(f"{path}: a list of objects without 'keypoints'; COCO results are expected")
    chosen = list(groups)
    if len(groups) > 1:
        name = "" if photo is None else Path(photo).name
        named = [(key, key) for key in groups if last_name(key) == last_name(name)]
        found = find_picture(photo or "", named, str(path)) if name else None
        if found is None:
            raise UserError(
                f"{path}: results of several images, none with image_id {stem_of(name)!r}; keep those of one"
            )
        chosen = [found]
    return [_result(path, item) for key in chosen for item in groups[key]]


def _result(path: Path, item: dict[str, Any]) -> Entry:
    keypoints, names = with_feet(path, item, None)
    count = len(numbers(path, keypoints)) // 3 if names is None else len(names)
    names = names or BY_COUNT.get(count)
    if names is None and count in (14, 16):
        raise UserError(
            f"{path}: {count} joints without names, and several orders have as many; give a COCO data set, whose "
            "categories name them"
        )
    # AlphaPose writes `box`, all other tools `bbox`. AlphaPose scores of confident joints exceed 1.
    alphapose = "idx" in item or "box" in item
    third = CONFIDENCE if alphapose and names in (HALPE26,) else EITHER
    return Entry(keypoints, names, third=third, box=item.get("bbox", item.get("box")), identity=identity_of(item))
