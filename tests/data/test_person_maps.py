"""Depth maps and masks of prepared people: stored, cropped and augmented like the image, and used in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from records import HEIGHT, WIDTH, ListReader, make_records
from small import free_body, small_config

from hmdiff.build import build_source
from hmdiff.cli.depth_maps import photo_depth
from hmdiff.config import Augment
from hmdiff.data.person_maps import crop_depth, crop_mask, encode_depth, encode_mask, read_mask
from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.recorded import RecordedPeople
from hmdiff.data.shards import PreparedShards
from hmdiff.data.transforms import Augmentation, crop_affine
from hmdiff.errors import UserError
from hmdiff.train.check import CAREFUL, dry_run
from hmdiff.train.loop import Trainer

SIZE = 32


def plane() -> np.ndarray:  # (H, W)
    """A depth that encodes position: 2 x + y, in photo units."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (2 * x + y).astype(np.float32)


def places(affine: np.ndarray) -> np.ndarray:  # (S, S, 2) photo pixels of the crop's pixels
    grid = (np.arange(SIZE) + 0.5) * 2 / SIZE - 1
    crop = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    return ((crop - affine[:, 2]) @ np.linalg.inv(affine[:, :2]).T).reshape(SIZE, SIZE, 2)


@pytest.mark.parametrize(
    "change", [Augmentation(), Augmentation(flip=True), Augmentation(angle=0.6, flip=True, scale=1.1)], ids=str
)
@pytest.mark.parametrize("coarser", [1, 4])
def test_a_crop_of_depth_is_at_its_own_place(change: Augmentation, coarser: int) -> None:
    """For any map resolution and augmentation, the crop samples the plane at the photo positions of its pixels."""
    depth = cv2.resize(plane(), (WIDTH // coarser, HEIGHT // coarser), interpolation=cv2.INTER_AREA)
    region = (100.0, 60.0, 420.0, 380.0)
    stored = encode_depth(depth, (WIDTH, HEIGHT), region, (160, 160))
    assert stored is not None
    affine = crop_affine(np.array([260.0, 220.0]), 180.0, change)
    found = crop_depth(np.frombuffer(stored, np.uint8), region, affine, SIZE)
    at = places(affine)
    expected = 2 * at[..., 0] + at[..., 1]
    fit = np.polyfit(found.ravel(), expected.ravel(), 1)  # up to unit and origin
    assert fit[0] > 0 and np.abs(np.polyval(fit, found) - expected).max() < 4


def test_what_is_not_known_stays_so() -> None:
    depth = plane()
    depth[:, :320] = np.nan
    region = (160.0, 100.0, 480.0, 420.0)
    stored = encode_depth(depth, (WIDTH, HEIGHT), region, (160, 160))
    affine = crop_affine(np.array([320.0, 260.0]), 200.0, Augmentation())
    found = crop_depth(np.frombuffer(stored, np.uint8), region, affine, SIZE)
    assert np.isnan(found[:, : SIZE // 2 - 1]).all() and np.isfinite(found[:, SIZE // 2 + 1 :]).all()
    assert encode_depth(depth, (WIDTH, HEIGHT), (0.0, 0.0, 200.0, 200.0), (50, 50)) is None
    outside = crop_depth(
        np.frombuffer(stored, np.uint8), region, crop_affine(np.array([600.0, 260.0]), 100, Augmentation()), 8
    )
    assert np.isnan(outside).all()


def test_masks_by_polygon_and_by_runs() -> None:
    """COCO's three encodings of one rectangle: x from 3 to 7, y from 2 to 5, in 10 x 8 pixels."""
    true = np.zeros((8, 10), bool)
    true[2:5, 3:7] = True
    runs = [3 * 8 + 2, 3, 5, 3, 5, 3, 5, 3, 8 - 5 + 3 * 8]
    assert np.array_equal(read_mask({"size": [8, 10], "counts": runs}, (10, 8), "x"), true)

    def packed(counts: list[int]) -> str:
        """An independent implementation of COCO's encoding: groups of five bits, the lowest first."""
        text = ""
        for number, count in enumerate(counts):
            value = count - counts[number - 2] if number > 2 else count
            while True:
                bits, value = value & 31, value >> 5
                last = (value == 0 and not bits & 16) or (value == -1 and bits & 16)
                text += chr(48 + (bits if last else bits | 32))
                if last:
                    break
        return text

    assert np.array_equal(read_mask({"size": [8, 10], "counts": packed(runs)}, (10, 8), "x"), true)
    polygon = read_mask([[3, 2, 7, 2, 7, 5, 3, 5]], (10, 8), "x")
    assert polygon[2:5, 3:7].all() and polygon.sum() <= 4 * 5  # OpenCV's fill includes the border
    for damaged in ({"size": [8, 10], "counts": [5]}, {"size": [10, 8], "counts": runs}, [["a", "b"]], {"counts": []}):
        with pytest.raises(UserError, match="row 3: a damaged segmentation"):
            read_mask(damaged, (10, 8), "row 3")


def test_a_mask_lies_on_its_person() -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[200:260, 240:300] = True
    region, change = (100.0, 60.0, 420.0, 380.0), Augmentation(angle=0.4, flip=True)
    affine = crop_affine(np.array([260.0, 220.0]), 180.0, change)
    stored = np.frombuffer(encode_mask(mask, (WIDTH, HEIGHT), region, (160, 160)), np.uint8)
    found, at = crop_mask(stored, region, affine, SIZE), places(affine)
    inside = (abs(at[..., 0] - 270) < 25) & (abs(at[..., 1] - 230) < 25)
    outside = (abs(at[..., 0] - 270) > 38) | (abs(at[..., 1] - 230) > 38)
    assert found[inside].min() > 0.95 and found[outside].max() < 0.05 and inside.sum() > 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Depth for all people but one, masks for the first three."""
    folder = tmp_path_factory.mktemp("maps")
    records = make_records(folder, 4)
    for number, record in enumerate(records):
        assert record.image is not None
        if number:
            np.save(record.image.with_name(f"{record.image.stem}_depth.npy"), plane())
        x, y = record.center
        if number < 3:
            box = [[x - 20, y - 40, x + 20, y - 40, x + 20, y + 40, x - 20, y + 40]]
            records[number] = dataclasses.replace(record, mask=box)
    source = {"depth": photo_depth("files"), "depth_name": "files (depth)"}
    figures = prepare_dataset(ListReader(records), folder / "out", **source)
    assert figures["with depth, of those new"] == 3 and figures["with masks, of those new"] == 3
    return folder / "out"


def test_prepared_people_have_their_maps(prepared: Path) -> None:
    body, mesh = free_body()
    store = PreparedShards(prepared)
    plain = RecordedPeople(store, body, mesh.coarse_ids, 4, heatmaps="none", same_body=True).block("val", 0)
    assert plain.depth_input is None and plain.silhouette is None  # not requested
    options = {"heatmaps": "none", "same_body": True, "map_size": SIZE}
    sample = RecordedPeople(store, body, mesh.coarse_ids, 4, **options).block("val", 0)
    assert sample.depth_input is not None and sample.silhouette is not None and sample.has_silhouette is not None
    known = sample.depth_input.isfinite().flatten(1)
    assert not known[0].any() and (known[1:].float().mean(1) > 0.5).all()
    assert sample.has_silhouette.tolist() == [True, True, True, False]
    assert (sample.silhouette[:3, 15:17, 15:17] > 0.9).all() and sample.silhouette[3].max() == 0
    always = Augment(flip=1.0, rotation=0.0)
    flipped = RecordedPeople(store, body, mesh.coarse_ids, 4, augment=always, **options).block("train", 0)
    assert flipped.depth_input is not None
    right = flipped.depth_input[:, :, -4:].nanmean((1, 2)) - flipped.depth_input[:, :, :4].nanmean((1, 2))
    assert (right[flipped.depth_input.isfinite().flatten(1).any(1)] < 0).all()  # 2 x + y, mirrored: decreases along x
    # Masks are rotated with the image and the depth.
    every = Augment(flip=0.0, rotation=90.0, upright=0.0, scale=0.0)
    turned = RecordedPeople(store, body, mesh.coarse_ids, 4, augment=every, **options)
    sample = turned.block("train", 0)
    assert sample.silhouette is not None and sample.has_silhouette is not None and sample.joints_2d is not None
    masks = [mask for mask, there in zip(sample.silhouette, sample.has_silhouette, strict=True) if there]
    high, wide = torch.stack([torch.stack([mask.amax(1).sum(), mask.amax(0).sum()]) for mask in masks]).unbind(1)
    assert (high / wide).min() < 1.5  # upright people are twice as high as wide


def test_depth_from_a_folder_and_sources_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 6), np.float32) * 2)
    read = photo_depth(str(tmp_path), "disparity")
    assert read is not None and photo_depth(None) is None
    pixels = np.zeros((8, 12, 3), np.uint8)
    assert read(pixels, Path("x/b.jpg")) is None and read(pixels, Path("x/a.jpg")).shape == (4, 6)
    with pytest.raises(UserError, match="--depth nowhere: no such folder"):
        photo_depth("nowhere")


def test_a_model_that_reads_depth_gets_it(prepared: Path) -> None:
    words = ("data.kind=recorded", f"data.sources=[{{path: {prepared}, same_body: true}}]", "model.depth_map=true")
    sample = build_source(small_config("unused", *words), *free_body()).block("train", 0)
    assert sample.depth_input is not None and sample.depth_input.shape == (4, 64, 64)
    assert torch.isfinite(sample.depth_input).any()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The same people, prepared without depth and masks."""
    prepare_dataset(ListReader(make_records(tmp_path, 4)), tmp_path / "bare")
    return tmp_path / "bare"


@pytest.mark.parametrize(("option", "what"), [("depth_map", "depth map"), ("silhouette", "mask")])
def test_nothing_is_called_d2a_without_its_labels(bare: Path, tmp_path: Path, option: str, what: str) -> None:
    words = ("data.kind=recorded", f"data.sources=[{{path: {bare}, same_body: true}}]", f"model.{option}=true")
    message = f"model.{option} is on, and nobody in data.sources has a {what}.*not be D2A-HMR"
    with pytest.raises(UserError, match=message):
        Trainer(small_config(tmp_path / "run", *words, "evaluation.people=0"))


@pytest.mark.slow
def test_the_dry_run_names_what_learns_nothing(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all labels a full model has no unused parameters; without its loss the silhouette decoder is named."""
    monkeypatch.setattr("hmdiff.train.check._TIMED_STEPS", 3)
    words = (
        "data.kind=recorded",
        f"data.sources=[{{path: {prepared}, same_body: true}}]",
        "model.silhouette=true",
        "model.depth_map=true",
        "model.depth=2",
        "evaluation.people=0",
    )
    for weight, state in ((0.1, "ok"), (0.0, CAREFUL)):
        result = dry_run(small_config(tmp_path / "run", *words, f"loss.silhouette={weight}"))
        line = next(check for check in result.checks if check.name == "gradients")
        assert line.state == state, line.found
        if weight == 0:
            assert "silhouette_decoder: " in line.found and "depth" not in line.found
