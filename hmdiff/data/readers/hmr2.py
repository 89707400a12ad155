"""ProHMR's and HMR 2.0's npz (Kolotouros et al., ICCV 2021; Goel et al., ICCV 2023), training and evaluation files.

One row a person: imgname, center (2,), scale (pixels, or width and height), body_pose (72,) including the root,
has_body_pose, betas (10,), has_betas, body_keypoints_2d (25, 3), extra_keypoints_2d (19, 3), body_keypoints_3d (25, 4),
extra_keypoints_3d (19, 4), gender; all but the first three may be missing. The 19 extra keypoints are the first of
SPIN24. `scale` is the side itself: their loaders divide it by 200. As in their code, 3D limb joints of the OpenPose set
are not used. HMR 2.0's widening of the box to its input's aspect ratio is not applied. The files contain no camera.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hmdiff.body.skeletons import OPENPOSE25, SPIN24
from hmdiff.data.readers.labels import RowReader, merge_keypoints, parse_gender
from hmdiff.data.readers.tables import Table, label_files, stem_name
from hmdiff.data.record import Record

EXTRA19 = SPIN24[:19]
_UNUSED = slice(1, 15)  # OPENPOSE25's neck to left ankle: SMPL's joints under OpenPose names


def read(source: Path, split: str) -> RowReader:
    """Records of one label file, named by the split."""
    (path,) = label_files(source, split)
    table = Table(path)
    center, scale = table.column("center", (2,)), table.column("scale", (), (2,))
    pose, betas = table.optional("body_pose", (72,)), table.optional("betas", (10,))
    has_pose, has_betas = table.optional("has_body_pose", ()), table.optional("has_betas", ())
    points_2d = _sets(table, "2d", 3)
    points_3d = _sets(table, "3d", 4)
    for points, names in points_3d:
        if names == OPENPOSE25:
            points[:, _UNUSED, -1] = 0
    gender = table.optional("gender")
    images = table.image_folder((source, source / "images", source / path.stem))
    name = path.stem

    def make(row: int) -> Record:
        fitted = pose is not None and betas is not None
        fitted &= all(has is None or has[row] > 0 for has in (has_pose, has_betas))
        keypoints, confidence, names = _merged(points_2d, row)
        joints, valid, joint_names = _merged(points_3d, row)
        return Record(
            name=f"{name}/{stem_name(table.names[row])}/{row}",
            center=center[row],
            side=float(np.max(scale[row])),
            source=table.location(row),
            image=images / table.names[row],
            group=str(Path(table.names[row]).parent),
            gender="neutral" if gender is None else parse_gender(gender[row]),
            pose=pose[row].reshape(24, 3) if fitted and pose is not None else None,
            betas=betas[row] if fitted and betas is not None else None,
            joints_3d=joints,
            joints_3d_valid=None if valid is None else valid > 0,
            joint_names=joint_names,
            keypoints_2d=keypoints,
            keypoints_2d_confidence=confidence,
            keypoint_names=names,
        )

    return RowReader(name, range(len(table)), make, [f"{path}, images in {images}"], location=table.location)


def _sets(table: Table, dimensions: str, size: int) -> list[tuple[np.ndarray, tuple[str, ...]]]:
    """The data set's own points first, then OpenPose's."""
    candidates = (
        (table.optional(f"extra_keypoints_{dimensions}", (19, size)), EXTRA19),
        (table.optional(f"body_keypoints_{dimensions}", (25, size)), OPENPOSE25),
    )
    return [(points, names) for points, names in candidates if points is not None]


def _merged(
    sets: list[tuple[np.ndarray, tuple[str, ...]]], row: int
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    return merge_keypoints(*((points[row], names) for points, names in sets)) if sets else (None, None, ())
