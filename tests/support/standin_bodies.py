"""Stand-ins of licensed bodies in their published layouts and sizes, made of the free body; no licensed value is here.

SMPL: 6890 vertices, 24 joints, ten shapes, pose blend shapes of a centimetre. MANO: 778 vertices, 16 joints, a mean
pose; not a hand but the whole body, its head and limbs playing five fingers.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from hmdiff.body.body import load_body
from hmdiff.body.decimation import MeshHierarchy
from hmdiff.body.keypoints import LANDMARKS
from hmdiff.body.mesh_cache import _read_asset
from hmdiff.body.skeletons import MANO16, SMPL24

SMPL, MANO = 6890, 778
# The free body's joints that play MANO's; what is not named here is the wrist.
_LIMBS = {
    "index": ("left_hip", "left_knee", "left_ankle left_foot"),
    "pinky": ("left_shoulder", "left_elbow", "left_wrist left_hand"),
    "middle": ("right_hip", "right_knee", "right_ankle right_foot"),
    "ring": ("right_shoulder", "right_elbow", "right_wrist right_hand"),
    "thumb": ("spine3", "neck", "head"),
}
_ENDS = {"index4": "left_big_toe", "middle4": "right_big_toe", "thumb4": "top_head"}
MANO_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)


@functools.cache
def smpl_arrays(seed: int = 0) -> dict[str, Any]:
    """Another seed has other pose blend shapes and is somewhat taller: another sex."""
    body, ids, faces = _level(SMPL)
    named = dict(zip(body.keypoint_names, body.keypoints(body.v_template).numpy(), strict=True))  # type: ignore[arg-type]
    template = body.v_template.numpy()[ids]
    order = _placed(template, {number: named[name] for name, number in LANDMARKS[SMPL].items()})
    ids, faces = ids[order], np.argsort(order)[faces]
    weights = body.lbs_weights.numpy()[ids].astype(np.float64)
    directions = 0.01 * np.random.default_rng(seed).normal(size=(23, 3, 9))
    arrays = {
        "v_template": (1 + 0.03 * seed) * body.v_template.numpy()[ids].astype(np.float64),
        "shapedirs": body.shapedirs.numpy()[ids].astype(np.float64),
        "posedirs": np.einsum("vj,jcd->vcjd", weights[:, 1:], directions).reshape(SMPL, 3, 207),
        "weights": weights,
        "kintree_table": np.stack([[2**32 - 1, *body.parents[1:]], np.arange(24)]).astype(np.uint32),
        "f": faces.astype(np.uint32),
    }
    places = (1 + 0.03 * seed) * body.joint_template.numpy()
    return arrays | {"J_regressor": _regressor(arrays["v_template"], places)}


@functools.cache
def mano_arrays() -> dict[str, Any]:
    body, ids, faces = _level(MANO)
    template = 0.1 * body.v_template.numpy()[ids].astype(np.float64)
    free, names = 0.1 * body.joint_template.numpy(), dict(zip(SMPL24, range(24), strict=True))
    kept = body.lbs_weights.numpy()[ids].astype(np.float64)
    weights, places = np.zeros((MANO, 16)), np.zeros((16, 3))
    for finger, parts in _LIMBS.items():
        for number, part in enumerate(parts, 1):
            rows, joint = [names[name] for name in part.split()], MANO16.index(f"{finger}{number}")
            weights[:, joint], places[joint] = kept[:, rows].sum(1), free[rows[0]]
    weights[:, 0] = 1 - weights.sum(1)
    at = dict(zip(body.keypoint_names, 0.1 * body.keypoints(body.v_template).numpy(), strict=True))  # type: ignore[arg-type]
    ends = {tip: at[name] for tip, name in _ENDS.items()}
    ends |= {"pinky4": template[template[:, 0].argmax()], "ring4": template[template[:, 0].argmin()]}
    order = _placed(template, {number: ends[name] for name, number in LANDMARKS[MANO].items()})
    template, weights, faces = template[order], weights[order], np.argsort(order)[faces]
    random = np.random.default_rng(0)
    directions = 0.001 * random.normal(size=(15, 3, 9))
    return {
        "v_template": template,
        "shapedirs": 0.1 * body.shapedirs.numpy()[ids[order]].astype(np.float64),
        "posedirs": np.einsum("vj,jcd->vcjd", weights[:, 1:], directions).reshape(MANO, 3, 135),
        "weights": weights,
        "J_regressor": _regressor(template, places),
        "kintree_table": np.stack([[2**32 - 1, *MANO_PARENTS[1:]], np.arange(16)]).astype(np.uint32),
        "f": faces.astype(np.uint32),
        "hands_mean": 0.1 * random.normal(size=45),
    }


def write_pickle(path: Path, arrays: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    return path


def _level(vertices: int) -> tuple[Any, np.ndarray, np.ndarray]:
    body = load_body()
    assert body.faces is not None
    faces = body.faces.numpy()
    return body, *MeshHierarchy.from_arrays(_read_asset(faces), faces).level(vertices)


def _placed(points: np.ndarray, wanted: dict[int, np.ndarray]) -> np.ndarray:
    """A permutation of the vertices after which `wanted[number]` has vertex `number` next to it."""
    order, done = np.arange(len(points)), list[int]()
    for number, place in wanted.items():
        distance = np.square(points - place).sum(-1)
        distance[order[done]] = np.inf
        done.append(number)
        at = int(np.flatnonzero(order == distance.argmin())[0])
        order[at], order[number] = order[number], order[at]
    return order


def _regressor(template: np.ndarray, places: np.ndarray) -> np.ndarray:  # (J, V) rows >= 0, sum to 1
    rows = np.zeros((len(places), len(template)))
    size = np.ptp(template, 0).max()
    for row, place in zip(rows, places, strict=True):
        near = np.square(template - place).sum(-1).argsort()[:100]
        design = np.concatenate([(template[near] - place).T / size, np.ones((1, 100)), 1e-3 * np.eye(100)])
        row[near] = nnls(design, np.concatenate([np.zeros(3), [1], np.zeros(100)]))[0]
    return rows / rows.sum(1, keepdims=True)
