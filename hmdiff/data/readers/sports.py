"""Frames of sports in hmdiff's own layout: MLBPitchDB, which D2A-HMR uses, has no public release.

SOURCE/frames.csv, UTF-8, a header (line 1) and one row a person:
    image          path below SOURCE/images/ (or SOURCE/)
    split          train, val or test; without the column every split has all rows
    group          the clip, game or pitcher: a group must not be divided between splits
    frame, person  whole numbers that make the row's name unique in its group; optional
    x0,y0,x1,y1    the box, pixels; if empty it is computed from the keypoints; the crop is 1.2 times the box
    NAME_x,NAME_y,NAME_c   a keypoint, NAME of any joint set (`hmdiff.body.skeletons`): pixels, confidence 0..1
    NAME_X,NAME_Y,NAME_Z   a 3D joint: metres, camera frame (x right, y down, z forward)
    fx,fy,cx,cy    the camera, pixels; may be missing or empty
A joint with empty cells (or c = 0) is unlabelled.

Or SOURCE/annotations.json, a COCO keypoint file of all frames (17 keypoints), images in SOURCE/images/; every split has
all frames.
"""

from __future__ import annotations

import csv
import difflib
import os
from pathlib import Path

import numpy as np

from hmdiff.body.skeletons import JOINT_SETS
from hmdiff.data.readers.boxes import square_of_box, square_of_points
from hmdiff.data.readers.coco import read_file
from hmdiff.data.readers.labels import RowReader
from hmdiff.data.readers.tables import stem_name
from hmdiff.data.record import Record
from hmdiff.errors import UserError

_PLAIN = ("image", "split", "group", "frame", "person", "x0", "y0", "x1", "y1", "fx", "fy", "cx", "cy")
_BOX, _CAMERA = ("x0", "y0", "x1", "y1"), ("fx", "fy", "cx", "cy")
_AXES_2D, _AXES_3D = ("x", "y", "c"), ("X", "Y", "Z")
_JOINTS = sorted({name for names in JOINT_SETS.values() for name in names})


def read(source: Path, split: str) -> RowReader:
    """Records of one split, or of all rows."""
    path = source / "frames.csv"
    if not path.is_file() and (source / "annotations.json").is_file():
        return read_file("sports", source / "annotations.json", (source / "images", source))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); nor is there annotations.json") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    table = csv.reader(text.splitlines())
    header = next(table, [])
    points, joints = _columns(path, header)
    rows = []
    for line, cells in enumerate(table, 2):
        if len(cells) != len(header):
            raise UserError(f"{path}, line {line}: {len(cells)} cells, the header has {len(header)}")
        values = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        if split == "all" or values.get("split", split) == split:
            rows.append((line, values))
    notes = [f"{path}: {len(rows)} rows in {split}, {len(points)} keypoints, {len(joints)} 3D joints"]
    return RowReader(
        "sports",
        rows,
        lambda row: _record(source, path, points, joints, *row),
        notes,
        location=lambda row: f"{path}, line {row[0]}",
    )


def _columns(path: Path, header: list[str]) -> tuple[list[str], list[str]]:
    """Names of the 2D and the 3D joints. Raises `UserError` naming an unknown or missing column."""
    if "image" not in header:
        raise UserError(f"{path}: no column 'image' in its header; see hmdiff/data/readers/sports.py for the layout")
    columns: dict[str, list[str]] = {"2": [], "3": []}
    for name in header:
        joint, _, axis = name.rpartition("_")
        if name in _PLAIN:
            continue
        if joint not in _JOINTS or axis not in (*_AXES_2D, *_AXES_3D):
            known = [*_PLAIN, *(f"{joint}_{axis}" for joint in _JOINTS for axis in (*_AXES_2D, *_AXES_3D))]
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            raise UserError(f"{path}: column {name!r} is not known; the nearest is {nearest!r}")
        names = columns["2" if axis in _AXES_2D else "3"]
        if joint not in names:
            names.append(joint)
    for kind, axes in (("2", _AXES_2D), ("3", _AXES_3D)):
        for joint in columns[kind]:
            if missing := [f"{joint}_{axis}" for axis in axes if f"{joint}_{axis}" not in header]:
                raise UserError(f"{path}: no column {missing[0]!r}; a joint needs _{', _'.join(axes)}")
    return columns["2"], columns["3"]


def _record(
    source: Path, path: Path, points: list[str], joints: list[str], line: int, values: dict[str, str]
) -> Record:
    location = f"{path}, line {line}"

    def numbers(names: list[str]) -> np.ndarray | None:
        """None if any of the cells is empty or missing."""
        cells = [values.get(name, "") for name in names]
        try:
            return np.array([float(cell) for cell in cells]) if all(cells) else None
        except ValueError as error:
            raise UserError(f"{location}: {error}, in {', '.join(names)}") from None

    unlabelled = np.zeros(3)
    seen = [numbers([f"{joint}_{axis}" for axis in _AXES_2D]) for joint in points]
    keypoints = np.stack([unlabelled if xyc is None else xyc for xyc in seen]) if points else np.zeros((0, 3))
    known = [numbers([f"{joint}_{axis}" for axis in _AXES_3D]) for joint in joints]
    box, camera = numbers(list(_BOX)), numbers(list(_CAMERA))
    if box is not None:
        center, side = square_of_box(*box)
    elif (keypoints[:, 2] > 0).any():
        center, side = square_of_points(keypoints[:, :2], keypoints[:, 2] > 0)
    else:
        raise UserError(f"{location}: neither a box nor a labelled keypoint; give x0, y0, x1, y1")
    image = values["image"].replace("\\", "/")
    folder = source / "images" if os.path.isfile(source / "images" / image) else source
    group = values.get("group", "")
    number = "/".join(values[key] for key in ("frame", "person") if values.get(key)) or str(line)
    intrinsics = None
    if camera is not None:
        fx, fy, cx, cy = camera
        intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return Record(
        name=f"sports/{group or stem_name(image)}/{number}",
        center=center,
        side=float(side),
        source=location,
        image=folder / image,
        group=group,
        joints_3d=np.stack([unlabelled if xyz is None else xyz for xyz in known]) if joints else None,
        joints_3d_valid=np.array([xyz is not None for xyz in known]) if joints else None,
        joint_names=tuple(joints),
        keypoints_2d=keypoints[:, :2] if points else None,
        keypoints_2d_confidence=keypoints[:, 2] if points else None,
        keypoint_names=tuple(points),
        intrinsics=intrinsics,
    )
