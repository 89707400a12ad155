"""Uneven labels across processes: value and gradient equal those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from gloo import run_processes
from torch import Tensor

from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.losses.keypoints import labelled_mean
from hmdiff.losses.objective import objective
from hmdiff.losses.processes import over_processes

PEOPLE, COARSE, POINTS = 6, 6, 9
CASES = {  # who has vertices, joints, a camera
    "all": ("yyyyyy", "yyyyyy", "yyyyyy"),
    "uneven": ("ynnnny", "yynnnn", "nnnyyy"),
    "a process without": ("nnnyyy", "nnnnyy", "ynnnnn"),
    "nobody": ("nnnnnn", "nnnnnn", "nnnnnn"),
}
CONFIG = LossConfig(points="l1", camera=0.3, edges=0.5)
APART = LossConfig(points="l1", camera=0.3, edges=0.5, vertices=1.0, joints_3d=0.7)


def one_step(config: LossConfig, case: str, people: slice) -> list[Tensor]:
    """Gradient of a parameter shared by all people, and all terms."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(PEOPLE, *shape, generator=generator)[people]

    prediction, target, truth = drawn(2, POINTS, 3), drawn(2, POINTS, 3), drawn(1, POINTS, 3)
    camera, true_camera, confidence = drawn(3) + 0.5, drawn(3) + 0.5, drawn(4)
    masks = {}
    for name, letters in zip(("has_vertices", "has_joints_3d", "has_camera"), CASES[case], strict=True):
        mask = torch.tensor([letter == "y" for letter in letters])[people]
        masks[name] = None if mask.all() else mask  # what all of a process' people have may go without a mask
    factor = torch.tensor(0.7, requires_grad=True)
    shares: dict[str, Tensor] = {}
    more = {}
    if people.start == 0:  # the others' data has no keypoints at all
        confidence[2:] = 0
        ones, error = torch.ones(len(confidence), 2), (factor * prediction).abs().mean(-1)[..., :4]
        more["keypoints_2d"] = labelled_mean(error, confidence, ones, "keypoints_2d", shares)
    terms = objective(
        config,
        Sample(camera=true_camera, **masks),
        factor * prediction,
        target,
        drawn(2) + 0.1,
        factor * prediction,
        truth,
        drawn(2),
        factor * camera,
        COARSE,
        torch.tensor([[0, 1], [1, 2], [3, 4]]),
        more=more,
        shares=shares,
    )
    terms["loss"].backward()
    assert factor.grad is not None
    names = sorted(terms.keys() | {"keypoints_2d"})
    return [factor.grad, *(terms.get(name, torch.tensor(0.0)).detach() for name in names)]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_equal_one(tmp_path: Path, count: int) -> None:
    size = PEOPLE // count

    def work(rank: int) -> None:
        results = {}
        for config in (CONFIG, APART):
            for case in CASES:
                found = torch.stack(one_step(config, case, slice(rank * size, (rank + 1) * size)))
                distributed.all_reduce(found)
                results[config.vertices, case] = found / count
        torch.save(results, tmp_path / f"{count}_{rank}.pt")

    run_processes(work, count, tmp_path)
    results = torch.load(tmp_path / f"{count}_0.pt", weights_only=True)
    for config in (CONFIG, APART):
        for case in CASES:
            expected = torch.stack(one_step(config, case, slice(0, PEOPLE)))
            torch.testing.assert_close(results[config.vertices, case], expected, rtol=1e-5, atol=1e-7, msg=case)
            # Without keypoint labels anywhere: check the gradient, the term and the loss.
            assert (expected.abs() > 1e-3).sum() == (3 if case == "nobody" else len(expected))


def test_one_process_leaves_its_terms() -> None:
    terms = {"points": torch.tensor(2.0), "joint_contrast": torch.tensor(3.0)}
    assert over_processes(terms, {"points": torch.tensor(0.5)}) == terms
