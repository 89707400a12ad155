"""Losses: known values, gradients, and no gradient from missing labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.losses.mesh import (
    POINT_LOSSES,
    camera_error,
    edge_error,
    mask_unlabelled,
    mean_over_labelled,
    point_error,
    reprojection_error,
)
from hmdiff.losses.objective import objective


def test_known_values() -> None:
    predicted = torch.tensor([[[0.0, 0, 0], [3, 0, 4]]])
    target = torch.zeros(1, 2, 3)
    assert point_error(predicted, target, "l2").item() == pytest.approx(25 / 3 / 2)
    assert point_error(predicted, target, "l1").item() == pytest.approx(7 / 3 / 2)
    assert point_error(predicted, target, "euclidean").item() == pytest.approx(2.5, abs=1e-4)
    weight = torch.tensor([3.0, 1.0])
    assert point_error(predicted, target, "euclidean", weight).item() == pytest.approx(5 / 4, abs=1e-4)
    each = torch.tensor([[3.0, 1.0], [0.0, 2.0]])[:, None]  # weights per sample
    both = point_error(predicted.expand(2, 1, 2, 3), target, "euclidean", each)
    torch.testing.assert_close(both[:, 0], torch.tensor([5 / 4, 5.0]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="'huber' is none of"):
        point_error(predicted, target, "huber")
    edges = torch.tensor([[0, 1]])
    assert edge_error(predicted, target, edges).item() == pytest.approx(5, abs=1e-4)
    assert edge_error(predicted + 7, predicted, edges).item() == pytest.approx(0, abs=1e-5)  # place does not count
    projected = torch.tensor([[[0.0, 0.0], [0.5, -0.5]]])
    place = torch.tensor([[[0.25, 0.0], [0.0, 0.0]]])
    assert reprojection_error(projected, place, torch.ones(1, 2)).item() == pytest.approx((0.25 + 1) / 2)
    assert reprojection_error(projected, place, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.25)
    assert reprojection_error(projected, place, torch.zeros(1, 2)).item() == 0
    camera, truth = torch.tensor([[2.0, 0.1, 0.0]]), torch.tensor([[1.0, 0.0, -0.2]])
    assert camera_error(camera, truth).item() == pytest.approx(0.6931 + 0.3, abs=1e-4)


@pytest.mark.parametrize("kind", POINT_LOSSES)
def test_gradients_of_points(kind: str) -> None:
    predicted = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randn(2, 1, 4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda points: point_error(points, target, kind, weight), predicted)


def test_gradients_of_the_others() -> None:
    points = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3]])
    other = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: edge_error(p, other, edges), points)
    flat, confidence = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True), torch.rand(2, 4).double() + 0.5
    assert torch.autograd.gradcheck(lambda p: reprojection_error(p, other[..., :2], confidence), flat)
    camera = (torch.rand(2, 3, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: camera_error(c, other[:, 0].abs()), camera)
    collapsed = torch.zeros(1, 4, 3, requires_grad=True)  # edges of length 0 have no direction, but a finite gradient
    edge_error(collapsed, torch.randn(1, 4, 3), edges).sum().backward()
    point_error(collapsed, torch.zeros(1, 4, 3), "euclidean").sum().backward()
    assert collapsed.grad is not None and collapsed.grad.isfinite().all()


def test_silence() -> None:
    error = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(mask_unlabelled(error, None), error)
    assert mask_unlabelled(error, torch.tensor([False, True])).tolist() == [[0, 0, 0], [3, 4, 5]]
    assert mask_unlabelled(error[:, 0], torch.tensor([True, False])).tolist() == [0, 0]


COARSE, JOINTS, LEVELS = 6, 3, 2
EDGES = torch.tensor([[0, 1], [1, 2], [3, 4]])


def batch(count: int, has_vertices: Tensor | None = None, has_joints: Tensor | None = None) -> dict:
    every = COARSE + JOINTS
    generator = torch.Generator().manual_seed(4)
    share = torch.rand(count, LEVELS, generator=generator)
    prediction = torch.randn(count, LEVELS, every, 3, generator=generator).requires_grad_()
    return {
        "sample": Sample(
            has_vertices=has_vertices, has_joints_3d=has_joints, camera=torch.rand(count, 3, generator=generator) + 0.5
        ),
        "prediction": prediction,
        "target": torch.randn(count, LEVELS, every, 3, generator=generator),
        "level_weight": torch.rand(count, LEVELS, generator=generator) + 0.1,
        "clean": prediction,
        "truth": torch.randn(count, 1, every, 3, generator=generator),
        "share": share,
        "camera": (torch.rand(count, 3, generator=generator) + 0.5).requires_grad_(),
        "num_coarse": COARSE,
        "edges": EDGES,
    }


def test_objective_is_its_named_sum() -> None:
    given = batch(3)
    config = LossConfig(points="l1", joints=2.0, camera=0.3, edges=0.5)
    terms = objective(config, **given)
    assert set(terms) == {"points", "camera", "edges", "loss"}
    assert terms["loss"].item() == pytest.approx(sum(terms[name].item() for name in ("points", "camera", "edges")))
    error = (given["prediction"] - given["target"]).abs().mean(-1)
    weight = torch.tensor([1.0] * COARSE + [2.0] * JOINTS)
    points = ((error * weight).sum(-1) / weight.sum() * given["level_weight"]).mean()
    torch.testing.assert_close(terms["points"], points)
    torch.testing.assert_close(terms["camera"], 0.3 * camera_error(given["camera"], given["sample"].camera).mean())
    lengths = edge_error(given["clean"][..., :COARSE, :], given["truth"][..., :COARSE, :], EDGES)
    torch.testing.assert_close(terms["edges"], 0.5 * (lengths * given["share"]).mean())
    assert set(objective(LossConfig(camera=0.0), **given)) == {"points", "loss"}


def test_vertices_and_joints_as_terms_of_their_own() -> None:
    """D2A-HMR's λ_v L_v and λ_3D L_3D by hand: a mean over its points, weighted by noise level."""
    given = batch(3)
    terms = objective(LossConfig(points="l1", vertices=2.0, joints_3d=0.5, camera=0.0), **given)
    assert set(terms) == {"vertices", "joints_3d", "loss"}
    error = (given["prediction"] - given["target"]).abs().mean(-1)
    for name, weight, part in (("vertices", 2.0, error[..., :COARSE]), ("joints_3d", 0.5, error[..., COARSE:])):
        torch.testing.assert_close(terms[name], weight * (part.mean(-1) * given["level_weight"]).mean())


def test_labels_that_are_all_there_change_nothing() -> None:
    config = LossConfig(edges=0.1, joints=0.5)
    everyone = torch.ones(3, dtype=torch.bool)
    plain, marked = objective(config, **batch(3)), objective(config, **batch(3, everyone, everyone))
    assert all(torch.equal(plain[name], marked[name]) for name in plain)


def test_a_missing_label_pulls_at_nothing() -> None:
    config = LossConfig(edges=0.1, camera=0.0)
    given = batch(3, torch.tensor([True, False, True]), torch.tensor([True, True, False]))
    objective(config, **given)["loss"].backward()
    gradient = given["prediction"].grad
    assert (gradient[1, :, :COARSE] == 0).all() and (gradient[1, :, COARSE:] != 0).any((-1, -2)).all()
    assert (gradient[2, :, COARSE:] == 0).all() and (gradient[2, :, :COARSE] != 0).any((-1, -2)).all()
    assert (gradient[0] != 0).any(-1).all()
    # Values at missing labels are ignored.
    changed = batch(3, torch.tensor([True, False, True]), torch.tensor([True, True, False]))
    changed["target"][1, :, :COARSE] = 99
    changed["target"][2, :, COARSE:] = 99
    changed["truth"][1, :, :COARSE] = 99
    torch.testing.assert_close(objective(config, **changed)["loss"], objective(config, **given)["loss"])


def test_people_without_a_label_do_not_weaken_the_others() -> None:
    """With labels for half of a batch, every term equals that of the labelled half."""
    there = torch.tensor([True, False, True, False])
    for config in (LossConfig(edges=0.1), LossConfig(vertices=1.0, joints_3d=0.5)):
        given = batch(4, there, there)
        given["sample"] = dataclasses.replace(given["sample"], has_camera=there)
        mixed = objective(config, **given)
        rows = {k: v[there] if isinstance(v, Tensor) and k != "edges" else v for k, v in given.items()}
        rows["sample"] = given["sample"].map(lambda tensor: tensor[there])
        alone = objective(config, **rows)
        assert set(mixed) == set(alone)
        for name in mixed:
            torch.testing.assert_close(mixed[name], alone[name])
    assert mean_over_labelled(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool)) == 0


def test_weights_do_not_depend_on_the_batch() -> None:
    config = LossConfig(edges=0.1)
    given = batch(4)
    whole = objective(config, **given)
    parts = []
    for i in range(4):
        rows = {k: v[i : i + 1] if isinstance(v, Tensor) and k != "edges" else v for k, v in given.items()}
        rows["sample"] = given["sample"].map(lambda tensor, i=i: tensor[i : i + 1])
        parts.append(objective(config, **rows))
    for name in whole:
        torch.testing.assert_close(whole[name], torch.stack([part[name] for part in parts]).mean())


def test_without_a_true_camera_the_keypoints_tell() -> None:
    given = batch(2)
    keypoints, camera = torch.randn(2, 5, 3), torch.tensor([[0.8, 0.1, -0.2], [1.1, 0.0, 0.3]])
    seen = keypoints[..., :2] * camera[:, None, :1] + camera[:, None, 1:]
    sample = Sample(keypoints_3d=keypoints, joints_2d=seen, joints_2d_confidence=torch.ones(2, 5))
    config = LossConfig(camera=1.0)
    exact = objective(config, **{**given, "sample": sample, "camera": camera})
    assert exact["camera"].item() == pytest.approx(0, abs=1e-6)
    off = objective(config, **{**given, "sample": sample, "camera": camera + torch.tensor([0.0, 0.1, 0.0])})
    assert off["camera"].item() == pytest.approx(0.1, abs=1e-5)
    blind = dataclasses.replace(sample, joints_2d=None)
    assert objective(config, **{**given, "sample": blind})["camera"] == 0


def test_a_true_camera_goes_before_the_keypoints_and_both_need_their_labels() -> None:
    """The first person has a camera, the second 3D and 2D keypoints, the third keypoints without depth."""
    given = batch(3)
    keypoints, camera = torch.randn(3, 5, 3), torch.tensor([[0.8, 0.1, -0.2], [1.1, 0.0, 0.3], [1.0, 0.0, 0.0]])
    seen = keypoints[..., :2] * camera[:, None, :1] + camera[:, None, 1:]
    sample = Sample(
        camera=camera,
        has_camera=torch.tensor([True, False, False]),
        keypoints_3d=keypoints,
        has_keypoints_3d=torch.tensor([True, True, False])[:, None].expand(3, 5),
        joints_2d=seen + 7.0 * torch.tensor([1.0, 0.0, 1.0])[:, None, None],  # wrong for the first and the third
        joints_2d_confidence=torch.ones(3, 5),
    )
    config = LossConfig(camera=1.0)
    exact = objective(config, **{**given, "sample": sample, "camera": camera})["camera"]
    assert exact.item() == pytest.approx(0, abs=1e-5)
    off = objective(config, **{**given, "sample": sample, "camera": camera + torch.tensor([0.0, 0.1, 0.0])})["camera"]
    assert off.item() == pytest.approx(0.1, abs=1e-5)  # 0.1 for each of the two who have labels


def test_a_camera_of_no_size_has_a_finite_error() -> None:
    scale = torch.tensor([[0.0, 0, 0], [-1.0, 0, 0]], requires_grad=True)
    error = camera_error(scale, torch.tensor([[1.0, 0, 0], [0.0, 0, 0]]))
    error.sum().backward()
    assert error.isfinite().all() and scale.grad is not None and scale.grad.isfinite().all()


def test_what_is_not_labelled_may_be_nan() -> None:
    """In the objective's own hands: a NaN behind a mask reaches neither the value nor a gradient."""
    there = torch.tensor([True, False, True])
    given = batch(3, there, there)
    camera = given["sample"].camera.clone()
    camera[1] = torch.nan
    confidence = torch.ones(3, 5)
    confidence[:, 2] = 0
    seen = torch.where(confidence[..., None] > 0, torch.randn(3, 5, 2), torch.nan)
    given["sample"] = dataclasses.replace(
        given["sample"],
        camera=camera,
        has_camera=there,
        keypoints_3d=torch.randn(3, 5, 3),
        joints_2d=seen,
        joints_2d_confidence=confidence,
    )
    terms = objective(LossConfig(camera=1.0), **given)
    terms["loss"].backward()
    assert terms["camera"].isfinite() and given["camera"].grad.isfinite().all()


def test_a_label_without_a_mask_is_everybodys() -> None:
    """Joints of all, vertices of some: the others' joints count, and the other way round."""
    some = torch.tensor([True, False, True])
    for given, part in ((batch(3, some, None), slice(COARSE, None)), (batch(3, None, some), slice(COARSE))):
        objective(LossConfig(camera=0.0), **given)["points"].backward()
        gradient = given["prediction"].grad
        assert (gradient[1, :, part] != 0).any(-1).all()
        other = slice(COARSE) if part.start else slice(COARSE, None)
        assert (gradient[1, :, other] == 0).all()


def test_edges_are_those_of_the_clean_mesh_whatever_is_predicted() -> None:
    given = batch(2)
    given["clean"] = given["truth"].expand(-1, LEVELS, -1, -1) + 3.0  # moved: its edges are right
    assert objective(LossConfig(edges=1.0), **given)["edges"].item() == pytest.approx(0, abs=1e-5)
