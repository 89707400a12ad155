"""The training objective: named terms, each weighted, each a plain mean over the samples.

L = L_points (on what the network predicts, weighted by noise level) + w_cam L_camera + w_e L_edges.
Which of them the paper uses is unknown; the sum is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.geometry import weak_perspective_projection
from hmdiff.losses.mesh import camera_error, edge_error, point_error, reprojection_error, silence


def objective(
    config: LossConfig,
    sample: Sample,
    prediction: Tensor,  # (B, M, P, 3) of the network, for M noise levels
    target: Tensor,  # (B, M, P, 3)
    level_weight: Tensor,  # (B, M)
    clean: Tensor,  # (B, M, P, 3) x̂_0
    truth: Tensor,  # (B, 1, P, 3) x_0
    share: Tensor,  # (B, M) abar, how much of x_k was signal
    camera: Tensor,  # (B, 3)
    num_coarse: int,
    edges: Tensor | None = None,  # (E, 2) of the coarse mesh
) -> dict[str, Tensor]:  # scalars: every term, weighted, and their sum as "loss"
    """Sum the terms. A sample without a label adds nothing to that label's term."""
    weight = torch.ones(prediction.shape[-2], device=prediction.device)
    weight[num_coarse:] = config.joints
    if sample.has_joints_3d is not None:
        is_vertex = torch.arange(len(weight), device=weight.device) < num_coarse
        weight = weight * (is_vertex | sample.has_joints_3d[:, None, None])  # (B, 1, P)
    terms: dict[str, Tensor] = {}
    error = point_error(prediction, target, config.points, weight) * level_weight
    terms["points"] = silence(error, sample.has_vertices).mean()
    if config.camera:
        terms["camera"] = config.camera * _camera_term(sample, camera).mean()
    if config.edges and edges is not None:
        # Only where the noise is low: the mean of several poses, which is right at high noise, has short edges.
        error = edge_error(clean[..., :num_coarse, :], truth[..., :num_coarse, :], edges) * share
        terms["edges"] = config.edges * silence(error, sample.has_vertices).mean()
    terms["loss"] = torch.stack(list(terms.values())).sum()
    return terms


def _camera_term(sample: Sample, camera: Tensor) -> Tensor:  # (B,)
    """Against the true camera where it is known, else through the projected keypoints."""
    if sample.camera is not None:
        return camera_error(camera, sample.camera)
    if sample.keypoints_3d is None or sample.joints_2d is None or sample.joints_2d_confidence is None:
        return camera.new_zeros(len(camera))
    projected = weak_perspective_projection(sample.keypoints_3d, camera)
    return reprojection_error(projected, sample.joints_2d, sample.joints_2d_confidence)
