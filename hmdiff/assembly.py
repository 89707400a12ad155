"""From a config to its parts: body, model, schedule, data. The one place where the rooms are put together."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from hmdiff.body import Body, load_body
from hmdiff.config import Config, check_keys
from hmdiff.data.estimator import EstimatorFaults
from hmdiff.data.poses import PoseMixture
from hmdiff.data.synthetic import SyntheticHumans
from hmdiff.diffusion.schedule import make_scheduler
from hmdiff.errors import UserError
from hmdiff.mesh import MeshSampler, load_mesh, partition_patches
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline import HMDiffPipeline


def build_model(config: Config, body: Body, mesh: MeshSampler) -> MeshRecoveryModel:
    """A new model for the body's mesh. Raises `UserError` for a hyperparameter that its constructor does not have."""
    allowed = [name for name in inspect.signature(MeshRecoveryModel.__init__).parameters if name != "self"]
    check_keys(config.model, allowed, "section 'model'")
    values: dict[str, Any] = {
        "image_size": config.data.image_size,
        **config.model,
        "body": body.name,
        "num_vertices": body.num_vertices,
        "num_joints": body.num_joints,
        "num_coarse": mesh.num_coarse,
        "upsample_neighbours": mesh.fitted_index.shape[1],
    }
    torch.manual_seed(config.seed)  # the initial weights; all later draws have generators of their own
    try:
        model = MeshRecoveryModel(**values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"section 'model': {error}") from None
    template = body.v_template[mesh.coarse_ids]
    try:
        patches = partition_patches(template, mesh.coarse_faces, model.config.patch_size)
    except ValueError as error:
        raise UserError(f"section 'model': {error}") from None
    model.set_topology(mesh.coarse_ids, patches, mesh.adjacency(), mesh.fitted_index, mesh.fitted_weight)
    return model


def build_mesh(config: Config, body: Body) -> MeshSampler:
    """The body's coarse mesh of the size that the model asks for."""
    signature = inspect.signature(MeshRecoveryModel.__init__).parameters
    return load_mesh(body, int(config.model.get("num_coarse", signature["num_coarse"].default)))


def build_scheduler(config: Config) -> Any:
    """The diffusion's schedule, with the sampler that is used when no other is asked for."""
    values = config.diffusion
    return make_scheduler(
        values.sampler, values.num_train_timesteps, values.schedule, values.noise_shift, values.prediction_type
    )


def build_data(
    config: Config,
    body: Body,
    mesh: MeshSampler,
    full_mesh: bool = False,
    device: torch.device | str = "cpu",
) -> SyntheticHumans:
    """The synthetic people of a config, with pictures where the model reads them. Real data sets have their readers."""
    if config.data.kind != "synthetic":
        raise UserError(f"data.kind {config.data.kind!r} is not known; 'synthetic' is")
    check_keys(config.data.faults, [f.name for f in dataclasses.fields(EstimatorFaults)], "section 'data.faults'")
    faults = EstimatorFaults(**config.data.faults)
    reads_images = config.model.get("inputs", "heatmaps") != "heatmaps"
    image_size = int(config.model.get("image_size", config.data.image_size))
    return SyntheticHumans(
        body, PoseMixture(), mesh.coarse_ids, config.data.block_size, config.seed, full_mesh, faults, device,
        image_size if reads_images or config.data.pictures else None,
    )  # fmt: skip


def build_pipeline(config: Config) -> HMDiffPipeline:
    """An untrained pipeline of a config, for tests and for timing."""
    body = load_body(config.body)
    model = build_model(config, body, build_mesh(config, body))
    return HMDiffPipeline(
        model, build_scheduler(config), body, config.diffusion.num_inference_steps, config.diffusion.eta
    )
