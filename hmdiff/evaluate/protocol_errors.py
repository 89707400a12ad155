"""Error functions of the named protocols: pure, with any leading dimensions.

Each function takes bodies with the protocol's joints (regressed in `protocols`) and returns a dictionary of metrics,
millimetres or shares 0..1. Without vertices, metrics that need them are omitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import H36M14, J14, SMPL24, joint_indices
from hmdiff.errors import UserError
from hmdiff.evaluate.hand_metrics import curve_area, f_score, orthogonal_align
from hmdiff.evaluate.metrics import MILLIMETRES, joint_error, mean_distance, procrustes_error, root_of, vertex_error
from hmdiff.geometry import similarity_transform

HIPS = ("left_hip", "right_hip")
Errors = dict[str, Tensor]  # metric -> (...)


@dataclasses.dataclass(frozen=True)
class Bodies:
    """Meshes, joints or both: metres, the camera's frame."""

    vertices: Tensor | None = None  # (..., V, 3)
    joints: Tensor | None = None  # (..., J, 3)
    joint_names: tuple[str, ...] = ()  # J

    def map(self, function: Callable[[Tensor], Tensor]) -> Bodies:
        """Apply `function` to vertices and joints."""
        vertices, joints = (None if value is None else function(value) for value in (self.vertices, self.joints))
        return Bodies(vertices, joints, self.joint_names)

    def named(self, names: Sequence[str]) -> Tensor:  # (..., len(names), 3)
        """Joints by name. Raises `UserError` for a missing one."""
        assert self.joints is not None
        missing = [name for name in names if name not in self.joint_names]
        if missing:
            known = ", ".join(self.joint_names)
            raise UserError(f"joint {missing[0]!r} is needed and not given; the joints given are {known}")
        return self.joints[..., joint_indices(names, self.joint_names), :]

    def regressed(self, regressor: Tensor, names: tuple[str, ...]) -> Bodies:
        """With joints regressed from the vertices by a (J, V) regressor."""
        assert self.vertices is not None
        return Bodies(self.vertices, regressor.to(self.vertices) @ self.vertices, names)


def joint_errors(
    predicted: Bodies,
    target: Bodies,
    joints: Sequence[str],  # to compare
    root: Sequence[str],  # joints whose mean is the root
) -> Errors:
    """MPJPE relative to the root, and PA-MPJPE (similarity with proper rotation), over the same joints."""
    names = list(dict.fromkeys([*joints, *root]))
    guess, truth = predicted.named(names), target.named(names)
    chosen = joint_indices(joints, names)
    return {
        "mpjpe": joint_error(guess, truth, names, root, joints),
        "pa_mpjpe": procrustes_error(guess[..., chosen, :], truth[..., chosen, :]),
    }


def vertex_errors(predicted: Bodies, target: Bodies, roots: tuple[Tensor, Tensor]) -> Errors:  # roots (..., 1, 3)
    """PVE, each mesh relative to its own root; empty if one of them has no vertices."""
    if predicted.vertices is None or target.vertices is None:
        return {}
    return {"pve": vertex_error(predicted.vertices, target.vertices, *roots)}


def _roots(predicted: Bodies, target: Bodies, root: Sequence[str]) -> tuple[Tensor, Tensor]:
    first, second = (root_of(bodies.named(root), root, root) for bodies in (predicted, target))
    return first, second


def spin_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    errors = joint_errors(predicted, target, J14, ("pelvis",))
    return errors | vertex_errors(predicted, target, _roots(predicted, target, ("pelvis",)))


def metro_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    errors = joint_errors(predicted, target, J14, HIPS)
    if predicted.vertices is None or target.vertices is None:
        return errors
    return errors | vertex_errors(predicted, target, _roots(predicted, target, ("pelvis",)))


def jotr_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    errors = joint_errors(predicted, target, H36M14, ("pelvis",))
    if predicted.vertices is None or target.vertices is None:
        return errors
    row = regressors["body"][:1].to(predicted.vertices)  # SMPL's joint 0, the pelvis
    return errors | vertex_errors(predicted, target, (row @ predicted.vertices, row @ target.vertices))


def humaniflow_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    points = {"mpjpe": (predicted.named(J14), target.named(J14))}
    if predicted.vertices is not None and target.vertices is not None:
        points["pve"] = (predicted.vertices, target.vertices)
    errors = {}
    for metric, (guess, truth) in points.items():
        errors[metric] = mean_distance(guess, truth)
        errors[f"{metric}_sc"] = mean_distance(scaled_onto(guess, truth), truth)
        errors[f"{metric}_pa"] = procrustes_error(guess, truth)
    return errors


def scaled_onto(
    source: Tensor,  # (..., P, 3)
    target: Tensor,  # (..., P, 3)
) -> Tensor:  # (..., P, 3)
    """HuManiFlow's scale correction: source with the mean and RMS radius of target, without rotation."""
    centred = source - source.mean(-2, keepdim=True)
    goal = target - target.mean(-2, keepdim=True)
    radius, target_radius = (points.square().sum((-2, -1), keepdim=True).sqrt() for points in (centred, goal))
    return centred * (target_radius / radius.clamp_min(1e-12)) + target.mean(-2, keepdim=True)


def emdb_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    errors = joint_errors(predicted, target, SMPL24, HIPS)
    if predicted.vertices is None or target.vertices is None:
        return errors
    errors |= vertex_errors(predicted, target, _roots(predicted, target, HIPS))
    # EMDB aligns the mesh by the similarity of the joints.
    guess, truth = torch.broadcast_tensors(predicted.named(SMPL24), target.named(SMPL24))
    scale, rotation, translation = similarity_transform(guess, truth)
    aligned = scale[..., None, None] * predicted.vertices @ rotation.mT + translation[..., None, :]
    return errors | {"pa_pve": mean_distance(aligned, target.vertices)}


def freihand_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    errors = {}
    points = {"mpjpe": (predicted.joints, target.joints), "pve": (predicted.vertices, target.vertices)}
    for metric, (guess, truth) in points.items():
        if guess is None or truth is None:
            continue
        if metric == "mpjpe":
            guess = predicted.named(target.joint_names)
        guess, truth = torch.broadcast_tensors(guess, truth)
        aligned = orthogonal_align(guess, truth)  # separately for joints and vertices
        errors[f"pa_{metric}"] = (aligned - truth).norm(dim=-1).mean(-1) * MILLIMETRES
        errors["auc_joints" if metric == "mpjpe" else "auc_vertices"] = curve_area(aligned, truth)
        if metric == "pve":
            errors["f_5"], errors["f_15"] = f_score(aligned, truth)
    return errors


def synthetic_errors(predicted: Bodies, target: Bodies, regressors: Mapping[str, Tensor]) -> Errors:
    errors = joint_errors(predicted, target, J14, HIPS)
    if predicted.vertices is None or target.vertices is None:
        return errors
    errors |= vertex_errors(predicted, target, _roots(predicted, target, HIPS))
    return errors | {"pa_pve": procrustes_error(predicted.vertices, target.vertices)}
