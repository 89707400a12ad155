"""Fit pose and shape of a body model to vertices, so that a recovered mesh can be animated.

Maximum a posteriori with standard normal betas and Gaussian vertex noise; the solver is `hmdiff/body/body_fitter.py`.
Symbols: N bodies, V and C vertices, J joints, B shape coefficients, K keypoints.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hmdiff.body.anatomy import angles_to_rotations, clamp_angles, limit_excess, rotations_to_angles, within_reach
from hmdiff.body.body import Body
from hmdiff.body.body_fitter import NOISE, BodyFitter, Sight
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from hmdiff.geometry import matrix_to_axis_angle

_COLLARS = [SMPL24.index(f"{side}_collar") - 1 for side in ("left", "right")]  # without the root
_SHOULDERS = [SMPL24.index(f"{side}_shoulder") - 1 for side in ("left", "right")]
AT_ONCE = 32  # bodies per batch: bounds the memory, does not affect results
# Metres. A predicted vertex is off by about 2 cm, but errors of neighbours are correlated: the larger value compensates
# for treating them as independent.
PREDICTION_NOISE = 0.05
KEYPOINT_WEIGHT = 30.0  # of a keypoint's position across the line of sight, relative to a vertex
LARGEST_BETA = 4.0  # bound of a fitted prediction, standard deviations
ROUNDS = 4


class FittedBodies(NamedTuple):
    pose: Tensor  # (N, J, 3) axis-angles, relative to the parent; root first; includes a hand's mean pose
    betas: Tensor  # (N, B)
    translation: Tensor  # (N, 3) metres; body(betas, axis_angle_to_matrix(pose), translation) is the fitted mesh
    error_mm: Tensor  # (N,) mean distance of the given vertices to the fitted ones


@torch.no_grad()
def fit_parameters(
    body: Body,
    vertices: Tensor,  # (N, V, 3) metres, any orientation: the root rotation absorbs it
    rounds: int = ROUNDS,
) -> FittedBodies:
    """Fit each mesh independently: up to rounding, results do not depend on the batch. Includes pose blend shapes.

    Fits the given body's gender and hand, whatever the mesh's: load the matching body. For a mesh that is not a body of
    the model (a mirror image, noise) the nearest one found is returned, with a large `error_mm`.

    Raises:
        UserError: vertices of another shape than the body's, or not finite.
    """
    if vertices.dim() != 3 or vertices.shape[1:] != (body.num_vertices, 3):
        raise UserError(
            f"vertices {tuple(vertices.shape)} found, (N, {body.num_vertices}, 3) of body {body.name!r} expected"
        )
    finite = vertices.isfinite().flatten(1).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0, 0])
        raise UserError(f"vertices of mesh {first} are not finite: there is no body to fit to them")
    vertices = vertices.to(body.v_template)
    fitter = _fitter(body, body.v_template.device, body.v_template.dtype)
    parts = []
    for group in vertices.split(AT_ONCE):
        rotations, betas, translation = fitter.fit(group[:, fitter.ids], rounds)
        found = body(betas, rotations, translation).vertices
        error = 1000 * (found - group).norm(dim=-1).mean(-1)
        parts.append(FittedBodies(matrix_to_axis_angle(rotations), betas, translation, error))
    if not parts:
        empty = vertices.new_zeros
        return FittedBodies(empty(0, body.num_joints, 3), empty(0, body.num_betas), empty(0, 3), empty(0))
    return FittedBodies(*(torch.cat(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def fit_coarse(
    body: Body,
    coarse_ids: Tensor,  # (C,) vertices of the coarse mesh
    coarse: Tensor,  # (N, C, 3) metres, any frame
    rounds: int = 1,  # of Levenberg-Marquardt, within the joints' limits
    keypoints: Tensor | None = None,  # (K, C) regressor: their projections are preserved
    translation: Tensor | None = None,  # (N, 3) metres: from mesh to camera frame, whose axes are parallel
) -> FittedBodies:
    """The bodies nearest to predicted coarse meshes, as used by `surface=body` of the pipeline.

    Predictions are off by centimetres where they are uncertain, so betas are regularised for such noise, and joints of
    a body with SMPL's skeleton are kept inside their limits (`hmdiff/body/anatomy.py`). `error_mm` is over the coarse
    vertices. With `keypoints`, their image positions weigh more than depth, which a photo determines less well. Raises
    `UserError` as `fit_parameters` does.
    """
    if coarse.dim() != 3 or coarse.shape[1:] != (len(coarse_ids), 3):
        raise UserError(f"coarse {tuple(coarse.shape)} found, (N, {len(coarse_ids)}, 3) expected")
    if not coarse.isfinite().all():
        raise UserError("the predicted vertices are not finite: there is no body to fit to them")
    coarse = coarse.to(body.v_template)
    ids = tuple(coarse_ids.tolist())
    fitter = _fitter(body, body.v_template.device, body.v_template.dtype, ids, PREDICTION_NOISE)
    small = _selected(body, ids, body.v_template.device, body.v_template.dtype)
    parts = []
    for first in range(0, len(coarse), AT_ONCE):
        group, sight = coarse[first : first + AT_ONCE], None
        if keypoints is not None and translation is not None:
            lines = keypoints @ group + translation[first : first + AT_ONCE, None]
            sight = Sight.along(keypoints, lines, KEYPOINT_WEIGHT)
        limit = functools.partial(within_limits, body)
        rotations, betas, place = fitter.refine(fitter.bone_by_bone(group), group, rounds, sight, limit)
        rotations, betas = within_limits(body, rotations), betas.clamp(-LARGEST_BETA, LARGEST_BETA)
        found = small(betas, rotations, place).vertices
        shift = (group - found).mean(1)
        error = 1000 * (found + shift[:, None] - group).norm(dim=-1).mean(-1)
        parts.append(FittedBodies(matrix_to_axis_angle(rotations), betas, place + shift, error))
    return FittedBodies(*(torch.cat(values) for values in zip(*parts, strict=True)))


def within_limits(
    body: Body,
    rotations: Tensor,  # (N, J, 3, 3) relative to the parent
) -> Tensor:  # (N, J, 3, 3)
    """The nearest pose within joint limits, for a body whose first 22 joints are SMPL's; other poses are unchanged."""
    if body.joint_names[:22] != SMPL24[:22]:
        return rotations
    names = len(SMPL24)
    shown = rotations[:, :22] if body.joint_names != SMPL24 else rotations
    if shown.shape[1] < names:
        rest = torch.eye(3, dtype=rotations.dtype, device=rotations.device).expand(len(rotations), 2, 3, 3)
        shown = torch.cat([shown, rest], 1)
    angles = rotations_to_angles(shown)
    limited = angles_to_rotations(clamp_angles(within_reach(angles)))
    count = names if body.joint_names == SMPL24 else 22
    # The root has no limit; joints inside their limits are returned without rounding.
    outside = limit_excess(angles)[:, 1:count] > 1e-3
    outside[:, _SHOULDERS] |= outside[:, _COLLARS]  # a shoulder's angles depend on collar and shoulder
    joints = torch.where(outside[..., None, None], limited[:, 1:count], rotations[:, 1:count])
    return torch.cat([rotations[:, :1], joints, rotations[:, count:]], 1)


@functools.lru_cache(maxsize=4)
def _selected(body: Body, ids: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Body:
    return body.select(torch.tensor(ids)).to(device)


@functools.lru_cache(maxsize=4)
def _fitter(
    body: Body, device: torch.device, dtype: torch.dtype, ids: tuple[int, ...] | None = None, noise: float = NOISE
) -> BodyFitter:
    # Not keyed by the body alone: `.to()` modifies a body in place.
    return BodyFitter(body, None if ids is None else torch.tensor(ids, device=device), noise)
