"""Keypoint regressors for licensed bodies, computed from their arrays: HALPE26 for SMPL and SMPL-X, HAND21 for MANO.

Nose, eyes, ears and feet are single vertices, as in smplx's `vertex_ids.py`. Fingertips are the vertices of FreiHAND's
`mano_utils.py` (kpId2vertices), since HAND21 follows its order and its labels are evaluated: ring 555 and pinky 672,
where smplx has the neighbours 554 and 671. FreiHAND's hands are right hands; a left MANO gets the same numbers, as in
smplx. The top of the head is the highest vertex. Limbs are SMPL's joints including hips, as in SPIN and smplx; since
keypoints are regressed from the posed mesh, `joint_row` computes vertex weights that follow the joint. That and the top
of the head are our choice. MANO's joints are rows of its J_regressor, as in FreiHAND's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hmdiff.body.skeletons import FACE_AND_FEET, HALPE26, HAND21

# By number of vertices, which identifies the topology.
LANDMARKS: dict[int, dict[str, int]] = {
    6890: dict(zip(FACE_AND_FEET, (332, 6260, 2800, 4071, 583, 3216, 3226, 3387, 6617, 6624, 6787), strict=True)),
    10475: dict(zip(FACE_AND_FEET, (9120, 9929, 9448, 616, 6, 5770, 5780, 8846, 8463, 8474, 8635), strict=True)),
    778: {"thumb4": 744, "index4": 320, "middle4": 443, "ring4": 555, "pinky4": 672},
}
_CANDIDATES = 200  # vertices around a joint that its row may use
_KEPT = 24
_REACH = 0.3  # metres: typical displacement of a vertex by a bone that does not meet the joint


def licensed_keypoints(
    v_template: np.ndarray,  # (V, 3)
    shapedirs: np.ndarray,  # (V, 3, B)
    weights: np.ndarray,  # (V, J)
    J_regressor: np.ndarray,  # (J, V)
    parents: Sequence[int],
    joint_names: Sequence[str],
) -> tuple[tuple[str, ...], np.ndarray] | None:
    """Names and regressor (K, V) for a SMPL, SMPL+H, SMPL-X or MANO mesh; None for another one."""
    vertices = len(v_template)
    landmarks, position = LANDMARKS.get(vertices), {name: index for index, name in enumerate(joint_names)}
    if landmarks is None:
        return None
    rows = {name: np.eye(1, vertices, index, dtype=np.float64)[0] for name, index in landmarks.items()}
    if vertices == 778:
        if len(parents) != 16:
            return None
        rows.update({name: np.asarray(J_regressor[position[name]], np.float64) for name in HAND21 if name in position})
        return HAND21, np.stack([rows[name] for name in HAND21]).astype(np.float32)
    limbs = [
        f"{side}_{name}"
        for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ]
    if any(name not in position for name in limbs):
        return None
    for name in limbs:
        rows[name] = joint_row(v_template, shapedirs, weights, J_regressor, parents, position[name])
    rows["top_head"] = np.eye(1, vertices, int(np.argmax(v_template[:, 1])))[0]
    for middle, part in (("neck", "shoulder"), ("mid_hip", "hip")):
        rows[middle] = (rows[f"left_{part}"] + rows[f"right_{part}"]) / 2
    return HALPE26, np.stack([rows[name] for name in HALPE26]).astype(np.float32)


def joint_row(
    v_template: np.ndarray,  # (V, 3) metres
    shapedirs: np.ndarray,  # (V, 3, B)
    weights: np.ndarray,  # (V, J)
    J_regressor: np.ndarray,  # (J, V)
    parents: Sequence[int],
    joint: int,
) -> np.ndarray:  # (V,) >= 0, summing to 1, few non-zero
    """Vertex weights r whose weighted sum stays at a joint for every pose and shape of linear blend skinning.

    sum_v r_v sum_k W_vk G_k v is the joint c if, for both bones that meet there, sum_v r_v W_vk (v - c) = 0 (both bones
    keep c fixed), and no other bone contributes: sum_v r_v W_vk = 0. The same holds for the shape directions.
    Non-negative least squares, first on all candidates and then on the largest weights.
    """
    centre, drift = J_regressor[joint] @ v_template, np.einsum("v,vcb->cb", J_regressor[joint], shapedirs)
    from scipy.spatial import cKDTree  # slow to import, and only needed to compute a regressor

    near = cKDTree(v_template).query(centre, min(_CANDIDATES, len(v_template)))[1]
    bones = np.flatnonzero(weights[near].max(0) > 1e-3)
    own = np.isin(bones, [joint, parents[joint]])
    share = weights[near][:, bones].T.astype(np.float64)  # (k, C)
    offset = (v_template[near] - centre).T.astype(np.float64)  # (3, C)
    growth = (shapedirs[near] - drift).transpose(2, 1, 0).reshape(-1, len(near)).astype(np.float64)  # (3 B, C)
    pieces = [
        (share[:, None] * offset).reshape(-1, len(near)),
        (share[:, None] * growth).reshape(-1, len(near)),
        _REACH * share[~own],
        np.full((1, len(near)), 10.0),  # sum to one, weighted much more than a millimetre
    ]
    design = np.concatenate(pieces)
    target = np.zeros(len(design))
    target[-1] = 10.0
    chosen = np.arange(len(near))
    from scipy.optimize import nnls

    for last in (False, True):
        ridge = 1e-3 * np.eye(len(chosen))
        solution, _ = nnls(np.concatenate([design[:, chosen], ridge]), np.append(target, np.zeros(len(chosen))))
        if not last:
            largest = np.sort(np.argsort(-solution, kind="stable")[:_KEPT])
            chosen = chosen[largest]
    row = np.zeros(len(v_template))
    row[near[chosen]] = np.where(solution > 1e-4, solution, 0)
    return row / row.sum()
