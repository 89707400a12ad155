"""3DPW (von Marcard et al., ECCV 2018): people outdoors, SMPL in the world frame, a moving camera; sequence pickles.

SOURCE/sequenceFiles/{train,validation,test}/SEQUENCE.pkl, SOURCE/imageFiles/SEQUENCE/image_00000.jpg. A pickle holds,
for person p and F frames: poses[p] (F, 72), betas[p], trans[p] (F, 3), poses2d[p] (F, 3, 18), jointPositions[p] (F,
72), campose_valid[p] (F,), genders[p], cam_poses (F, 4, 4) world to camera, cam_intrinsics (3, 3), sequence. An image's
number is its position in the sequence, not its entry of img_frame_ids, which counts the IMUs' 60 Hz.

As in SPIN: frames with a valid camera pose, the box around poses2d with confidence > 0, times 1.2, the root rotated
into the camera frame. The pickles are read by the restricted unpickler.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hmdiff.body.skeletons import OPENPOSE18, SMPL24
from hmdiff.data.readers.boxes import square_of_points
from hmdiff.data.readers.labels import RowReader, first_text, naming, parse_gender, rotate_root, rotate_translation
from hmdiff.data.readers.splits import SPLITS_OF, has_frame, has_sequence
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.files.unpickling import load_pickle

# Arrays with one entry per frame for each person.
_PER_PERSON = {"poses": (72,), "poses2d": (3, 18), "campose_valid": ()}
_OPTIONAL = {"trans": (3,), "jointPositions": (72,)}
_STEADY = 0.02  # metres: maximum variation of a person's rest-pose root joint between frames


class _Sequence(NamedTuple):
    path: Path
    name: str
    images: Path
    people: list[dict[str, np.ndarray]]  # the arrays above, betas, and root (3,) where known
    genders: list[str]
    cameras: np.ndarray  # (F, 4, 4)
    intrinsics: np.ndarray  # (3, 3)


def read(source: Path, split: str) -> RowReader:
    """Records of one split, of all, or of a named subset (`hmdiff.data.readers.splits`)."""
    sequences: list[_Sequence] = []
    rows: list[tuple[int, int, int]] = []
    without = 0
    for path in _pickles(source, split):
        sequence = _load(path, source)
        for person, arrays in enumerate(sequence.people):
            labelled = (arrays["poses2d"][:, 2] > 0).any(1) | np.isnan(arrays["poses2d"]).any((1, 2))
            for frame in np.flatnonzero(arrays["campose_valid"] > 0):
                if has_frame(split, sequence.name, int(frame)):
                    without += not labelled[frame]
                    rows += [(len(sequences), person, int(frame))] if labelled[frame] else []
        sequences.append(sequence)
    notes = [f"{len(sequences)} sequences of {split}"]
    notes += [f"{without} people without any 2D keypoint, and so without a box, were left out"] if without else []
    return RowReader(
        "3dpw",
        rows,
        lambda row: _record(sequences[row[0]], *row[1:]),
        notes,
        location=lambda row: f"{sequences[row[0]].path}, person {row[1]}, frame {row[2]}",
    )


def _pickles(source: Path, split: str) -> Iterator[Path]:
    found = False
    for part in SPLITS_OF[split]:
        folder = source / "sequenceFiles" / part
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {split} of 3DPW needs it: unpack sequenceFiles.zip in {source}")
        for path in sorted(folder.glob("*.pkl")):
            if has_sequence(split, path.stem):
                found = True
                yield path
    if not found:
        raise UserError(f"{source / 'sequenceFiles'}: no sequence of {split} in it; unpack sequenceFiles.zip again")


def _load(path: Path, source: Path) -> _Sequence:
    data = load_pickle(path)
    needed = (*_PER_PERSON, "betas", "genders", "cam_poses", "cam_intrinsics")
    missing = [key for key in needed if key not in data] if isinstance(data, dict) else list(needed)
    if missing:
        raise UserError(f"{path}: not a 3DPW sequence: no {', '.join(missing)} in it; download it again")
    cameras = _numbers(path, data, "cam_poses", (-1, 4, 4))
    intrinsics = _numbers(path, data, "cam_intrinsics", (3, 3))
    for key in (*_PER_PERSON, *_OPTIONAL, "betas", "genders"):
        if key in data and not isinstance(data[key], list | tuple | np.ndarray | str):
            raise UserError(f"{path}: {key} is {data[key]!r:.60}, an entry for each person expected; download it again")
    frames, count = len(cameras), len(data["poses"])
    people = []
    for person in range(count):
        arrays = {"betas": _entry(path, data, "betas", person, count).reshape(-1)[:10]}
        for key, shape in {**_PER_PERSON, **{k: s for k, s in _OPTIONAL.items() if k in data}}.items():
            array = _entry(path, data, key, person, count)
            if array.shape != (frames, *shape):
                raise UserError(
                    f"{path}: {key} of person {person} has shape {array.shape}, expected {(frames, *shape)} for the "
                    f"{frames} frames of cam_poses; download it again"
                )
            arrays[key] = array
        if _OPTIONAL.keys() <= arrays.keys():
            root = arrays["jointPositions"][:, :3] - arrays["trans"]
            valid = arrays["campose_valid"] > 0
            # jointPositions[0] = rest-pose root + trans: if the root varies between frames, the two are inconsistent.
            if valid.any() and np.ptp(root[valid], 0).max() < _STEADY:
                arrays["root"] = np.median(root[valid], 0)
        people.append(arrays)
    with naming(f"{path}, sequence"):
        name = first_text(data.get("sequence", path.stem))
    genders = []
    for person in range(count):
        with naming(f"{path}, genders of person {person}"):
            genders.append(parse_gender(data["genders"][person]))
    return _Sequence(path, name, source / "imageFiles" / name, people, genders, cameras, intrinsics)


def _entry(path: Path, data: dict[str, Any], key: str, person: int, count: int) -> np.ndarray:
    if len(data[key]) != count or len(data["genders"]) != count:
        found = f"{key} of {len(data[key])} and genders of {len(data['genders'])} people, poses of {count}"
        raise UserError(f"{path}: {found}; download it again")
    with naming(f"{path}, {key} of person {person}"):
        return np.asarray(data[key][person], np.float64)


def _numbers(path: Path, data: dict[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of the whole sequence; -1 in the shape: any length."""
    with naming(f"{path}, {key}"):
        value = np.asarray(data[key], np.float64)
    if value.ndim != len(shape) or any(want not in (-1, have) for have, want in zip(value.shape, shape, strict=True)):
        expected_shape = ", ".join("frames" if size == -1 else str(size) for size in shape)
        actual = " ".join(repr(data[key]).split())  # numpy prints matrices on several lines
        raise UserError(
            f"{path}: {key} is {actual:.40} of shape {value.shape}, ({expected_shape}) expected; download it again"
        )
    return value


def _record(sequence: _Sequence, person: int, frame: int) -> Record:
    arrays, camera = sequence.people[person], sequence.cameras[frame]
    points, confidence = arrays["poses2d"][frame, :2].T, arrays["poses2d"][frame, 2]
    center, side = square_of_points(points, ~(confidence <= 0))
    joints, translation = None, None
    if "jointPositions" in arrays:
        joints = arrays["jointPositions"][frame].reshape(24, 3) @ camera[:3, :3].T + camera[:3, 3]
    if "root" in arrays:
        translation = rotate_translation(arrays["trans"][frame], arrays["root"], camera)
    return Record(
        name=f"3dpw/{sequence.name}/{frame:05d}/{person}",
        center=center,
        side=float(side),
        source=f"{sequence.path}, person {person}, frame {frame}",
        image=sequence.images / f"image_{frame:05d}.jpg",
        group=sequence.name,
        gender=sequence.genders[person],
        pose=rotate_root(arrays["poses"][frame].reshape(24, 3), camera[:3, :3]),
        betas=arrays["betas"],
        translation=translation,
        joints_3d=joints,
        joint_names=() if joints is None else SMPL24,
        keypoints_2d=points,
        keypoints_2d_confidence=confidence.clip(0, 1),
        keypoint_names=OPENPOSE18,
        intrinsics=sequence.intrinsics,
    )
