"""Pose and shape of a body model from its vertices, so that a recovered mesh can be animated.

min over R, beta, t of sum_v |x_v - v(R, beta, t)|^2 + sigma^2 |beta|^2, sigma the noise expected of a vertex: the
most likely body, betas being standard normal. Each bone's rotation starts from an orthogonal Procrustes fit of its own
vertices (Kabsch, Acta Cryst. 1976), which no large pose traps; Levenberg-Marquardt then fits everything together.
Symbols: N bodies, P points (vertices that are fitted), J joints, B shape coefficients. The method is our choice.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.anatomy import angles_to_rotations, clamp_angles, limit_excess, rotations_to_angles, within_reach
from hmdiff.body.body import Body
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle

_COLLARS = [SMPL24.index(f"{side}_collar") - 1 for side in ("left", "right")]  # the root left out
_SHOULDERS = [SMPL24.index(f"{side}_shoulder") - 1 for side in ("left", "right")]
AT_ONCE = 32  # bodies: bounds the memory, changes no result
POINTS = 640  # vertices that are fitted, spread over the surface
POINTS_A_BONE = 12  # at least, of those that a bone moves most
NOISE = 0.005  # sigma, metres
# Metres: a predicted vertex is off by about 2 cm, and together with its neighbours, so that they say less than as many
# independent ones.
PREDICTION_NOISE = 0.05
LARGEST_BETA = 4.0  # of a fitted prediction, standard deviations
ROUNDS = 4


class FittedBodies(NamedTuple):
    pose: Tensor  # (N, J, 3) axis-angles, relative to the parent; the root's first; a hand's mean pose included
    betas: Tensor  # (N, B)
    translation: Tensor  # (N, 3) metres; body(betas, axis_angle_to_matrix(pose), translation) is the fitted mesh
    error_mm: Tensor  # (N,) mean distance of the given vertices to the fitted ones, over all vertices


@torch.no_grad()
def fit_parameters(
    body: Body,
    vertices: Tensor,  # (N, V, 3) metres, in any upright or turned frame: the root's rotation takes it up
    rounds: int = ROUNDS,
) -> FittedBodies:
    """Fit every mesh on its own: a result does not depend on the batch, but for rounding. Pose blend shapes count.

    The body's own sex and hand are fitted, whatever the mesh's: load the body that the mesh is of. A mesh that is no
    body of the model's (a mirror image, noise) gets the nearest one found, and its `error_mm` says so.

    Raises:
        UserError: vertices of another shape than the body's, or that are not finite.
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
    rounds: int = 2,
) -> FittedBodies:
    """The bodies nearest to predicted coarse meshes: what `surface=body` of the pipeline shows.

    A prediction is off by centimetres where it is unsure, so the prior of the betas is that of such noise, and the
    joints of a body with SMPL's skeleton are brought inside their limits (`hmdiff/body/anatomy.py`). `error_mm` is of
    the coarse vertices. Raises `UserError` as `fit_parameters` does.
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
    for group in coarse.split(AT_ONCE):
        rotations, betas, translation = fitter.fit(group, rounds)
        rotations, betas = within_limits(body, rotations), betas.clamp(-LARGEST_BETA, LARGEST_BETA)
        found = small(betas, rotations, translation).vertices
        shift = (group - found).mean(1)
        error = 1000 * (found + shift[:, None] - group).norm(dim=-1).mean(-1)
        parts.append(FittedBodies(matrix_to_axis_angle(rotations), betas, translation + shift, error))
    return FittedBodies(*(torch.cat(values) for values in zip(*parts, strict=True)))


def within_limits(
    body: Body,
    rotations: Tensor,  # (N, J, 3, 3) relative to the parent
) -> Tensor:  # (N, J, 3, 3)
    """The nearest pose within joint limits, for a body whose first 22 joints are SMPL's; any other pose as it is."""
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
    # The root has no limit; what is inside its limits stays as it is, unrounded.
    outside = limit_excess(angles)[:, 1:count] > 1e-3
    outside[:, _SHOULDERS] |= outside[:, _COLLARS]  # a shoulder's angles are those of collar and shoulder together
    joints = torch.where(outside[..., None, None], limited[:, 1:count], rotations[:, 1:count])
    return torch.cat([rotations[:, :1], joints, rotations[:, count:]], 1)


@functools.lru_cache(maxsize=4)
def _selected(body: Body, ids: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Body:
    return body.select(torch.tensor(ids)).to(device)


@functools.lru_cache(maxsize=4)
def _fitter(
    body: Body, device: torch.device, dtype: torch.dtype, ids: tuple[int, ...] | None = None, noise: float = NOISE
) -> _Fitter:
    # Of the body as it is now: `.to()` changes a body in its place.
    return _Fitter(body, None if ids is None else torch.tensor(ids, device=device), noise)


class _Placed(NamedTuple):
    """N bodies at their parameters, and how far they are from the target."""

    rotations: Tensor  # (N, J, 3, 3) relative to the parent
    betas: Tensor  # (N, B)
    translation: Tensor  # (N, 3)
    world: Tensor  # (N, J, 3, 3) rotations in the world
    joints: Tensor  # (N, J, 3, 1 + B): joints are linear in the betas
    moved: Tensor  # (N, P, 3, J) every vertex as every bone places it, by its weight
    residual: Tensor  # (N, P, 3)
    cost: Tensor  # (N,)


class _Fitter:
    """What of a body does not change from fit to fit."""

    def __init__(self, body: Body, ids: Tensor | None = None, noise: float = NOISE) -> None:
        self.ids = _spread_vertices(body) if ids is None else ids
        self.noise = noise
        small = body.select(self.ids)
        self.template, self.shapedirs, self.posedirs = small.v_template, small.shapedirs, small.posedirs
        self.weights = small.lbs_weights  # (P, J)
        self.joint_basis = torch.cat([body.joint_template[..., None], body.joint_shapedirs], -1)  # (J, 3, 1 + B)
        self.parents = body.parents
        self.above = torch.tensor([max(parent, 0) for parent in body.parents], device=self.template.device)
        below = torch.eye(body.num_joints)  # below[j, k]: joint k hangs on j, or is j
        for joint in range(body.num_joints - 1, 0, -1):
            below[body.parents[joint]] += below[joint]
        self.below = below.to(self.weights)
        self.moved = self.weights @ self.below.T  # (P, J) how much of a vertex turns with a joint
        depth = [0] * body.num_joints
        for joint in range(1, body.num_joints):
            depth[joint] = depth[body.parents[joint]] + 1
        self.levels = [[j for j, d in enumerate(depth) if d == level] for level in range(max(depth) + 1)]

    def fit(
        self,
        target: Tensor,  # (N, P, 3)
        rounds: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # rotations (N, J, 3, 3), betas (N, B), translation (N, 3)
        centre = target.mean(1)  # far from the origin float32 would lose the millimetres
        target = target - centre[:, None]
        rotations = self._bone_rotations(target)
        betas = target.new_zeros(len(target), self.shapedirs.shape[-1])
        best = self._place(rotations, betas, torch.zeros_like(centre), target)
        damping = torch.full_like(best.cost, 1e-4)
        joints = len(self.parents)
        for _ in range(rounds):
            normal, slope = self._normal_equations(best)
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            damped = normal + torch.diag_embed(damping[:, None] * diagonal + 1e-7)
            step = torch.linalg.solve_ex(damped.double(), slope.double())[0].to(target)
            turn, growth, shift = step.split([3 * joints, betas.shape[1], 3], -1)
            parents = best.world[:, self.above].clone()
            parents[:, 0] = torch.eye(3).to(parents)
            local = (parents.mT @ turn.unflatten(-1, (3, -1)).mT[..., None])[..., 0]
            proposed = self._place(
                axis_angle_to_matrix(local) @ best.rotations, best.betas + growth, best.translation + shift, target
            )
            better = proposed.cost < best.cost
            damping = torch.where(better, damping / 10, damping * 10).clamp(1e-8, 1e4)
            best = (
                proposed
                if better.all()
                else _Placed(
                    *(
                        torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
                        for new, old in zip(proposed, best, strict=True)
                    )
                )
            )
        return best.rotations, best.betas, best.translation + centre

    def _bone_rotations(
        self,
        target: Tensor,  # (N, P, 3)
    ) -> Tensor:  # (N, J, 3, 3) relative to the parent
        """Each bone's own Procrustes fit, from the root outwards, with a slight pull towards its parent's rotation."""
        weight = self.weights.square()
        weight = weight / weight.sum(0).clamp_min(1e-9)  # (P, J)
        rest = self.template - self.template.mean(0)
        middle = (weight.T @ rest)[None, :, :, None] * (weight.T @ target)[:, :, None]  # (N, J, 3, 3), rest by target
        design = (weight[:, :, None] * rest[:, None]).flatten(1)  # (P, J * 3)
        covariance = (design.T @ target).unflatten(1, (-1, 3)) - middle
        pull = 1e-4  # square metres: a bone of a few centimetres follows its own vertices
        turned: list[Tensor | None] = [None] * len(self.parents)
        identity = torch.eye(3).to(target).expand(len(target), 1, 3, 3)
        for level in self.levels:
            above = [self.parents[joint] for joint in level]
            towards = identity if level == [0] else torch.stack([turned[parent] for parent in above], 1)  # type: ignore[arg-type,misc]
            strength = 1e-9 if level == [0] else pull
            u, _, vh = torch.linalg.svd(covariance[:, level].mT + strength * towards)
            sign = torch.ones_like(u[..., 0])
            sign[..., -1] = torch.linalg.det(u @ vh)
            for row, joint in enumerate(level):
                turned[joint] = ((u * sign[..., None, :]) @ vh)[:, row]
        world = torch.stack(turned, 1)  # type: ignore[arg-type]
        return torch.cat([world[:, :1], world[:, self.above[1:]].mT @ world[:, 1:]], 1)

    def _chain(self, rotations: Tensor) -> Tensor:  # (N, J, 3, 3) -> in the world
        turned: list[Tensor] = []
        for joint, parent in enumerate(self.parents):
            turned.append(rotations[:, joint] if joint == 0 else turned[parent] @ rotations[:, joint])
        return torch.stack(turned, 1)

    def _place(
        self,
        rotations: Tensor,  # (N, J, 3, 3)
        betas: Tensor,  # (N, B)
        translation: Tensor,  # (N, 3)
        target: Tensor,  # (N, P, 3)
    ) -> _Placed:
        count = len(target)
        world = self._chain(rotations)
        placed = [self.joint_basis[:1].expand(count, -1, -1, -1)[:, 0]]  # (N, 3, 1 + B)
        for joint, parent in enumerate(self.parents[1:], 1):
            bone = self.joint_basis[joint] - self.joint_basis[parent]
            placed.append(placed[parent] + world[:, parent] @ bone)
        joints = torch.stack(placed, 1)  # (N, J, 3, 1 + B)
        shift = joints - world @ self.joint_basis  # G_k v = world_k v + shift_k
        betas_one = torch.cat([betas.new_ones(count, 1), betas], 1)

        rest = self.template + (betas @ self.shapedirs.flatten(0, 1).T).unflatten(-1, (-1, 3))
        if self.posedirs is not None:
            feature = (rotations[:, 1:] - torch.eye(3).to(rotations)).flatten(1)
            rest = rest + (feature @ self.posedirs.flatten(0, 1).T).unflatten(-1, (-1, 3))
        placed_by = (rest @ world.permute(0, 3, 2, 1).flatten(2)).unflatten(-1, (3, -1))
        moved = (placed_by + (shift @ betas_one[:, None, :, None])[..., 0].mT[:, None]) * self.weights[:, None]
        residual = target - moved.sum(-1) - translation[:, None]
        cost = residual.square().sum((1, 2)) + self.noise**2 * betas.square().sum(-1)
        return _Placed(rotations, betas, translation, world, joints, moved, residual, cost)

    def _normal_equations(
        self, at: _Placed
    ) -> tuple[Tensor, Tensor]:  # J^T J (N, U, U), J^T r (N, U); U = 3 J turns (x of all joints first) + B + 3
        """From one Gram matrix.

        A turn w of joint j, in the world, moves a vertex by w x d_vj, with d_vj = sum_{k at or below j} W_vk (G_k v -
        p_j). So every block of J^T J is a sum of products of d, of the posed shape directions and of the residual. The
        pose blend shapes' own dependence on the pose is small, and left out of J alone.
        """
        world, joints, betas, moved, residual = at.world, at.joints, at.betas, at.moved, at.residual
        count, points, num_betas = len(moved), len(self.template), betas.shape[1]
        shift = joints - world @ self.joint_basis
        betas_one = torch.cat([betas.new_ones(count, 1), betas], 1)
        pivot = (joints @ betas_one[:, None, :, None])[..., 0].mT  # (N, 3, J)
        arm = moved @ self.below.T - self.moved[:, None] * pivot[:, None]

        blended = (self.weights @ world.flatten(2)).unflatten(-1, (3, 3)).transpose(0, 1).flatten(1, 2)  # (P, N * 3, 3)
        grown = (blended @ self.shapedirs).unflatten(1, (count, 3)).transpose(0, 1)  # (N, P, 3, B)
        grown = grown + (self.weights @ shift[..., 1:].flatten(2)).unflatten(-1, (3, num_betas))
        identity = torch.eye(3).to(moved)
        linear = torch.cat([grown, identity.expand(count, points, 3, 3), residual[..., None]], -1)  # (N, P, 3, L)
        everything = torch.cat([arm.flatten(2), linear.flatten(2)], -1)
        gram = everything.mT @ everything

        num_joints, columns = len(self.parents), linear.shape[-1]
        turns = 3 * num_joints
        among = gram[:, :turns, :turns].unflatten(1, (3, num_joints)).unflatten(3, (3, num_joints))  # a j b i
        trace = among.diagonal(dim1=1, dim2=3).sum(-1)  # (N, J, J)
        turn_turn = identity[None, :, None, :, None] * trace[:, None, :, None] - among.transpose(1, 3)
        cross = gram[:, :turns, turns:].unflatten(1, (3, num_joints)).unflatten(3, (3, columns))  # c j d l
        # (arm x column)_a = arm_b column_c - arm_c column_b for a, b, c in turn
        turn_linear = torch.cat(
            [
                cross[:, 1, :, 2] - cross[:, 2, :, 1],
                cross[:, 2, :, 0] - cross[:, 0, :, 2],
                cross[:, 0, :, 1] - cross[:, 1, :, 0],
            ],
            1,
        )
        inner = gram[:, turns:, turns:].unflatten(1, (3, columns)).unflatten(3, (3, columns))
        linear_linear = inner.diagonal(dim1=1, dim2=3).sum(-1)  # (N, L, L)

        normal = torch.cat(
            [
                torch.cat([turn_turn.flatten(3, 4).flatten(1, 2), turn_linear[..., :-1]], -1),
                torch.cat([turn_linear[..., :-1].mT, linear_linear[:, :-1, :-1]], -1),
            ],
            1,
        )
        slope = torch.cat([turn_linear[..., -1], linear_linear[:, :-1, -1]], -1)
        prior, shapes = self.noise**2, slice(turns, turns + num_betas)
        normal.diagonal(dim1=-2, dim2=-1)[:, shapes] += prior
        slope[:, shapes] -= prior * betas
        return normal, slope


def _spread_vertices(body: Body) -> Tensor:  # (P,) ascending
    """Vertices spread over the surface by farthest-point sampling, and of every bone those that it moves most."""
    points = body.v_template.detach().cpu().numpy().astype(np.float64)
    weights = body.lbs_weights.detach().cpu().numpy()
    chosen = [int(points[:, 1].argmax())]
    distance = np.full(len(points), np.inf)
    for _ in range(min(POINTS, len(points)) - 1):
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(-1))
        chosen.append(int(distance.argmax()))
    kept = set(chosen)
    for bone in weights.T:
        order = np.argsort(-bone, kind="stable")
        if (bone[chosen] > 0.5).sum() < POINTS_A_BONE:
            kept |= set(order[:POINTS_A_BONE][bone[order[:POINTS_A_BONE]] > 1e-3].tolist())
    return torch.tensor(sorted(kept), device=body.v_template.device)
