"""RealNVP: exact inverse and log-determinant, a density that integrates to 1, the sizes of RLE's code."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from small import awaken
from torch import Tensor

from hmdiff.models.flow import SCALE_FLOOR, RealNVP, scale_of

DIMS = (1, 2, 3, 5)


def random_flow(dim: int, couplings: int = 6, hidden: int = 16) -> RealNVP:
    """Weights far from initialisation, so that the map is far from the identity."""
    flow = RealNVP(dim, couplings, hidden)
    awaken(flow, 1.3)
    return flow


@pytest.mark.parametrize("dim", DIMS)
def test_forward_and_inverse_undo_each_other(dim: int) -> None:
    flow = random_flow(dim).double()
    latent = torch.randn(4, 7, dim, dtype=torch.float64)
    x = flow(latent)
    assert (x - latent).abs().mean() > 0.3
    back, log_determinant = flow.inverse(x)
    torch.testing.assert_close(back, latent, rtol=1e-9, atol=1e-9)
    assert back.shape == latent.shape and log_determinant.shape == (4, 7)
    torch.testing.assert_close(flow(flow.inverse(latent)[0]), latent, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", DIMS)
def test_the_log_determinant_is_that_of_the_jacobian(dim: int) -> None:
    flow = random_flow(dim).double()
    found = []
    for x in torch.randn(5, dim, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda point: flow.inverse(point)[0], x)
        assert isinstance(jacobian, Tensor)
        expected = torch.linalg.slogdet(jacobian)
        assert expected.sign > 0
        latent, log_determinant = flow.inverse(x)
        torch.testing.assert_close(log_determinant, expected.logabsdet)
        normal = torch.distributions.MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double())
        torch.testing.assert_close(flow.log_prob(x), normal.log_prob(latent) + expected.logabsdet)
        found.append(log_determinant.item())
    assert dim == 1 or max(found) - min(found) > 1e-3  # not a constant stretch


@pytest.mark.parametrize(("dim", "side", "count"), [(1, 20.0, 4001), (2, 12.0, 401)])
def test_the_density_integrates_to_one(dim: int, side: float, count: int) -> None:
    flow = RealNVP(dim, hidden=16).double()
    awaken(flow, 0.8)
    line = torch.linspace(-side, side, count, dtype=torch.float64)
    grid = line[:, None] if dim == 1 else torch.cartesian_prod(line, line)
    with torch.no_grad():
        total = flow.log_prob(grid).exp().sum() * (line[1] - line[0]) ** dim
        outside = (flow(torch.randn(2000, dim, dtype=torch.float64)).abs() > side).any(-1).sum()
    assert outside == 0 and total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("dim", DIMS)
def test_gradients(dim: int) -> None:
    flow = random_flow(dim, hidden=4).double()
    x = torch.randn(3, dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow.log_prob, x)
    assert torch.autograd.gradcheck(flow, x)
    parameters = tuple(flow.parameters())
    names = [name for name, _ in flow.named_parameters()]

    def of_weights(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(flow, dict(zip(names, weights, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(of_weights, parameters, fast_mode=True)


@pytest.mark.parametrize("dim", DIMS)
def test_batch_equals_single(dim: int) -> None:
    flow = random_flow(dim)
    x = torch.randn(3, 4, dim)
    whole = flow.log_prob(x)
    each = torch.stack([torch.stack([flow.log_prob(point) for point in row]) for row in x])
    torch.testing.assert_close(whole, each, rtol=1e-5, atol=1e-5)


def test_masks_are_the_authors_where_they_have_any() -> None:
    assert RealNVP(2).masks.tolist() == [[0, 1], [1, 0]] * 3
    assert RealNVP(3).masks.tolist() == [[0, 0, 1], [1, 1, 0]] * 3
    assert RealNVP(5, 2).masks.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    assert RealNVP(1, 3).masks.tolist() == [[0], [1], [0]]
    flow = RealNVP(3)
    kinds = ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear"]
    assert [type(layer).__name__ for layer in flow.scale_nets[0]] == [*kinds, "Tanh"]  # type: ignore[arg-type]
    assert [type(layer).__name__ for layer in flow.shift_nets[5]] == kinds  # type: ignore[arg-type]
    # Two nets of Linear(3, 64), Linear(64, 64), Linear(64, 3) for each of six couplings.
    assert sum(weight.numel() for weight in flow.parameters()) == 6 * 2 * (4 * 64 + 65 * 64 + 65 * 3)


def test_in_one_dimension_the_flow_is_a_normal_density() -> None:
    flow = random_flow(1).double()
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    curvature = flow.log_prob(x).diff(n=2)
    assert curvature.amax() < 0
    torch.testing.assert_close(curvature, curvature[:1].expand_as(curvature), rtol=1e-6, atol=1e-9)


def test_it_begins_near_a_standard_normal() -> None:
    x = torch.randn(200, 3)
    normal = -0.5 * x.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    assert (RealNVP(3).log_prob(x) - normal).abs().mean() < 0.6


def test_it_equals_the_flow_of_mmpose() -> None:
    """mmpose's module, from the authors' code (D = 2), loaded by file: the package need not import."""
    found = importlib.util.find_spec("mmpose")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mmpose is not installed")
    file = Path(found.submodule_search_locations[0]) / "models" / "utils" / "realnvp.py"
    spec = importlib.util.spec_from_file_location("mmpose_realnvp", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs, ours = module.RealNVP(), random_flow(2, hidden=64)
    theirs.s.load_state_dict(ours.scale_nets.state_dict())
    theirs.t.load_state_dict(ours.shift_nets.state_dict())
    x = torch.randn(50, 2) * 2
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_learns_a_shape() -> None:
    """Two moons: a normal density of the same covariance is far worse."""

    def moons(count: int) -> Tensor:
        angle = torch.rand(count) * math.pi
        upper = torch.rand(count) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
        return torch.stack([x, y], -1) + 0.1 * torch.randn(count, 2)

    flow = RealNVP(2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=6e-3)
    for _ in range(150):
        loss = -flow.log_prob(moons(192)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = moons(4000)
    normal = torch.distributions.MultivariateNormal(test.mean(0), test.T.cov())
    assert flow.log_prob(test).mean() > normal.log_prob(test).mean() + 0.2


def test_autocast_rounds_nothing() -> None:
    flow, x = random_flow(3), torch.randn(20, 3) * 30
    with torch.autocast("cpu", torch.bfloat16):
        inside, back = flow.log_prob(x), flow(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, flow.log_prob(x)) and torch.equal(back, flow(x))
    half = flow.log_prob(x.bfloat16())
    assert torch.equal(half, flow.log_prob(x.bfloat16().float()))


def test_scales_stay_off_zero_and_can_always_move() -> None:
    raw = torch.tensor([-40.0, -8.0, 0.0, 8.0], requires_grad=True)
    scale = scale_of(raw)
    assert scale[0].item() == pytest.approx(SCALE_FLOOR) and scale[2].item() == pytest.approx(0.5, abs=1e-3)
    assert (scale <= 1).all()
    scale.sum().backward()
    assert raw.grad is not None and (raw.grad[1:] > 1e-4).all()
    assert scale_of(raw.detach().bfloat16()).dtype == torch.float32


def test_no_flow_of_nothing() -> None:
    with pytest.raises(ValueError, match="6 couplings in 0 dimensions: at least 1"):
        RealNVP(0)
    with pytest.raises(ValueError, match="0 couplings in 3 dimensions: at least 1"):
        RealNVP(3, 0)
