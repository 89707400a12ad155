"""Every shipped config at full size: it builds, its loss has all weighted terms, and a step lowers the loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hmdiff.body.body import load_body
from hmdiff.build import build_mesh, build_model, build_scheduler, build_source
from hmdiff.config import Config, load_config
from hmdiff.train.loop import TrainingStream
from hmdiff.train.optimizer import build_optimizer
from hmdiff.train.step import TrainingStep, keypoint_map

pytestmark = pytest.mark.slow  # full-size networks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# Two people, no pretrained weights, float32 so that losses can be compared.
FEW = (
    "training.batch_size=2",
    "data.block_size=2",
    "data.workers=0",
    "loss.noise_levels=1",
    "model.pretrained=false",
    "training.start_from=''",
    "training.mixed_precision=no",
    "training.compile=false",
    "model.masked=0",
)
# Recipes for licensed bodies and recorded data run on the free body and synthetic data; `test_recipes` tests the data.
FREE = ("body=free", "model.num_coarse=432")
# Loss term of a weight, if it has another name; if a weight has several terms (RLE), one of them.
TERMS = (
    "vertices",
    "joints_3d",
    "keypoints_2d",
    "keypoints_3d",
    "camera",
    "edges",
    "projection",
    "silhouette",
    "estimates",
    "joint_contrast",
    "non_joint_contrast",
)


def few(name: str) -> Config:
    config = load_config(CONFIGS / f"{name}.yaml", FEW)
    if config.data.kind != "synthetic":
        config = load_config(CONFIGS / f"{name}.yaml", (*FEW, *FREE))
        config.data = dataclasses.replace(config.data, kind="synthetic", sources=[], splits={})
    return config


def test_all_are_there() -> None:
    assert {"d2a_hmr", "jotr", "hmdiff_paper", "hmdiff_small", "quickstart"} <= set(NAMES) and len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_one_step(name: str) -> None:
    config = few(name)
    body = load_body(config.body)
    mesh = build_mesh(config, body)
    model = build_model(config, body, mesh)
    if model.upsample_weight is not None:
        model.upsample_weight.requires_grad_(False)
    model.train()
    faces = mesh.coarse_faces
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]) if config.loss.edges else None
    step = TrainingStep(model, build_scheduler(config), config.loss, edges, keypoint_map(config.loss, model, body))
    people, draws = TrainingStream(build_source(config, body, mesh), config, 0, 1, model)[0]
    first = step(people, draws)
    assert all(bool(torch.isfinite(value)) for value in first.values()), first
    weights = dataclasses.asdict(config.loss)
    assert {term for term in TERMS if weights[term]} <= set(first), first.keys()
    assert bool(weights["rle"]) == any("rle" in term for term in first)
    first["loss"].backward()
    grown = {key for key, value in model.named_parameters() if value.grad is not None and bool(value.grad.any())}
    for part in ("denoisers", "depth_fusion", "volume_lifting", "silhouette_decoder", "flows", "feature_backbone"):
        if any(key.startswith(part) for key, _ in model.named_parameters()):
            assert any(key.startswith(part) for key in grown), part
    assert all(bool(torch.isfinite(value.grad).all()) for value in model.parameters() if value.grad is not None)
    # A short gradient step, with batch statistics and dropout unchanged.
    with torch.no_grad():
        squared = sum(float(value.grad.square().sum()) for value in model.parameters() if value.grad is not None)
        for value in model.parameters():
            if value.grad is not None:
                value -= 1e-3 * float(first["loss"]) / max(squared, 1e-12) * value.grad
    second = step(people, draws)["loss"]
    assert second < first["loss"], (float(first["loss"]), float(second))
    build_optimizer(model, config.training).step()  # the config's optimiser accepts these gradients
