"""Tiny data sets in the exact published layouts, made of known bodies before known cameras.

Each maker writes a folder and returns the truth by record name: what a reader must give back. People are of the free
body (SMPL's joints and shapes) or of a random body of SMPL-X's or MANO's tree, whose files `licensed_folder` writes.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from hmdiff.body.body import Body, load_body
from hmdiff.body.skeletons import H36M17, HALPE26, HAND21, OPENPOSE18, SMPL24, joint_indices
from hmdiff.geometry import axis_angle_to_matrix

WIDTH, HEIGHT = 96, 160
INTRINSICS = np.array([[240.0, 0, 48], [0, 242.0, 80], [0, 0, 1]])
MANO_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
_SMPLX_BODY = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)
SMPLX_PARENTS = (
    *_SMPLX_BODY,
    15,
    15,
    15,
    *(
        parent
        for wrist, first in ((20, 25), (21, 40))
        for f in range(5)
        for parent in (wrist, first + 3 * f, first + 3 * f + 1)
    ),
)
# FreiHAND's own: MANO's sixteen joints and five vertices.
FREIHAND_TIPS = {"thumb4": 744, "index4": 320, "middle4": 443, "ring4": 555, "pinky4": 672}


@dataclasses.dataclass(frozen=True)
class Truth:
    vertices: np.ndarray | None = None  # (V, 3) metres, camera frame
    joints: np.ndarray | None = None  # (J, 3) metres, camera frame
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Person:
    """A body in the world before a camera."""

    pose: np.ndarray  # (J, 3) axis-angle, the root's in the world
    betas: np.ndarray  # (10,)
    translation: np.ndarray  # (3,) in the world
    extrinsics: np.ndarray  # (4, 4) world to camera
    vertices: np.ndarray  # (V, 3) camera frame
    joints: np.ndarray  # (J, 3) camera frame
    world_joints: np.ndarray  # (J, 3)
    points: np.ndarray  # (26, 2) HALPE26 in pixels, of a body that has them

    @property
    def truth(self) -> Truth:
        return Truth(self.vertices, self.joints)


_SMALL: list[Body] = []


def small_free_body() -> Body:
    """The free body with the vertices of its keypoints alone: all its joints, a fortieth of its work."""
    if not _SMALL:
        free = load_body()
        _SMALL.append(free.select(free.keypoint_support()))
    return _SMALL[0]


def posed(body: Body, pose: np.ndarray, betas: np.ndarray, translation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and joints by the body itself, in float64."""
    output = body.double()(
        torch.from_numpy(np.asarray(betas, np.float64)),
        axis_angle_to_matrix(torch.from_numpy(pose)),
        torch.from_numpy(np.asarray(translation, np.float64)),
    )
    return output.vertices.numpy(), output.joints.numpy()


def project(points: np.ndarray, intrinsics: np.ndarray = INTRINSICS) -> np.ndarray:
    seen = points @ intrinsics.T
    return seen[:, :2] / seen[:, 2:]


def make_person(
    body: Body,
    seed: int,
    place: tuple[float, float, float] = (0.05, 0.1, 4.0),  # of the root joint, camera frame
    extrinsics: np.ndarray | None = None,  # (4, 4); None: a random camera
    betas: np.ndarray | None = None,
) -> Person:
    random = np.random.default_rng(seed)
    pose = 0.25 * random.normal(size=(body.num_joints, 3))
    betas = random.normal(size=body.num_betas) if betas is None else betas
    if extrinsics is None:
        extrinsics = np.eye(4)
        extrinsics[:3, :3], extrinsics[:3, 3] = Rotation.random(None, random).as_matrix(), random.normal(size=3)
    # Upright in the camera (SMPL's y is up), wherever the world's axes point.
    upright = Rotation.from_matrix(extrinsics[:3, :3]).inv() * Rotation.from_rotvec([np.pi, 0, 0])
    pose[0] = (upright * Rotation.from_rotvec([0.1, random.normal(), 0.1])).as_rotvec()
    root = posed(body, pose, betas, np.zeros(3))[1][0]
    translation = extrinsics[:3, :3].T @ (np.array(place) - extrinsics[:3, 3]) - root
    vertices, world = posed(body, pose, betas, translation)
    seen = vertices @ extrinsics[:3, :3].T + extrinsics[:3, 3]
    points = np.zeros((26, 2))
    if body.keypoint_regressor is not None and body.keypoint_names == HALPE26:
        points = project(body.keypoints(torch.from_numpy(seen)).numpy())
    joints = world @ extrinsics[:3, :3].T + extrinsics[:3, 3]
    return Person(pose, betas, translation, extrinsics, seen, joints, world, points)


def write_image(path: Path, width: int = WIDTH, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 90, 90)).save(path)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Pickles as Python 2 did: text and bytes alike as byte strings, numpy under its old module name."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def _save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _save_string


def write_python2_pickle(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        _Python2Pickler(handle, 2).dump(data)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, default=lambda array: array.tolist()))


def licensed_folder(folder: Path) -> Path:
    """MANO_RIGHT.pkl (778 vertices, a mean pose) and SMPLX_NEUTRAL.npz (90 vertices), random; for HMDIFF_BODY_DIR."""
    folder.mkdir(parents=True, exist_ok=True)
    mano = body_arrays(778, MANO_PARENTS, scale=0.05)
    mano["hands_mean"] = 0.2 * np.random.default_rng(5).normal(size=45)
    (folder / "MANO_RIGHT.pkl").write_bytes(pickle.dumps(mano, protocol=2))
    np.savez(folder / "SMPLX_NEUTRAL.npz", **body_arrays(90, SMPLX_PARENTS, scale=0.4))
    return folder


def body_arrays(vertices: int, parents: tuple[int, ...], scale: float) -> dict[str, Any]:
    random, joints = np.random.default_rng(vertices), len(parents)
    weights, regressor = random.random((vertices, joints)) ** 8, random.random((joints, vertices)) ** 8
    return {
        "v_template": scale * random.normal(size=(vertices, 3)).clip(-2, 2),
        "shapedirs": 0.03 * scale * random.normal(size=(vertices, 3, 10)),
        "posedirs": 0.01 * scale * random.normal(size=(vertices, 3, 9 * (joints - 1))),
        "weights": weights / weights.sum(1, keepdims=True),
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
        "kintree_table": np.stack([np.array([2**32 - 1, *parents[1:]]), np.arange(joints)]).astype(np.uint32),
        "f": random.integers(0, vertices, (7, 3)).astype(np.uint32),
    }


def make_3dpw(
    folder: Path,
    sequences: tuple[tuple[str, str], ...] = (("test", "downtown_bus_00"), ("validation", "courtyard_hug_00")),
    frames: int = 3,
    first: int = 0,  # frames before this one have no valid camera pose
) -> dict[str, Truth]:
    """Two people a sequence; the second person's camera pose is not valid in the last frame."""
    body, truths = small_free_body(), {}
    for split in ("train", "validation", "test"):
        (folder / "sequenceFiles" / split).mkdir(parents=True, exist_ok=True)
    for number, (split, name) in enumerate(sequences):
        cameras = np.stack([make_person(body, 100 * number + f).extrinsics for f in range(frames)])
        data: dict[str, Any] = {
            "sequence": name,
            "cam_intrinsics": INTRINSICS,
            "cam_poses": cameras,
            "genders": ["m", "f"],
            "img_frame_ids": 2 * np.arange(frames, dtype=np.uint16),
            "texture_maps": [],
            **{key: [] for key in ("poses", "betas", "trans", "poses2d", "jointPositions", "campose_valid")},
        }
        for p in (0, 1):
            betas = np.random.default_rng(p).normal(size=10)
            people = [
                make_person(body, 1000 * number + 10 * f + p, (0.2 * p, 0.0, 4 + p), cameras[f], betas)
                for f in range(frames)
            ]
            seen = np.stack([person.points[joint_indices(OPENPOSE18, HALPE26)] for person in people])
            confidence = np.full((frames, 18, 1), 0.8)
            confidence[:, -1] = 0  # not detected: 0, 0, 0
            valid = np.ones(frames, np.uint8)
            valid[:first], valid[frames - p :] = 0, 0
            data["poses"].append(np.stack([person.pose.ravel() for person in people]))
            data["betas"].append(betas)
            data["trans"].append(np.stack([person.translation for person in people]))
            data["poses2d"].append((np.concatenate([seen, confidence], 2) * (confidence > 0)).transpose(0, 2, 1))
            data["jointPositions"].append(np.stack([person.world_joints.ravel() for person in people]))
            data["campose_valid"].append(valid)
            for f in np.flatnonzero(valid):
                truths[f"3dpw/{name}/{f:05d}/{p}"] = people[f].truth
        write_python2_pickle(folder / "sequenceFiles" / split / f"{name}.pkl", data)
        for f in range(frames):
            write_image(folder / "imageFiles" / name / f"image_{f:05d}.jpg")
    return truths


def make_freihand(
    folder: Path,
    hand: Body,  # MANO, of `licensed_folder`
    rows: int = 3,
    vertices: bool = True,  # also training_verts.json
) -> dict[str, Truth]:
    truths = {}
    for split in ("training", "evaluation"):
        columns: dict[str, list[Any]] = {key: [] for key in ("K", "xyz", "mano", "verts", "scale")}
        for row in range(rows):
            random = np.random.default_rng(row + (split == "training") * 50)
            pose, betas = 0.2 * random.normal(size=(16, 3)), random.normal(size=10)
            assert hand.mean_pose is not None
            full = pose + hand.mean_pose.double().numpy()
            intrinsics = np.array([[480.0 + row, 0, 112], [0, 480.0 + row, 112], [0, 0, 1]])
            mesh, joints = posed(hand, full, betas, np.array([0.01, -0.02, 0.8]))
            named = dict(zip(hand.joint_names, joints, strict=True)) | {k: mesh[v] for k, v in FREIHAND_TIPS.items()}
            xyz = np.stack([named[name] for name in HAND21])
            uv, scale = project(xyz, intrinsics)[9], intrinsics[0, 0] / xyz[9, 2]
            for key, value in (
                ("K", intrinsics),
                ("xyz", xyz),
                ("verts", mesh),
                ("scale", 0.03),
                ("mano", [[*pose.ravel(), *betas, *uv, scale]]),
            ):
                columns[key].append(value)
            for version in range(4 if split == "training" else 1):
                number = row + version * rows
                write_image(folder / split / "rgb" / f"{number:08d}.jpg", 224, 224)
                truths[f"freihand/{split}/{number:08d}"] = Truth(mesh, xyz)
        for key, column in columns.items():
            if key != "verts" or split == "evaluation" or vertices:
                write_json(folder / f"{split}_{key}.json", column)
    return truths


def h36m_joints(person: Person) -> tuple[np.ndarray, np.ndarray]:
    """Seventeen joints in H36M17's order of a stand-in body: (17, 3) in the camera, and in the world."""
    like = {"neck": "spine3", "jaw": "neck", "top_head": "head", "spine": "spine1"}
    rows = joint_indices([like.get(name, name) for name in H36M17], SMPL24)
    return person.joints[rows], person.world_joints[rows]
