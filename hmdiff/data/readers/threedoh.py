"""3DOH50K (Zhang et al., CVPR 2020): people behind objects, with SMPL (neutral) and a camera each.

SOURCE/{train,test}set/annots.json (or {train,test}/annots.json), keyed by number '00000': img_path, bbox ((x0, y0),
(x1, y1)), pose (1, 72), betas (1, 10), trans (1, 3), scale (1,), extri (4, 4), intri (3, 3), smpl_joints_2d (24, 2),
smpl_joints_3d (24, 3), lsp_joints_2d (14, 2), lsp_joints_3d (14, 3).

Lengths are not in metres: the body is `scale` times SMPL's (about 7). All lengths are divided by `scale`, which leaves
the projection unchanged. Public readers disagree on whether smpl_joints_3d are in the camera or the world frame; the 2D
joints decide. The translation is given only if the implied rest-pose root joint is close to SMPL's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.skeletons import SMPL24
from hmdiff.data.readers.boxes import square_of_box
from hmdiff.data.readers.labels import RowReader, rotate_root
from hmdiff.data.readers.tables import read_json, stem_name
from hmdiff.data.record import Record
from hmdiff.errors import UserError

_SHAPES = {
    "bbox": (2, 2),
    "pose": (24, 3),
    "betas": (10,),
    "trans": (3,),
    "scale": (),
    "extri": (4, 4),
    "intri": (3, 3),
    "smpl_joints_2d": (24, 2),
    "smpl_joints_3d": (24, 3),
}
_AGREEMENT = 5.0  # pixels: maximum median reprojection error
_ROOT, _REACH = np.array([0.0, -0.23, 0.03]), 0.4  # metres: SMPL's rest-pose root, about, and the allowed distance


def read(source: Path, split: str) -> RowReader:
    """Records of the test or the training set."""
    folders = [source / f"{split}set", source / split]
    folder = next((folder for folder in folders if (folder / "annots.json").is_file()), folders[0])
    path = folder / "annots.json"
    people = read_json(path)
    if not isinstance(people, dict):
        raise UserError(f"{path}: a {type(people).__name__}, where entries by number were expected; download it again")
    rows = list(people.items())
    return RowReader(
        "3doh",
        rows,
        lambda row: _record(path, folder, *row),
        [f"{path}: {len(rows)} entries"],
        location=lambda row: f"{path}, entry {row[0]}",
    )


def _record(path: Path, folder: Path, key: str, entry: dict[str, Any]) -> Record:
    source = f"{path}, entry {key}"
    try:
        labels = {name: np.array(entry[name], np.float64).reshape(shape) for name, shape in _SHAPES.items()}
        image = str(entry["img_path"]).replace("\\", "/")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{source}: damaged or not 3DOH50K's ({error!r}); download it again") from None
    scale, camera, intrinsics = float(labels["scale"]), labels["extri"], labels["intri"]
    if not scale > 0:
        raise UserError(f"{source}: scale {scale}, more than 0 was expected")
    raw_joints, keypoints = labels["smpl_joints_3d"], labels["smpl_joints_2d"]
    joints = min(
        (raw_joints, raw_joints @ camera[:3, :3].T + camera[:3, 3]),
        key=lambda points: _reprojection_error(points, intrinsics, keypoints),
    )
    if (distance := _reprojection_error(joints, intrinsics, keypoints)) > _AGREEMENT and all(
        np.isfinite(v).all() for v in labels.values()
    ):
        raise UserError(
            f"{source}: its 3D joints are {distance:.1f} pixels from its 2D ones, within {_AGREEMENT:g} was expected"
        )
    center, side = square_of_box(*labels["bbox"].ravel())
    return Record(
        name=f"3doh/{stem_name(image)}/{key}",
        center=center,
        side=side,
        source=source,
        image=folder / image,
        group=folder.name,
        pose=rotate_root(labels["pose"], camera[:3, :3]),
        betas=labels["betas"],
        translation=_translation(joints[0], scale, camera, labels["trans"]),
        joints_3d=joints / scale,
        joint_names=SMPL24,
        keypoints_2d=keypoints,
        keypoint_names=SMPL24,
        intrinsics=intrinsics,
    )


def _reprojection_error(points: np.ndarray, intrinsics: np.ndarray, pixels: np.ndarray) -> float:
    if not (points[:, 2] > 0).all():
        return float("inf")
    projected = points @ intrinsics.T
    return float(np.median(np.linalg.norm(projected[:, :2] / projected[:, 2:] - pixels, axis=1)))


def _translation(pelvis: np.ndarray, scale: float, camera: np.ndarray, trans: np.ndarray) -> np.ndarray | None:
    """The body model's translation. The pelvis in the world is scale root + trans, or scale (root + trans)."""
    world = camera[:3, :3].T @ (pelvis - camera[:3, 3])
    roots = ((world - trans) / scale, world / scale - trans)
    root = min(roots, key=lambda location: float(np.linalg.norm(location - _ROOT)))
    return pelvis / scale - root if np.linalg.norm(root - _ROOT) < _REACH else None
