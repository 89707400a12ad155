"""BEDLAM (Black et al., CVPR 2023): rendered people with SMPL-X and known cameras; the published npz, one a scene.

One row a person: imgname, center (2,), scale (side / 200), pose_cam (165,), shape (11,), trans_cam, cam_ext (4, 4),
cam_int (3, 3), gtkps (127, 3), gender. The body's translation is trans_cam + cam_ext[:3, 3]; pose_cam's root is already
in the camera frame. Either SOURCE/training_labels/all_npz_12_training/SCENE.npz with SOURCE/training_images/SCENE/png/
(the layout of BEDLAM's training script), or SOURCE/processed_labels/ with SOURCE/images/SCENE/png/ (that of its
processing script; also SMPL, 72 of pose).

Two pitfalls. Shapes of 11 numbers are the neutral body's, whatever the person's `gender`. Labels of close-up scenes
refer to the upright image, but the stored image is turned by 90 degrees: here the labels are turned to match it.
Turning the translation needs the body file (HMDIFF_BODY_DIR), since a body turns about its root joint; without it the
translation is omitted.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.body import Body
from hmdiff.body.skeletons import SMPL24, SMPLX76
from hmdiff.data.readers.boxes import PIXELS_PER_SCALE
from hmdiff.data.readers.labels import (
    RowReader,
    load_body_if_installed,
    parse_gender,
    rest_pose_root,
    rotate_root,
    rotate_translation,
)
from hmdiff.data.readers.tables import Table, stem_name
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.files.images import open_image

_LABELS = ("training_labels/all_npz_12_training", "processed_labels", ".")
_UPRIGHT_TO_STORED = np.array(
    [[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0]]
)  # upright to stored camera frame: x' = y, y' = -x
# gtkps of SMPL-X start with SMPLX76; the smplx package's SMPL has 24 joints, then the same face and limb points.
_POINTS = {55: SMPLX76, 24: (*SMPL24, *SMPLX76[55:])}


def read(source: Path, split: str) -> RowReader:
    """Records of all scenes."""
    folders = [source / folder for folder in _LABELS if any((source / folder).glob("*.npz"))]
    if not folders:
        raise UserError(f"{source}: no SCENE.npz in {', '.join(_LABELS[:2])}, nor in the folder itself; put them there")
    scenes = [Table(path) for path in sorted(folders[0].glob("*.npz"))]
    rows = [(number, row) for number, table in enumerate(scenes) for row in range(len(table))]

    @functools.lru_cache(maxsize=1)  # the labels of all scenes at once are gigabytes
    def scene(number: int) -> _Scene:
        return _Scene(scenes[number], source)

    notes = [f"{len(scenes)} scenes of {folders[0]}"]
    return RowReader(
        "bedlam",
        rows,
        lambda row: scene(row[0]).record(row[1]),
        notes,
        location=lambda row: f"{scenes[row[0]].path}, row {row[1]}",
    )


class _Scene:
    def __init__(self, table: Table, source: Path) -> None:
        self.table, path = table, table.path
        self.columns: dict[str, np.ndarray] = {
            "center": table.column("center", (2,)),
            "scale": table.column("scale", ()),
            "pose": table.column("pose_cam", (55, 3), (24, 3)),
            "betas": table.column("shape"),
            "trans_cam": table.column("trans_cam", (3,)),
            "cam_ext": table.column("cam_ext", (4, 4)),
            "cam_int": table.column("cam_int", (3, 3)),
            "gtkps": table.column("gtkps"),
            "gender": table.column("gender"),
        }
        self.joints = self.columns["pose"].shape[1]
        points = self.columns["gtkps"]
        if points.ndim != 3 or points.shape[2] not in (2, 3) or points.shape[1] < 22:
            raise UserError(f"{path}: gtkps has rows of shape {points.shape[1:]}, expected (127, 3)")
        self.names = _POINTS[self.joints][: points.shape[1]]
        self.scene = path.stem
        folders = (f"training_images/{self.scene}/png", f"images/{self.scene}/png", f"{self.scene}/png")
        self.images = table.image_folder([*(source / folder for folder in folders), source / "training_images/images"])
        self._bodies: dict[str, Body | None] = {}  # by gender; only turned scenes need them
        self.rotated = bool(len(table)) and self._is_rotated()

    def _is_rotated(self) -> bool:
        """Whether the stored image is turned by 90 degrees against its labels, judged by its width and height."""
        path = self.images / self.table.names[0]
        with open_image(path) as image:
            width, height = image.size
        upright = 2 * self.columns["cam_int"][0, :2, 2]  # principal points are at the centres
        return width != height and np.allclose(upright, (height, width), atol=2)

    def record(self, row: int) -> Record:
        labels: dict[str, Any] = {key: column[row] for key, column in self.columns.items()}
        kind = "smplx" if self.joints == 55 else "smpl"
        gender = "neutral" if len(labels["betas"]) > 10 else parse_gender(labels["gender"])
        pose, intrinsics, center = labels["pose"], labels["cam_int"], labels["center"]
        points = labels["gtkps"][: len(self.names), :2]
        translation = labels["trans_cam"] + labels["cam_ext"][:3, 3]
        if self.rotated:
            width = 2 * intrinsics[0, 2]  # of the upright image: the stored image's height
            if gender not in self._bodies:
                self._bodies[gender] = load_body_if_installed(kind, gender)
            body = self._bodies[gender]
            pose = rotate_root(pose, _UPRIGHT_TO_STORED[:, :3])
            root = None if body is None else rest_pose_root(body, labels["betas"])
            translation = None if root is None else rotate_translation(translation, root, _UPRIGHT_TO_STORED)
            points, center = _rotate_to_stored(points, width), _rotate_to_stored(center, width)
            (fx, cx), (fy, cy) = intrinsics[0, [0, 2]], intrinsics[1, [1, 2]]
            intrinsics = np.array([[fy, 0, cy], [0, fx, width - cx], [0, 0, 1]])
        return Record(
            name=f"bedlam/{self.scene}/{stem_name(self.table.names[row])}/{row}",
            center=center,
            side=float(labels["scale"]) * PIXELS_PER_SCALE,
            source=self.table.location(row),
            image=self.images / self.table.names[row],
            group=f"{self.scene}/{Path(self.table.names[row]).parent}",
            gender=gender,
            body=kind,
            pose=pose,
            betas=labels["betas"],
            translation=translation,
            keypoints_2d=points,
            keypoint_names=self.names,
            intrinsics=intrinsics,
        )


def _rotate_to_stored(points: np.ndarray, width: float) -> np.ndarray:  # (..., 2)
    """Map points of the upright image to the stored one, which a clockwise quarter turn makes upright."""
    return np.stack([points[..., 1], width - points[..., 0]], -1)
