"""The training objective: named, weighted terms, each a mean over the people with its label.

L = L_points (on the prediction, weighted by noise level) + w_cam L_camera + w_e L_edges + keypoint terms
(`losses/keypoints.py`) + terms of optional modules (`losses/paths.py`). L_points is one mean over vertices and joints,
or λ_v L_v + λ_3D L_3D as in D2A-HMR's eq. 2. HMDiff's terms are not published.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.geometry import weak_perspective_projection
from hmdiff.losses.mesh import (
    camera_error,
    edge_error,
    mask_unlabelled,
    mean_over_labelled,
    point_error,
    reprojection_error,
)
from hmdiff.losses.paths import PathOutputs, path_terms
from hmdiff.losses.processes import over_processes


def objective(
    config: LossConfig,
    sample: Sample,
    prediction: Tensor,  # (B, M, P, 3) network output at M noise levels
    target: Tensor,  # (B, M, P, 3)
    level_weight: Tensor,  # (B, M)
    clean: Tensor,  # (B, M, P, 3) x̂_0
    truth: Tensor,  # (B, 1, P, 3) x_0
    share: Tensor,  # (B, M) alpha_bar
    camera: Tensor,  # (B, 3)
    num_coarse: int,
    edges: Tensor | None = None,  # (E, 2) of the coarse mesh
    paths: PathOutputs | None = None,
    more: Mapping[str, Tensor] | None = None,  # further terms, weighted
    shares: dict[str, Tensor] | None = None,  # labelled fraction of the batch for those terms
) -> dict[str, Tensor]:  # scalars: the weighted terms, and their sum as "loss"
    """Sum the terms. A sample without a label does not contribute to that label's term."""
    sample = sample.zero_unlabelled()
    weight = torch.ones(prediction.shape[-2], device=prediction.device)
    weight[num_coarse:] = config.joints
    labelled = None
    if sample.has_vertices is not None or sample.has_joints_3d is not None:
        weight = weight * _labelled_points(sample, len(prediction), len(weight), num_coarse)  # (B, 1, P)
        target, truth = (torch.where(weight[..., None] > 0, points, 0.0) for points in (target, truth))
        labelled = (weight > 0).any(-1)[:, 0]
        weight = torch.where(labelled[:, None, None], weight, 1.0)  # avoids 0 / 0 for samples without labels
    terms: dict[str, Tensor] = {}
    shares = {} if shares is None else shares
    if config.vertices or config.joints_3d:
        terms |= _terms_apart(config, sample, prediction, target, level_weight, num_coarse, shares)
    else:
        error = point_error(prediction, target, config.points, weight) * level_weight
        terms["points"] = mean_over_labelled(error, labelled, "points", shares)
    if config.camera:
        terms["camera"] = config.camera * mean_over_labelled(*_camera_term(sample, camera), "camera", shares)
    if config.edges and edges is not None:
        # Weighted to low noise: at high noise the optimal x̂_0 is a mean over poses, which has short edges.
        error = edge_error(clean[..., :num_coarse, :], truth[..., :num_coarse, :], edges) * share
        terms["edges"] = config.edges * mean_over_labelled(error, sample.has_vertices, "edges", shares)
    if paths is not None:
        terms |= path_terms(config, sample, paths, clean, truth, level_weight, camera, num_coarse, shares)
    terms = over_processes(terms | dict(more or {}), shares)
    terms["loss"] = torch.stack(list(terms.values())).sum()
    return terms


def _terms_apart(
    config: LossConfig,
    sample: Sample,
    prediction: Tensor,  # (B, M, P, 3)
    target: Tensor,  # (B, M, P, 3)
    level_weight: Tensor,  # (B, M)
    num_coarse: int,
    shares: dict[str, Tensor],  # filled with the labelled fraction for each term
) -> dict[str, Tensor]:
    """λ_v L_v and λ_3D L_3D: separate means and weights for vertices and joints."""
    terms = {}
    for name, weight, part, labelled in (
        ("vertices", config.vertices, slice(num_coarse), sample.has_vertices),
        ("joints_3d", config.joints_3d, slice(num_coarse, None), sample.has_joints_3d),
    ):
        if weight:
            error = point_error(prediction[..., part, :], target[..., part, :], config.points) * level_weight
            terms[name] = weight * mean_over_labelled(error, labelled, name, shares)
    return terms


def _labelled_points(sample: Sample, people: int, points: int, num_coarse: int) -> Tensor:  # (B, 1, P) bool
    """Label mask of the points: coarse vertices, then joints."""
    parts = []
    for has, count in ((sample.has_vertices, num_coarse), (sample.has_joints_3d, points - num_coarse)):
        given = next(mask for mask in (has, sample.has_vertices, sample.has_joints_3d) if mask is not None)
        known = torch.ones_like(given) if has is None else has
        parts.append(known[:, None, None].expand(people, 1, count))
    return torch.cat(parts, -1)


def _camera_term(sample: Sample, camera: Tensor) -> tuple[Tensor, Tensor | None]:  # (B,), (B,) bool: labelled
    """Error against the ground-truth camera if known, else the reprojection error of 3D keypoint labels."""
    known = camera.new_zeros(len(camera))
    has_camera = torch.zeros_like(known, dtype=torch.bool)
    if sample.camera is not None:
        known = mask_unlabelled(camera_error(camera, sample.camera), sample.has_camera)
        if sample.has_camera is None:
            return known, None
        has_camera = sample.has_camera
    if sample.keypoints_3d is None or sample.joints_2d is None or sample.joints_2d_confidence is None:
        return known, has_camera
    confidence = sample.joints_2d_confidence
    if sample.has_keypoints_3d is not None:
        confidence = confidence * sample.has_keypoints_3d
    projected = weak_perspective_projection(sample.keypoints_3d, camera)
    error = torch.where(has_camera, known, reprojection_error(projected, sample.joints_2d, confidence))
    return error, has_camera | (confidence.sum(-1) > 0)
