"""Loss terms of the optional modules, named and weighted. A module that is off, or a weight of 0, has no term.

D2A-HMR (arXiv 2403.09063, poster eq. 2): L = λ_d L_RLE + λ_v L_v + λ_3D L_3D + λ_2D L_2D + λ_s L_silh. L_v and L_3D are
the point error of `objective`; the λ are not published. JOTR (arXiv 2307.16377): two contrastive terms, 0.1 each, and
supervision of the joints after every layer. B people, M noise levels, K joints, C coarse vertices.

RLE in a diffusion model (see `losses/rle.py`): on x̂_0 at every noise level with the σ̂ of that level; the mean is
detached except at the terminal step, so that elsewhere only the squared error trains it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.geometry import weak_perspective_projection
from hmdiff.losses.mesh import mean_over_labelled, point_error, reprojection_error
from hmdiff.losses.rle import rle_error
from hmdiff.losses.silhouette import silhouette_error


@dataclasses.dataclass(frozen=True)
class PathOutputs:
    """Outputs of a model's optional modules in one training step."""

    mesh_scale: float = 1.0  # metres per unit of the points
    scale: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # RLE's σ̂: (B, M, K or C, 3 or 2)
    flows: Mapping[str, Callable[[Tensor], Tensor]] = dataclasses.field(default_factory=dict)  # log G for each
    rle_variant: str = "exact"
    silhouette: Tensor | None = None  # (B, S, S) logits
    estimates: Tensor | None = None  # (B, M, E, K, 3) joints after each block but the last
    meshes: Tensor | None = None  # (B, M, E, C, 3) vertices, likewise
    contrast: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # by name, unweighted
    vertices: Tensor | None = None  # (v,) long: coarse vertices in RLE's term in this step; None: all
    regressed: Tensor | None = None  # (B, M) bool: x_k is pure noise, so x̂_0 is a direct regression; None: all


def path_terms(
    config: LossConfig,
    sample: Sample,  # with unlabelled entries zeroed
    paths: PathOutputs,
    clean: Tensor,  # (B, M, P, 3) x̂_0
    truth: Tensor,  # (B, 1, P, 3)
    level_weight: Tensor,  # (B, M)
    camera: Tensor,  # (B, 3) predicted
    num_coarse: int,
    shares: dict[str, Tensor] | None = None,  # filled with the labelled fraction of the batch for each term
) -> dict[str, Tensor]:  # scalars, weighted
    """The terms of all active modules. A sample without a label does not contribute to that label's term."""
    terms: dict[str, Tensor] = {}
    joints, true_joints = clean[..., num_coarse:, :], truth[..., num_coarse:, :]
    if config.projection:
        error = reprojection_error(*_projected(sample, joints, true_joints, camera, paths.mesh_scale))
        terms["projection"] = config.projection * mean_over_labelled(error, sample.has_joints_3d, "projection", shares)
    if config.rle:
        for name, scale in paths.scale.items():
            labelled = sample.has_vertices if name == "vertices" else sample.has_joints_3d
            weight = None
            if name == "joints_2d":
                mean, target, weight = _projected(sample, joints, true_joints, camera, paths.mesh_scale)
            elif name == "vertices":
                rows = torch.arange(num_coarse, device=clean.device) if paths.vertices is None else paths.vertices
                mean, target, scale = clean[..., rows, :], truth[..., rows, :], scale[..., rows, :]
            else:
                mean, target = joints, true_joints
            if paths.regressed is not None:
                mean = torch.where(paths.regressed[..., None, None], mean, mean.detach())
            error = rle_error(mean, scale, target.expand_as(mean), paths.flows[name], paths.rle_variant, weight)
            term = f"rle_{name}"
            terms[term] = config.rle * mean_over_labelled(error, labelled, term, shares)
    if config.silhouette and paths.silhouette is not None and sample.silhouette is not None:
        target = sample.silhouette[:, None].to(paths.silhouette)
        target = F.interpolate(target, paths.silhouette.shape[-2:], mode="bilinear", antialias=True)[:, 0]
        error = silhouette_error(paths.silhouette, target.clamp(0, 1))
        terms["silhouette"] = config.silhouette * mean_over_labelled(error, sample.has_silhouette, "silhouette", shares)
    if config.estimates and paths.estimates is not None:
        error = point_error(paths.estimates, true_joints[:, :, None], config.points).mean(-1) * level_weight
        terms["estimates"] = config.estimates * mean_over_labelled(error, sample.has_joints_3d, "estimates", shares)
    if config.estimates and paths.meshes is not None:
        true_mesh = truth[..., :num_coarse, :]
        error = point_error(paths.meshes, true_mesh[:, :, None], config.points).mean(-1) * level_weight
        mean = mean_over_labelled(error, sample.has_vertices, "mesh_estimates", shares)
        terms["mesh_estimates"] = config.estimates * mean
    weights = {"joint_contrast": config.joint_contrast, "non_joint_contrast": config.non_joint_contrast}
    for name, value in paths.contrast.items():
        terms[name] = weights[name] * value
    return terms


def _projected(
    sample: Sample,
    joints: Tensor,  # (B, M, K, 3) units of the diffusion
    true_joints: Tensor,  # (B, 1, K, 3)
    camera: Tensor,  # (B, 3)
    mesh_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # predicted (B, M, K, 2), true (B, M, K, 2), counted (B, M, K) 0 or 1
    """Project predicted joints by the predicted camera, ground-truth joints by the ground-truth camera if known."""
    predicted = weak_perspective_projection(joints * mesh_scale, camera[:, None])
    known = torch.zeros(len(camera), device=camera.device)
    true_camera = torch.zeros_like(camera)
    if sample.camera is not None:
        true_camera = sample.camera.to(camera)
        known = torch.ones_like(known) if sample.has_camera is None else sample.has_camera.to(known)
    true = weak_perspective_projection(true_joints * mesh_scale, true_camera[:, None]).expand_as(predicted)
    return predicted, true, known[:, None, None].expand(predicted.shape[:-1])
