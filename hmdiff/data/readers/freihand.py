"""FreiHAND (Zimmermann et al., ICCV 2019): right hands with MANO meshes, 224 x 224 pixels, one camera per image.

SOURCE/{training,evaluation}_{K,xyz}.json, training_mano.json, training_verts.json (version 2), evaluation_verts.json
(and evaluation_xyz.json: FreiHAND_pub_v2_eval.zip), SOURCE/{training,evaluation}/rgb/00000000.jpg. The training images
come in four background versions, one after the other: image = row + version * rows, with the same labels.

xyz (21, 3) and verts (778, 3) are metres in the camera frame; mano is 48 pose relative to MANO's mean pose, 10 betas, 2
uv root, 1 scale. The translation is the labelled wrist minus MANO's wrist; uv and scale are not needed. Training hands
are read as poses with a MANO file (HMDIFF_BODY_DIR), otherwise as the vertices of training_verts.json (1.5 GB of text).
Evaluation hands are read as vertices. The crop is the whole image (our choice): the evaluation images have no box, and
a box from their labels would reveal the hand's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.body import Body, load_body
from hmdiff.body.skeletons import HAND21
from hmdiff.data.readers.labels import RowReader, load_body_if_installed, rest_pose_root
from hmdiff.data.readers.tables import json_rows
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.files.images import open_image

VERSIONS = ("gs", "hom", "sample", "auto")  # green screen, homogenised, two automatic colourings
_SHAPES = {"K": (3, 3), "xyz": (21, 3), "mano": (61,), "verts": (778, 3)}


def read(source: Path, split: str) -> RowReader:
    """Records of the training images, version after version, or of the evaluation images."""
    hand = None
    if split == "training":
        # Without the vertices file, MANO is required, so its absence is an error.
        with_vertices = (source / "training_verts.json").is_file()
        hand = load_body_if_installed("mano", "right") if with_vertices else load_body("mano", "right")
    columns = {key: _column(source, split, key) for key in ("K", "xyz", "verts" if hand is None else "mano")}
    rows = len(columns["K"])
    for key, column in columns.items():
        if len(column) != rows:
            raise UserError(
                f"{source / f'{split}_{key}.json'}: {len(column)} rows, {split}_K.json has {rows}; download it again"
            )
    images = source / split / "rgb"
    versions = [v for v in range(len(VERSIONS) if split == "training" else 1) if _image(images, v * rows).is_file()]
    if rows and 0 not in versions:
        raise UserError(f"{_image(images, 0)}: missing; unpack FreiHAND's images in {source}")
    notes = [f"{split}: {rows} hands, versions of the image: {', '.join(VERSIONS[v] for v in versions)}"]
    if split == "training" and hand is None:
        notes.append("no MANO file was found: the vertices are those of training_verts.json, without poses")
    index = [(version, row) for version in versions for row in range(rows)]
    side = _image_side(_image(images, 0)) if rows else 0

    def make(item: tuple[int, int]) -> Record:
        version, row = item
        number = row + version * rows
        labels: dict[str, Any] = {key: column[row] for key, column in columns.items()}
        intrinsics, joints = labels["K"], labels["xyz"]
        projected = joints @ intrinsics.T
        pose, betas, translation = (None, None, None) if hand is None else _pose(hand, labels["mano"], joints)
        return Record(
            name=f"freihand/{split}/{number:08d}",
            center=np.array([side / 2, side / 2]),
            side=float(side),
            source=f"{source / split}_xyz.json, row {row}",
            image=_image(images, number),
            group=f"{split}_{VERSIONS[version]}" if split == "training" else split,
            body="mano",
            hand="right",
            pose=pose,
            betas=betas,
            translation=translation,
            vertices=labels.get("verts"),
            joints_3d=joints,
            joint_names=HAND21,
            keypoints_2d=projected[:, :2] / projected[:, 2:],
            keypoint_names=HAND21,
            intrinsics=intrinsics,
        )

    location = f"{source / split}_xyz.json"
    return RowReader("freihand", index, make, notes, location=lambda item: f"{location}, row {item[1]}")


def _column(source: Path, split: str, key: str) -> np.ndarray:
    path = source / f"{split}_{key}.json"
    if not path.is_file():
        archive = "FreiHAND_pub_v2_eval.zip" if split == "evaluation" and key != "K" else "FreiHAND_pub_v2.zip"
        raise UserError(f"{path}: missing; it is in {archive} of FreiHAND's page: unpack it in {source}")
    # float32, the precision of the data set: the meshes of 32,560 hands then take 300 MB.
    rows = [row.astype(np.float32 if key == "verts" else np.float64) for row in json_rows(path, _SHAPES[key])]
    return np.stack(rows) if rows else np.zeros((0, *_SHAPES[key]))


def _pose(hand: Body, mano: np.ndarray, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    betas = mano[48:58]
    return mano[:48].reshape(16, 3), betas, joints[0] - rest_pose_root(hand, betas)


def _image(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.jpg"


def _image_side(path: Path) -> int:
    with open_image(path) as image:
        return max(image.size)
