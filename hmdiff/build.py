"""Builds model, mesh, scheduler and data from a config."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from hmdiff.body.body import Body, load_body
from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.body.mesh import MeshSampler
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.body.surface import partition_patches
from hmdiff.config import Config
from hmdiff.data.label_noise import NoisyLabels
from hmdiff.data.label_subset import LabelSubset
from hmdiff.data.mixture import Mixture, NamedSplits
from hmdiff.data.sample import PeopleSource
from hmdiff.data.synthetic.occluders import OccluderSampler
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.data.synthetic.pose_prior import PosePrior
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.diffusion.schedule import make_scheduler
from hmdiff.errors import UserError
from hmdiff.files.resources import asset_path
from hmdiff.files.yaml_values import check_keys
from hmdiff.models.limits import check_hyperparameters
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline import HMDiffPipeline


def build_model(config: Config, body: Body, mesh: MeshSampler) -> MeshRecoveryModel:
    """A new model for the body's mesh. Raises `UserError` for an unknown or invalid hyperparameter."""
    allowed = [name for name in inspect.signature(MeshRecoveryModel.__init__).parameters if name != "self"]
    check_keys(config.model, allowed, "section 'model'")
    signature = inspect.signature(MeshRecoveryModel.__init__).parameters
    check_hyperparameters(config.model, "section 'model'", {name: signature[name].default for name in allowed})
    values: dict[str, Any] = {
        "image_size": config.data.image_size,
        **config.model,
        "body": body.name,
        "num_vertices": body.num_vertices,
        "num_joints": body.num_joints,
        "num_coarse": mesh.num_coarse,
        "upsample_neighbours": mesh.fitted_index.shape[1],
    }
    if values.get("coarse_to_fine") and values.get("mode") != "direct" and config.diffusion.prediction_type != "sample":
        raise UserError(
            "model.coarse_to_fine refines a mesh, and diffusion.prediction_type is "
            f"{config.diffusion.prediction_type!r}; give sample, or model.mode=direct"
        )
    torch.manual_seed(config.seed)  # initial weights; all later random draws use separate generators
    try:
        model = MeshRecoveryModel(**values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"section 'model': {error}") from None
    if model.config.tokens == "parts":
        model.coarse_ids.copy_(mesh.coarse_ids)
        model.set_basis(lbs_basis(body, mesh.coarse_ids))
        return model
    try:
        patches = _patches(body, mesh, model.config.patch_size)
    except ValueError as error:
        raise UserError(f"section 'model': {error}") from None
    model.set_topology(mesh.coarse_ids, patches, mesh.adjacency(), mesh.fitted_index, mesh.fitted_weight)
    return model


@functools.lru_cache(maxsize=4)
def _patches(body: Body, mesh: MeshSampler, patch_size: int) -> Tensor:
    return partition_patches(body.v_template[mesh.coarse_ids], mesh.coarse_faces, patch_size)


def build_mesh(config: Config, body: Body) -> MeshSampler:
    """The body's coarse mesh with the model's `num_coarse` vertices."""
    signature = inspect.signature(MeshRecoveryModel.__init__).parameters
    return load_mesh(body, int(config.model.get("num_coarse", signature["num_coarse"].default)))


def build_scheduler(config: Config) -> Any:
    """The noise schedule with the default sampler."""
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
    """The synthetic people of a config, with images and depth maps if the model or the config needs them."""
    training_poses = PoseMixture(prior=PosePrior.load(asset_path("pose_prior_train.npz")))
    return SyntheticHumans(
        body,
        PoseMixture(),
        mesh.coarse_ids,
        config.data.block_size,
        config.seed,
        full_mesh,
        config.data.faults,
        device,
        _picture_size(config),
        _map_size(config),
        config.data.depth_faults,
        OccluderSampler(config.data.augment),
        training_poses,
        peaks=_reads_peaks(config) and not full_mesh,
    )


def _reads_peaks(config: Config) -> bool:
    """Whether peaks replace heatmaps, which saves rendering them: the joint backbone is then their only consumer."""
    model = config.model
    alone = model.get("inputs", "heatmaps") == "heatmaps" and model.get("backbone", "joints") == "joints"
    return config.data.kind == "synthetic" and alone and not (model.get("depth_map") or model.get("lifting"))


def build_source(
    config: Config,
    body: Body,
    mesh: MeshSampler,
    full_mesh: bool = False,
    device: torch.device | str = "cpu",  # for synthetic people only
) -> PeopleSource:
    """The training people of a config, synthetic, recorded or both; with `full_mesh` also its evaluation splits.

    Raises:
        UserError: an unknown kind or key; a folder that is not prepared; a split that is missing or too small.
    """
    data = config.data
    if data.kind not in DATA_KINDS:
        raise UserError(f"data.kind {data.kind!r} is not known; choose one of {', '.join(DATA_KINDS)}")
    if data.kind == "synthetic":
        if data.sources or data.splits:
            raise UserError("data.sources and data.splits are of data.kind recorded and mixture, and it is synthetic")
        return _labelled(config, body, mesh, build_data(config, body, mesh, full_mesh, device))
    if data.kind == "recorded" and len(data.sources) != 1:
        raise UserError(f"data.kind recorded takes one source, data.sources has {len(data.sources)}; give mixture")
    entries = [_source_entry(entry, f"data.sources[{number}]") for number, entry in enumerate(data.sources)]
    weights = [entry.get("weight", 1.0) for entry in entries]
    if not all(isinstance(weight, int | float) for weight in weights):
        raise UserError(f"data.sources: weights {weights}; numbers above 0 are expected")
    sources = [_recorded(config, body, mesh, full_mesh, entry, "faults") for entry in entries]
    splits = {}
    for name, entry in data.splits.items() if full_mesh else ():
        splits[name] = _recorded(config, body, mesh, True, _source_entry(entry, f"data.splits.{name}"), "labels")
    if full_mesh:
        _check_splits(config, splits)
    return _labelled(config, body, mesh, NamedSplits(Mixture(sources, weights), splits))


def _labelled(config: Config, body: Body, mesh: MeshSampler, source: PeopleSource) -> PeopleSource:
    """Add `data.label_noise` to the training labels; evaluation labels stay exact."""
    if not config.data.label_noise or source.full_mesh:
        return source
    return NoisyLabels(source, body, mesh.coarse_ids, config.data.label_noise, config.seed)


DATA_KINDS = ("synthetic", "recorded", "mixture")
_SOURCE_KEYS = ("kind", "path", "weight", "groups", "heatmaps", "same_body", "labels", "seed")


def _source_entry(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"kind": "synthetic"} if entry == "synthetic" else {"path": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r}; a prepared folder is expected, or {{path: FOLDER, weight: 1}}")
    check_keys(entry, _SOURCE_KEYS, where)
    if ("path" in entry) == (entry.get("kind") == "synthetic"):
        raise UserError(f"{where}: give path, a folder that hmdiff prepare wrote, or kind: synthetic, and not both")
    return entry


def _recorded(
    config: Config, body: Body, mesh: MeshSampler, full_mesh: bool, entry: dict[str, Any], heatmaps: str
) -> PeopleSource:
    """One source or split."""
    if entry.get("labels", "all") != "all":
        source = _recorded(config, body, mesh, full_mesh, {**entry, "labels": "all"}, heatmaps)
        return LabelSubset(source, str(entry["labels"]))
    if "path" not in entry:
        # Two synthetic sources with the same seed would give the same people.
        seed = entry.get("seed", config.seed)
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"data.sources: seed {seed!r}; a whole number from 0 on is expected")
        return build_data(dataclasses.replace(config, seed=seed), body, mesh, full_mesh)
    if "seed" in entry:
        raise UserError(f"data.sources: {entry['path']} has a seed, which is of kind: synthetic; leave it out")
    from hmdiff.data.recorded import RecordedPeople
    from hmdiff.data.shards import PreparedShards

    store = PreparedShards(entry["path"])
    numbers = None
    if "groups" in entry:
        numbers = store.select_groups(entry["groups"])
    return RecordedPeople(
        store,
        body,
        mesh.coarse_ids,
        config.data.block_size,
        config.seed,
        full_mesh,
        _picture_size(config),
        config.data.augment,
        config.data.faults,
        entry.get("heatmaps", heatmaps),
        bool(entry.get("same_body", False)),
        numbers,
        _map_size(config),
    )


def _check_splits(config: Config, splits: dict[str, PeopleSource]) -> None:
    """Fail before the training, not at its first evaluation."""
    wanted = {"val": config.evaluation.people, "test": config.evaluation.test_people}
    for name, people in wanted.items():
        if not people:
            continue
        if name not in splits:
            raise UserError(
                f"data.splits.{name} is missing: give a folder that hmdiff prepare wrote, or synthetic"
                + (", or evaluation.test_people=0" if name == "test" else "")
            )
        split = splits[name]
        if isinstance(split, Sized) and len(split) < people:
            key = "people" if name == "val" else "test_people"
            raise UserError(f"data.splits.{name} has {len(split)} people, and evaluation.{key} is {people}; give fewer")


def _picture_size(config: Config) -> int | None:
    reads_images = config.model.get("inputs", "heatmaps") != "heatmaps"
    size = int(config.model.get("image_size", config.data.image_size))
    return size if reads_images or config.data.pictures else None


def _map_size(config: Config) -> int | None:
    if config.data.map_size:
        return config.data.map_size
    needed = config.model.get("depth_map") or config.model.get("silhouette")
    return int(config.model.get("depth_size", 64)) if needed else None


def build_pipeline(config: Config) -> HMDiffPipeline:
    """An untrained pipeline of a config, for tests and timing."""
    body = load_body(config.body)
    model = build_model(config, body, build_mesh(config, body))
    return HMDiffPipeline(
        model, build_scheduler(config), body, config.diffusion.num_inference_steps, config.diffusion.eta
    )
