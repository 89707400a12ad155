"""Human3.6M (Ionescu et al., PAMI 2014) in three layouts common in the field; 17 joints from motion capture.

SPIN: SOURCE/h36m_valid_protocol{1,2}.npz, h36m_train*.npz (or in dataset_extras/),
images/S9_Directions_1.60457274_000001.jpg; S (24, 4) relative to the pelvis, no camera. mmpose:
SOURCE/annotation_body3d/cameras.pkl and fps10/ or fps50/h36m_*.npz with part and S (17, 3 and 4),
images/S9/S9_Directions_1.60457274/....jpg, cameras with lens distortion. The JSON of I2L-MeshNet and Pose2Mesh: see
`hmdiff.data.readers.human36m_json`.

Splits: p2 = S9 and S11, camera 60457274, every fifth frame; p1 = all cameras; train = S1, S5, S6, S7, S8, all rows. The
image name determines a row's split; its frames are counted from 1. The protocols' 14 joints are selected by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.skeletons import H36M17, SPIN24, SPIN24_H36M17, joint_indices
from hmdiff.data.readers.boxes import PIXELS_PER_SCALE
from hmdiff.data.readers.human36m_frames import Frame, frame_of, in_split
from hmdiff.data.readers.human36m_json import read_annotations
from hmdiff.data.readers.labels import RowReader, naming
from hmdiff.data.readers.lens import Lens, fit_pinhole
from hmdiff.data.readers.spin import SpinTable
from hmdiff.data.readers.tables import Table, stem_name
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.files.unpickling import load_pickle

_SPIN24_ROWS = joint_indices(SPIN24_H36M17, SPIN24)
_LENS = {"R": (3, 3), "T": (3,), "f": (2,), "c": (2,), "k": (3,), "p": (2,)}  # of one camera in cameras.pkl
_AGREEMENT = 3.0  # pixels: maximum reprojection error at which 3D joints and a camera are taken to belong together


def read(source: Path, split: str) -> RowReader:
    """Records of p2, p1 or train, from whichever layout is found."""
    if list(source.glob("annotations/Human36M_subject*_data.json")):
        return read_annotations(source, split)
    stem = "train" if split == "train" else "test"
    if paths := sorted(source.glob(f"annotation_body3d/fps*/h36m_{stem}.npz")):
        return _mmpose(source, paths[0], split)
    own, all_cameras = f"h36m_valid_protocol{split[1]}.npz", "h36m_valid_protocol1.npz"
    names = ("h36m_train*.npz",) if split == "train" else (own, all_cameras)
    for folder in (source, source / "dataset_extras"):
        for name in names:
            if paths := sorted(folder.glob(name)):
                return _spin(source, paths[0], split)
    raise UserError(
        f"{source}: none of Human3.6M's layouts for {split}: neither {names[0]}, nor "
        f"annotation_body3d/fps10/h36m_{stem}.npz, nor annotations/Human36M_subject9_data.json"
    )


def _frames(table: Table, split: str) -> list[tuple[int, Frame]]:
    """Rows of the split with the frame parsed from their image names."""
    chosen = []
    for row, name in enumerate(table.names):
        if (frame := frame_of(name)) is None:
            raise UserError(
                f"{table.location(row)}: image {name!r}, expected a name like S9_Directions_1.60457274_000001.jpg"
            )
        if in_split(split, frame):
            chosen.append((row, frame))
    return chosen


def _common(table: Table, row: int, frame: Frame, images: Path) -> dict[str, Any]:
    return {
        "name": f"human36m/{stem_name(Path(table.names[row]).name)}",
        "source": table.location(row),
        "image": images / table.names[row],
        "group": f"S{frame.subject}_{frame.action}",
        "joint_names": H36M17,
    }


def _spin(source: Path, path: Path, split: str) -> RowReader:
    data = SpinTable(path)
    if data.joints is None:
        raise UserError(f"{path}: no array 'S', so no 3D joints; Human3.6M's label file of SPIN has it")
    joints, part = data.joints[:, _SPIN24_ROWS], None if data.part is None else data.part[:, _SPIN24_ROWS]
    images = data.table.image_folder((source, source / "images"))

    def make(item: tuple[int, Frame]) -> Record:
        row, frame = item
        pose, betas = data.body(row)
        return Record(
            **_common(data.table, row, frame, images),
            center=data.center[row],
            side=data.side(row),
            gender=data.person(row),
            pose=pose,
            betas=betas,
            joints_3d=joints[row, :, :3],
            joints_3d_valid=joints[row, :, 3] > 0,
            keypoints_2d=None if part is None else part[row, :, :2],
            keypoints_2d_confidence=None if part is None else part[row, :, 2].clip(0, 1),
            keypoint_names=() if part is None else H36M17,
        )

    rows = _frames(data.table, split)
    notes = [f"SPIN's {path}: {len(rows)} of its {len(data)} rows are in {split}; no camera, joints about the pelvis"]
    return RowReader("human36m", rows, make, notes, location=lambda item: data.table.location(item[0]))


def _mmpose(source: Path, path: Path, split: str) -> RowReader:
    table = Table(path)
    center, scale = table.column("center", (2,)), table.column("scale", ())
    part, joints = table.column("part", (17, 3)), table.column("S", (17, 4))
    lenses = _lenses(source / "annotation_body3d" / "cameras.pkl")
    images = table.image_folder((source / "images", source))
    rows = _frames(table, split)

    def make(item: tuple[int, Frame]) -> Record:
        row, frame = item
        key = (f"S{frame.subject}", frame.camera)
        if key not in lenses:
            raise UserError(f"{table.location(row)}: camera {frame.camera} of S{frame.subject} is not in cameras.pkl")
        lens, points = lenses[key], part[row, :, :2]
        # The converter's S is in the camera frame, in some copies in the world frame: the 2D joints decide.
        frames = (joints[row, :, :3], lens.to_camera(joints[row, :, :3]))
        errors = [lens.reprojection_error(joints_of_frame, points) for joints_of_frame in frames]
        best = int(np.argmin(errors))
        if np.isfinite(joints[row]).all() and np.isfinite(part[row]).all() and not errors[best] < _AGREEMENT:
            raise UserError(
                f"{table.location(row)}: its 3D joints are {errors[best]:.1f} pixels from its 2D ones by cameras.pkl, "
                f"within {_AGREEMENT:g} was expected; the two files are not of the same conversion"
            )
        return Record(
            **_common(table, row, frame, images),
            center=center[row],
            side=float(scale[row]) * PIXELS_PER_SCALE,
            joints_3d=frames[best],
            joints_3d_valid=joints[row, :, 3] > 0,
            keypoints_2d=points,
            keypoints_2d_confidence=part[row, :, 2].clip(0, 1),
            keypoint_names=H36M17,
            intrinsics=fit_pinhole(frames[best], points, lens),
        )

    notes = [f"mmpose's {path}: {len(rows)} of its {len(table)} rows are in {split}"]
    return RowReader("human36m", rows, make, notes, location=lambda item: table.location(item[0]))


def _lenses(path: Path) -> dict[tuple[str, str], Lens]:
    if not path.is_file():
        raise UserError(f"{path}: missing; mmpose's preprocess_h36m.py writes it beside the labels")
    cameras = load_pickle(path)
    if not isinstance(cameras, dict):
        raise UserError(f"{path}: not mmpose's cameras; R, T, f, c, k and p by (S9, 60457274) were expected")
    lenses = {}
    for key, values in cameras.items():
        if not (isinstance(key, tuple) and len(key) == 2 and isinstance(values, dict)):
            raise UserError(
                f"{path}, camera {key!r:.60}: not mmpose's cameras; R, T, f, c, k and p by (S9, 60457274) were expected"
            )
        parameters = {}
        for field, shape in _LENS.items():
            with naming(f"{path}, camera {key!r:.60}, {field}"):
                value = values.get(field, np.zeros(shape)) if field in ("k", "p") else values[field]
                parameters[field] = np.asarray(value, np.float64).reshape(shape)
                if not np.isfinite(parameters[field]).all():
                    raise ValueError("not finite")
        # Theirs multiplies row vectors, so its transpose maps world to camera.
        lenses[str(key[0]), str(key[1])] = Lens(
            parameters["R"].T, parameters["T"], parameters["f"], parameters["c"], parameters["k"], parameters["p"]
        )
    return lenses
