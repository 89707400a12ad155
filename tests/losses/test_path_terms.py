"""Terms of the optional modules and noise-level weights against known values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.losses.objective import objective
from hmdiff.losses.paths import PathOutputs, path_terms

COARSE, JOINTS = 5, 3


def points(people: int = 2, levels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(people, levels, COARSE + JOINTS, 3, generator=torch.Generator().manual_seed(seed))


def terms(config: LossConfig, sample: Sample, paths: PathOutputs, clean: Tensor, truth: Tensor, **other: Tensor):  # type: ignore[no-untyped-def]
    level = other.get("level_weight", torch.ones(clean.shape[:2]))
    camera = other.get("camera", torch.tensor([[1.0, 0.0, 0.0]]).expand(len(clean), 3))
    return path_terms(config, sample, paths, clean, truth, level, camera, COARSE)


def test_the_projection_term_is_the_joints_distance_in_the_crop() -> None:
    """Joints 0.1 m to the right at 2 half-sides per metre: 0.2 per joint; depth does not count."""
    truth = points(2, 1)
    camera = torch.tensor([[2.0, 0.3, -0.1]]).expand(2, 3)
    sample = Sample(camera=camera, has_camera=torch.tensor([True, True]))
    config, paths = LossConfig(projection=3.0), PathOutputs(mesh_scale=0.5)
    moved = truth.expand(-1, 2, -1, -1).clone()
    moved[..., COARSE:, 0] += 0.1 / 0.5
    moved[..., COARSE:, 2] += 7.0

    def error(clean: Tensor, camera: Tensor, sample: Sample = sample) -> Tensor:
        return terms(config, sample, paths, clean, truth, camera=camera)["projection"]

    assert error(moved, camera).item() == pytest.approx(0.6, rel=1e-5)
    exact, shifted = truth.expand(-1, 2, -1, -1), camera + torch.tensor([0.0, 0.0, 0.25])
    assert error(exact, shifted).item() == pytest.approx(0.75, rel=1e-5)
    moved.requires_grad_(True)
    error(moved, camera).backward()
    gradient = moved.grad
    assert gradient is not None and (gradient[..., COARSE:, :2] != 0).any() and (gradient[..., :COARSE, :] == 0).all()
    unknown = dataclasses.replace(sample, has_camera=torch.tensor([True, False]))
    assert error(moved.detach(), camera, unknown).item() == pytest.approx(0.3, rel=1e-5)  # that of the other is unknown


def test_the_silhouette_is_compared_the_right_way_up() -> None:
    """A confident correct silhouette costs nothing, a flipped or inverted one much."""
    upper = torch.zeros(1, 8, 8)
    upper[:, :4] = 1.0
    sample = Sample(silhouette=upper, has_silhouette=torch.tensor([True]))
    logits = torch.where(upper > 0, 8.0, -8.0)
    clean = points(1, 1)
    config = LossConfig(silhouette=2.0)

    def error(found: Tensor) -> float:
        return terms(config, sample, PathOutputs(silhouette=found), clean, clean)["silhouette"].item()

    assert error(logits) < 0.01
    assert error(logits.flip(1)) > 2 and error(-logits) > 2
    assert error(torch.zeros_like(logits)) == pytest.approx(2 * math.log(2), rel=1e-4)
    assert "silhouette" not in terms(LossConfig(), sample, PathOutputs(silhouette=logits), clean, clean)


@pytest.mark.parametrize("of", ["estimates", "meshes"])
def test_estimates_on_the_way_are_weighted_by_noise_level(of: str) -> None:
    truth = points(2, 1)
    target = truth[..., COARSE:, :] if of == "estimates" else truth[..., :COARSE, :]
    found = target[:, :, None].expand(-1, 2, 4, -1, -1) + 0.3  # at every level and block off by 0.3 in each coordinate
    paths = PathOutputs(**{of: found})
    level = torch.tensor([[1.0, 5.0], [2.0, 0.0]])
    name = "estimates" if of == "estimates" else "mesh_estimates"
    value = terms(LossConfig(estimates=0.5), Sample(), paths, truth.expand(-1, 2, -1, -1), truth, level_weight=level)
    assert value[name].item() == pytest.approx(0.5 * 0.09 * 2.0, rel=1e-5)


def test_the_objective_weighs_the_noise_levels() -> None:
    """An error of 1 at one of the levels: the term is the weight of that level over the number of levels."""
    truth = points(3, 1)
    prediction = truth.expand(-1, 2, -1, -1).clone()
    prediction[:, 0] += 1.0
    config = LossConfig(camera=0.0)
    for weight, expected in (([1.0, 1.0], 0.5), ([4.0, 1.0], 2.0), ([0.0, 9.0], 0.0)):
        level = torch.tensor([weight]).expand(3, 2)
        found = objective(
            config,
            Sample(),
            prediction,
            truth.expand(-1, 2, -1, -1),
            level,
            prediction,
            truth,
            torch.ones(3, 2),
            torch.ones(3, 3),
            COARSE,
        )
        assert found["points"].item() == pytest.approx(expected, abs=1e-6)
