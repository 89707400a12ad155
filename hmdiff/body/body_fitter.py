"""The least-squares solver of `fitting.py`: per-bone Procrustes, then Levenberg-Marquardt on all parameters.

min over R, beta, t of sum_v |x_v - v|^2 + sigma^2 |beta|^2, and with keypoints + c sum_j |P_j (k_j(x) - k_j(v))|^2:
keypoints k are linear in the vertices, and P_j removes the component along the line of sight, which a photo does not
determine. Each bone's rotation is initialised by an orthogonal Procrustes fit of its vertices (Kabsch, Acta Cryst.
1976), so that large poses do not end in local minima. Symbols: N bodies, P points (fitted vertices), J joints, B shape
coefficients, U = 3 J rotations (x of all joints first) + B + 3 unknowns, K keypoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle

POINTS = 640  # number of fitted vertices, spread over the surface
POINTS_A_BONE = 12  # minimum number of points with the largest weights of each bone
NOISE = 0.005  # sigma, metres
HELD = 1e6  # square metres, added to the diagonal of a held joint; its vertices contribute only a few


class Sight(NamedTuple):
    """Keypoints whose projection the fit preserves."""

    regressor: Tensor  # (K, P) keypoints as weighted sums of the fitted points
    across: Tensor  # (N, K, 3, 3) projector across the line of sight, times sqrt(weight)

    @classmethod
    def along(
        cls,
        regressor: Tensor,  # (K, P)
        lines: Tensor,  # (N, K, 3) from the camera to every keypoint, any length
        weight: float,  # of a keypoint, relative to a vertex
    ) -> Sight:
        line = torch.nn.functional.normalize(lines, dim=-1)
        across = torch.eye(3).to(line) - line[..., None] * line[..., None, :]
        return cls(regressor, weight**0.5 * across)

    def seen(self, points: Tensor) -> Tensor:  # (N, P, 3) -> (N, K, 3)
        return (self.across @ (self.regressor @ points)[..., None])[..., 0]


class Placement(NamedTuple):
    """The parameters of N bodies."""

    rotations: Tensor  # (N, J, 3, 3) relative to the parent
    betas: Tensor  # (N, B)
    translation: Tensor  # (N, 3) metres


class _Placed(NamedTuple):
    """N bodies at their parameters, with residuals to the target."""

    rotations: Tensor  # (N, J, 3, 3) relative to the parent
    betas: Tensor  # (N, B)
    translation: Tensor  # (N, 3)
    world: Tensor  # (N, J, 3, 3) global rotations
    joints: Tensor  # (N, J, 3, 1 + B): joints are linear in the betas
    moved: Tensor  # (N, P, 3, J) each vertex transformed by each bone, times its weight
    residual: Tensor  # (N, P, 3)
    cost: Tensor  # (N,)


class BodyFitter:
    """Precomputed quantities of a body that all fits share."""

    def __init__(self, body: Body, ids: Tensor | None = None, noise: float = NOISE) -> None:
        self.ids = _spread_vertices(body) if ids is None else ids
        self.noise = noise
        small = body.select(self.ids)
        self.template, self.shapedirs, self.posedirs = small.v_template, small.shapedirs, small.posedirs
        self.weights = small.lbs_weights  # (P, J)
        self.joint_basis = torch.cat([body.joint_template[..., None], body.joint_shapedirs], -1)  # (J, 3, 1 + B)
        self.parents = body.parents
        self.above = torch.tensor([max(parent, 0) for parent in body.parents], device=self.template.device)
        below = torch.eye(body.num_joints)  # below[j, k]: joint k is j or its descendant
        for joint in range(body.num_joints - 1, 0, -1):
            below[body.parents[joint]] += below[joint]
        self.below = below.to(self.weights)
        self.moved = self.weights @ self.below.T  # (P, J) how much each vertex rotates with each joint
        depth = [0] * body.num_joints
        for joint in range(1, body.num_joints):
            depth[joint] = depth[body.parents[joint]] + 1
        self.levels = [[j for j, d in enumerate(depth) if d == level] for level in range(max(depth) + 1)]

    def fit(
        self,
        target: Tensor,  # (N, P, 3)
        rounds: int,
        sight: Sight | None = None,
    ) -> Placement:
        """Per-bone Procrustes, then the given number of rounds on all parameters."""
        return self.refine(self.bone_by_bone(target), target, rounds, sight)

    def bone_by_bone(
        self,
        target: Tensor,  # (N, P, 3)
    ) -> Placement:
        """Per-bone Procrustes with the mean shape."""
        centre = target.mean(1)
        rotations = self._bone_rotations(target - centre[:, None])
        return Placement(rotations, target.new_zeros(len(target), self.shapedirs.shape[-1]), centre)

    def refine(
        self,
        start: Placement,
        target: Tensor,  # (N, P, 3)
        rounds: int,
        sight: Sight | None = None,
        limit: Callable[[Tensor], Tensor] | None = None,  # (N, J, 3, 3) relative rotations -> the nearest allowed
    ) -> Placement:
        """Levenberg-Marquardt from a given placement.

        With `limit`, joints that a step takes beyond it are held there, and the others' step is solved anew with the
        same linearisation: a clamped joint moves its descendants, and they compensate.
        """
        centre = target.mean(1)  # centred: float32 would lose millimetres far from the origin
        target = target - centre[:, None]
        best = self._place(start.rotations, start.betas, start.translation - centre, target, sight)
        damping = torch.full_like(best.cost, 1e-4)
        for _ in range(rounds):
            normal, slope = self._normal_equations(best, sight)
            damped = normal + torch.diag_embed(damping[:, None] * normal.diagonal(dim1=-2, dim2=-1) + 1e-7)
            parents = best.world[:, self.above].clone()
            parents[:, 0] = torch.eye(3).to(parents)
            step = _solve(damped, slope)
            turned = self._turned(best, parents, step)
            if limit is not None:
                allowed = limit(turned)
                held = (allowed != turned).flatten(2).any(-1)  # (N, J)
                turns = (parents @ matrix_to_axis_angle(allowed @ best.rotations.mT)[..., None])[..., 0]
                strength = HELD * held.repeat(1, 3)
                count = strength.shape[1]
                slope[:, :count] += strength * turns.mT.flatten(1)
                damped[:, range(count), range(count)] += strength
                step = _solve(damped, slope)
                turned = self._turned(best, parents, step)
            growth, shift = step[:, 3 * len(self.parents) :].split([start.betas.shape[1], 3], -1)
            proposed = self._place(turned, best.betas + growth, best.translation + shift, target, sight)
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
        return Placement(best.rotations, best.betas, best.translation + centre)

    def _turned(
        self,
        at: _Placed,
        parents: Tensor,  # (N, J, 3, 3) global rotations
        step: Tensor,  # (N, U)
    ) -> Tensor:  # (N, J, 3, 3)
        turn = step[:, : 3 * len(self.parents)].unflatten(-1, (3, -1))
        return axis_angle_to_matrix((parents.mT @ turn.mT[..., None])[..., 0]) @ at.rotations

    def _bone_rotations(
        self,
        target: Tensor,  # (N, P, 3)
    ) -> Tensor:  # (N, J, 3, 3) relative to the parent
        """Procrustes fit of each bone, from the root outwards, slightly regularised towards the parent's rotation."""
        weight = self.weights.square()
        weight = weight / weight.sum(0).clamp_min(1e-9)  # (P, J)
        rest = self.template - self.template.mean(0)
        middle = (weight.T @ rest)[None, :, :, None] * (weight.T @ target)[:, :, None]  # (N, J, 3, 3), rest by target
        design = (weight[:, :, None] * rest[:, None]).flatten(1)  # (P, J * 3)
        covariance = (design.T @ target).unflatten(1, (-1, 3)) - middle
        pull = 1e-4  # square metres: small, so that even a bone of a few centimetres follows its vertices
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

    def _chain(self, rotations: Tensor) -> Tensor:  # (N, J, 3, 3) -> global
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
        sight: Sight | None,
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
        # Homogeneous coordinates: one product per bone saves an addition over the largest tensor.
        offset = (shift @ betas_one[:, None, :, None])[..., 0].mT  # (N, 3, J)
        motion = torch.cat([world.permute(0, 3, 2, 1).flatten(2), offset.flatten(1)[:, None]], 1)  # (N, 4, 3 * J)
        homogeneous = torch.nn.functional.pad(rest, (0, 1), value=1.0)
        moved = (homogeneous @ motion).unflatten(-1, (3, -1)) * self.weights[:, None]
        residual = target - moved.sum(-1) - translation[:, None]
        cost = residual.square().sum((1, 2)) + self.noise**2 * betas.square().sum(-1)
        if sight is not None:
            cost = cost + sight.seen(residual).square().sum((1, 2))
        return _Placed(rotations, betas, translation, world, joints, moved, residual, cost)

    def _normal_equations(
        self, at: _Placed, sight: Sight | None
    ) -> tuple[Tensor, Tensor]:  # J^T J (N, U, U), J^T r (N, U)
        """From one Gram matrix.

        A rotation w of joint j (global frame) moves a vertex by w x d_vj, with d_vj = sum_{k at or below j} W_vk (G_k v
        - p_j). So every block of J^T J is a sum of products of d, the posed shape directions and the residual. J
        ignores the dependence of the pose blend shapes on the pose, which is small.
        """
        world, joints, betas, moved, residual = at.world, at.joints, at.betas, at.moved, at.residual
        count, points, num_betas = len(moved), len(self.template), betas.shape[1]
        shift = joints - world @ self.joint_basis
        betas_one = torch.cat([betas.new_ones(count, 1), betas], 1)
        pivot = (joints @ betas_one[:, None, :, None])[..., 0].mT  # (N, 3, J)

        blended = (self.weights @ world.flatten(2)).unflatten(-1, (3, 3)).transpose(0, 1).flatten(1, 2)  # (P, N * 3, 3)
        grown = (blended @ self.shapedirs).unflatten(1, (count, 3)).transpose(0, 1)  # (N, P, 3, B)
        grown = grown + (self.weights @ shift[..., 1:].flatten(2)).unflatten(-1, (3, num_betas))
        identity = torch.eye(3).to(moved)
        arm = torch.addcmul(moved @ self.below.T, self.moved[:, None], pivot[:, None], value=-1)
        num_joints, columns = len(self.parents), num_betas + 4
        turns = 3 * num_joints
        linear = moved.new_empty(count, points, 3, columns)  # shape directions, translation, residual
        linear[..., :num_betas], linear[..., num_betas:-1] = grown, identity
        linear[..., -1] = residual
        everything = torch.cat([arm.flatten(2), linear.flatten(2)], -1)
        gram = everything[..., :turns].mT @ everything

        among = gram[:, :turns, :turns].unflatten(1, (3, num_joints)).unflatten(3, (3, num_joints))  # a j b i
        trace = among.diagonal(dim1=1, dim2=3).sum(-1)  # (N, J, J)
        turn_turn = identity[None, :, None, :, None] * trace[:, None, :, None] - among.transpose(1, 3)
        cross = gram[:, :turns, turns:].unflatten(1, (3, num_joints)).unflatten(3, (3, columns))  # c j d l
        # (arm x column)_a = arm_b column_c - arm_c column_b for cyclic a, b, c
        turn_linear = torch.cat(
            [
                cross[:, 1, :, 2] - cross[:, 2, :, 1],
                cross[:, 2, :, 0] - cross[:, 0, :, 2],
                cross[:, 0, :, 1] - cross[:, 1, :, 0],
            ],
            1,
        )
        rows = linear.flatten(1, 2)
        linear_linear = rows.mT @ rows  # (N, L, L)

        normal = torch.cat(
            [
                torch.cat([turn_turn.flatten(3, 4).flatten(1, 2), turn_linear[..., :-1]], -1),
                torch.cat([turn_linear[..., :-1].mT, linear_linear[:, :-1, :-1]], -1),
            ],
            1,
        )
        slope = torch.cat([turn_linear[..., -1], linear_linear[:, :-1, -1]], -1)
        if sight is not None:
            columns_seen = self._seen_columns(sight, everything)
            normal = normal + columns_seen[..., :-1].mT @ columns_seen[..., :-1]
            slope = slope + (columns_seen[..., :-1].mT @ columns_seen[..., -1:])[..., 0]
        prior, shapes = self.noise**2, slice(turns, turns + num_betas)
        normal.diagonal(dim1=-2, dim2=-1)[:, shapes] += prior
        slope[:, shapes] -= prior * betas
        return normal, slope

    def _seen_columns(
        self,
        sight: Sight,
        everything: Tensor,  # (N, P, 3 J + 3 L) arms; shape directions, translation and residual
    ) -> Tensor:  # (N, K * 3, U + 1) Jacobian of the keypoints across the line of sight, and their residual
        seen = torch.matmul(sight.regressor, everything)
        arm, others = seen.split([3 * len(self.parents), seen.shape[-1] - 3 * len(self.parents)], -1)
        x, y, z = arm.unflatten(-1, (3, -1)).unbind(2)  # (N, K, J)
        nothing = torch.zeros_like(x)
        # w x arm, for w along each axis
        turns = torch.stack(
            [
                torch.cat([nothing, z, -y], -1),
                torch.cat([-z, nothing, x], -1),
                torch.cat([y, -x, nothing], -1),
            ],
            2,
        )
        return (sight.across @ torch.cat([turns, others.unflatten(-1, (3, -1))], -1)).flatten(1, 2)


def _solve(
    normal: Tensor,  # (N, U, U)
    slope: Tensor,  # (N, U)
) -> Tensor:  # (N, U)
    """If not positive definite, the step is not finite or raises the cost, and is rejected."""
    factor = torch.linalg.cholesky_ex(normal.double())[0]
    return torch.cholesky_solve(slope.double()[..., None], factor)[..., 0].to(slope)


def _spread_vertices(body: Body) -> Tensor:  # (P,) ascending
    """Vertices from farthest-point sampling of the surface, and each bone's vertices of largest weight."""
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
