"""Heatmaps: pixel convention, resampling, drawing, validation, and arrays on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hmdiff.body.skeletons import COCO17, HALPE26, shared_joints
from hmdiff.errors import UserError
from hmdiff.heatmaps import (
    HEATMAP_SIZE,
    Crop,
    Heatmaps,
    concatenate_heatmaps,
    crop_from_box,
    crop_from_keypoints,
    draw_samples,
    gaussian_heatmaps,
    heatmap_peaks,
    heatmaps_from_values,
    load_heatmaps,
    normalised,
    resample_heatmaps,
    save_heatmaps,
    soft_argmax,
)

PIXEL = 2 / HEATMAP_SIZE  # crop units


def example(batch: int = 2) -> Heatmaps:
    points = torch.rand(batch, 26, 2) - 0.5
    values = gaussian_heatmaps(points, torch.rand(batch, 26) * 0.8 + 0.2, 2.0)
    valid = torch.ones(batch, 26, dtype=torch.bool)
    return Heatmaps(values, valid, Crop.of(torch.rand(batch, 2) * 100, torch.rand(batch) * 100 + 50))


# ---- Gaussians and their inverse ----


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (2, 3)])
def test_gaussians_equal_the_formula(shape: tuple[int, ...]) -> None:
    points, confidence = torch.rand(*shape, 5, 2) * 2.4 - 1.2, torch.rand(*shape, 5)
    sigma = torch.rand(*shape, 5) * 3 + 0.5
    centre = (torch.arange(16) + 0.5) / 8 - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")  # row i is y, column j is x
    squared = (x - points[..., 0, None, None]).square() + (y - points[..., 1, None, None]).square()
    expected = confidence[..., None, None] * torch.exp(-squared * 64 / (2 * sigma[..., None, None].square()))
    torch.testing.assert_close(gaussian_heatmaps(points, confidence, sigma, 16), expected, rtol=1e-4, atol=1e-6)
    one_width = gaussian_heatmaps(points, confidence, 2.0, 16)
    torch.testing.assert_close(one_width, gaussian_heatmaps(points, confidence, torch.full_like(confidence, 2.0), 16))


def test_a_joint_without_confidence_leaves_nothing_even_at_nan() -> None:
    points, confidence = torch.full((2, 2), float("nan")), torch.tensor([0.0, 0.0])
    assert gaussian_heatmaps(points, confidence, 2.0).eq(0).all()


def test_points_come_back_from_gaussians() -> None:
    points, confidence = torch.rand(4, 26, 2) * 1.4 - 0.7, torch.rand(4, 26) + 0.1
    values = gaussian_heatmaps(points, confidence, 2.0)
    torch.testing.assert_close(soft_argmax(values), points, rtol=0, atol=1e-4)
    peaks, height = heatmap_peaks(values)
    torch.testing.assert_close(peaks, points, rtol=0, atol=1e-4)
    # The highest pixel lies at most half a diagonal from the point.
    assert (height <= confidence).all() and (height > confidence * 0.93).all()
    # A false second peak moves the mean but not the highest peak.
    second = values + 0.5 * gaussian_heatmaps(points.flip(0), confidence.amin() * torch.ones_like(confidence), 2.0)
    far = (points - points.flip(0)).norm(dim=-1) > 12 * PIXEL
    torch.testing.assert_close(heatmap_peaks(second)[0][far], points[far], rtol=0, atol=0.01 * PIXEL)


def test_peak_on_the_border_and_of_an_empty_channel_is_finite() -> None:
    values = torch.zeros(3, 8, 8)
    values[0, 0, 7] = 1  # the top right pixel
    values[1, 3, 4] = 1  # a lone pixel
    points, confidence = heatmap_peaks(values)
    torch.testing.assert_close(points[:2], torch.tensor([[7 / 8, -7 / 8], [1 / 8, -1 / 8]]))
    assert points.isfinite().all() and confidence.tolist() == [1, 1, 0]


# ---- distributions ----


def test_normalised_sums_to_one_or_leaves_the_joint_out() -> None:
    values = gaussian_heatmaps(torch.zeros(3, 2), torch.tensor([0.9, 0.2, 0.02]), 2.0)
    values[0] -= 1e-3  # raw regressions can be negative
    result = normalised(values)
    torch.testing.assert_close(result.sum((-2, -1)), torch.tensor([1.0, 1.0, 0.0]))
    assert (result >= 0).all()
    assert normalised(values, floor=0.1)[2].sum() == pytest.approx(1, abs=1e-5)
    coarse = gaussian_heatmaps(torch.zeros(2, 2), torch.tensor([0.06, 0.02]), 1.0, 32)  # the floor scales too
    assert normalised(coarse).sum((-2, -1)).tolist() == pytest.approx([1, 0], abs=1e-5)


def test_samples_follow_the_distribution(generator: torch.Generator) -> None:
    one = gaussian_heatmaps(torch.tensor([0.25, -0.5]), torch.tensor(0.6), 3.0)
    two = 0.5 * one + 1.5 * gaussian_heatmaps(torch.tensor([-0.5, 0.5]), torch.tensor(0.6), 3.0)
    values = torch.stack([one, two, torch.zeros_like(one)])
    samples = draw_samples(values, 20_000, generator)
    assert samples.shape == (20_000, 3, 2)
    torch.testing.assert_close(samples[:, 0].mean(0), torch.tensor([0.25, -0.5]), rtol=0, atol=0.005)
    torch.testing.assert_close(samples[:, 0].std(0), torch.full((2,), 3 * PIXEL), rtol=0.03, atol=0)
    assert (samples[:, 1, 0] < 0).float().mean() == pytest.approx(0.75, abs=0.02)
    assert samples[:, 2].eq(0).all()


def test_samples_never_leave_the_support_and_repeat_by_seed() -> None:
    values = torch.zeros(2, 1, 8, 8)
    values[:, 0, 7, 7] = 1e-3
    values[:, 0, 2, 1] = 5
    first = draw_samples(values, 500, torch.Generator().manual_seed(3))
    assert torch.equal(first, draw_samples(values, 500, torch.Generator().manual_seed(3)))
    pixel = ((first + 1) * 4).floor().long()
    allowed = (pixel == torch.tensor([1, 2])).all(-1) | (pixel == torch.tensor([7, 7])).all(-1)
    assert allowed.all()


# ---- crops ----


def test_crops() -> None:
    center, side = crop_from_box(torch.tensor([[10.0, 20, 30, 100], [0, 0, 50, 10]]), padding=1.25)
    torch.testing.assert_close(center, torch.tensor([[20.0, 60], [25, 5]]))
    torch.testing.assert_close(side, torch.tensor([100.0, 62.5]))
    points = torch.tensor([[10.0, 20], [30, 100], [999, 999]])
    center, side = crop_from_keypoints(points, torch.tensor([0.5, 1, 0]), padding=1.25)
    torch.testing.assert_close(center, torch.tensor([20.0, 60]))
    torch.testing.assert_close(side, torch.tensor(100.0))


@pytest.mark.parametrize("size", [48, 64, 96])
def test_a_peak_keeps_its_place_in_the_photo(size: int) -> None:
    photo = torch.tensor([[[200.0, 150.0], [230.3, 171.7], [188.8, 120.2]]])
    center, side = torch.tensor([[205.0, 148.0]]), torch.tensor([180.0])
    other_center, other_side = torch.tensor([[199.2, 152.9]]), torch.tensor([160.0])
    values = gaussian_heatmaps(Crop.of(center, side).from_photo(photo), torch.ones(1, 3), 2.5, size)
    moved = resample_heatmaps(values, center, side, other_center, other_side)
    coarser = max(180 / size, 160 / HEATMAP_SIZE)  # photo pixels per pixel of the coarser grid
    for found, allowed in ((soft_argmax(moved), 0.02), (heatmap_peaks(moved)[0], 0.1)):
        assert (Crop.of(other_center, other_side).to_photo(found) - photo).abs().max() / coarser < allowed
    assert moved.amax((-2, -1)).min() > 0.9
    there_and_back = resample_heatmaps(moved, other_center, other_side, center, side, size)
    torch.testing.assert_close(Crop.of(center, side).to_photo(soft_argmax(there_and_back)), photo, rtol=0, atol=0.3)


def test_resampling_to_the_same_crop_changes_nothing_and_outside_is_zero() -> None:
    heatmaps = example()
    same = resample_heatmaps(heatmaps.values, heatmaps.center, heatmaps.side, heatmaps.center, heatmaps.side)
    torch.testing.assert_close(same, heatmaps.values, rtol=0, atol=1e-5)
    far = heatmaps.center + 3 * heatmaps.side[:, None]
    assert resample_heatmaps(heatmaps.values, heatmaps.center, heatmaps.side, far, heatmaps.side).eq(0).all()
    # A rectangular crop, like mmpose's 48 x 64, to the surrounding square.
    narrow = torch.stack([heatmaps.side * 0.75, heatmaps.side], 1)
    values = gaussian_heatmaps(torch.tensor([[0.5, 0.5]]).expand(2, 1, 2), torch.ones(2, 1), 2.0, 64)[..., 8:56]
    square = resample_heatmaps(values, heatmaps.center, narrow, heatmaps.center, heatmaps.side)
    torch.testing.assert_close(soft_argmax(square), torch.full((2, 1, 2), 0.5), rtol=0, atol=1e-3)


# ---- the type and its builders ----


def broken(**changes: Any) -> Heatmaps:
    heatmaps = example()
    of_crop = {name: changes.pop(name) for name in ("center", "side") if name in changes}
    crop = Crop.of(**{"center": heatmaps.center, "side": heatmaps.side, **of_crop})
    return dataclasses.replace(heatmaps, crop=crop, **changes)


def with_value(value: float) -> Tensor:
    values = example().values.clone()
    values[1, 9, 3, 3] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.ones(2, 17, 64, 64)}, r"shape \(2, 17, 64, 64\) found, \(B, 26, 64, 64\) expected"),
        ({"values": torch.ones(26, 64, 64)}, "expected"),
        ({"values": torch.ones(0, 26, 64, 64)}, "expected"),
        ({"values": with_value(float("nan"))}, "NaN or infinite values in joint 'left_wrist' of person 1"),
        ({"values": with_value(float("inf"))}, "NaN or infinite"),
        ({"values": with_value(-0.5)}, "negative value -0.5"),
        ({"values": torch.cat([torch.ones(1, 26, 64, 64), torch.zeros(1, 26, 64, 64)])}, "all zero for person 1"),
        ({"values": torch.ones(2, 26, 64, 64).double()}, "float32"),
        ({"valid": torch.zeros(2, 26, dtype=torch.bool)}, "not valid"),
        ({"valid": torch.ones(2, 26)}, "bool"),
        ({"center": torch.zeros(2)}, "`center` and `side`"),
        ({"side": torch.tensor([1.0, 0.0])}, "above 0"),
        ({"center": torch.full((2, 2), float("nan"))}, "finite"),
    ],
)
def test_bad_heatmaps_are_refused_by_name(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        broken(**changes)
    assert "\n" not in str(caught.value)


def test_selecting_and_joining_people() -> None:
    heatmaps = example(3)
    assert len(heatmaps[1]) == 1 and torch.equal(heatmaps[1].values[0], heatmaps.values[1])
    assert torch.equal(heatmaps[1:].side, heatmaps.side[1:])
    joined = concatenate_heatmaps([heatmaps[0], heatmaps[1:]])
    for part, whole in ((joined, heatmaps), (joined.crop, heatmaps.crop)):
        values = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        assert tensors and all(torch.equal(getattr(part, name), value) for name, value in tensors.items())
    assert torch.equal(heatmaps.to("cpu").values, heatmaps.values)


def test_raw_values_are_clamped_and_mapped_by_name() -> None:
    names = ("left_ankle", "jaw", "nose")  # the middle one has no counterpart in HALPE26
    raw = torch.randn(1, 3, 64, 64)
    built = heatmaps_from_values(raw, names, torch.zeros(1, 2), torch.ones(1))
    ankle, nose = HALPE26.index("left_ankle"), HALPE26.index("nose")
    assert torch.equal(built.values[0, ankle], raw[0, 0].clamp_min(0))
    assert torch.equal(built.values[0, nose], raw[0, 2].clamp_min(0))
    assert built.valid.sum() == 2 and built.valid[0, [ankle, nose]].all()
    with pytest.raises(UserError, match="none of the joints"):
        heatmaps_from_values(raw, ("jaw", "spine1", "spine2"), torch.zeros(1, 2), torch.ones(1))
    raw[0, 2, 5, 5] = float("nan")
    with pytest.raises(UserError, match="joint 'nose'"):
        heatmaps_from_values(raw, names, torch.zeros(1, 2), torch.ones(1))


# ---- arrays on disk ----


def test_arrays_survive_the_disk_exactly(tmp_path: Path) -> None:
    heatmaps = example()
    partly = heatmaps.valid.clone()
    partly[1, :5] = False
    crop = Crop.of(heatmaps.center, heatmaps.side, torch.tensor([0.0, 1.0]), (640, 480), 700.0, (300.0, 250.0))
    heatmaps = Heatmaps(heatmaps.values * partly[..., None, None], partly, crop)
    save_heatmaps(tmp_path / "h.npz", heatmaps)
    loaded = load_heatmaps(tmp_path / "h.npz")
    assert torch.equal(loaded.values, heatmaps.values) and torch.equal(loaded.valid, heatmaps.valid)
    for field in dataclasses.fields(heatmaps.crop):
        assert torch.equal(getattr(loaded.crop, field.name), getattr(heatmaps.crop, field.name)), field.name
    assert [entry.name for entry in tmp_path.iterdir()] == ["h.npz"]


def array_file(path: Path, **changes: Any) -> Path:
    arrays = {
        "heatmaps": np.ones((17, 32, 32), np.float16),
        "joints": np.array(COCO17),
        "center": np.zeros(2, np.float32),
        "side": np.float32(100),
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_one_person_of_any_size_and_names_by_count(tmp_path: Path) -> None:
    loaded = load_heatmaps(array_file(tmp_path / "a.npz"))
    assert len(loaded) == 1 and loaded.valid.sum() == 17
    assert torch.equal(load_heatmaps(array_file(tmp_path / "b.npz", joints=None)).values, loaded.values)
    two = load_heatmaps(
        array_file(tmp_path / "c.npz", heatmaps=np.ones((2, 17, 32, 32)), center=np.zeros((2, 2)), side=np.ones(2))
    )
    assert len(two) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heatmaps": np.full((17, 32, 32), np.nan)}, "NaN"),
        ({"heatmaps": np.zeros((17, 32, 32))}, "all zero"),
        ({"heatmaps": -np.ones((17, 32, 32))}, "all zero"),
        ({"heatmaps": np.ones((32, 32))}, r"shape \(32, 32\)"),
        ({"heatmaps": np.ones((17, 64, 48))}, "square"),
        ({"heatmaps": np.array(["a"])}, "numbers"),
        ({"heatmaps": None}, "no array 'heatmaps'"),
        ({"center": None}, "no array 'center'"),
        ({"side": np.ones(3)}, "`side`"),
        ({"side": np.float32(-1)}, "above 0"),
        ({"joints": np.array(COCO17[:5])}, "17 heatmaps but 5 joint names"),
        ({"joints": np.array([*COCO17[:16], "right_ankel"])}, "'right_ankel' is unknown; .* 'right_ankle'"),
        ({"joints": np.array([*COCO17[:16], "nose"])}, "'nose' is named twice"),
        ({"joints": np.arange(17)}, "list of names"),
        ({"joints": None, "heatmaps": np.ones((14, 32, 32))}, "14 heatmaps without names"),
        ({"heatmaps": np.array([{"evil": 1}])}, "pickled"),
        ({"valid": np.ones(3, bool)}, "`valid`"),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = array_file(tmp_path / "bad.npz", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_heatmaps(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_an_npz_is_refused(tmp_path: Path) -> None:
    good = array_file(tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "plain.npy", np.ones(3))
    contents = {
        "text.npz": b"hello",
        "empty.npz": b"",
        "cut.npz": good[: len(good) // 2],
        "npy.npz": (tmp_path / "plain.npy").read_bytes(),
        "bits.npz": good.replace(b"NUMPY", b"NUMPX"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: (not an npz|a damaged file of arrays)"):
            load_heatmaps(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.npz: no such file"):
        load_heatmaps(tmp_path / "missing.npz")


@pytest.mark.parametrize("photo", ["lunge_barbell", "skier", "warrior_yoga"])
def test_real_heatmaps_load(shared_data: Path, photo: str) -> None:
    path = shared_data / "photos" / f"{photo}_heatmaps.npz"
    loaded = load_heatmaps(path)
    with np.load(path, allow_pickle=False) as raw:
        source, target = shared_joints(raw["joints"].tolist(), HALPE26)
        values = torch.from_numpy(raw["heatmaps"].astype(np.float32))
    assert len(source) == 14 and loaded.valid[0].nonzero()[:, 0].tolist() == sorted(target)
    before, confidence = heatmap_peaks(values[source])
    after, _ = heatmap_peaks(loaded.values[0, target])
    sure = confidence > 0.3
    distance = (before - after)[sure].norm(dim=-1) / PIXEL
    # Their peaks are plateaus of up to three equal pixels of 96, two of ours, with the maximum anywhere on them.
    assert len(distance) >= 8 and distance.median() < 0.5 and distance.max() < 2
    shift = soft_argmax(values[source].clamp_min(0)) - soft_argmax(loaded.values[0, target])
    assert shift[sure].norm(dim=-1).max() / PIXEL < 0.05
