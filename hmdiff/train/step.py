"""One training step's losses: noise the mesh, predict, and sum the objective.

HMDiff predicts at x_k; the direct baseline from a constant. `TrainingStep` holds the model, so that whatever shares a
training over processes sees every parameter that is used, RLE's flow included, inside one forward pass.
B people, M noise levels of each, P points (C coarse vertices, K joints), T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hmdiff.body.body import Body
from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.diffusion.noising import clean_estimate, loss_weight, signal_share, training_target
from hmdiff.errors import UserError
from hmdiff.geometry import crop_rotation
from hmdiff.losses.contrastive import joint_to_joint, joint_to_non_joint
from hmdiff.losses.keypoints import KeypointMap, keypoint_terms
from hmdiff.losses.objective import objective
from hmdiff.losses.paths import PathOutputs
from hmdiff.models.lifting import sample_volume, volume_coordinates, voxels_away_from
from hmdiff.models.prediction import Prediction
from hmdiff.models.recovery import MeshRecoveryModel

RLE_VERTICES = 48  # coarse vertices whose likelihood a step takes, where RLE is of the vertices too


class Draws(NamedTuple):
    """All that is random in the step of a batch, a function of (seed, batch) alone."""

    steps: Tensor  # (B, M) long
    noise: Tensor  # (B, M, P, 3)
    hidden: Tensor | None = None  # (B, M, T) bool, masked modelling's
    shared_seed: int = 0  # the same in every process

    def to(self, device: torch.device | str) -> Draws:
        hidden = None if self.hidden is None else self.hidden.to(device)
        return Draws(self.steps.to(device), self.noise.to(device), hidden, self.shared_seed)


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
    sample = sample.silenced()
    assert sample.coarse_vertices is not None and sample.joints_3d is not None
    truth = model.to_points(sample.coarse_vertices, sample.joints_3d)
    if model.config.frame == "crop" and sample.focal is not None and sample.principal_point is not None:
        with torch.autocast(truth.device.type, enabled=False):  # bfloat16 would move the labels by millimetres
            truth = truth @ crop_rotation(sample.principal_point, sample.focal)
    truth = truth[:, None]
    inputs: list[Tensor | None] = [sample.image, sample.heatmaps, sample.heatmap_valid]
    if model.config.depth_map or draws.hidden is not None:
        inputs.append(sample.depth_input if model.config.depth_map else None)
    more = {} if sample.peaks is None else {"peaks": sample.peaks}
    steps, noise = draws.steps, draws.noise
    if model.config.mode == "direct":
        start = torch.zeros_like(truth)
        share = weight = clean_weight = truth.new_ones(len(truth), 1)
        hidden = () if draws.hidden is None else (draws.hidden[:, :1],)
        found: Prediction = model(start, start.new_ones(len(truth), 1), *inputs, *hidden, **more)
        target, clean = truth, found.points
    else:
        kind = scheduler.config.prediction_type
        # Somebody whose truth is not all there is seen at the last step alone: x_K is noise, whatever x_0 was.
        for whole in (sample.has_vertices, sample.has_joints_3d):
            if whole is not None:
                steps = torch.where(whole[:, None], steps, scheduler.config.num_train_timesteps - 1)
        share = signal_share(scheduler, steps).to(truth)
        noisy = share.sqrt()[..., None, None] * truth + (1 - share).sqrt()[..., None, None] * noise
        fraction = (steps + 1).to(truth) / scheduler.config.num_train_timesteps
        hidden = () if draws.hidden is None else (draws.hidden,)
        found = model(noisy, fraction, *inputs, *hidden, **more)
        target = training_target(truth.expand_as(noise), noise, share, kind)
        clean = clean_estimate(found.points, noisy, share, kind)
        weight = loss_weight(share, kind, config.weighting, config.gamma)
        clean_weight = loss_weight(share, "sample", config.weighting, config.gamma)
        if kind == "epsilon":  # where x_k holds no signal, the noise that is predicted says nothing of x_0
            clean_weight = clean_weight * (share / (1 - share).clamp_min(1e-8)).clamp(max=1.0)
    contrast = _contrast(model, config, sample, found, truth, clean, share, draws.shared_seed)
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
        regressed=None if model.config.mode == "direct" else share < 1e-6,
    )
    more = {}
    shares: dict[str, Tensor] = {}
    if keypoints is not None:
        with torch.autocast(truth.device.type, enabled=False):
            more = keypoint_terms(
                config,
                sample,
                keypoints,
                model.to_coarse(clean).float(),
                model.to_joints(clean).float(),
                found.camera,
                clean_weight,
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
        clean,
        truth,
        share,
        found.camera,
        model.config.num_coarse,
        edges,
        paths,
        more,
        shares,
    )


def _some_vertices(model: MeshRecoveryModel, draws: Draws) -> Tensor:  # (v,) long
    """RLE's flow costs more than the denoiser where it sees every vertex: others are taken in every step."""
    generator = torch.Generator().manual_seed(draws.shared_seed)
    return torch.randperm(model.config.num_coarse, generator=generator)[:RLE_VERTICES]


def _contrast(
    model: MeshRecoveryModel,
    config: LossConfig,
    sample: Sample,
    found: Prediction,
    truth: Tensor,  # (B, 1, P, 3)
    clean: Tensor,  # (B, M, P, 3)
    share: Tensor,  # (B, M)
    seed: int,
) -> dict[str, Tensor]:
    """JOTR's contrastive terms, on what the volume holds at the joints of the noisiest x̂_0 and at the true ones.

    The noisiest, since there the joints are least known; without a gradient through the places (ours: contrast is to
    shape the features, the mesh's own losses move the joints). True places need a true camera: else the model's own.
    """
    if found.volume is None or found.exponent is None or not (config.joint_contrast or config.non_joint_contrast):
        return {}
    row = share.argmin(1)
    noisiest = clean[torch.arange(len(clean), device=clean.device), row].detach()
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
    """What the keypoint terms need; None where both are off. Raises `UserError` for a body without keypoints."""
    if not (config.keypoints_2d or config.keypoints_3d):
        return None
    if body.keypoint_regressor is None:
        raise UserError(
            f"body {body.name!r} has no keypoints: loss.keypoints_2d and loss.keypoints_3d need them; give 0"
        )
    return KeypointMap.of(body, model.keypoint_regressor(body)).to(device or model.coarse_ids.device)


class TrainingStep(nn.Module):
    """The model and its objective as one module: what is wrapped for several processes."""

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
    """Whether some parameter gets no gradient in a step, which DDP must be told.

    Without a camera loss its head gets none, nor do an image network's other resolutions (HRNet), nor what is only
    trained by a term whose weight is 0.
    """
    values = model.config
    return (
        not config.camera
        or values.inputs != "heatmaps"
        or (values.silhouette and not config.silhouette)
        or (bool(values.rle) and not config.rle)
        or values.depth_map  # a batch in which nobody has a map
        or values.masked > 0  # a batch in which nothing was hidden
        or values.lifting  # the last estimate's own head, when nothing supervises it
    )
