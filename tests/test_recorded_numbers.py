"""The method's numbers as they were recorded: losses, gradients and samples of small networks with fixed weights.

A change that is meant to leave every number as it is passes. One that is meant to change some records them anew in the
same commit, and its message says why: `PYTHONPATH=.:tests/support python tests/test_recorded_numbers.py`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL, awaken_model, free_body, small_pipeline
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.body.surface import mesh_edges
from hmdiff.build import build_model, build_scheduler
from hmdiff.config import load_config
from hmdiff.data.sample import Sample
from hmdiff.diffusion.guidance import PAPER, Guidance
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.heatmaps import Crop, Heatmaps
from hmdiff.train.step import Draws, keypoint_map, training_losses

RECORDED = Path(__file__).with_suffix(".json")
PEOPLE = 3
LIFTED = (
    "model.backbone=conv",
    "model.lifting=true",
    "model.volume_width=16",
    "model.volume_size=4",
    "model.depth=2",
    "loss.estimates=0.5",
    "loss.joint_contrast=0.1",
    "loss.non_joint_contrast=0.1",
)
TRAININGS: dict[str, tuple[str, ...]] = {
    "sample": (),
    "epsilon": ("diffusion.prediction_type=epsilon", "loss.weighting=min_snr"),
    "epsilon, keypoints": ("diffusion.prediction_type=epsilon", "loss.keypoints_2d=0.5", "loss.projection=0.1"),
    "velocity": ("diffusion.prediction_type=v_prediction", "loss.points=l1"),
    "direct": ("model.mode=direct", "loss.points=euclidean", "loss.edges=0.1"),
    "direct, masked": ("model.mode=direct", "model.masked=0.5", "loss.keypoints_3d=0.5"),
    "stacked, crop": ("model.stack=2", "model.frame=crop", "loss.vertices=1", "loss.joints_3d=2"),
    "neighbours": ("model.neighbour_mask=true", "loss.joints=3"),
    "keypoints": ("loss.keypoints_2d=0.5", "loss.keypoints_3d=0.5", "model.frame=crop"),
    "depth": ("model.depth_map=true", "loss.projection=0.1"),
    "RLE": ("model.rle=[joints,vertices,joints_2d]", "loss.rle=0.1"),
    "RLE composite": ("model.rle=[joints]", "model.rle_variant=composite", "loss.rle=0.1"),
    "silhouette, masked": ("model.silhouette=true", "loss.silhouette=0.1", "model.masked=0.5"),
    "lifting": LIFTED,
    "coarse to fine": (*LIFTED, "model.coarse_to_fine=true", "model.hybrid_position=true"),
    "parts": ("model.tokens=parts", "model.encoder_type=mlp", "model.encoder_hidden=64", "model.qk_norm=true"),
}
SAMPLINGS: dict[str, SamplingConfig] = {
    "ddim": SamplingConfig(3, 4),
    "ddim, eta 1": SamplingConfig(3, 4, 1, eta=1.0),
    "ddpm": SamplingConfig(2, 4, scheduler="ddpm"),
    "dpm++": SamplingConfig(2, 4, scheduler="dpm++"),
    "as they are": SamplingConfig(2, 2, upright=False),
    "DAT": SamplingConfig(3, 4, guidance=Guidance()),
    "DAT, paired, score": SamplingConfig(3, 4, guidance=Guidance(pairing="paired", step="score", strength=0.5)),
    "DAT, likelihood": SamplingConfig(3, 4, guidance=Guidance(gap="likelihood", gradient="estimate")),
    "DAT, camera, last": SamplingConfig(3, 4, guidance=Guidance(projection="camera", last=0.5, threshold=0.5)),
    "DAT, falls back": SamplingConfig(3, 4, eta=1.0, guidance=Guidance(strength=20.0)),
    "DAT of the paper": SamplingConfig(3, 4, guidance=PAPER),
    "disrupted": SamplingConfig(3, 4, guidance=Guidance("disrupted", fall_back=False)),
}


def gaussians(points: Tensor, sigma: float = 0.08) -> Tensor:  # (..., 2) -> (..., 64, 64)
    line = (torch.arange(64) + 0.5) / 32 - 1
    away = (line[None, :] - points[..., 0, None, None]) ** 2 + (line[:, None] - points[..., 1, None, None]) ** 2
    return (-away / (2 * sigma**2)).exp()


@functools.cache
def people() -> Sample:
    """Made-up people with every label, some of them missing for some: nothing here follows the synthetic data."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(PEOPLE, *shape, generator=generator)

    body, mesh = free_body()
    vertices = body.v_template + 0.05 * normal(1, 3)
    keypoints = body.keypoints(vertices)
    joints = body.joint_template[:24] + 0.05 * normal(24, 3)
    joints_2d = 0.8 * keypoints[..., :2] + 0.05 * normal(len(HALPE26), 2)
    there = torch.tensor([True, True, False])
    side = torch.linspace(-1, 1, 64)
    oval = (side[:, None] - 0.1) ** 2 + ((side[None] - 0.2) / 0.4) ** 2 < 0.6  # its mirror image is another
    return Sample(
        heatmaps=gaussians(joints_2d) * (0.5 + 0.1 * normal(len(HALPE26), 1, 1).abs()),
        heatmap_valid=torch.rand(PEOPLE, len(HALPE26), generator=generator) < 0.9,
        coarse_vertices=vertices[:, mesh.coarse_ids],
        has_vertices=there,
        joints_3d=joints,
        has_joints_3d=there.flip(0),
        keypoints_3d=keypoints,
        has_keypoints_3d=torch.rand(PEOPLE, len(HALPE26), generator=generator) < 0.8,
        joints_2d=joints_2d,
        joints_2d_confidence=torch.rand(PEOPLE, len(HALPE26), generator=generator),
        silhouette=oval.float().expand(PEOPLE, -1, -1),
        has_silhouette=there,
        depth_input=3 + side[:, None] * side[None] + 0.1 * normal(64, 64),
        camera=torch.tensor([0.9, 0.1, -0.1]).expand(PEOPLE, -1),
        has_camera=there,
        pelvis=torch.tensor([0.2, 0.1, 4.0]) + 0.1 * normal(3),
        focal=torch.full((PEOPLE,), 4.0),
        principal_point=0.3 * normal(2),
        has_perspective=there,
    )


def training_numbers(overrides: tuple[str, ...]) -> dict[str, float]:
    """The terms of a step and the norm of each module's gradient."""
    config = load_config(None, [*SMALL, *overrides])
    body, mesh = free_body()
    model = build_model(config, body, mesh)
    awaken_model(model, 0.5)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.rand(PEOPLE, 2, model.num_tokens, generator=generator) < 0.3 if model.config.masked else None
    noise = torch.randn(PEOPLE, 2, model.num_points, 3, generator=generator)
    draws = Draws(torch.tensor([[20, 199], [5, 60], [60, 5]]), noise, hidden, 7)
    edges = mesh_edges(mesh.coarse_faces)
    terms = training_losses(
        model,
        build_scheduler(config),
        config.loss,
        people(),
        draws,
        edges if config.loss.edges else None,
        keypoint_map(config.loss, model, body),
    )
    terms["loss"].backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = name.split(".")[0]
            squares[part] = squares.get(part, 0.0) + float(parameter.grad.double().square().sum())
    return {name: value.item() for name, value in terms.items()} | {
        f"gradient of {part}": square**0.5 for part, square in squares.items()
    }


@functools.cache
def pipeline() -> Any:
    return small_pipeline()


def sampling_numbers(sampling: SamplingConfig) -> dict[str, float]:
    """Means over people and hypotheses of what a call of the pipeline gives.

    Of the predicted vertices: which body is nearest to an untrained network's mesh is a matter of the last bit.
    """
    maps = people().heatmaps
    assert maps is not None
    crop = Crop.of(torch.tensor([[250.0, 200.0]]).expand(PEOPLE, -1), torch.full((PEOPLE,), 180.0))
    heatmaps = Heatmaps(maps, torch.ones(PEOPLE, len(HALPE26), dtype=torch.bool), crop)
    sizes = torch.tensor([[640.0, 480.0]]).expand(PEOPLE, -1)
    output = pipeline()(heatmaps=heatmaps, sampling=sampling.but(surface="vertices"), photo_sizes=sizes)
    weights = torch.linspace(0.5, 1.5, output.joints.shape[2])[:, None]
    found = {
        "joints": output.joints.abs().mean(),
        "joints, weighted": (output.joints * weights).mean(),
        "vertices": output.vertices.abs().mean(),
        "translation": output.translation.mean(),
        "spread": output.spread.mean(),
        "log likelihood": output.log_likelihood.mean(),
        "selected": output.selected.double().mean(),
    }
    if output.guidance is not None:
        report = output.guidance
        found |= {"gap before": report.gap_before.mean(), "gap after": report.gap_after.mean()}
        found |= {"active": report.active.double().mean(), "fell back": report.fell_back.double().mean()}
    return {name: float(value) for name, value in found.items()}


def recorded(name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(RECORDED.read_text())[name]
    return found


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_is_as_recorded(name: str) -> None:
    assert training_numbers(TRAININGS[name]) == pytest.approx(recorded(name), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_hypotheses_are_as_recorded(name: str) -> None:
    assert sampling_numbers(SAMPLINGS[name]) == pytest.approx(recorded(name), rel=2e-3, abs=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    assert training_numbers(TRAININGS["RLE"]) == training_numbers(TRAININGS["RLE"])
    assert sampling_numbers(SAMPLINGS["DAT"]) == sampling_numbers(SAMPLINGS["DAT"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = {name: training_numbers(overrides) for name, overrides in TRAININGS.items()}
    numbers |= {name: sampling_numbers(sampling) for name, sampling in SAMPLINGS.items()}
    rounded = {name: {key: float(f"{value:.6g}") for key, value in found.items()} for name, found in numbers.items()}
    RECORDED.write_text(json.dumps(rounded, indent=1) + "\n")
