"""More tiny data sets in published layouts: SPIN's and HMR 2.0's npz, Human3.6M, BEDLAM, COCO, 3DOH50K.

See `tests.standins`; each maker returns the truth by record name.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import standins as s
from scipy.spatial.transform import Rotation

from hmdiff.body.body import Body
from hmdiff.body.skeletons import COCO17, HALPE26, OPENPOSE25, SMPL24, SPIN24, joint_indices

SPIN_TO_H36M = [14, 2, 1, 0, 3, 4, 5, 16, 12, 17, 18, 9, 10, 11, 8, 7, 6]  # rows of SPIN24 for H36M17
DISTORTION = {"k": np.array([[-0.2], [0.25], [-0.003]]), "p": np.array([[-0.0014], [-0.001]])}


def box(points: np.ndarray) -> tuple[np.ndarray, float]:
    low, high = points.min(0), points.max(0)
    return (low + high) / 2, 1.2 * float((high - low).max())


def with_confidence(points: np.ndarray, confidence: float = 1.0) -> np.ndarray:
    return np.concatenate([points, np.full((len(points), 1), confidence)], 1)


def in_openpose(person: s.Person) -> np.ndarray:  # (25, 3)
    return with_confidence(person.points[joint_indices(OPENPOSE25, HALPE26)], 0.7)


def in_spin24(person: s.Person) -> np.ndarray:  # (24, 3): the points of HALPE26 that it names
    part = np.zeros((24, 3))
    for row, name in enumerate(SPIN24):
        if name in HALPE26:
            part[row] = [*person.points[HALPE26.index(name)], 1]
    return part


def make_spin(folder: Path, rows: int = 3) -> dict[str, s.Truth]:
    """coco_2014_train.npz; the last row has no fit."""
    body, truths = s.small_free_body(), {}
    columns: dict[str, list[Any]] = {}
    for row in range(rows):
        person = s.make_person(body, row, extrinsics=np.eye(4))
        center, side = box(person.points)
        image = f"train2014/COCO_train2014_{row:012d}.jpg"
        s.write_image(folder / image)
        joints = np.zeros((24, 4))
        joints[SPIN_TO_H36M] = with_confidence(s.h36m_joints(person)[0] - person.joints[0])
        values = {
            "imgname": image,
            "center": center,
            "scale": side / 200,
            "part": in_spin24(person),
            "openpose": in_openpose(person),
            "S": joints,
            "pose": person.pose.ravel(),
            "shape": person.betas,
            "has_smpl": row + 1 < rows,
            "gender": "mf"[row % 2],
        }
        for key, value in values.items():
            columns.setdefault(key, []).append(value)
        truths[f"coco_2014_train/train2014/COCO_train2014_{row:012d}/{row}"] = person.truth
    np.savez(folder / "coco_2014_train.npz", **columns)
    return truths


def make_hmr2(folder: Path, rows: int = 3, objects: bool = False, tall: bool = False) -> dict[str, s.Truth]:
    """3dpw_test.npz; with object arrays, as some copies were saved; with boxes of width and height."""
    body, truths = s.small_free_body(), {}
    columns: dict[str, list[Any]] = {}
    for row in range(rows):
        person = s.make_person(body, row, extrinsics=np.eye(4))
        center, side = box(person.points)
        image = f"imageFiles/downtown_bus_00/image_{row:05d}.jpg"
        s.write_image(folder / image)
        joints = np.zeros((19, 4))
        joints[SPIN_TO_H36M] = with_confidence(s.h36m_joints(person)[0] - person.joints[0])
        values = {
            "imgname": image.encode(),
            "center": center,
            "scale": [side / 2, side] if tall else side,
            "body_pose": person.pose.ravel(),
            "has_body_pose": 1.0,
            "betas": person.betas,
            "has_betas": float(row > 0),
            "body_keypoints_2d": in_openpose(person),
            "extra_keypoints_2d": in_spin24(person)[:19],
            "body_keypoints_3d": np.full((25, 4), 9.0),
            "extra_keypoints_3d": joints,
            "gender": "f",
        }
        for key, value in values.items():
            columns.setdefault(key, []).append(value)
        truths[f"3dpw_test/imageFiles/downtown_bus_00/image_{row:05d}/{row}"] = person.truth
    arrays = {key: np.array(column) for key, column in columns.items()}
    if objects:
        arrays["imgname"] = arrays["imgname"].astype(object)
        arrays["extra_info"] = np.array([{"detection": row} for row in range(rows)])
    np.savez(folder / "3dpw_test.npz", **arrays)
    return truths


def make_human36m(folder: Path, layout: str, t_is_place: bool = False, world: bool = False) -> dict[str, s.Truth]:
    """Subjects 1, 9 and 11, two cameras, frames 0, 1, 5 and 10. The truth of every image by its record's name."""
    body, truths, rows = s.small_free_body(), {}, []
    cameras = {}
    for subject in (1, 9, 11):
        for number, camera in ((1, "54138969"), (4, "60457274")):
            key = (f"S{subject}", camera)
            extrinsics = np.eye(4)
            random = np.random.default_rng(subject * 10 + number)
            extrinsics[:3, :3], extrinsics[:3, 3] = Rotation.random(None, random).as_matrix(), random.normal(size=3)
            cameras[key] = extrinsics
            for frame in (0, 5, 10) if layout == "spin" else (0, 1, 5, 10):
                person = s.make_person(body, subject * 100 + frame, (0.3, 0.1, 4.5), extrinsics)
                rows.append((subject, number, camera, frame, person))
    write = {"spin": _spin_h36m, "mmpose": _mmpose_h36m, "json": _json_h36m}[layout]
    write(folder, rows, cameras, truths, world if layout == "mmpose" else t_is_place)
    return truths


def _spin_h36m(folder: Path, rows: list[Any], _: Any, truths: dict[str, s.Truth], __: bool) -> None:
    for stem, subjects, wanted in (
        ("h36m_valid_protocol1", (9, 11), None),
        ("h36m_valid_protocol2", (9, 11), 4),
        ("h36m_train", (1,), None),
    ):
        columns: dict[str, list[Any]] = {key: [] for key in ("imgname", "center", "scale", "S")}
        for subject, number, camera, frame, person in rows:
            if subject not in subjects or wanted not in (None, number):
                continue
            name = f"S{subject}_Directions_1.{camera}_{frame + 1:06d}"
            s.write_image(folder / "images" / f"{name}.jpg")
            joints = np.zeros((24, 4))
            seen = s.h36m_joints(person)[0]
            joints[SPIN_TO_H36M] = with_confidence(seen - seen[0])
            center, side = box(s.project(seen))
            for key, value in zip(columns, (f"images/{name}.jpg", center, side / 200, joints), strict=True):
                columns[key].append(value)
            truths[f"human36m/{name}"] = s.Truth(joints=seen - seen[0])
        np.savez(folder / f"{stem}.npz", **columns)


def _mmpose_h36m(
    folder: Path, rows: list[Any], cameras: dict[Any, Any], truths: dict[str, s.Truth], world: bool
) -> None:
    written = {}
    for key, extrinsics in cameras.items():
        rotation = extrinsics[:3, :3]
        written[key] = {
            "R": rotation.T,
            "T": -rotation.T @ extrinsics[:3, 3:],
            "c": s.INTRINSICS[:2, 2:],
            "f": s.INTRINSICS[[0, 1], [0, 1], None],
            **DISTORTION,
            "w": s.WIDTH,
            "h": s.HEIGHT,
            "name": "camera1",
            "id": key[1],
        }
    annotations = folder / "annotation_body3d"
    s.write_python2_pickle(annotations / "cameras.pkl", written)
    (annotations / "fps10").mkdir()
    k, p = DISTORTION["k"].ravel(), DISTORTION["p"].ravel()
    for stem, subjects in (("h36m_test", (9, 11)), ("h36m_train", (1,))):
        columns: dict[str, list[Any]] = {key: [] for key in ("imgname", "center", "scale", "part", "S")}
        for subject, _, camera, frame, person in rows:
            if subject in subjects:
                base = f"S{subject}_Directions_1.{camera}"
                image = f"S{subject}/{base}/{base}_{frame + 1:06d}.jpg"
                s.write_image(folder / "images" / image)
                seen, placed = s.h36m_joints(person)
                lens = np.array([*k[:2], *p, k[2]])
                pixels = cv2.projectPoints(seen, np.zeros(3), np.zeros(3), s.INTRINSICS, lens)[0]
                part, (center, side) = pixels[:, 0], box(pixels[:, 0])
                joints = with_confidence(placed if world else seen)
                for key, value in zip(columns, (image, center, side / 200, with_confidence(part), joints), strict=True):
                    columns[key].append(value)
                truths[f"human36m/{base}_{frame + 1:06d}"] = s.Truth(joints=seen)
        np.savez(annotations / "fps10" / f"{stem}.npz", **columns)


def _json_h36m(folder: Path, rows: list[Any], cameras: dict[Any, Any], truths: dict[str, s.Truth], place: bool) -> None:
    for subject in (1, 5, 6, 7, 8, 9, 11):
        images, annotations, joints, fits, lenses = [], [], {}, {}, {}
        for row, (who, number, camera, frame, person) in enumerate(rows):
            if who != subject:
                continue
            name = f"s_{subject:02d}_act_02_subact_01_ca_{number:02d}"
            image = f"{name}/{name}_{frame + 1:06d}.jpg"
            s.write_image(folder / "images" / image)
            seen, world = s.h36m_joints(person)
            (x, y), side = box(s.project(seen))
            images.append(
                {
                    "id": row,
                    "file_name": image,
                    "width": s.WIDTH,
                    "height": s.HEIGHT,
                    "subject": subject,
                    "action_name": "Directions",
                    "action_idx": 2,
                    "subaction_idx": 1,
                    "cam_idx": number,
                    "frame_idx": frame,
                }
            )
            annotations.append({"id": row, "image_id": row, "bbox": [x - side / 2, y - side / 2, side, side]})
            # One recording of a subject is seen by all its cameras: here each camera has an action of its own instead.
            images[-1]["subaction_idx"] = number
            joints.setdefault("2", {}).setdefault(str(number), {})[str(frame)] = 1000 * world
            fit = {"pose": person.pose.ravel(), "shape": person.betas, "trans": person.translation}
            fits.setdefault("2", {}).setdefault(str(number), {})[str(frame)] = fit
            rotation, t = cameras[f"S{subject}", camera][:3, :3], cameras[f"S{subject}", camera][:3, 3]
            lenses[str(number)] = {
                "R": rotation,
                "t": 1000 * (-rotation.T @ t if place else t),
                "f": s.INTRINSICS[[0, 1], [0, 1]],
                "c": s.INTRINSICS[:2, 2],
            }
            truths[f"human36m/{name}_{frame + 1:06d}"] = s.Truth(person.vertices, seen)
        start = str(folder / "annotations" / f"Human36M_subject{subject}")
        s.write_json(Path(f"{start}_data.json"), {"images": images, "annotations": annotations})
        s.write_json(Path(f"{start}_camera.json"), lenses)
        s.write_json(Path(f"{start}_joint_3d.json"), joints)
        s.write_json(Path(f"{start}_smpl_param.json"), fits)


def make_bedlam(folder: Path, body: Body, lying: bool = False, rows: int = 2) -> dict[str, s.Truth]:
    """One scene of SMPL-X, shapes of 11; with `lying` a close-up scene, whose stored images are turned to the left."""
    scene, truths = ("closeup" if lying else "static") + "_6fps", {}
    columns: dict[str, list[Any]] = {}
    for row in range(rows):
        person = s.make_person(body, row, (0.0, 0.1, 4.0), np.eye(4))
        camera = np.eye(4)
        camera[:3, 3] = [0.3, 0.1, 1.5]
        points = np.zeros((127, 3))
        points[:55] = with_confidence(s.project(person.joints))
        center, side = box(points[:22, :2])
        image = f"seq_000000/seq_000000_{5 * row:04d}.png"
        path = folder / "training_images" / scene / "png" / image
        s.write_image(path, s.HEIGHT, s.WIDTH) if lying else s.write_image(path)
        values = {
            "imgname": image,
            "center": center,
            "scale": side / 200,
            "pose_cam": person.pose.ravel(),
            "pose_world": person.pose.ravel(),
            "shape": [*person.betas, 0.0],
            "trans_cam": person.translation - camera[:3, 3],
            "trans_world": np.zeros(3),
            "gtkps": points,
            "cam_int": s.INTRINSICS,
            "cam_ext": camera,
            "gender": "female",
            "proj_verts": np.zeros((437, 3)),
            "motion_info": "walk",
            "sub": "rp_emma",
        }
        for key, value in values.items():
            columns.setdefault(key, []).append(value)
        truths[f"bedlam/{scene}/seq_000000/seq_000000_{5 * row:04d}/{row}"] = person.truth
    labels = folder / "training_labels" / "all_npz_12_training"
    labels.mkdir(parents=True, exist_ok=True)
    np.savez(labels / f"{scene}.npz", **columns)
    return truths


def make_coco(folder: Path, split: str = "val2017", name: str = "coco") -> dict[str, s.Truth]:
    """Two people in one image, one without keypoints, and a crowd."""
    body, truths, annotations = s.small_free_body(), {}, []
    s.write_image(folder / split / "000000000139.jpg")
    for row in range(2):
        person = s.make_person(body, row, extrinsics=np.eye(4))
        points = person.points[joint_indices(COCO17, HALPE26)].round(2)
        flags = np.array([2, 1, *[2] * 14, 0])
        low, size = points.min(0), np.ptp(points, 0)
        annotations.append(
            {
                "id": 500 + row,
                "image_id": 139,
                "category_id": 1,
                "iscrowd": 0,
                "area": float(size.prod()),
                "bbox": [*low, *size],
                "num_keypoints": 16,
                "segmentation": [],
                "keypoints": np.concatenate([points, flags[:, None]], 1).ravel(),
            }
        )
        truths[f"{name}/000000000139/{500 + row}"] = s.Truth(extra={"points": points, "box": (low, size)})
    annotations.append({**annotations[0], "id": 502, "num_keypoints": 0, "keypoints": [0] * 51})
    annotations.append({**annotations[0], "id": 503, "iscrowd": 1})
    images = [{"id": 139, "file_name": "000000000139.jpg", "width": s.WIDTH, "height": s.HEIGHT}]
    data = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": []}
    s.write_json(folder / "annotations" / f"person_keypoints_{split}.json", data)
    return truths


def make_3doh(folder: Path, world: bool = False, inner: bool = False, rows: int = 2) -> dict[str, s.Truth]:
    """Lengths seven times the body's; joints in the camera or the world; trans outside of the scale or inside."""
    body, truths, entries, scale = s.small_free_body(), {}, {}, 7.0
    for row in range(rows):
        person = s.make_person(body, row)
        points = s.project(person.joints)
        extrinsics = person.extrinsics.copy()
        extrinsics[:3, 3] *= scale
        low, high = points.min(0), points.max(0)
        entries[f"{row:05d}"] = {
            "img_path": f"images\\{row:05d}.jpg",
            "mask_path": f"masks\\{row:05d}.png",
            "bbox": [low, high],
            "pose": [person.pose.ravel()],
            "betas": [person.betas],
            "scale": [scale],
            "trans": [person.translation * (1 if inner else scale)],
            "extri": extrinsics,
            "intri": s.INTRINSICS,
            "smpl_joints_2d": points,
            "smpl_joints_3d": scale * (person.world_joints if world else person.joints),
            "lsp_joints_2d": np.zeros((14, 2)),
            "lsp_joints_3d": np.zeros((14, 3)),
        }
        s.write_image(folder / "testset" / "images" / f"{row:05d}.jpg")
        truths[f"3doh/images/{row:05d}/{row:05d}"] = person.truth
    s.write_json(folder / "testset" / "annots.json", entries)
    return truths


def make_sports(folder: Path, rows: int = 3) -> dict[str, s.Truth]:
    """The last row has no box; one keypoint and one 3D joint of each are not labelled."""
    body, truths, lines = s.small_free_body(), {}, []
    for row in range(rows):
        person = s.make_person(body, row, extrinsics=np.eye(4))
        image = f"game1/{row:04d}.jpg"
        s.write_image(folder / "images" / image)
        low, high = person.points.min(0), person.points.max(0)
        line: dict[str, Any] = {
            "image": image,
            "split": "train" if row == 0 else "test",
            "group": "game1",
            "frame": row,
            "person": 0,
            "fx": 240.0,
            "fy": 242.0,
            "cx": 48.0,
            "cy": 80.0,
        }
        corners = (*low, *high) if row + 1 < rows else ("", "", "", "")
        line.update(zip(("x0", "y0", "x1", "y1"), corners, strict=True))
        for name, (x, y) in zip(HALPE26, person.points, strict=True):
            line |= {f"{name}_x": x, f"{name}_y": y, f"{name}_c": 0.9}
        line |= {"left_ear_x": "", "left_ear_y": "", "left_ear_c": ""}
        for name, place in zip(SMPL24, person.joints, strict=True):
            if name != "neck" and name not in HALPE26:
                line |= {f"{name}_{axis}": value for axis, value in zip("XYZ", place, strict=True)}
        line |= {f"left_hand_{axis}": "" for axis in "XYZ"}
        lines.append(line)
        truths[f"sports/game1/{row}/0"] = s.Truth(None, person.joints, {"points": person.points})
    with (folder / "frames.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return truths
