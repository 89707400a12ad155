"""Human3.6M as JSON: the layout of 3DMPPE, I2L-MeshNet and Pose2Mesh (Moon and Lee, ECCV 2020; Choi et al., ECCV 2020).

SOURCE/annotations/Human36M_subjectN_data.json (COCO-like: images with subject, action_idx, subaction_idx, cam_idx,
frame_idx; boxes x, y, width, height), _camera.json (cameras 1 to 4: R, t, f, c; millimetres), _joint_3d.json (action,
subaction, frame: 17 joints, world frame, millimetres) and optionally _smpl_param.json or _SMPL_NeuralAnnot.json (pose,
shape and trans, world frame), images in SOURCE/images/s_09_act_02_subact_01_ca_04/. No lens distortion.

Copies differ in t: x = R X + t or x = R (X - t). The variant that puts the person in front of the camera and closest to
the box is used. The crop is computed from the joints, times 1.2, like mmpose's: copies also differ in box padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.skeletons import H36M17
from hmdiff.data.readers.boxes import square_of_points
from hmdiff.data.readers.human36m_frames import EVERY, P2_CAMERA, TEST_SUBJECTS, TRAIN_SUBJECTS
from hmdiff.data.readers.labels import (
    RowReader,
    load_body_if_installed,
    naming,
    rest_pose_root,
    rotate_root,
    rotate_translation,
)
from hmdiff.data.readers.tables import read_json, stem_name
from hmdiff.data.record import Record
from hmdiff.errors import UserError

CAMERAS = ("54138969", "55011271", "58860488", "60457274")  # cam_idx 1 to 4
_MILLIMETRES = 1000.0
_SMPL_FILES = ("smpl_param", "SMPL_NeuralAnnot")


def read_annotations(source: Path, split: str) -> RowReader:
    """Records of p2, p1 or train."""
    subjects = [_Subject(source, n) for n in (TRAIN_SUBJECTS if split == "train" else TEST_SUBJECTS)]
    rows = []
    for subject in subjects:
        for row, (image, _) in enumerate(subject.rows):
            with naming(f"{subject.path}, annotation {row}"):
                camera = CAMERAS[image["cam_idx"] - 1]
                if split == "train" or (image["frame_idx"] % EVERY == 0 and (split == "p1" or camera == P2_CAMERA)):
                    rows.append((subject, row))
    notes = [f"annotations of subjects {', '.join(str(s.number) for s in subjects)}: {len(rows)} rows in {split}"]
    fits = [str(subject.number) for subject in subjects if subject.smpl is not None]
    notes.append(f"SMPL of subjects {', '.join(fits)}" if fits else "without SMPL: neither smpl_param nor NeuralAnnot")
    return RowReader(
        "human36m",
        rows,
        lambda item: item[0].record(item[1]),
        notes,
        location=lambda item: f"{item[0].path}, annotation {item[1]}",
    )


class _Subject:
    def __init__(self, source: Path, number: int) -> None:
        self.number, self.images = number, source / "images"
        self.start = source / "annotations" / f"Human36M_subject{number}"
        self.path = Path(f"{self.start}_data.json")
        data = read_json(self.path)
        try:
            images = {image["id"]: image for image in data["images"]}
            self.rows = [(images[item["image_id"]], item) for item in data["annotations"]]
            for image, _ in self.rows[:1]:
                {key: image[key] for key in ("file_name", "action_idx", "subaction_idx", "cam_idx", "frame_idx")}
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path}: not in the layout of I2L-MeshNet ({error!r} is missing)") from None
        self.cameras = read_json(Path(f"{self.start}_camera.json"))
        self.joints = read_json(Path(f"{self.start}_joint_3d.json"))
        fits = [path for name in _SMPL_FILES if (path := Path(f"{self.start}_{name}.json")).is_file()]
        self.fits = fits[0] if fits else None
        self.smpl = read_json(fits[0]) if fits else None
        self._smpl = None if self.smpl is None else load_body_if_installed("smpl", "neutral")
        self._inverse: dict[int, bool] = {}  # by camera: whether t is the camera's position

    def record(self, row: int) -> Record:
        image, item = self.rows[row]
        source = f"{self.path}, annotation {row}"
        x, y, width, height = item["bbox"]
        frame_key = (str(image["action_idx"]), str(image["subaction_idx"]), str(image["frame_idx"]))
        action, subaction, frame = frame_key
        location = f"{self.start}_joint_3d.json, action {action}, subaction {subaction}, frame {frame} (of {source})"
        with naming(location):
            world = np.array(self.joints[action][subaction][frame], np.float64).reshape(17, 3) / _MILLIMETRES
            if not np.isfinite(world).all():
                raise ValueError("not finite")
        camera = {}
        for key, shape in (("R", (3, 3)), ("t", (3,)), ("f", (2,)), ("c", (2,))):
            with naming(f"{self.start}_camera.json, camera {image['cam_idx']}, {key} (of {source})"):
                camera[key] = np.array(self.cameras[str(image["cam_idx"])][key], np.float64).reshape(shape)
                if not np.isfinite(camera[key]).all():
                    raise ValueError("not finite")
        (fx, fy), (cx, cy) = camera["f"], camera["c"]
        intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        extrinsics = self._extrinsics(image["cam_idx"], camera, world, intrinsics, (x, y, width, height), source)
        joints = world @ extrinsics[:, :3].T + extrinsics[:, 3]
        pixels = joints @ intrinsics.T
        projected = pixels[:, :2] / pixels[:, 2:]
        center, side = square_of_points(projected, np.ones(17, bool))
        return Record(
            name=f"human36m/{stem_name(Path(image['file_name']).name)}",
            center=center,
            side=side,
            source=source,
            image=self.images / str(image["file_name"]).replace("\\", "/"),
            group=f"S{self.number}_{frame_key[0]}_{frame_key[1]}",
            joints_3d=joints,
            joint_names=H36M17,
            keypoints_2d=projected,
            keypoint_names=H36M17,
            intrinsics=intrinsics,
            **self._body(frame_key, extrinsics),
        )

    def _extrinsics(
        self,
        number: int,
        camera: dict[str, np.ndarray],
        world: np.ndarray,
        intrinsics: np.ndarray,
        box: tuple[float, float, float, float],
        source: str,
    ) -> np.ndarray:  # (3, 4)
        rotation, t = camera["R"], camera["t"] / _MILLIMETRES
        candidates = [np.concatenate([rotation, shift[:, None]], 1) for shift in (t, -rotation @ t)]
        if number not in self._inverse:
            x, y, width, height = box
            box_corners, errors = np.array([[x, y], [x + width, y + height]]), []
            for extrinsics in candidates:
                pixels = (world @ extrinsics[:, :3].T + extrinsics[:, 3]) @ intrinsics.T
                projected = pixels[:, :2] / pixels[:, 2:]
                error = np.abs(np.stack([projected.min(0), projected.max(0)]) - box_corners).max()
                errors.append(error if (pixels[:, 2] > 0.1).all() else np.inf)
            if not min(errors) <= max(width, height):
                raise UserError(
                    f"{source}: camera {number} does not see the joints in their box; {self.start}_camera.json, "
                    f"{self.start}_joint_3d.json and this file are not one set"
                )
            self._inverse[number] = bool(errors[1] < errors[0])
        return candidates[self._inverse[number]]

    def _body(self, frame_key: tuple[str, str, str], extrinsics: np.ndarray) -> dict[str, Any]:
        """Fitted pose and shape, if present; the translation needs SMPL's file, for the root joint of the rest pose."""
        if self.smpl is None:
            return {}
        with naming(f"{self.fits}, action {frame_key[0]}, subaction {frame_key[1]}, frame {frame_key[2]}"):
            try:
                fit = self.smpl[frame_key[0]][frame_key[1]][frame_key[2]]
            except KeyError:
                return {}
            return self._labels(fit, extrinsics)

    def _labels(self, fit: dict[str, Any], extrinsics: np.ndarray) -> dict[str, Any]:
        pose, betas = np.array(fit["pose"], np.float64).reshape(-1, 3), np.array(fit["shape"], np.float64).reshape(-1)
        if not (np.isfinite(pose).all() and np.isfinite(betas).all()):
            raise ValueError("pose or shape is not finite")
        labels: dict[str, Any] = {"pose": rotate_root(pose[:24], extrinsics[:, :3]), "betas": betas[:10]}
        if "trans" in fit:
            trans = np.array(fit["trans"], np.float64).reshape(3)
            if self._smpl is not None:
                labels["translation"] = rotate_translation(trans, rest_pose_root(self._smpl, betas), extrinsics)
        return labels
