"""Losses of one training step: noise the mesh, predict, and sum the objective.

HMDiff predicts from x_k, the direct baseline from a constant. `TrainingStep` holds model and objective, so that DDP and
FSDP see all parameters, RLE's flow included, in one forward pass.
B people, M noise levels per person, P points (C coarse vertices, K joints), T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hmdiff.body.body import Body
from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.diffusion.noising import alpha_bar_at, loss_weight, predict_x0, training_target
from hmdiff.errors import UserError
from hmdiff.geometry import crop_rotation
from hmdiff.losses.contrastive import joint_to_joint, joint_to_non_joint
from hmdiff.losses.keypoints import KeypointMap, keypoint_terms
from hmdiff.losses.objective import objective
from hmdiff.losses.paths import PathOutputs
from hmdiff.models.lifting import sample_volume, volume_coordinates, voxels_away_from
from hmdiff.models.prediction import Prediction
from hmdiff.models.recovery import MeshRecoveryModel

RLE_VERTICES = 48  # coarse vertices sampled per step for the RLE loss on vertices


class Draws(NamedTuple):
    """The random numbers of a training step, a function of (seed, batch) only."""

    steps: Tensor  # (B, M) long
    noise: Tensor  # (B, M, P, 3)
    token_mask: Tensor | None = None  # (B, M, T) bool, masked modelling's
    shared_seed: int = 0  # the same in every process

    def to(self, device: torch.device | str) -> Draws:
        token_mask = None if self.token_mask is None else self.token_mask.to(device)
        return Draws(self.steps.to(device), self.noise.to(device), token_mask, self.shared_seed)


def training_losses(
    model: MeshRecoveryModel,
    scheduler: Any,
    config: LossConfig,
    sample: Sample,
    draws: Draws,
    edges: Tensor | None = None,  # (E, 2)
    keypoints: KeypointMap | None = None,  # for the two keypoint terms
) -> dict[str, Tensor]:
    """One forward pass and the objective's terms."""
    sample = sample.zero_unlabelled()
    assert sample.coarse_vertices is not None and sample.joints_3d is not None
    truth = model.to_points(sample.coarse_vertices, sample.joints_3d)
    if model.config.frame == "crop" and sample.focal is not None and sample.principal_point is not None:
        with torch.autocast(truth.device.type, enabled=False):  # bfloat16 would move the labels by millimetres
            truth = truth @ crop_rotation(sample.principal_point, sample.focal)
    truth = truth[:, None]
    inputs: list[Tensor | None] = [sample.image, sample.heatmaps, sample.heatmap_valid]
    if model.config.depth_map or draws.token_mask is not None:
        inputs.append(sample.depth_input if model.config.depth_map else None)
    more = {} if sample.peaks is None else {"peaks": sample.peaks}
    steps, noise = draws.steps, draws.noise
    if model.config.mode == "direct":
        start = torch.zeros_like(truth)
        alpha_bar = weight = x0_weight = truth.new_ones(len(truth), 1)
        masked = () if draws.token_mask is None else (draws.token_mask[:, :1],)
        found: Prediction = model(start, start.new_ones(len(truth), 1), *inputs, *masked, **more)
        target, x0_pred = truth, found.points
    else:
        prediction_type = scheduler.config.prediction_type
        # Partially labelled samples train only at t = T, where x_t is pure noise, independent of x_0.
        for whole in (sample.has_vertices, sample.has_joints_3d):
            if whole is not None:
                steps = torch.where(whole[:, None], steps, scheduler.config.num_train_timesteps - 1)
        alpha_bar = alpha_bar_at(scheduler, steps).to(truth)
        x_t = alpha_bar.sqrt()[..., None, None] * truth + (1 - alpha_bar).sqrt()[..., None, None] * noise
        fraction = (steps + 1).to(truth) / scheduler.config.num_train_timesteps
        masked = () if draws.token_mask is None else (draws.token_mask,)
        found = model(x_t, fraction, *inputs, *masked, **more)
        target = training_target(truth.expand_as(noise), noise, alpha_bar, prediction_type)
        x0_pred = predict_x0(found.points, x_t, alpha_bar, prediction_type)
        weight = loss_weight(alpha_bar, prediction_type, config.weighting, config.gamma)
        x0_weight = loss_weight(alpha_bar, "sample", config.weighting, config.gamma)
        if prediction_type == "epsilon":  # as alpha_bar -> 0, an epsilon prediction does not determine x_0
            x0_weight = x0_weight * (alpha_bar / (1 - alpha_bar).clamp_min(1e-8)).clamp(max=1.0)
    contrast = _contrast(model, config, sample, found, truth, x0_pred, alpha_bar, draws.shared_seed)
    paths = PathOutputs(
        model.config.mesh_scale,
        found.scale,
        model.flow_log_probs(),
        model.config.rle_variant,
        found.silhouette,
        found.estimates,
        found.meshes,
        contrast,
        vertices=_some_vertices(model, draws).to(truth.device),
        regressed=None if model.config.mode == "direct" else alpha_bar < 1e-6,
    )
    more = {}
    shares: dict[str, Tensor] = {}
    if keypoints is not None:
        with torch.autocast(truth.device.type, enabled=False):
            more = keypoint_terms(
                config,
                sample,
                keypoints,
                model.to_coarse(x0_pred).float(),
                model.to_joints(x0_pred).float(),
                found.camera,
                x0_weight,
                model.config.frame,
                model.config.mesh_scale,
                shares,
            )
    return objective(
        config,
        sample,
        found.points,
        target,
        weight,
        x0_pred,
        truth,
        alpha_bar,
        found.camera,
        model.config.num_coarse,
        edges,
        paths,
        more,
        shares,
    )


def _some_vertices(model: MeshRecoveryModel, draws: Draws) -> Tensor:  # (v,) long
    """A random subset of vertices per step: on all vertices, RLE's flow would cost more than the denoiser."""
    generator = torch.Generator().manual_seed(draws.shared_seed)
    return torch.randperm(model.config.num_coarse, generator=generator)[:RLE_VERTICES]


def _contrast(
    model: MeshRecoveryModel,
    config: LossConfig,
    sample: Sample,
    found: Prediction,
    truth: Tensor,  # (B, 1, P, 3)
    x0_pred: Tensor,  # (B, M, P, 3)
    alpha_bar: Tensor,  # (B, M)
    seed: int,
) -> dict[str, Tensor]:
    """JOTR's contrastive losses on volume features sampled at the joints of x̂_0 and at the ground truth joints.

    x̂_0 is that of the highest noise level, where joints are least certain. Sampling positions are detached (our choice:
    contrast trains the features, the mesh losses move the joints). Ground truth joints are projected by the labelled
    camera, or by the predicted one where there is no label.
    """
    if found.volume is None or found.exponent is None or not (config.joint_contrast or config.non_joint_contrast):
        return {}
    row = alpha_bar.argmin(1)
    noisiest = x0_pred[torch.arange(len(x0_pred), device=x0_pred.device), row].detach()
    camera = found.camera.detach()
    true_camera = camera if sample.camera is None else sample.camera
    if sample.camera is not None and sample.has_camera is not None:
        true_camera = torch.where(sample.has_camera[:, None], sample.camera, camera)
    places = volume_coordinates(model.to_joints(noisiest), camera, found.exponent.detach())
    true_places = volume_coordinates(model.to_joints(truth[:, 0]), true_camera, found.exponent.detach())
    predicted, labelled = sample_volume(found.volume, places), sample.has_joints_3d
    inside = (true_places.abs() <= 1).all(-1)
    generator = torch.Generator().manual_seed(seed)
    terms = {}
    if config.joint_contrast:
        true = sample_volume(found.volume, true_places)
        terms["joint_contrast"] = joint_to_joint(predicted, true, labelled, generator, valid=inside)
    if config.non_joint_contrast:
        size = found.volume.shape[2:]
        away = voxels_away_from(places, (size[0], size[1], size[2]))
        voxels = found.volume.flatten(2).mT
        terms["non_joint_contrast"] = joint_to_non_joint(predicted, voxels, away, labelled, generator, valid=inside)
    return terms


def keypoint_map(
    config: LossConfig,
    model: MeshRecoveryModel,  # with its mesh
    body: Body,
    device: torch.device | None = None,  # None: the model's
) -> KeypointMap | None:
    """Regressors of the keypoint losses; None if both are off. Raises `UserError` for a body without keypoints."""
    if not (config.keypoints_2d or config.keypoints_3d):
        return None
    if body.keypoint_regressor is None:
        raise UserError(
            f"body {body.name!r} has no keypoints: loss.keypoints_2d and loss.keypoints_3d need them; give 0"
        )
    return KeypointMap.of(body, model.keypoint_regressor(body)).to(device or model.coarse_ids.device)


class TrainingStep(nn.Module):
    """Model and objective as one module, to be wrapped by DDP or FSDP."""

    def __init__(
        self,
        model: MeshRecoveryModel,
        scheduler: Any,
        config: LossConfig,
        edges: Tensor | None = None,
        keypoints: KeypointMap | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.scheduler, self.config, self.edges, self.keypoints = scheduler, config, edges, keypoints

    def forward(self, people: Sample, draws: Draws) -> dict[str, Tensor]:
        return training_losses(self.model, self.scheduler, self.config, people, draws, self.edges, self.keypoints)


def used_by_no_loss(
    model: MeshRecoveryModel,
    config: LossConfig,
) -> bool:
    """Whether some parameters may get no gradient in a step (DDP's `find_unused_parameters`).

    Examples: the camera head without a camera loss, unused resolutions of an image backbone (HRNet), modules whose only
    loss has weight 0.
    """
    values = model.config
    return (
        not config.camera
        or values.inputs != "heatmaps"
        or (values.silhouette and not config.silhouette)
        or (bool(values.rle) and not config.rle)
        or values.depth_map  # batches without any depth map
        or values.masked > 0  # batches without any masked token
        or values.lifting  # the last estimate's head, if not supervised
    )
