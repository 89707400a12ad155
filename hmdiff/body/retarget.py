"""Retarget poses of one body to another, such as a user's SMPL or SMPL-X.

Both bodies have SMPL's joints and a T-pose as rest pose. The target's betas are fitted to the shaped rest surface by
nearest points (ICP) with a standard normal prior; rotations are copied, as both share the skeleton; the root joint
keeps its position. Shapes outside the target's shape space and small differences of the rest poses remain: `error_mm`
is the joints' distance. Our choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle

ROUNDS = 12  # ICP iterations
PRIOR = 1e-5  # square metres: weight of one standard deviation of a beta against the mean squared distance
SHARED = 22  # the joints that SMPL, SMPL-X and the free body have in common


class Retargeted(NamedTuple):
    pose: Tensor  # (F, J', 3) axis-angles of the target's joints
    betas: Tensor  # (B',)
    translation: Tensor  # (F, 3) metres
    error_mm: Tensor  # (F,) mean distance of the shared joints


@torch.no_grad()
def retarget(
    body: Body,  # with SMPL's 24 joints
    target: Body,
    pose: Tensor,  # (F, J, 3) axis-angles of `body`
    betas: Tensor,  # (B,)
    translation: Tensor,  # (F, 3) metres
) -> Retargeted:
    """The same motion for the target body.

    Raises:
        UserError: a target without SMPL's joints, such as a hand.
    """
    if target.joint_names[:SHARED] != body.joint_names[:SHARED]:
        raise UserError(f"body {target.name!r} has not the joints of {body.name!r}; give an SMPL or SMPL-X file")
    rotations = axis_angle_to_matrix(pose.to(body.v_template))
    shape = fit_rest_shape(body, target, betas)
    turned = target.from_smpl(rotations).to(target.v_template)
    wanted = body(betas.to(body.v_template), rotations, translation.to(body.v_template)).joints[:, :SHARED]
    found = target(shape, turned).joints[:, :SHARED]
    place = (wanted.to(found) - found).mean(1)
    error = 1000 * (found + place[:, None] - wanted.to(found)).norm(dim=-1).mean(-1)
    return Retargeted(matrix_to_axis_angle(turned), shape, place, error)


def fit_rest_shape(body: Body, target: Body, betas: Tensor) -> Tensor:  # (B',)
    """Betas of the target whose rest-pose surface and joints are nearest to those of the shaped body."""
    rest = torch.eye(3).expand(body.num_joints, 3, 3).to(body.v_template)
    posed = body(betas.to(body.v_template), rest)
    middle = posed.joints[:SHARED].mean(0)
    surface = (posed.vertices - middle).double().cpu()
    joints = (posed.joints[:SHARED] - middle).double().cpu()
    tree = cKDTree(surface.numpy())
    joint_basis = target.joint_shapedirs[:SHARED].double().cpu()  # (22, 3, B')
    drift = joint_basis.mean(0)  # of the joints' centroid, which stays at the origin
    joint_basis = joint_basis - drift
    joint_rest = target.joint_template[:SHARED].double().cpu()
    template = target.v_template.double().cpu() - joint_rest.mean(0)
    joint_rest = joint_rest - joint_rest.mean(0)
    basis = target.shapedirs.double().cpu() - drift  # (V', 3, B')
    shape = basis.new_zeros(target.num_betas)
    for _ in range(ROUNDS):
        _, nearest = tree.query((template + basis @ shape).numpy())
        # Vertices determine the girth, joints the lengths, along which nearest points slide: both as mean squares.
        normal, slope = PRIOR * torch.eye(len(shape), dtype=torch.float64), torch.zeros_like(shape)
        for design, residual in ((basis, surface[nearest] - template), (joint_basis, joints - joint_rest)):
            flat = design.flatten(0, 1)
            normal = normal + flat.mT @ flat / len(design)
            slope = slope + flat.mT @ residual.flatten() / len(design)
        shape = torch.linalg.solve(normal, slope)
    return shape.to(target.v_template)
