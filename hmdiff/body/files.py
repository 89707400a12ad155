"""Finding and reading body files: the free body, and a user's SMPL, SMPL-X or MANO file.

Published formats (SMPL v1.0.0 and v1.1.0, SMPL-X v1.1, MANO v1.2, SMPL+H): a pickle or npz of v_template (V, 3),
shapedirs (V, 3, >= 10), posedirs (V, 3, 9 (J - 1)), weights (V, J), J_regressor (J, V), kintree_table (2, J) and f (F,
3). The free body's npz has the same, with sparse weights and regressors. The smplx package is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.keypoints import licensed_keypoints
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from hmdiff.files.reading import ArrayArchive
from hmdiff.files.unpickling import load_pickle

FOLDER_VARIABLE = "HMDIFF_BODY_DIR"
NUM_BETAS = 10
NUM_EXPRESSIONS = 10
_GENDERS = {"neutral": "neutral", "female": "f", "male": "m"}  # and their names in SMPL's published files
_SIDES = {"right": "RIGHT", "neutral": "RIGHT", "left": "LEFT"}
_SITES = {
    "smpl": "https://smpl.is.tue.mpg.de",
    "smplx": "https://smpl-x.is.tue.mpg.de",
    "mano": "https://mano.is.tue.mpg.de",
}
LICENSED = tuple(_SITES)
_LARGEST = 1e4  # limit on any number in a body: metres, weights, and posedirs in metres
_MAX_BYTES = 1 << 30  # of a body's arrays
_DEPTH = 4  # levels below HMDIFF_BODY_DIR that are searched: the published archives need three


def body_folder() -> Path | None:
    """The folder HMDIFF_BODY_DIR, or None if it is not set."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder).expanduser() if folder else None


def files_by_name(folder: Path) -> dict[str, Path]:
    """Body and regressor files in and below a folder, by lower-case name; shallower files take precedence."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEPTH else []
        for name in sorted(names):
            known = found.get(name.lower())
            if name.lower().endswith((".npz", ".pkl", ".npy")) and (
                known is None or depth < len(known.relative_to(folder).parts) - 1
            ):
                found[name.lower()] = Path(place, name)
    return found


def find_body_file(
    kind: str,  # one of LICENSED
    gender: str = "neutral",  # neutral, female, male; for MANO right (also for neutral) or left
) -> Path:
    """The user's file of that kind in or below HMDIFF_BODY_DIR, under any of its published names.

    Raises:
        UserError: it is not there; names the file, where to register for it and where to put it.
    """
    names = _published_names(kind, gender)
    folder = body_folder()
    if folder:
        there = files_by_name(folder)
        for name in (own_name(kind, gender), *names):  # the output of `hmdiff prepare licensed` first: it loads faster
            if (path := there.get(name.lower())) is not None:
                return path
    place_text = f"not in {folder} ({FOLDER_VARIABLE})" if folder else f"{FOLDER_VARIABLE} is not set"
    raise UserError(
        f"{names[0]} not found: {place_text}; register at {_SITES[kind]}, download it, put it at "
        f"{Path(folder or '<folder>') / kind / names[0]} and set {FOLDER_VARIABLE}={folder or '<folder>'} "
        f"(also taken: {', '.join(names[1:])}), or use the free body"
    )


def own_name(
    kind: str,  # one of LICENSED
    gender: str,
) -> str:
    """The file name that `hmdiff prepare licensed` gives to such a body."""
    return f"{Path(_published_names(kind, gender)[0]).stem}.npz"


def published_rank(
    kind: str,  # one of LICENSED
    gender: str,
    file: str,
) -> int:
    """Rank of a file among the published ones of its kind: the lowest is read."""
    return [name.lower() for name in _published_names(kind, gender)].index(file.lower())


def _published_names(kind: str, gender: str) -> list[str]:
    """Names under which the file was published or is commonly stored, in any case; the first is ours."""
    if kind == "mano":
        if gender not in _SIDES:
            raise UserError(f"MANO is right or left, not {gender!r}")
        return [f"MANO_{_SIDES[gender]}.{suffix}" for suffix in ("pkl", "npz")]
    if gender not in _GENDERS:
        raise UserError(f"gender {gender!r}: expected one of {', '.join(_GENDERS)}")
    upper = gender.upper()
    if kind == "smplx":
        return [f"SMPLX_{upper}.npz", f"SMPLX_{upper}.pkl", f"SMPLX_{upper}_2020.npz"]
    return [
        f"SMPL_{upper}.pkl",
        f"SMPL_{upper}.npz",
        *(
            f"basicModel_{_GENDERS[gender]}_lbs_10_207_0_v{version}.{suffix}"
            for suffix in ("pkl", "npz")
            for version in ("1.1.0", "1.0.0")
        ),
    ]


def licensed_kind(
    name: str,  # a body's name or a file's: smpl, smpl_female, mano_left, SMPLX_MALE.npz, basicmodel_m_lbs_...pkl
) -> tuple[str, str] | None:
    """The licensed body that a name refers to, as (kind, gender); None for any other name."""
    for kind in LICENSED:
        for gender in _SIDES if kind == "mano" else _GENDERS:
            names = [Path(file) for file in _published_names(kind, gender)]
            if name.lower() in {kind if gender == "neutral" else f"{kind}_{gender}", *(f.name.lower() for f in names)}:
                return kind, gender
            if name.lower() in {file.stem.lower() for file in names}:
                return kind, gender
    return None


def read_body_file(path: str | Path) -> dict[str, Any]:
    """Arguments of `hmdiff.body.body.Body`, except the name, from a free or licensed body file.

    Raises:
        UserError: the file is missing, damaged, or not a body.
    """
    path, data = Path(path), raw_arrays(path)
    try:
        arrays = _free_arrays(data) if "keypoint_names" in data else _smpl_arrays(data)
        _check_values(arrays)
    except (KeyError, ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not laid out as a body file ({error!r:.200}); download it again") from None
    return arrays


def _check_values(arrays: dict[str, Any]) -> None:
    """Raises ValueError naming values that are not finite, too large, or out of the mesh's range."""
    vertices = len(arrays["v_template"])
    for name, value in arrays.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            if not np.isfinite(value).all() or np.abs(value).max(initial=0) > _LARGEST:
                raise ValueError(f"{name} holds numbers that are not finite, or beyond {_LARGEST:g}")
    faces = arrays["faces"]
    if faces.ndim != 2 or faces.shape[1] != 3 or not len(faces):
        raise ValueError(f"faces are {faces.shape}, (F, 3) expected")
    if int(faces.min()) < 0 or int(faces.max()) >= vertices:
        raise ValueError(f"faces point to vertices {int(faces.min())} to {int(faces.max())} of {vertices}")


def raw_arrays(path: str | Path) -> dict[str, Any]:
    """The content of a body file under its published names.

    Raises:
        UserError: the file is missing, damaged, or not a body.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such body file; give free, {', '.join(LICENSED)} or the path of a .npz or .pkl")
    if path.suffix == ".pkl":
        data = load_pickle(path)
    elif path.suffix == ".npz":
        data = _read_npz(path)
    else:
        raise UserError(f"{path}: a body file is .npz or .pkl, not {path.suffix or 'without a suffix'!r}")
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a body file (a {type(data).__name__} where a dictionary of arrays was expected)")
    wanted = {"v_template", "shapedirs", "kintree_table"}
    if wanted - data.keys():
        raise UserError(f"{path}: not a body file: it has no {', '.join(sorted(wanted - data.keys()))}")
    return data


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    archive = ArrayArchive(path, _MAX_BYTES, "download it again")
    # SMPL-X's files also contain pickled dictionaries, which are not needed.
    return {name: archive.read(name) for name in archive.names if not archive.holds_objects(name)}


def _parents(kintree_table: np.ndarray) -> list[int]:
    parents = np.asarray(kintree_table, np.int64)[0]
    # The root's parent is -1, or 2**32 - 1 if written as unsigned.
    return [-1 if joint == 0 else int(parent) for joint, parent in enumerate(parents)]


def _smpl_arrays(data: dict[str, Any]) -> dict[str, Any]:
    parents = _parents(data["kintree_table"])
    arrays: dict[str, Any] = {
        "v_template": np.asarray(data["v_template"], np.float32),
        "shapedirs": shape_components(np.asarray(data["shapedirs"], np.float32), len(parents)),
        "posedirs": np.asarray(data["posedirs"], np.float32) if "posedirs" in data else None,
        "lbs_weights": np.asarray(data["weights"], np.float32),
        "J_regressor": np.asarray(data["J_regressor"], np.float32),
        "parents": parents,
        "joint_names": _joint_names(parents),
        "faces": np.asarray(data["f"], np.int64),
        "mean_pose": _mean_pose(data, len(parents)),
        "expression_dirs": expression_components(data, len(parents)),
    }
    used = ("v_template", "shapedirs", "lbs_weights", "J_regressor", "parents", "joint_names")
    keypoints = licensed_keypoints(*(arrays[name] for name in used))
    if keypoints is not None:
        arrays["keypoint_names"], arrays["keypoint_regressor"] = keypoints
    return arrays


def shape_components(
    shapedirs: np.ndarray,  # (V, 3, >= 10) as published, or (V, 3, 11) from `hmdiff prepare licensed`
    joints: int,
) -> np.ndarray:  # (V, 3, B)
    """Ten shape components, eleven for SMPL-X v1.1 (of 300 before the expressions), as in BEDLAM's labels.

    SMPL-X v1.0 has ten shapes, then ten expressions: there an eleventh label is dropped.
    """
    eleven = joints == 55 and (shapedirs.shape[2] >= 300 or shapedirs.shape[2] == NUM_BETAS + 1)
    return shapedirs[:, :, : NUM_BETAS + eleven]


def expression_components(data: dict[str, Any], joints: int) -> np.ndarray | None:  # (V, 3, 10)
    """SMPL-X's first ten expressions, which follow 300 shapes in v1.1 and ten in v1.0 (as in smplx).

    `hmdiff prepare licensed` stores them as expressiondirs. None for other bodies, and for files without expressions.
    """
    if joints != 55:
        return None
    if "expressiondirs" in data:
        return np.asarray(data["expressiondirs"], np.float32)
    count = np.shape(data["shapedirs"])[2]
    first = 300 if count >= 300 else NUM_BETAS
    if count < first + NUM_EXPRESSIONS:
        return None
    return np.asarray(data["shapedirs"], np.float32)[:, :, first : first + NUM_EXPRESSIONS]


def _mean_pose(data: dict[str, Any], joints: int) -> np.ndarray | None:  # (J, 3)
    """The hands' mean pose, to which published labels are relative; the hands' joints come last."""
    hands = [np.asarray(data[key], np.float32).reshape(-1, 3) for key in ("hands_meanl", "hands_meanr") if key in data]
    if not hands and joints == 16 and "hands_mean" in data:
        hands = [np.asarray(data["hands_mean"], np.float32).reshape(-1, 3)]
    total = sum(map(len, hands))
    return np.concatenate([np.zeros((joints - total, 3), np.float32), *hands]) if hands else None


def _free_arrays(data: dict[str, np.ndarray]) -> dict[str, Any]:
    vertices = len(data["v_template"])
    parents = _parents(data["kintree_table"])
    weights = np.zeros((vertices, len(parents)), np.float32)
    np.put_along_axis(weights, data["weights_joint"].astype(np.int64), data["weights_value"].astype(np.float32), 1)
    return {
        "v_template": data["v_template"].astype(np.float32),
        "shapedirs": data["shapedirs"].astype(np.float32),
        "lbs_weights": weights / weights.sum(1, keepdims=True),
        "J_regressor": _dense_rows(data, "J_regressor", len(parents), vertices),
        "parents": parents,
        "joint_names": [str(name) for name in data["joint_names"]],
        "faces": data["faces"].astype(np.int64),
        "keypoint_names": [str(name) for name in data["keypoint_names"]],
        "keypoint_regressor": _dense_rows(data, "keypoint_regressor", len(data["keypoint_names"]), vertices),
    }


def _dense_rows(data: dict[str, np.ndarray], name: str, rows: int, columns: int) -> np.ndarray:
    """A sparse matrix stored as `<name>_row`, `<name>_column`, `<name>_value`; each row is normalised to sum to one."""
    dense = np.zeros((rows, columns), np.float32)
    dense[data[f"{name}_row"], data[f"{name}_column"]] = data[f"{name}_value"]
    return dense / dense.sum(1, keepdims=True)


def _joint_names(parents: Sequence[int]) -> list[str]:
    """Names of SMPL's 24 joints; for other trees, identified by their size, generated names."""
    if len(parents) == len(SMPL24):
        return list(SMPL24)
    if len(parents) == 16:  # MANO: the wrist, then three joints per finger
        return ["wrist", *_finger_names("")]
    body = list(SMPL24[:22])  # SMPL+H and SMPL-X: SMPL without its hand joints, then the fingers
    hands = [*_finger_names("left_"), *_finger_names("right_")]
    if len(parents) == 52:
        return body + hands
    if len(parents) == 55:
        return [*body, "jaw", "left_eye_smplhf", "right_eye_smplhf", *hands]
    return [f"joint{index}" for index in range(len(parents))]


def _finger_names(side: str) -> list[str]:
    return [f"{side}{finger}{index}" for finger in ("index", "middle", "pinky", "ring", "thumb") for index in (1, 2, 3)]
