"""Rotations, cameras and alignments against their axioms, scipy and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.autograd import gradcheck

from hmdiff import geometry as g


def rotations(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(Rotation.random(count, np.random.default_rng(seed)).as_matrix())


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Every public function with inputs of a leading batch dimension B.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple[Tensor, ...]]]] = {
    "axis_angle_to_matrix": (g.axis_angle_to_matrix, lambda b: (randn(b, 3),)),
    "skew": (g.skew, lambda b: (randn(b, 3),)),
    "matrix_to_quaternion": (g.matrix_to_quaternion, lambda b: (rotations(b),)),
    "matrix_to_axis_angle": (g.matrix_to_axis_angle, lambda b: (rotations(b),)),
    "perspective_projection": (
        g.perspective_projection,
        lambda b: (randn(b, 5, 3) + torch.tensor([0.0, 0, 6]), randn(b) + 5, randn(b, 2)),
    ),
    "weak_perspective_projection": (g.weak_perspective_projection, lambda b: (randn(b, 5, 3), randn(b, 3))),
    "weak_perspective_fit": (
        g.weak_perspective_fit,
        # Near a true camera: the scale's lower bound has no gradient.
        lambda b: ((p := randn(b, 5, 3)), 0.8 * p[..., :2] + 0.1 * randn(b, 5, 2), randn(b, 5).abs() + 0.1),
    ),
    "perspective_fit": (
        g.perspective_fit,
        lambda b: (0.4 * randn(b, 7, 3), 0.5 * randn(b, 7, 2), randn(b, 7).abs() + 0.1, 0.3 * randn(b, 2)),
    ),
    "fitted_projection": (
        g.fitted_projection,
        # A nearness within its bounds, which have no gradient.
        lambda b: (0.3 * randn(b, 5, 3), torch.tensor([1.0, 0.1, -0.2, 0.3]) + 0.05 * torch.rand(b, 4), randn(b, 2)),
    ),
    "crop_rotation": (g.crop_rotation, lambda b: (randn(b, 2), randn(b).abs() + 2)),
    "weak_to_full_camera": (
        g.weak_to_full_camera,
        lambda b: (
            randn(b, 3).abs() + 0.5,
            randn(b, 2) * 100,
            randn(b).abs() * 100 + 50,
            randn(b).abs() + 900,
            randn(b, 2) * 100,
        ),
    ),
    "similarity_align": (g.similarity_align, lambda b: (randn(b, 5, 3), randn(b, 5, 3))),
}


def test_every_public_function_is_covered() -> None:
    public = {name for name, value in vars(g).items() if callable(value) and value.__module__ == g.__name__}
    # similarity_transform returns a tuple and is what similarity_align applies; the fit has a test of its own.
    assert public - set(CASES) == {"similarity_transform", "perspective_translation_fit"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3, 4])  # at 3, code that forgets `dim` takes the batch for x, y, z
def test_batch_equals_single(name: str, batch: int) -> None:
    function, inputs = CASES[name]
    arguments = inputs(batch)
    whole = function(*arguments)
    assert whole.isfinite().all()
    for index in range(batch):
        torch.testing.assert_close(whole[index], function(*(a[index] for a in arguments)), rtol=0, atol=1e-9)
    doubled = function(*(torch.stack([a, a]) for a in arguments))
    torch.testing.assert_close(doubled, torch.stack([whole, whole]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    function, inputs = CASES[name]
    assert gradcheck(function, tuple(a.double().requires_grad_() for a in inputs(3)), atol=1e-5)


def test_rotations_agree_with_scipy() -> None:
    vectors = randn(50, 3) * 2
    reference = Rotation.from_rotvec(vectors.numpy())
    matrices = g.axis_angle_to_matrix(vectors)
    torch.testing.assert_close(matrices, torch.from_numpy(reference.as_matrix()), rtol=0, atol=1e-12)
    xyzw = torch.from_numpy(reference.as_quat(canonical=True))
    torch.testing.assert_close(g.matrix_to_quaternion(matrices), xyzw[:, [3, 0, 1, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        g.matrix_to_axis_angle(matrices), torch.from_numpy(reference.as_rotvec()), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 9.99e-4, 1.001e-3, 1.0, math.pi - 1e-4, math.pi - 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_axis_angle_round_trip_and_gradient_at_the_edges(angle: float, dtype: torch.dtype) -> None:
    axis = torch.nn.functional.normalize(torch.tensor([[0.3, -0.5, 0.8], [1.0, 0, 0], [-0.1, 0.99, 0.05]], dtype=dtype))
    vector = (axis * angle).requires_grad_()
    matrix = g.axis_angle_to_matrix(vector)
    back = g.matrix_to_axis_angle(matrix)
    # Near pi the sign of the axis is a matter of rounding, but the rotation is not.
    torch.testing.assert_close(g.axis_angle_to_matrix(back), matrix, rtol=0, atol=2e-6)
    expected = torch.from_numpy(Rotation.from_rotvec(vector.detach().double().numpy()).as_matrix()).to(dtype)
    torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=6e-7 if dtype == torch.float32 else 1e-14)
    if angle < 3:
        torch.testing.assert_close(back, vector, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=0)
    back.square().sum().backward()
    assert vector.grad is not None and vector.grad.isfinite().all()
    if angle < 3:  # d|v|² / dv = 2v, through both functions
        torch.testing.assert_close(vector.grad, 2 * vector.detach(), rtol=0, atol=1e-4)


def test_axis_angle_gradient_at_zero_and_near_pi() -> None:
    for vector in (torch.zeros(2, 3), torch.tensor([[math.pi - 1e-3, 0, 0], [0, 2.2, -2.2]])):
        assert gradcheck(g.axis_angle_to_matrix, vector.double().requires_grad_())
    # The derivative at zero is the generator: dR = skew(dv).
    zero = torch.zeros(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: g.matrix_to_axis_angle(g.axis_angle_to_matrix(v)), zero)
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(g.axis_angle_to_matrix, zero)
    torch.testing.assert_close(jacobian, g.skew(torch.eye(3, dtype=torch.float64)).permute(1, 2, 0))


def test_quaternion_takes_every_branch() -> None:
    half_turns = torch.diag_embed(torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]))
    torch.testing.assert_close(g.matrix_to_quaternion(half_turns), torch.eye(4))


def test_skew_is_the_cross_product() -> None:
    a, b = randn(4, 3), randn(4, 3)
    torch.testing.assert_close((g.skew(a) @ b[..., None])[..., 0], torch.linalg.cross(a, b))


def test_perspective_known_values() -> None:
    points = torch.tensor([[0.0, 0, 2], [1, 0, 2], [0, 1, 4]])  # x right, y down
    pixels = g.perspective_projection(points, torch.tensor(1000.0), torch.tensor([320.0, 240.0]))
    torch.testing.assert_close(pixels, torch.tensor([[320.0, 240], [820, 240], [320, 490]]))


def test_weak_perspective_fit_recovers_the_camera_and_ignores_weightless_points() -> None:
    points, camera = randn(4, 10, 3), torch.tensor([[0.9, 0.1, -0.2], [0.5, 0, 0], [2, 1, 1], [1.1, -0.4, 0.3]])
    target = g.weak_perspective_projection(points, camera.double())
    target[:, 0] = 50
    weight = torch.ones(4, 10, dtype=torch.float64)
    weight[:, 0] = 0
    torch.testing.assert_close(g.weak_perspective_fit(points, target, weight), camera.double())


def test_weak_perspective_fit_is_optimal() -> None:
    points, weight = randn(3, 12, 3), randn(3, 12).abs()
    target = g.weak_perspective_projection(points, torch.tensor([0.8, 0.1, 0.0]).double().expand(3, 3))
    target = target + 0.3 * randn(3, 12, 2)

    def loss(camera: Tensor) -> Tensor:
        difference = g.weak_perspective_projection(points, camera) - target
        return (weight[..., None] * difference.square()).sum((-2, -1))

    best = g.weak_perspective_fit(points, target, weight)
    for step in (1e-3, 1e-2, 0.1):
        for direction in torch.nn.functional.normalize(randn(20, 3), dim=-1):
            assert (loss(best + step * direction) > loss(best)).all()
    assert g.weak_perspective_fit(points, -target, weight)[:, 0].min() >= 1e-3  # never a mirror image
    assert g.weak_perspective_fit(points, target, weight * 0).isfinite().all()


def test_weak_camera_agrees_with_perspective() -> None:
    """The pelvis lands exactly; the rest of the body the nearer, the longer the focal length."""
    body = (torch.rand(50, 3, dtype=torch.float64) - 0.5) * torch.tensor([0.8, 1.8, 0.5])
    body[0] = 0
    camera = torch.tensor([0.95, 0.1, -0.15], dtype=torch.float64)
    center, side, principal = (torch.tensor(x, dtype=torch.float64) for x in ([400.0, 300.0], 350.0, [320.0, 240.0]))
    expected = g.weak_perspective_projection(body, camera) * side / 2 + center
    errors = []
    for focal in (1e3, 1e4, 1e5):
        translation = g.weak_to_full_camera(camera, center, side, torch.tensor(focal).double(), principal)
        pixels = g.perspective_projection(body + translation, torch.tensor(focal).double(), principal)
        torch.testing.assert_close(pixels[0], expected[0])
        errors.append((pixels - expected).norm(dim=-1).max().item())
    assert errors[2] < 0.15 and errors[1] / errors[2] > 8 and errors[0] / errors[1] > 8


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_similarity_recovers_a_known_one(batch: int) -> None:
    source, rotation = randn(batch, 6, 3), rotations(batch, seed=1)
    scale, shift = randn(batch).abs() + 0.2, randn(batch, 3)
    target = scale[:, None, None] * source @ rotation.mT + shift[:, None]
    found = g.similarity_transform(source, target)
    for value, expected in zip(found, (scale, rotation, shift), strict=True):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(g.similarity_align(source, target), target)


def test_similarity_agrees_with_scipy() -> None:
    """scipy standardises both sets and allows reflections: on near copies the residuals are the same."""
    for _ in range(5):
        target = randn(20, 3)
        source = target @ rotations(1)[0].mT * 1.7 + 0.2 * randn(20, 3) + 3
        _, _, disparity = procrustes(target.numpy(), source.numpy())
        residual = (g.similarity_align(source, target) - target).square().sum()
        spread = (target - target.mean(0)).square().sum()
        assert (residual / spread).item() == pytest.approx(disparity, rel=1e-9)


def test_similarity_is_the_best_and_never_a_reflection() -> None:
    target = randn(4, 8, 3)
    source = target * torch.tensor([-1.0, 1, 1])  # a mirror image
    scale, rotation, translation = g.similarity_transform(source, target)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(4, dtype=rotation.dtype))
    assert (scale > 0).all()

    def loss(scale: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
        moved = scale[:, None, None] * source @ rotation.mT + translation[:, None]
        return (moved - target).square().sum((-2, -1))

    best = loss(scale, rotation, translation)
    for _ in range(50):
        turn = g.axis_angle_to_matrix(0.1 * randn(4, 3))
        assert (loss(scale, turn @ rotation, translation) >= best).all()
        assert (loss(scale * (1 + 0.1 * randn(4)), rotation, translation + 0.1 * randn(4, 3)) >= best).all()
    for other in rotations(200, seed=2):
        # The optimal scale and shift for any other rotation are no better: the minimum is global.
        turned = (source - source.mean(1, keepdim=True)) @ other.mT
        centred = target - target.mean(1, keepdim=True)
        fit = ((turned * centred).sum((1, 2)) / turned.square().sum((1, 2))).clamp_min(0)
        assert ((fit[:, None, None] * turned - centred).square().sum((1, 2)) >= best - 1e-9).all()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2)])
def test_translation_fit_finds_the_place_and_resists_an_outlier(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    points = torch.randn(*shape, 17, 3, generator=generator, dtype=torch.float64) * 0.3
    place = torch.tensor([0.4, -0.2, 5.0], dtype=torch.float64).expand(*shape, 3)
    focal = torch.full(shape, 1000.0, dtype=torch.float64)
    center = torch.tensor([320.0, 240.0], dtype=torch.float64).expand(*shape, 2)
    seen = g.perspective_projection(points + place[..., None, :], focal, center)
    prior = place + torch.tensor([0.1, 0.1, 1.0], dtype=torch.float64)
    weight = torch.ones(*shape, 17, dtype=torch.float64)
    exact = g.perspective_translation_fit(points, seen, weight, focal, center, prior, prior_weight=0.0)
    assert (exact - place).abs().max() < 1e-8
    seen[..., 3, :] += 300
    robust = g.perspective_translation_fit(points, seen, weight, focal, center, prior, prior_weight=0.0, rounds=8)
    plain = g.perspective_translation_fit(points, seen, weight, focal, center, prior, prior_weight=0.0, rounds=1)
    assert (robust - place).norm(dim=-1).max() < 0.2 * (plain - place).norm(dim=-1).min()
    # With nothing seen it stays where it was thought to be.
    lost = g.perspective_translation_fit(points, seen, 0 * weight, focal, center, prior)
    assert torch.allclose(lost, prior)
