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
from hmdiff.losses.processes import LABELLED_TERMS
from hmdiff.losses.rle import rle_error

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


def test_the_silhouette_is_not_mirrored_and_is_averaged_to_the_size_of_the_map() -> None:
    """A stripe two pixels wide covers half of a pixel that is four wide, wherever it lies in it."""
    stripe = torch.zeros(2, 32, 32)
    stripe[:, :, 1:3] = 1.0
    covered = torch.full((2, 8, 8), 0.02)
    covered[:, :, 0] = 0.5
    clean, config = points(2, 1), LossConfig(silhouette=1.0)

    def error(found: Tensor, has: list[bool]) -> float:
        sample = Sample(silhouette=stripe, has_silhouette=torch.tensor(has))
        return terms(config, sample, PathOutputs(silhouette=found), clean, clean)["silhouette"].item()

    best = error(covered.logit(), [True, True])
    for other in (covered.flip(2), torch.where(covered > 0.4, 0.9, covered), torch.where(covered > 0.4, 0.1, covered)):
        assert error(other.logit(), [True, True]) > best + 0.02
    one = covered.logit()
    one[1] = 9.0  # wrong, and not labelled
    assert error(one, [True, False]) == pytest.approx(best, rel=1e-5) and error(one, [True, True]) > best + 1


def rle(variant: str = "exact") -> tuple[LossConfig, PathOutputs, Tensor, Tensor, Sample]:
    """Two people at two noise levels; the second has no camera and no vertices."""
    generator = torch.Generator().manual_seed(3)
    clean, truth = points(2, 2, 1), points(2, 1, 2)
    sizes = {"joints": (JOINTS, 3), "vertices": (COARSE, 3), "joints_2d": (JOINTS, 2)}
    scale = {name: torch.rand(2, 2, *size, generator=generator) + 0.1 for name, size in sizes.items()}
    paths = PathOutputs(
        mesh_scale=0.5,
        scale=scale,
        flows={name: (lambda y, power=power: -power * y.square().sum(-1)) for power, name in enumerate(scale)},
        rle_variant=variant,
        vertices=torch.tensor([4, 1]),
        regressed=torch.tensor([[True, False], [False, True]]),
    )
    there = torch.tensor([True, False])
    sample = Sample(camera=torch.rand(2, 3, generator=generator) + 0.5, has_camera=there, has_vertices=there)
    return LossConfig(rle=0.3), paths, clean.requires_grad_(), truth, sample


@pytest.mark.parametrize("variant", ["exact", "official"])
def test_rle_is_of_the_joints_the_drawn_vertices_and_the_projected_joints(variant: str) -> None:
    config, paths, clean, truth, sample = rle(variant)
    camera = torch.tensor([[1.2, 0.1, 0.0], [0.9, 0.0, 0.2]])
    found = terms(config, sample, paths, clean, truth, camera=camera)
    assert set(found) == {"rle_joints", "rle_vertices", "rle_joints_2d"}
    true = truth.expand(-1, 2, -1, -1)

    def error(name: str, mean: Tensor, target: Tensor, scale: Tensor) -> Tensor:  # (B, M)
        return rle_error(mean, scale, target, paths.flows[name], variant)

    joints = error("joints", clean[..., COARSE:, :], true[..., COARSE:, :], paths.scale["joints"])
    torch.testing.assert_close(found["rle_joints"], 0.3 * joints.mean())
    rows = torch.tensor([4, 1])
    vertices = error("vertices", clean[..., rows, :], true[..., rows, :], paths.scale["vertices"][..., rows, :])
    torch.testing.assert_close(found["rle_vertices"], 0.3 * vertices[0].mean())  # the first person's alone

    def seen(points: Tensor, by: Tensor) -> Tensor:
        return 0.5 * points[..., COARSE:, :2] * by[:, None, None, :1] + by[:, None, None, 1:]

    assert sample.camera is not None
    projected = error("joints_2d", seen(clean, camera), seen(true, sample.camera), paths.scale["joints_2d"])
    torch.testing.assert_close(found["rle_joints_2d"], 0.3 * projected[0].mean() / 2)  # a mean over both people


def test_rle_trains_the_mean_at_the_terminal_step_alone() -> None:
    config, paths, clean, truth, sample = rle()
    for name in ("rle_joints", "rle_joints_2d"):
        value = terms(config, sample, paths, clean, truth)[name]
        (pull,) = torch.autograd.grad(value, clean)
        moved = (pull[..., COARSE:, :] != 0).any(-1).any(-1)
        expected = paths.regressed.clone() if paths.regressed is not None else moved
        if name == "rle_joints_2d":
            expected[1] = False  # without a camera
        assert torch.equal(moved, expected), name
    everywhere = dataclasses.replace(paths, regressed=None)  # the direct baseline
    (pull,) = torch.autograd.grad(terms(config, sample, everywhere, clean, truth)["rle_joints"], clean)
    assert (pull[..., COARSE:, :] != 0).any(-1).all()


def test_estimates_without_a_label_and_of_another_norm() -> None:
    truth, there = points(2, 1), torch.tensor([True, False])
    sample = Sample(has_joints_3d=there, has_vertices=there)
    for of, target in (("estimates", truth[..., COARSE:, :]), ("meshes", truth[..., :COARSE, :])):
        found = target[:, :, None].expand(-1, 2, 4, -1, -1) + torch.tensor([0.3, 5.0])[:, None, None, None, None]
        config = LossConfig(estimates=1.0, points="l1")
        value = terms(config, sample, PathOutputs(**{of: found}), truth.expand(-1, 2, -1, -1), truth)
        assert next(iter(value.values())).item() == pytest.approx(0.3, rel=1e-5)


def test_each_contrast_has_its_own_weight() -> None:
    truth = points(2, 1)
    paths = PathOutputs(contrast={"joint_contrast": torch.tensor(2.0), "non_joint_contrast": torch.tensor(3.0)})
    found = terms(LossConfig(joint_contrast=0.1, non_joint_contrast=0.7), Sample(), paths, truth, truth)
    assert found["joint_contrast"].item() == pytest.approx(0.2) and found["non_joint_contrast"].item() == pytest.approx(
        2.1
    )


def test_every_labelled_term_reports_its_share_to_the_processes() -> None:
    """Without it a term of several processes is a mean of means: `losses/processes.py`."""
    _, paths, clean, truth, sample = rle()
    paths = dataclasses.replace(
        paths,
        silhouette=torch.zeros(2, 8, 8),
        estimates=torch.zeros(2, 2, 1, JOINTS, 3),
        meshes=torch.zeros(2, 2, 1, COARSE, 3),
    )
    there = torch.tensor([True, False])
    sample = dataclasses.replace(
        sample, has_joints_3d=there, silhouette=torch.zeros(2, 8, 8), has_silhouette=torch.tensor([True, True])
    )
    config = LossConfig(rle=1.0, silhouette=1.0, estimates=1.0, projection=1.0, edges=1.0)
    shares: dict[str, Tensor] = {}
    found = objective(
        config,
        sample,
        clean,
        truth.expand(-1, 2, -1, -1),
        torch.ones(2, 2),
        clean,
        truth,
        torch.ones(2, 2),
        torch.ones(2, 3),
        COARSE,
        torch.tensor([[0, 1]]),
        paths,
        shares=shares,
    )
    assert shares.keys() == found.keys() - {"loss"} and shares.keys() <= set(LABELLED_TERMS) and len(shares) == 10
    assert all(value == (1.0 if name == "silhouette" else 0.5) for name, value in shares.items())
