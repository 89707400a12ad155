"""A model and a config small enough for the tests of the core, and synthetic people shared by them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import torch
from torch import nn

from hmdiff.body.body import Body, load_body
from hmdiff.body.mesh import MeshSampler
from hmdiff.build import build_data, build_mesh, build_model, build_scheduler
from hmdiff.config import Config, load_config
from hmdiff.data.sample import Sample
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline import HMDiffPipeline

SMALL = (
    "model.width=32",
    "model.heads=2",
    "model.depth=1",
    "model.feed_forward_ratio=2",
    "model.encoder_width=32",
    "model.encoder_depth=1",
    "model.encoder_heads=2",
    "model.patch_size=16",
    "data.block_size=4",
    "training.batch_size=4",
    "training.warmup_steps=2",
    "training.learning_rate=0.003",
    "training.log_every=2",
    "loss.noise_levels=2",
    "evaluation.people=2",
    "evaluation.num_hypotheses=2",
    "evaluation.num_inference_steps=2",
    "evaluation.test_people=0",
)


@functools.cache
def _loaded(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def small_config(output: str | Path = "unused", *overrides: str) -> Config:
    return dataclasses.replace(copy.deepcopy(_loaded(*overrides)), output=str(output))


@functools.cache
def free_body() -> tuple[Body, MeshSampler]:
    body = load_body("free")
    return body, build_mesh(small_config(), body)


@functools.cache
def people(full_mesh: bool = False, block_size: int = 8) -> SyntheticHumans:
    return build_data(small_config("unused", f"data.block_size={block_size}"), *free_body(), full_mesh=full_mesh)


@functools.cache
def people_block(stream: str = "train", number: int = 0, block_size: int = 8) -> Sample:
    return people(True, block_size).block(stream, number)


def awaken(module: nn.Module, scale: float = 1.0) -> None:
    """Random weights everywhere: at its start a denoiser is a constant, and every test of it would pass."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            weight = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(weight * scale / max(1, parameter.shape[-1]) ** 0.5)


def awaken_model(model: MeshRecoveryModel, scale: float = 1.0) -> MeshRecoveryModel:
    """The same, but for the upsampling: its weights are fitted, and others tear the mesh."""
    weight = None if model.upsample_weight is None else model.upsample_weight.detach().clone()
    awaken(model, scale)
    if weight is not None:
        with torch.no_grad():
            model.upsample_weight.copy_(weight)
    return model


@functools.cache
def _awake(*overrides: str) -> MeshRecoveryModel:
    return awaken_model(build_model(small_config("unused", *overrides), *free_body()))


def small_pipeline(*overrides: str) -> HMDiffPipeline:
    """Untrained, but no output of it is constant. Each call gives another one with the same weights."""
    scheduler = build_scheduler(small_config("unused", *overrides))
    return HMDiffPipeline(copy.deepcopy(_awake(*overrides)), scheduler, free_body()[0], 5)
