"""RLE: `exact` by hand, `official` against a readable loop, normalisation of the densities, and learning."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from small import awaken
from torch import Tensor, nn

from hmdiff.losses.rle import RLE_VARIANTS, joint_confidence, rle_error, rle_log_likelihood
from hmdiff.models.flow import RealNVP, scale_of

DIMS = (1, 2, 3, 5)


def flat(x: Tensor) -> Tensor:
    """log G = 0 everywhere: not a density, but isolates the other terms."""
    return torch.zeros_like(x[..., 0])


def normal(x: Tensor) -> Tensor:
    return (-0.5 * x.square() - 0.5 * math.log(2 * math.pi)).sum(-1)


def random_flow(dim: int, hidden: int = 16, scale: float = 1.0) -> RealNVP:
    flow = RealNVP(dim, hidden=hidden)
    awaken(flow, scale)
    return flow


def some(dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Means, scales and targets (4, 2, 6, D)."""
    shape = (4, 2, 6, dim)
    return torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.05, torch.randn(shape, dtype=dtype)


def test_known_values() -> None:
    mean, target = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]])
    scale = torch.tensor([[[0.5, 0.25]]])  # residual y = (2, 0)
    laplace = math.log(0.5) + math.log(0.25) + 2 * math.log(2) + 2
    log_normal = -0.5 * 4 - math.log(2 * math.pi)
    assert rle_error(mean, scale, target, flat).item() == pytest.approx(laplace)
    assert rle_error(mean, scale, target, normal).item() == pytest.approx(laplace - log_normal)
    twice = laplace + math.log(0.5) + math.log(0.25)
    assert rle_error(mean, scale, target, normal, "composite").item() == pytest.approx(twice - log_normal)
    authors = 2 * (math.log(0.5) + math.log(0.25)) + math.log(2 * math.pi) + 2 / math.sqrt(2)
    assert rle_error(mean, scale, target, normal, "official").item() == pytest.approx(authors - 2 * log_normal)
    with pytest.raises(ValueError, match="variant 'strict' is none of"):
        rle_error(mean, scale, target, flat, "strict")
    with pytest.raises(ValueError, match="variant 'strict' is none of"):
        rle_log_likelihood(mean, mean[:, 0], scale[:, 0], flat, "strict")


@pytest.mark.parametrize("dim", DIMS)
def test_official_is_the_authors_formula(dim: int) -> None:
    """The authors' code, scalar by scalar: nf_loss = log σ - log φ((pred - gt) / σ), logQ with amp = 1 / √(2π)."""
    flow = random_flow(dim).double()
    mean, scale, target = some(dim, torch.float64)
    found = rle_error(mean, scale, target, flow.log_prob, "official")
    amp = 1 / math.sqrt(2 * math.pi)
    for i in range(4):
        for n in range(2):
            points = []
            for p in range(6):
                predicted, sigma, true = mean[i, n, p], scale[i, n, p], target[i, n, p]
                log_phi = flow.log_prob(((predicted - true) / sigma)[None])[0].item()
                loss = 0.0
                for d in range(dim):
                    size, off = sigma[d].item(), abs((true[d] - predicted[d]).item())
                    nf_loss = math.log(size) - log_phi
                    loss += nf_loss + math.log(size / amp) + off / (math.sqrt(2) * size + 1e-9)
                points.append(loss)
            assert found[i, n].item() == pytest.approx(sum(points) / 6, rel=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_exact_is_laplace_times_the_flow_in_the_points_own_axes(dim: int) -> None:
    flow = random_flow(dim).double()
    mean, scale, target = some(dim, torch.float64)
    laplace = torch.distributions.Laplace(mean, scale).log_prob(target).sum(-1)
    stretched = flow.log_prob((target - mean) / scale)  # of y; a density of x would have - Σ log σ
    torch.testing.assert_close(rle_error(mean, scale, target, flow.log_prob), -(laplace + stretched).mean(-1))
    proper = stretched - scale.log().sum(-1)
    composite = rle_error(mean, scale, target, flow.log_prob, "composite")
    torch.testing.assert_close(composite, -(laplace + proper).mean(-1))


@pytest.mark.parametrize("dim", [1, 2])
def test_what_is_a_density_and_what_only_bounds_one(dim: int) -> None:
    """exp(-exact) integrates to Z = ∫ Q G <= 2^-D for any mean and scale; each half of composite to 1."""
    flow = random_flow(dim, hidden=8, scale=0.8).double()
    line = torch.linspace(-8, 8, 4001 if dim == 1 else 241, dtype=torch.float64)
    grid = (line[:, None] if dim == 1 else torch.cartesian_prod(line, line))[:, None]
    cell = (line[1] - line[0]) ** dim
    masses = []
    with torch.no_grad():
        for mean, scale in ((0.0, 0.7), (0.4, 0.5)):
            one, wide = torch.full_like(grid, mean), torch.full_like(grid, scale)
            exact = rle_error(one, wide, grid, flow.log_prob)
            laplace = rle_error(one, wide, grid, flat)
            both = rle_error(one, wide, grid, flow.log_prob, "composite")
            masses.append((exact.neg().exp().sum() * cell).item())
            assert laplace.neg().exp().sum().item() * cell == pytest.approx(1, abs=1e-2)
            assert (laplace - both).exp().sum().item() * cell == pytest.approx(1, abs=1e-2)  # the flow's half
        latent = torch.randn(40000, dim, dtype=torch.float64)
        overlap = (0.5**dim * (-flow(latent).abs().sum(-1)).exp()).mean().item()  # Z = E_G[Q]
    assert masses[0] == pytest.approx(masses[1], rel=1e-2) and masses[0] == pytest.approx(overlap, rel=2e-2)
    assert masses[0] < 0.5**dim


@pytest.mark.parametrize("variant", RLE_VARIANTS)
def test_gradients(variant: str) -> None:
    flow = random_flow(3, hidden=4).double()
    mean, scale, target = (part[:2, :, :3] for part in some(3, torch.float64))
    weight = torch.tensor([1.0, 0.0, 2.0]).double()
    inputs = (mean.requires_grad_(), scale.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, s, t: rle_error(m, s, t, flow.log_prob, variant, weight), inputs)


@pytest.mark.parametrize("variant", RLE_VARIANTS)
def test_batch_equals_single(variant: str) -> None:
    flow = random_flow(3)
    mean, scale, target = some(3)
    weight = torch.rand(4, 2, 6)
    whole = rle_error(mean, scale, target, flow.log_prob, variant, weight)
    assert whole.shape == (4, 2)
    for i in range(4):
        one = rle_error(mean[i], scale[i], target[i], flow.log_prob, variant, weight[i])
        torch.testing.assert_close(one, whole[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", RLE_VARIANTS)
def test_points_without_a_label_do_not_count(variant: str) -> None:
    flow = random_flow(3)
    mean, scale, target = (part.requires_grad_() for part in some(3))
    weight = torch.ones(4, 2, 6)
    weight[0, 0, 2:] = 0
    weight[3] = 0
    holes = torch.where(weight[..., None] > 0, target.detach(), torch.nan)
    found = rle_error(mean, scale, holes, flow.log_prob, variant, weight)
    two = rle_error(mean[0, 0, :2], scale[0, 0, :2], target[0, 0, :2], flow.log_prob, variant)
    torch.testing.assert_close(found[0, 0], two, rtol=1e-5, atol=1e-5)
    assert (found[3] == 0).all() and found.isfinite().all()
    found.sum().backward()
    for part in (mean, scale):
        assert part.grad is not None and part.grad.isfinite().all()
        assert (part.grad[weight == 0] == 0).all() and (part.grad[weight > 0] != 0).any(-1).all()
    heavy = rle_error(mean, scale, target, flow.log_prob, variant, torch.full((4, 2, 6), 3.0))
    torch.testing.assert_close(heavy, rle_error(mean, scale, target, flow.log_prob, variant))


@pytest.mark.parametrize("variant", RLE_VARIANTS)
def test_wild_numbers_stay_finite(variant: str) -> None:
    flow = random_flow(3)
    mean = torch.tensor([1e4, -1e4, 0.0, 0.0])[None, :, None].repeat(1, 1, 3).requires_grad_()
    scale = torch.tensor([0.5, 0.0, 0.0, 1e4])[None, :, None].repeat(1, 1, 3).requires_grad_()
    found = rle_error(mean, scale, torch.zeros(1, 4, 3), flow.log_prob, variant)
    found.sum().backward()
    assert found.isfinite().all()
    for part in (mean, scale, *flow.parameters()):
        assert part.grad is not None and part.grad.isfinite().all()


@pytest.mark.parametrize("variant", RLE_VARIANTS)
def test_half_precision_is_computed_in_float32(variant: str) -> None:
    flow = random_flow(3)
    half = [part.bfloat16() for part in some(3)]
    expected = rle_error(*(part.float() for part in half), flow.log_prob, variant)
    with torch.autocast("cpu", torch.bfloat16):
        found = rle_error(*half, flow.log_prob, variant)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_confidence() -> None:
    scale = torch.tensor([[[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], [[0.0, 0.0, 0.0], [1.0, 1.0, 4.0]]])
    torch.testing.assert_close(joint_confidence(scale), torch.tensor([[0.8, 0.5], [1.0, 0.0]]))


@pytest.mark.parametrize("variant", RLE_VARIANTS)
def test_the_likelihood_of_hypotheses_orders_them_as_the_loss_does(variant: str) -> None:
    flow = random_flow(3).double()
    mean, scale, _ = (part[:, 0] for part in some(3, torch.float64))
    joints = mean[:, None] + torch.randn(4, 5, 6, 3, dtype=torch.float64)
    found = rle_log_likelihood(joints, mean, scale, flow.log_prob, variant)
    assert found.shape == (4, 5)
    each = [
        rle_error(*torch.broadcast_tensors(mean[:, None], scale[:, None], joints), log_prob, variant)
        for log_prob in (flow.log_prob, flat)
    ]
    log_g = {"exact": 1, "composite": 1, "official": 3}[variant]
    laplace, shape = -6 * each[1], 6 * (each[1] - each[0]) / log_g
    expected = {"exact": laplace + shape, "official": laplace + shape, "composite": shape}[variant]
    difference = found - expected
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))  # a constant of the person
    one = rle_log_likelihood(joints[1:2, :2], mean[1:2], scale[1:2], flow.log_prob, variant)
    torch.testing.assert_close(one, found[1:2, :2])


def test_the_likelihood_knows_which_joints_are_sure() -> None:
    mean = torch.zeros(1, 2, 3)
    scale = torch.tensor([[[0.02] * 3, [0.5] * 3]])
    joints = torch.zeros(1, 3, 2, 3)
    joints[0, 1, 1, 0], joints[0, 2, 0, 0] = 0.2, 0.2  # off at the unsure joint, off at the sure one
    for variant in RLE_VARIANTS:
        found = rle_log_likelihood(joints, mean, scale, RealNVP(3).log_prob, variant)[0]
        assert found[0] > found[1] > found[2] + 5


def uniform(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * 2 - 1


def skewed(shape: tuple[int, ...]) -> Tensor:
    """Exponential with median 0, strongly correlated across coordinates."""
    return -torch.rand(shape[0], 1).clamp_min(1e-6).log() - math.log(2) + 0.3 * uniform(shape)


def people(count: int, dim: int, noise: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A latent u in -1..1 -> true scale and noisy targets."""
    u = torch.rand(count, 1) * 2 - 1
    scale = (0.02 + 0.08 * (u + 1)) * torch.linspace(0.6, 1.4, dim)
    return u, scale, u * torch.linspace(0.5, 1, dim) + scale * noise((count, dim))


def trained(variant: str, dim: int, noise: Callable[[tuple[int, ...]], Tensor]) -> dict[str, float]:
    """Train a small regression of mean and scale ("laplace": without a flow); its output on held-out samples."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 2 * dim))
    flow = RealNVP(dim, couplings=4, hidden=16)
    optimizer = torch.optim.Adam([*network.parameters(), *flow.parameters()], lr=1e-2)
    steps = 160
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def error(u: Tensor, target: Tensor, variant: str) -> Tensor:
        mean, raw = network(u)[:, None].chunk(2, -1)
        log_prob = flat if variant == "laplace" else flow.log_prob
        return rle_error(mean, scale_of(raw), target[:, None], log_prob, "exact" if variant == "laplace" else variant)

    for _ in range(steps):
        u, _, target = people(128, dim, noise)
        optimizer.zero_grad()
        error(u, target, variant).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        u, true, target = people(4000, dim, noise)
        scale = scale_of(network(u)[:, dim:])
        laplace, exact, composite = (error(u, target, each).mean() for each in ("laplace", "exact", "composite"))
        log_z = (-flow(torch.randn(20000, dim)).abs().sum(-1)).logsumexp(0) - math.log(20000 * 2**dim)
        nll = {"laplace": laplace, "exact": exact + log_z, "composite": composite - laplace}[variant]
        order = [spearmanr(scale[:, d], true[:, d]).statistic for d in range(dim)]
        return {"nll": nll.item(), "order": float(min(order)), "size": (scale / true).median().item()}


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "noise"), [(1, uniform), (3, skewed)], ids=["uniform_1d", "skewed_3d"])
def test_a_regression_learns_its_scale_and_a_better_density_than_laplace(
    dim: int, noise: Callable[[tuple[int, ...]], Tensor]
) -> None:
    """`exact` ranks the scales correctly but does not identify their magnitude; `composite` does."""
    absolute = noise((20000, dim)).abs().mean().item()
    plain = trained("laplace", dim, noise)
    exact, composite = trained("exact", dim, noise), trained("composite", dim, noise)
    print(f"\n{dim}D {noise.__name__}: laplace {plain}, exact {exact}, composite {composite}")
    for found in (plain, exact, composite):
        assert found["order"] > 0.9
    assert plain["size"] == pytest.approx(absolute, rel=0.25)
    assert composite["size"] == pytest.approx(absolute, rel=0.25)
    assert exact["size"] > 2 * absolute
    assert exact["nll"] < plain["nll"] - 0.05 and composite["nll"] < plain["nll"] - 0.05
