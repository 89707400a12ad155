"""Corruptions as of a 2D estimator: none when switched off, and each at its configured rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hmdiff.body.skeletons import COCO17, HALPE26, LSP14, OPENPOSE25, joint_indices, mirror_permutation
from hmdiff.config import HeatmapCorruption
from hmdiff.data.synthetic.corruption import estimate_heatmaps, estimate_peaks, face_visibility, two_gaussians
from hmdiff.heatmaps import gaussian_heatmaps, heatmap_peaks

NONE = HeatmapCorruption(
    jitter=0.0, missing=0.0, missing_hidden=0.0, second_peak=0.0, swap=0.0, exact=0.0, all_joints=True
)
JOINTS = len(HALPE26)
MIRROR = mirror_permutation(HALPE26)


def run(
    corruption: HeatmapCorruption, n: int = 64, points: Tensor | None = None, **hidden: Tensor
) -> tuple[Tensor, Tensor]:
    points = places(n) if points is None else points
    seen = torch.ones(n, JOINTS, dtype=torch.bool)
    return estimate_heatmaps(
        points,
        hidden.get("visible", seen),
        hidden.get("face_visible", seen),
        corruption,
        torch.Generator().manual_seed(2),
    )


def places(n: int = 64) -> Tensor:
    return torch.rand(n, JOINTS, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


def test_without_faults_the_peaks_are_the_keypoints() -> None:
    points = places()
    heatmaps, valid = run(NONE, points=points)
    assert heatmaps.shape == (64, JOINTS, 64, 64) and valid.all() and (heatmaps >= 0).all()
    peaks, confidence = heatmap_peaks(heatmaps)
    torch.testing.assert_close(peaks, points, rtol=0, atol=2e-3)
    assert (confidence > 0.2).all() and (confidence <= 1).all()


def test_two_peaks_are_a_sum_of_gaussians() -> None:
    points = torch.rand(3, 5, 2, 2) - 0.5
    share, sigma = torch.rand(3, 5, 2), torch.rand(3, 5) + 1.5
    expected = sum(gaussian_heatmaps(points[:, :, i], share[:, :, i], sigma) for i in range(2))
    torch.testing.assert_close(two_gaussians(points, share, sigma), expected, rtol=1e-4, atol=1e-5)


def test_peaks_are_as_wide_as_they_were_asked_for() -> None:
    corruption = dataclasses.replace(NONE, narrowest=1.0, widest=1.2)
    seen = torch.ones(64, JOINTS, dtype=torch.bool)
    peaks, *_ = estimate_peaks(places(), seen, seen, corruption, torch.Generator().manual_seed(2))
    width = peaks[..., 0, 3].median(1).values  # per person; single joints vary by a tenth
    assert 0.95 < width.min() < 1.05 and 1.15 < width.max() < 1.25


def test_jitter_has_the_size_it_was_given() -> None:
    points = places(160)
    peaks, _ = heatmap_peaks(run(dataclasses.replace(NONE, jitter=0.02), 160, points)[0])
    error = (peaks - points).abs()
    hips = torch.tensor(["hip" in name for name in HALPE26])
    other, hip = error[:, ~hips].median().item(), error[:, hips].median().item()
    assert other == pytest.approx(0.6745 * 0.02, rel=0.3) and hip == pytest.approx(1.8 * other, rel=0.25)
    behind = torch.ones(160, JOINTS, dtype=torch.bool)
    behind[:, 5] = False
    peaks, _ = heatmap_peaks(run(dataclasses.replace(NONE, jitter=0.02), 160, points, visible=behind)[0])
    error = (peaks - points).abs()
    assert error[:, 5].median() > 1.6 * error[:, 6].median()
    exact, _ = heatmap_peaks(run(dataclasses.replace(NONE, jitter=0.02, exact=1.0), 160, points)[0])
    assert (exact - points).abs().median() < 0.4 * other


def test_missing_joints() -> None:
    there = run(dataclasses.replace(NONE, missing=0.3), 160)[0].amax((-1, -2)) > 0
    assert there.float().mean().item() == pytest.approx(0.7, abs=0.03)
    behind = torch.ones(160, JOINTS, dtype=torch.bool)
    behind[:, ::2] = False
    there = run(dataclasses.replace(NONE, missing_hidden=0.6), 160, visible=behind)[0].amax((-1, -2)) > 0
    assert there[:, 1::2].all() and there[:, ::2].float().mean().item() == pytest.approx(0.4, abs=0.03)
    outside = places()
    outside[:, 3] = torch.tensor([1.2, 0.0])
    there = run(NONE, points=outside)[0].amax((-1, -2)) > 0
    assert not there[:, 3].any() and there[:, [0, 1, 2, 4]].all()


@pytest.mark.slow
def test_guesses_of_hidden_joints_are_off_and_half_of_them_as_wide_as_they_are_off() -> None:
    points, behind = places(400), torch.ones(400, JOINTS, dtype=torch.bool)
    behind[:, ::2] = False
    plain = run(NONE, 400, points, visible=behind)[0]
    maps = run(dataclasses.replace(NONE, hidden=0.2), 400, points, visible=behind)[0]
    assert torch.equal(maps[:, 1::2], plain[:, 1::2])  # visible joints are unchanged
    labelled = [run(dataclasses.replace(NONE, hidden=h, exact=1.0), 400, points, visible=behind)[0] for h in (0, 0.2)]
    assert torch.equal(*labelled)  # and so are people with exact labels
    maps, points, plain = maps[:, ::2], points[:, ::2], plain[:, ::2]
    found = maps.amax((-1, -2)) > 0
    error = ((heatmap_peaks(maps)[0] - points)[found] ** 2).mean().sqrt().item()
    assert error == pytest.approx(0.2 * math.exp(0.3**2), rel=0.15)  # guesses outside the crop are not found
    widest = (maps > 0.5 * maps.amax((-1, -2), keepdim=True)).sum((-1, -2))[found].float().sqrt() / 64
    # The half maximum is a disc of radius 1.18 sigma; `widest` is the side of the square of equal area.
    wide = widest > 0.13
    assert wide.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert widest[wide].median().item() == pytest.approx(1.18 * 0.2 * math.sqrt(math.pi) / 2, rel=0.2)
    # A person's maps are all wide or all narrow; wide ones keep their mass, narrow ones their peak.
    flags = (maps > 0.5 * maps.amax((-1, -2), keepdim=True)).sum((-1, -2)) > (0.13 * 64) ** 2
    assert ((flags | ~found).all(1) | (~flags | ~found).all(1)).float().mean() > 0.9
    inner = found & (heatmap_peaks(maps)[0].abs().amax(-1) < 0.5)
    mass = (maps.sum((-1, -2)) / plain.sum((-1, -2)))[inner & (points.abs().amax(-1) < 0.5)]
    assert mass.quantile(torch.tensor([0.1, 0.9])).tolist() == pytest.approx([1.0, 1.0], abs=0.25)


def test_joint_sets() -> None:
    heatmaps, valid = run(dataclasses.replace(NONE, all_joints=False), 300)
    assert (heatmaps.amax((-1, -2)) > 0).eq(valid).all()  # without corruption: exactly the joints of the set
    sets = {names: torch.tensor([name in names for name in HALPE26]) for names in (COCO17, OPENPOSE25, LSP14, HALPE26)}
    rates = [valid.eq(row).all(-1).float().mean().item() for row in sets.values()]
    assert sum(rates) == pytest.approx(1) and rates == pytest.approx([0.5, 0.2, 0.15, 0.15], abs=0.08)
    # A joint in the set may be missing: valid, but empty.
    heatmaps, valid = run(dataclasses.replace(NONE, missing=0.5))
    assert valid.all() and (heatmaps.amax((-1, -2)) == 0).any()


def test_swaps_exchange_left_and_right() -> None:
    points = places(200)
    heatmaps, _ = run(dataclasses.replace(NONE, swap=1.0), 200, points)
    swapped = (heatmap_peaks(heatmaps)[0] - points[:, MIRROR]).norm(dim=-1) < 0.02
    knee, wrist, nose = joint_indices(["left_knee", "left_wrist", "nose"], HALPE26)
    limbs = [name for name in HALPE26 if any(part in name for part in ("knee", "ankle", "toe", "heel", "hip"))]
    legs = joint_indices([name for name in limbs if name != "mid_hip"], HALPE26)
    # Half of the people are swapped (the others get double peaks); of those, 70 % in the legs, 60 % in the arms.
    plain = (heatmap_peaks(heatmaps)[0] - points).norm(dim=-1) < 0.02
    outright = swapped[:, legs].all(1)
    assert outright.float().mean().item() > 0.3
    assert (swapped[:, knee] & swapped[:, wrist]).float().mean() < 0.5 * swapped[:, knee].float().mean() + 0.1
    assert plain[:, nose].all()
    double = run(dataclasses.replace(NONE, swap=1.0), 200, points)[0][:, knee]
    at = ((points[:, [knee, MIRROR[knee]]] + 1) * 32).long().clamp(0, 63)
    values = torch.stack([double[torch.arange(200), at[:, i, 1], at[:, i, 0]] for i in range(2)], 1)
    assert (values.amin(1) > 0.1).float().mean() > 0.2  # doubled joints have a peak at both positions


def test_second_peaks() -> None:
    points = places()
    one, two = run(NONE, points=points)[0], run(dataclasses.replace(NONE, second_peak=1.0), points=points)[0]
    mass = [(maps / maps.amax((-1, -2), keepdim=True)).sum((-1, -2)) for maps in (one, two)]
    assert (mass[1] > 1.15 * mass[0]).float().mean() > 0.8


def test_the_far_side_of_a_head_is_hidden() -> None:
    keypoints = torch.zeros(2, JOINTS, 3)
    left, right, nose = (HALPE26.index(name) for name in ("left_ear", "right_ear", "nose"))
    keypoints[0, left], keypoints[0, right] = torch.tensor([0.1, 0, 0]), torch.tensor([-0.1, 0, 0])
    keypoints[0, nose] = torch.tensor([0, 0, -0.1])  # facing the camera
    keypoints[1] = keypoints[0]
    keypoints[1, :, 2] *= -1  # facing away
    visible = face_visibility(keypoints)
    assert visible[0].all()
    face = joint_indices(["nose", "left_eye", "right_eye"], HALPE26)
    assert not visible[1, face].any() and visible[1, left] and visible[1, right] and visible[1, 5:].all()
    side = keypoints[:1].clone()
    side[0, left], side[0, right] = torch.tensor([0.0, 0, 0.1]), torch.tensor([0.0, 0, -0.1])
    side[0, nose] = torch.tensor([0.1, 0, 0])
    assert not face_visibility(side)[0, left] and face_visibility(side)[0, right]


def test_one_seed_one_result() -> None:
    corruption = HeatmapCorruption()
    first, second = run(corruption), run(corruption)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert (first[0].flatten(2).amax(-1) > 0)[~first[1]].sum() == 0
