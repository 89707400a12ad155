"""SPIN's npz (Kolotouros et al., ICCV 2019): boxes, 2D and 3D joints and SMPL of COCO, MPII, LSP, MPI-INF-3DHP, 3DPW.

One row a person: imgname, center (2,), scale (side / 200), part (24, 3), openpose (25, 3), S (24, 4), pose (72,), shape
(10,), has_smpl, gender; all but the first three may be missing. S is relative to the pelvis, in the camera's
orientation. SOURCE holds the npz, or dataset_extras/*.npz, and the images, or images/. The files contain no camera.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hmdiff.body.skeletons import OPENPOSE25, SPIN24
from hmdiff.data.readers.boxes import PIXELS_PER_SCALE
from hmdiff.data.readers.labels import RowReader, merge_keypoints, parse_gender
from hmdiff.data.readers.tables import Table, label_files, stem_name
from hmdiff.data.record import Record


class SpinTable:
    """The validated columns of one file."""

    def __init__(self, path: Path) -> None:
        self.table = table = Table(path)
        self.center, self.scale = table.column("center", (2,)), table.column("scale", ())
        self.part, self.openpose = table.optional("part", (24, 3)), table.optional("openpose", (25, 3))
        self.joints = table.optional("S", (24, 4))
        self.pose, self.shape = table.optional("pose", (72,)), table.optional("shape", (10,))
        self.has_smpl, self.gender = table.optional("has_smpl", ()), table.optional("gender")

    def __len__(self) -> int:
        return len(self.table)

    def body(self, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Pose (24, 3) and betas (10,), or (None, None)."""
        fitted = self.has_smpl is None or self.has_smpl[row] > 0
        if self.pose is None or self.shape is None or not fitted:
            return None, None
        return self.pose[row].reshape(24, 3), self.shape[row]

    def person(self, row: int) -> str:
        return "neutral" if self.gender is None else parse_gender(self.gender[row])

    def side(self, row: int) -> float:
        return float(self.scale[row]) * PIXELS_PER_SCALE


def read(source: Path, split: str) -> RowReader:
    """Records of one label file, named by the split."""
    (path,) = label_files(source, split)
    data = SpinTable(path)
    images = data.table.image_folder((source, source / "images", source / path.stem))
    name = path.stem

    def make(row: int) -> Record:
        pose, betas = data.body(row)
        sets = [
            (points[row], names)
            for points, names in ((data.part, SPIN24), (data.openpose, OPENPOSE25))
            if points is not None
        ]
        points, confidence, names = merge_keypoints(*sets) if sets else (None, None, ())
        joints = None if data.joints is None else data.joints[row]
        return Record(
            name=f"{name}/{stem_name(data.table.names[row])}/{row}",
            center=data.center[row],
            side=data.side(row),
            source=data.table.location(row),
            image=images / data.table.names[row],
            group=str(Path(data.table.names[row]).parent),
            gender=data.person(row),
            pose=pose,
            betas=betas,
            joints_3d=None if joints is None else joints[:, :3],
            joints_3d_valid=None if joints is None else joints[:, 3] > 0,
            joint_names=() if joints is None else SPIN24,
            keypoints_2d=points,
            keypoints_2d_confidence=confidence,
            keypoint_names=names,
        )

    return RowReader(name, range(len(data)), make, [f"{path}, images in {images}"], location=data.table.location)
