"""Metrics against loops, known values and their defining properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from torch import Tensor

from hmdiff.body.skeletons import COCO17, SMPL24
from hmdiff.evaluate import metrics as m
from hmdiff.evaluate.hypothesis_rows import reduce_hypotheses
from hmdiff.geometry import axis_angle_to_matrix


def turned(points: Tensor, scale: float = 1.3) -> Tensor:
    rotation = axis_angle_to_matrix(torch.tensor([0.5, -0.9, 1.4], dtype=points.dtype))
    return scale * points @ rotation.mT + torch.tensor([0.3, -0.2, 5.0], dtype=points.dtype)


def test_known_values_in_millimetres() -> None:
    target = torch.randn(2, 24, 3)
    shifted = target + torch.tensor([0.0, 0.03, 0.04])
    torch.testing.assert_close(m.mean_distance(shifted, target), torch.full((2,), 50.0))
    # A common translation is removed by the root.
    torch.testing.assert_close(m.joint_error(shifted, target, SMPL24), torch.zeros(2), rtol=0, atol=1e-3)
    only_root = target.clone()
    only_root[:, 0] += torch.tensor([0.0, 0.03, 0.04])
    torch.testing.assert_close(m.joint_error(only_root, target, SMPL24), torch.full((2,), 50.0 * 23 / 24))
    by_hips = m.joint_error(only_root, target, SMPL24, ("left_hip", "right_hip"))
    torch.testing.assert_close(by_hips, torch.full((2,), 50.0 / 24))
    limbs = m.joint_error(only_root, target, SMPL24, ("left_hip", "right_hip"), ("left_knee", "left_ankle"))
    torch.testing.assert_close(limbs, torch.zeros(2))
    vertices = torch.randn(2, 100, 3)
    error = m.vertex_error(vertices + 1, vertices, torch.ones(2, 1, 3), torch.zeros(2, 1, 3))
    torch.testing.assert_close(error, torch.zeros(2), rtol=0, atol=1e-3)
    with pytest.raises(KeyError, match="'pelvis' is not among"):
        m.joint_error(torch.zeros(17, 3), torch.zeros(17, 3), COCO17)


def test_procrustes_error_is_blind_to_similarities_and_to_nothing_else() -> None:
    target = torch.randn(3, 50, 3)
    torch.testing.assert_close(m.procrustes_error(turned(target), target), torch.zeros(3), rtol=0, atol=0.01)
    noisy = target + 0.05 * torch.randn_like(target)
    error = m.procrustes_error(noisy, target)
    assert (error > 30).all()
    torch.testing.assert_close(m.procrustes_error(turned(noisy), target), error, rtol=1e-4, atol=0)
    mirrored = target * torch.tensor([-1.0, 1, 1])
    assert (m.procrustes_error(mirrored, target) > 500).all()


def test_procrustes_error_agrees_with_a_numerical_search() -> None:
    target = torch.randn(6, 3, dtype=torch.float64)
    source = turned(target) + 0.2 * torch.randn_like(target)
    a, b = source.numpy(), target.numpy()

    def residual(p: np.ndarray) -> np.ndarray:
        return np.exp(p[0]) * a @ Rotation.from_rotvec(p[1:4]).as_matrix().T + p[4:] - b

    starts = [np.r_[0.0, vector, 0, 0, 0] for vector in Rotation.random(6, np.random.default_rng(0)).as_rotvec()]
    best = min((minimize(lambda p: (residual(p) ** 2).sum(), x0) for x0 in starts), key=lambda found: found.fun)
    expected = np.linalg.norm(residual(best.x), axis=-1).mean() * 1000
    assert m.procrustes_error(source, target).item() == pytest.approx(expected, rel=1e-4)


def test_chunks_and_broadcasts_give_what_a_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, target = torch.randn(3, 4, 20, 3), torch.randn(3, 1, 20, 3)
    pairs = [(predicted[b, n], target[b, 0]) for b in range(3) for n in range(4)]
    loop = torch.stack([m.procrustes_error(*pair) for pair in pairs]).view(3, 4)
    torch.testing.assert_close(m.procrustes_error(predicted, target), loop, rtol=1e-5, atol=0)
    for chunk in (1, 3 * 20 * 5, 10**9):  # one at a time, uneven, all at once
        monkeypatch.setattr(m, "_CHUNK", chunk)
        torch.testing.assert_close(m.procrustes_error(predicted, target), loop, rtol=1e-5, atol=0)
    assert m.procrustes_error(torch.zeros(0, 20, 3), torch.zeros(0, 20, 3)).shape == (0,)


def bodies(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target_vertices, target_joints = torch.randn(batch, 60, 3), torch.randn(batch, 24, 3)
    vertices = target_vertices[:, None] + 0.1 * torch.randn(batch, count, 60, 3)
    joints = target_joints[:, None] + 0.1 * torch.randn(batch, count, 24, 3)
    return vertices, joints, target_vertices, target_joints


def test_hypotheses_equal_singles() -> None:
    vertices, joints, target_vertices, target_joints = bodies(3, 4)
    each = m.mesh_errors(vertices, joints, target_vertices[:, None], target_joints[:, None], SMPL24)
    assert set(each) == {"pve", "mpjpe", "pa_mpjpe", "pa_pve"}
    for b in range(3):
        for n in range(4):
            single = m.mesh_errors(vertices[b, n], joints[b, n], target_vertices[b], target_joints[b], SMPL24)
            for name, value in single.items():
                torch.testing.assert_close(each[name][b, n], value, rtol=1e-4, atol=1e-3)
    # Translation of a hypothesis does not matter.
    shift = torch.randn(3, 4, 1, 3)
    shifted = m.mesh_errors(vertices + shift, joints + shift, target_vertices[:, None], target_joints[:, None], SMPL24)
    for name in each:
        torch.testing.assert_close(shifted[name], each[name], rtol=1e-3, atol=1e-2)


def test_first_mean_oracle_selected() -> None:
    each = {"pve": torch.tensor([[3.0, 1, 2], [5, 6, 4]]), "mpjpe": torch.tensor([[1.0, 2, 3], [9, 8, 9]])}
    mean = {"pve": torch.tensor([2.5, 3.5]), "mpjpe": torch.tensor([0.5, 7.0])}
    result = reduce_hypotheses(each, 3, lambda count: mean, lambda count: torch.tensor([2, 0]))
    assert {name: values["pve"].tolist() for name, values in result.items()} == {
        "first": [3, 5],
        "mean": [2.5, 3.5],
        "oracle": [1, 4],
        "selected": [2, 5],
    }
    assert result["oracle"]["mpjpe"].tolist() == [1, 8]
    assert reduce_hypotheses(each, 2, lambda count: mean, higher={"mpjpe"})["oracle"]["mpjpe"].tolist() == [2, 9]
    assert "selected" not in reduce_hypotheses(each, 2, lambda count: mean)
    curve = m.oracle_curve(each["pve"], (1, 2, 3, 100))
    assert {count: value.tolist() for count, value in curve.items()} == {1: [3, 5], 2: [1, 5], 3: [1, 4]}
    vertices, joints, target_vertices, target_joints = bodies(3, 8)
    real = m.mesh_errors(vertices, joints, target_vertices[:, None], target_joints[:, None], SMPL24)
    oracle = torch.stack(list(m.oracle_curve(real["pve"], (1, 2, 4, 8)).values()))
    assert (oracle.diff(dim=0) <= 0).all() and torch.equal(oracle[-1], real["pve"].amin(1))


def test_bootstrap_interval() -> None:
    values = torch.randn(400) * 2 + 5
    mean, low, high = m.bootstrap_interval(values, seed=3)
    assert mean == pytest.approx(values.mean().item(), rel=1e-5)
    half = 1.96 * values.std().item() / 20  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.05) and high == pytest.approx(mean + half, abs=0.05)
    assert m.bootstrap_interval(values, seed=3) == (mean, low, high) != m.bootstrap_interval(values, seed=4)
    narrow = m.bootstrap_interval(values, level=0.5)
    assert low < narrow[1] < narrow[2] < high
    assert m.bootstrap_interval(torch.full((7,), 3.0)) == (3.0, 3.0, 3.0)
    assert all(np.isnan(m.bootstrap_interval(torch.zeros(0))))


def calibrated(spread: float) -> tuple[Tensor, Tensor]:
    """300 people with ground truth and samples from the same Gaussian, except for the samples' spread."""
    centre = torch.randn(300, 1, 5, 3)
    truth = centre[:, 0] + 0.1 * torch.randn(300, 5, 3)
    return centre + 0.1 * spread * torch.randn(300, 200, 5, 3), truth


@pytest.mark.slow
def test_calibration_tells_honest_from_overconfident_and_vague() -> None:
    honest, sure, vague = (m.expected_calibration_error(*calibrated(spread)) for spread in (1.0, 0.3, 3.0))
    assert honest < 0.03 and sure > 0.3 and vague > 0.3
    torch.testing.assert_close(m.coverage(*calibrated(1.0), level=0.8), torch.full((5,), 0.8), rtol=0, atol=0.08)
    assert m.coverage(*calibrated(0.3), level=0.8).max() < 0.3
    assert m.coverage(*calibrated(3.0), level=0.8).min() > 0.97
    samples, truth = calibrated(1.0)
    assert m.expected_calibration_error(samples, truth + 10) == pytest.approx(0.5)


def test_calibration_equals_its_definition() -> None:
    samples, truth = torch.randn(6, 31, 3, 3), torch.randn(6, 3, 3)
    s, t = samples.double().numpy(), truth.double().numpy()
    median = np.median(s, axis=1)
    expected = []
    for q in np.linspace(0, 1, 21):
        radius = np.quantile(np.linalg.norm(median[:, None] - s, axis=-1), q, axis=1)
        frequency = (radius > np.linalg.norm(median - t, axis=-1)).mean(0)
        expected.append(abs(np.median(frequency) - q))
    assert m.expected_calibration_error(samples.double(), truth.double()) == pytest.approx(np.mean(expected))
