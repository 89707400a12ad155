"""Contrastive losses: against explicit loops; drawn triples; missing labels; one process against two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gloo import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hmdiff.losses.contrastive import joint_to_joint, joint_to_non_joint

PEOPLE, JOINTS, WIDTH, SIZE = 4, 3, 5, (2, 3, 2)
VOXELS = math.prod(SIZE)
TAU = 0.07


def drawn(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(people: int = PEOPLE, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predicted, ground truth, voxels, away; similar enough that no term of e^(a·n / τ) is lost to rounding."""
    base = torch.randn(WIDTH)
    parts = [base + torch.randn(people, count, WIDTH) for count in (JOINTS, JOINTS, VOXELS)]
    predicted, truth, voxels = (part.to(kind) for part in parts)
    away = torch.rand(people, *SIZE) < 0.6
    away[:, 0, 0, 0], away[:, 1, 1, 1] = True, False
    return predicted, truth, voxels, away


def error(anchor: Tensor, positive: Tensor, negatives: list[Tensor], tau: float = TAU) -> float:
    def power(other: Tensor) -> float:
        return math.exp((anchor @ other / (anchor.norm() * other.norm())).item() / tau)

    return -math.log(power(positive) / (power(positive) + sum(power(negative) for negative in negatives)))


def joint_triples(
    predicted: Tensor, truth: Tensor, has_joints: Tensor | None = None, valid: Tensor | None = None
) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Anchors with their positives and negatives."""
    people = [i for i in range(len(predicted)) if has_joints is None or has_joints[i]]
    for person in people:
        for joint in range(JOINTS):
            positives = [truth[other, joint] for other in people if valid is None or valid[other, joint]]
            negatives = [predicted[other, j] for other in people for j in range(JOINTS) if j != joint]
            yield predicted[person, joint], positives, negatives


def voxel_triples(
    predicted: Tensor,
    voxels: Tensor,
    away: Tensor,
    has_joints: Tensor | None = None,
    valid: Tensor | None = None,
) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    people = [i for i in range(len(predicted)) if has_joints is None or has_joints[i]]
    depth, height, width = SIZE
    volume = voxels.reshape(-1, depth, height, width, WIDTH)
    empty = []
    for i in people:
        for z in range(depth):
            for y in range(height):
                empty += [volume[i, z, y, x] for x in range(width) if away[i, z, y, x]]
    for person in people:
        for joint in range(JOINTS):
            others = [
                predicted[i, j]
                for i in people
                for j in range(JOINTS)
                if (i, j) != (person, joint) and (valid is None or valid[i, j])
            ]
            yield predicted[person, joint], others, empty


def mean_of(triples: Iterator[tuple[Tensor, list[Tensor], list[Tensor]]], tau: float = TAU) -> float:
    errors = [error(anchor, p, negatives, tau) for anchor, positives, negatives in triples for p in positives]
    return sum(errors) / len(errors)


LABELS = [None, [True, True, True, True], [True, False, True, True], [False, False, True, False]]


@pytest.mark.parametrize("labels", LABELS)
def test_joint_to_joint_equals_loops(labels: list[bool] | None) -> None:
    predicted, truth, _, _ = features()
    has = None if labels is None else torch.tensor(labels)
    value = joint_to_joint(predicted, truth, has, drawn())
    assert value.item() == pytest.approx(mean_of(joint_triples(predicted, truth, has)), rel=1e-9)
    warm = joint_to_joint(predicted, truth, has, drawn(), temperature=0.5)
    assert warm.item() == pytest.approx(mean_of(joint_triples(predicted, truth, has), 0.5), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("labels", LABELS)
def test_joint_to_non_joint_equals_loops(labels: list[bool] | None) -> None:
    predicted, _, voxels, away = features()
    has = None if labels is None else torch.tensor(labels)
    value = joint_to_non_joint(predicted, voxels, away, has, drawn())
    assert value.item() == pytest.approx(mean_of(voxel_triples(predicted, voxels, away, has)), rel=1e-9)
    flat = joint_to_non_joint(predicted, voxels, away.flatten(1), has, drawn())
    assert torch.equal(flat, value)
    warm = joint_to_non_joint(predicted, voxels, away, has, drawn(), temperature=0.5)
    assert warm.item() == pytest.approx(mean_of(voxel_triples(predicted, voxels, away, has), 0.5), rel=1e-9)


@pytest.mark.parametrize("labels", LABELS)
def test_joints_outside_the_crop_are_nobodys_positives(labels: list[bool] | None) -> None:
    """Per joint, for both losses; an all-True mask equals None."""
    predicted, truth, voxels, away = features()
    has = None if labels is None else torch.tensor(labels)
    valid = torch.tensor([[True, True, False], [False, True, False], [True, True, True], [False, False, False]])
    value = joint_to_joint(predicted, truth, has, drawn(), valid=valid)
    assert value.item() == pytest.approx(mean_of(joint_triples(predicted, truth, has, valid)), rel=1e-9)
    value = joint_to_non_joint(predicted, voxels, away, has, drawn(), valid=valid)
    assert value.item() == pytest.approx(mean_of(voxel_triples(predicted, voxels, away, has, valid)), rel=1e-9)
    everything, nothing = torch.ones_like(valid), torch.zeros_like(valid)
    for few in (1, 128):
        whole = joint_to_joint(predicted, truth, has, drawn(), positives=few, valid=everything)
        assert torch.equal(whole, joint_to_joint(predicted, truth, has, drawn(), positives=few))
    assert joint_to_joint(predicted, truth, has, drawn(), valid=nothing) == 0
    assert joint_to_non_joint(predicted, voxels, away, has, drawn(), valid=nothing) == 0
    garbage = torch.where(valid[..., None], truth, 1e3)
    moved = joint_to_joint(predicted, garbage, has, drawn(), valid=valid)
    assert torch.equal(moved, joint_to_joint(predicted, truth, has, drawn(), valid=valid))


def test_known_values() -> None:
    """Orthogonal features: every cosine is 0 or 1."""
    one, two = torch.eye(2, dtype=torch.float64)
    predicted, length = torch.stack([one, two]).expand(3, 2, 2), torch.tensor(7.0, dtype=torch.float64)
    value = joint_to_joint(predicted * length, predicted, None, drawn())  # 3 negatives at cosine 0, the positive at 1
    assert value.item() == pytest.approx(math.log(1 + 3 * math.exp(-1 / TAU)), rel=1e-9)
    swapped = joint_to_joint(predicted, predicted.flip(1), None, drawn())
    assert swapped.item() == pytest.approx(math.log(1 + 3), rel=1e-9)  # now all at 0
    voxels, away = torch.stack([one, two, -one])[None].expand(3, 3, 2), torch.tensor([[False, False, True]] * 3)
    single = joint_to_non_joint(predicted[:, :1], voxels, away, None, drawn())
    assert single.item() == pytest.approx(math.log(1 + 3 * math.exp(-2 / TAU)), rel=1e-6)


def test_drawn_triples_are_the_allowed_ones() -> None:
    """One anchor, positive and negative: many draws give exactly the triples that the definitions allow."""
    predicted, truth, voxels, away = features()
    has = torch.tensor([True, False, True, False])
    away[:, :, 1:] = False  # few, to limit the number of draws
    cases: list[tuple[Callable[[int], Tensor], Iterator, int]] = [
        (
            lambda seed: joint_to_joint(predicted, truth, has, drawn(seed), 1, 1, 1),
            joint_triples(predicted, truth, has),
            500,
        ),
        (
            lambda seed: joint_to_non_joint(predicted, voxels, away, has, drawn(seed), 1, 1, 1),
            voxel_triples(predicted, voxels, away, has),
            2000,
        ),
    ]
    for loss, triples, draws in cases:
        allowed = {f"{error(a, p, [n]):.6e}" for a, some, negatives in triples for p in some for n in negatives}
        found = {f"{loss(seed).item():.6e}" for seed in range(draws)}
        assert found <= allowed and len(found) > 0.99 * len(allowed) > 40


@pytest.mark.parametrize(("positives", "negatives"), [(2, 5), (1, 6), (3, 2)])
def test_counts_are_kept_and_nothing_is_drawn_twice(positives: int, negatives: int) -> None:
    """Equal features give -log[1 / (1 + n)], so n is the requested number, or all there are."""
    predicted, voxels, away = torch.ones(PEOPLE, JOINTS, 2), torch.ones(PEOPLE, VOXELS, 2), torch.ones(PEOPLE, *SIZE)
    value = joint_to_joint(predicted, predicted, None, drawn(), 4, positives, negatives)
    assert value.item() == pytest.approx(math.log(1 + negatives), rel=1e-5)
    assert joint_to_joint(predicted, predicted, None, drawn()).item() == pytest.approx(math.log(1 + 8), rel=1e-5)
    value = joint_to_non_joint(predicted, voxels, away.bool(), None, drawn(), 4, positives, negatives)
    assert value.item() == pytest.approx(math.log(1 + negatives), rel=1e-5)
    value = joint_to_non_joint(predicted, voxels, away.bool(), None, drawn())
    assert value.item() == pytest.approx(math.log(1 + PEOPLE * VOXELS), rel=1e-5)
    # Count the rows with a gradient: every positive, anchor and negative is a distinct row.
    predicted, truth, voxels, away = features()
    for leaf in (predicted, truth, voxels):
        leaf.requires_grad_()
    loss = joint_to_joint(predicted, truth, None, drawn(), 1, positives, negatives)
    pulled = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in (predicted, truth)]
    assert [(pull.abs().sum(-1) > 0).sum().item() for pull in pulled] == [1 + negatives, positives]
    loss = joint_to_non_joint(predicted, voxels, away, None, drawn(), 1, positives, negatives)
    pulled = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in (predicted, voxels)]
    assert [(pull.abs().sum(-1) > 0).sum().item() for pull in pulled] == [1 + positives, negatives]


def test_gradients() -> None:
    predicted, truth, voxels, away = features(3)
    leaves = [tensor.requires_grad_() for tensor in (predicted, truth, voxels)]
    has, counts = torch.tensor([True, False, True]), (5, 2, 4, 0.5)
    assert torch.autograd.gradcheck(lambda p, t: joint_to_joint(p, t, has, drawn(), *counts), leaves[:2])
    assert torch.autograd.gradcheck(lambda p, v: joint_to_non_joint(p, v, away, has, drawn(), *counts), leaves[::2])


def test_people_without_labels_are_left_out() -> None:
    predicted, truth, voxels, away = features()
    has = torch.tensor([True, False, True, True])
    values = [joint_to_joint(predicted, truth, has, drawn()), joint_to_non_joint(predicted, voxels, away, has, drawn())]
    parts = [tensor.clone() for tensor in (predicted, truth, voxels)]
    for tensor in parts:
        tensor[1] = math.nan
    leaves = [tensor.requires_grad_() for tensor in parts]
    changed = [joint_to_joint(*leaves[:2], has, drawn()), joint_to_non_joint(leaves[0], leaves[2], away, has, drawn())]
    assert torch.equal(torch.stack(changed), torch.stack(values))
    torch.stack(changed).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and (leaf.grad[1] == 0).all() and (leaf.grad[has] != 0).any(-1).any(-1).all()
    kept = (
        joint_to_joint(predicted[has], truth[has], None, drawn()),
        joint_to_non_joint(predicted[has], voxels[has], away[has], None, drawn()),
    )
    torch.testing.assert_close(torch.stack(kept), torch.stack(values))


@pytest.mark.parametrize("fault", ["no labels", "no voxel is away", "zero features"])
def test_nothing_to_compare_is_exactly_zero(fault: str) -> None:
    predicted, truth, voxels, away = features(kind=torch.float32)
    has = torch.full((PEOPLE,), fault != "no labels")
    if fault == "no voxel is away":
        away = torch.zeros_like(away)
    if fault == "zero features":
        predicted, truth, voxels = (torch.zeros_like(tensor) for tensor in (predicted, truth, voxels))
    leaves = [tensor.requires_grad_() for tensor in (predicted, truth, voxels)]
    joints = joint_to_joint(predicted, truth, has, drawn())
    nothing = joint_to_non_joint(predicted, voxels, away, has, drawn())
    if fault != "zero features":
        assert nothing.item() == 0 and (joints.item() == 0) == (fault == "no labels")
    (joints + nothing).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    if fault == "no labels":
        assert all((leaf.grad == 0).all() for leaf in leaves)


def test_half_precision_does_not_blur_the_cosines() -> None:
    predicted, truth, voxels, away = features(kind=torch.float32)
    exact = joint_to_joint(predicted, truth, None, drawn()), joint_to_non_joint(predicted, voxels, away, None, drawn())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = (
            joint_to_joint(predicted, truth, None, drawn()),
            joint_to_non_joint(predicted, voxels, away, None, drawn()),
        )
    assert value == exact
    rounded = joint_to_joint(predicted.bfloat16(), truth.bfloat16(), None, drawn())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact[0], rtol=0.02, atol=0.02)


def test_they_separate_what_they_should() -> None:
    """A few optimiser steps on the losses: features of the same joint converge, others and voxels diverge."""
    predicted, truth, voxels, away = features(kind=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (predicted, truth, voxels)]
    optimizer = torch.optim.Adam(leaves, 0.05)
    before = None
    for step in range(60):
        apart = joint_to_joint(predicted, truth, None, drawn(step))
        value = apart + 0.1 * joint_to_non_joint(predicted, voxels, away, None, drawn(step))
        before = value.item() if before is None else before
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    unit = [nn.functional.normalize(leaf.detach(), dim=-1) for leaf in leaves]
    alike = torch.einsum("akv,bkv->kab", unit[0], unit[1])
    other = torch.einsum("akv,bjv->kjab", unit[0], unit[0])[~torch.eye(JOINTS, dtype=torch.bool)]
    assert value.item() < 0.5 * before and alike.min() > other.max()


# -- over processes ---------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[list[bool], tuple[int, int, int]]] = {
    "all used": ([True, False, True, True, True, False], (100, 128, 256)),
    "some drawn": ([True, True, True, True, False, True], (7, 2, 6)),
    "one process has no labels": ([False, False, False, True, True, True], (7, 2, 6)),
    "nobody has labels": ([False] * 6, (100, 128, 256)),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.layer = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.tanh(self.layer(tensor)) for tensor in inputs)


def one_step(net: nn.Module, people: slice, case: str) -> list[Tensor]:
    """Both losses, and the optimiser's gradient."""
    torch.manual_seed(5)
    *inputs, away = (tensor[people] for tensor in features(6))
    labels, counts = CASES[case]
    has = torch.tensor(labels)[people]
    net.zero_grad()
    predicted, truth, voxels = net(*inputs)
    joints = joint_to_joint(predicted, truth, has, drawn(), *counts)
    nothing = joint_to_non_joint(predicted, voxels, away, has, drawn(), *counts)
    (joints + 0.3 * nothing).backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    return [joints.detach(), nothing.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_equal_one(tmp_path: Path, count: int) -> None:
    """A batch split over gloo processes has the value and DDP gradient of the whole batch."""
    size = 6 // count

    def share(rank: int) -> None:
        net = DistributedDataParallel(Net())
        results = {case: one_step(net, slice(rank * size, (rank + 1) * size), case) for case in CASES}
        torch.save(results, tmp_path / f"{count}_{rank}.pt")

    run_processes(share, count, tmp_path)
    for rank in range(count):
        results = torch.load(tmp_path / f"{count}_{rank}.pt", weights_only=True)
        for case in CASES:
            expected = one_step(Net(), slice(0, 6), case)
            assert len(results[case]) == len(expected) == 4
            for found, wanted in zip(results[case], expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
            if case == "nobody has labels":
                assert all((value == 0).all() for value in results[case])
            else:
                assert all(value.abs().max() > 1e-3 for value in expected)
