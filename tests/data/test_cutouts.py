"""Occluders: cut-outs from a folder, shapes, the next person; what they cover, and in which data."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from records import make_records
from small import free_body, people_block, small_config

from hmdiff.body.skeletons import HALPE26
from hmdiff.build import build_data
from hmdiff.config import Augment
from hmdiff.data.recorded import RecordedPeople
from hmdiff.data.sample import Sample
from hmdiff.data.shards import RecordFiles
from hmdiff.data.synthetic.cutouts import SIZE, Cutouts
from hmdiff.data.synthetic.draws import grid
from hmdiff.data.synthetic.occluders import (
    CUTOUT,
    NOTHING,
    OBJECTS,
    PERSON,
    CombinedOccluders,
    OccluderSampler,
    TrainingOccluders,
)
from hmdiff.data.synthetic.rendering import OccluderBoxes
from hmdiff.errors import UserError

STILL = Augment(flip=0, noise=0, upright=1, scale=0)


def save(path: Path, rgba: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgba.astype(np.uint8)).save(path)


def red_disc(size: int = 40) -> np.ndarray:
    """Red where opaque, green where transparent: green must never appear."""
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    inside = np.hypot(x, y) < size / 4
    return np.dstack([255 * inside, 255 * ~inside, 0 * x, 255 * inside])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "things" / "disc.png", red_disc())
    return tmp_path / "things"


def test_a_cutout_is_cut_to_its_thing_and_its_colour_does_not_bleed(folder: Path) -> None:
    bar = np.zeros((30, 60, 4))
    bar[10:20, 5:45] = (0, 0, 255, 255)
    save(folder / "deeper" / "bar.webp", bar)
    cutouts = Cutouts(folder)
    assert len(cutouts) == 2 and cutouts.pictures.shape == (2, 4, SIZE, SIZE)
    disc = cutouts.pictures[1].float() / 255
    assert disc[3].mean() == pytest.approx(np.pi / 4, abs=0.03)  # it fills the square
    assert disc[1].max() < 0.01  # no green
    # The bar is four times as wide as high: a quarter of the square, centred.
    blue = cutouts.pictures[0, 2].float() / 255
    assert blue.mean() == pytest.approx(0.25, abs=0.02) and blue[SIZE // 2].min() > 0.9 and blue[0].max() == 0
    points = torch.tensor([[[0.0, 0.0], [0.99, 0.99], [3.0, 0.0]]])
    assert cutouts.sample(torch.tensor([1]), points)[0, 3].tolist() == pytest.approx([1, 0, 0], abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "nowhere", "nowhere.*: no such folder; give one of RGBA pictures"),
        (lambda at: at.mkdir(exist_ok=True) or at, "no picture in it; RGBA pictures .*are expected"),
        (lambda at: save(at / "rgb.png", np.full((8, 8, 3), 200)) or at, "rgb.png: a cut-out without transparency"),
        (lambda at: save(at / "solid.png", np.full((8, 8, 4), 255)) or at, "solid.png: a cut-out without transparency"),
        (lambda at: save(at / "clear.png", np.zeros((8, 8, 4))) or at, "clear.png: .* transparent everywhere"),
        (lambda at: (at / "bad.png").write_bytes(b"\x89PNG nonsense") and at, "bad.png: not a picture"),
    ],
)
def test_a_bad_folder_is_named(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    at = tmp_path / "cut"
    at.mkdir()
    with pytest.raises(UserError, match=message):
        Cutouts(make(at))


def test_bad_shares_are_named() -> None:
    with pytest.raises(UserError, match=r"objects, people and pasted are 0\.7, 0\.4, 0, over 1 together"):
        OccluderSampler(Augment(objects=0.7, people=0.4))


def drawn(options: Augment, count: int = 64, seed: int = 0) -> tuple[TrainingOccluders, torch.Tensor]:
    points = torch.cat([people_block("train", number).joints_2d for number in range(count // 8)])
    known = torch.ones(points.shape[:2], dtype=torch.bool)
    return OccluderSampler(options)(points, known, torch.Generator().manual_seed(seed)), points


@pytest.mark.slow
def test_shares_are_kept_and_seeds_repeat(folder: Path) -> None:
    options = Augment(objects=0.3, people=0.3, cutouts=str(folder), pasted=0.3)
    front, _ = drawn(options, 160)
    share = torch.bincount(front.kind, minlength=4) / 160
    assert (share - torch.tensor([0.1, 0.3, 0.3, 0.3])).abs().max() < 0.1
    again, _ = drawn(options, 160)
    for field in ("kind", "shapes", "limbs", "cutout", "pose", "texture_seed"):
        assert torch.equal(torch.as_tensor(getattr(front, field)), torch.as_tensor(getattr(again, field)))
    other, _ = drawn(options, 160, seed=1)
    assert not torch.equal(front.kind, other.kind)
    fewer, _ = drawn(dataclasses.replace(options, pasted=0.0), 160)
    others = front.kind != CUTOUT
    assert torch.equal(fewer.shapes, front.shapes) and torch.equal(fewer.kind[others], front.kind[others])
    assert not OccluderSampler(Augment(pasted=1.0)).active  # nothing to paste


@pytest.mark.parametrize("kind", [OBJECTS, PERSON, CUTOUT])
def test_points_mask_and_picture_agree(kind: int, folder: Path) -> None:
    options = {
        OBJECTS: Augment(objects=1),
        PERSON: Augment(people=1),
        CUTOUT: Augment(cutouts=str(folder), pasted=1),
    }[kind]
    front, points = drawn(options, 16)
    assert (front.kind == kind).all()
    size = 32
    x, y = grid(size, size, "cpu")
    centres = torch.stack([x.expand(1, size, size), y.expand(1, size, size)], -1).flatten(1, 2).expand(16, -1, -1)
    mask = front.mask(size) > 0.5
    assert torch.equal(front.cover(centres).unflatten(1, (size, size)), mask)
    image = torch.full((16, 3, size, size), 0.5)
    painted = front.paint(image)
    changed = (painted - image).abs().amax(1) > 0.02
    # Outside the mask nothing is painted, except at soft edges.
    soft = torch.nn.functional.max_pool2d(mask[:, None].float(), 5, 1, 2)[:, 0] > 0
    assert not (changed & ~soft).any() and (changed & mask).sum() > 0.8 * mask.sum()
    assert 0.01 < mask.float().mean() < 0.6 and mask.flatten(1).any(1).float().mean() > 0.7
    hidden = front.cover(points)
    assert 0.03 < hidden.float().mean() < 0.7
    if kind == CUTOUT:
        assert painted[:, 0][mask].mean() > 0.9 and painted[:, 1][mask].mean() < 0.1
    # A person's occluder does not depend on the others: the same rows separately.
    alone = dataclasses.replace(
        front, **{name: getattr(front, name)[3:5] for name in ("kind", "shapes", "limbs", "cutout", "pose")}
    )
    assert torch.equal(alone.mask(size), front.mask(size)[3:5])


def test_the_person_in_front_is_the_next_one_moved() -> None:
    front, points = drawn(Augment(people=1), 16)
    limb = 5  # left shoulder to left elbow: see occluders._LIMBS
    a, b = HALPE26.index("left_shoulder"), HALPE26.index("left_hip")
    along = front.limbs[:, 4, 2:4] - front.limbs[:, 4, :2]
    other = points.roll(-1, 0)
    expected = other[:, b] - other[:, a]
    scale = (along * expected).sum(-1) / expected.square().sum(-1)
    assert torch.allclose(along, scale[:, None] * expected, atol=1e-5) and ((scale > 0.69) & (scale < 1.31)).all()
    assert (front.limbs[:, limb, 4] > 0).all()
    # Too few keypoints give no person; unlabelled keypoints may hold any value.
    known = torch.ones(16, 26, dtype=torch.bool)
    known[1, 5:] = False
    points = points.clone()
    points[1, 5:] = torch.nan
    points[3, 9], known[3, 9] = torch.nan, False
    front = OccluderSampler(Augment(people=1))(points, known, torch.Generator().manual_seed(0))
    assert front.kind[0] == NOTHING and (front.kind[1:] == PERSON).all()
    assert front.limbs[2].isfinite().all() and (front.limbs[2, :, 4] == 0).sum() == 1  # a limb of that joint
    hand = OccluderSampler(Augment(people=1))(points[:, :21], known[:, :21], torch.Generator(), ["wrist"] * 21)
    assert (hand.kind == NOTHING).all()


def test_boxes_and_what_is_in_front_cover_together() -> None:
    front, points = drawn(Augment(objects=1), 8)
    boxes = OccluderBoxes(torch.full((8, 1, 2), -0.5), torch.full((8, 1, 2), 0.3), torch.arange(8) < 4)
    both = CombinedOccluders.of(boxes, front)
    assert torch.equal(both.cover(points), boxes.cover(points) | front.cover(points))
    assert torch.equal(both.mask(16) > 0.5, (boxes.mask(16) > 0.5) | (front.mask(16) > 0.5))
    assert both.cover(points).sum() > boxes.cover(points).sum()


def recorded(folder: Path, heatmaps: str = "faults", **options: object) -> RecordedPeople:
    if not (folder / "raw").exists():
        (folder / "raw").mkdir()
    records = make_records(folder / "raw", 6)
    body, mesh = free_body()
    augment = dataclasses.replace(STILL, **options)  # type: ignore[arg-type]
    return RecordedPeople(
        RecordFiles(records),
        body,
        mesh.coarse_ids,
        6,
        image_size=32,
        augment=augment,
        heatmaps=heatmaps,
        same_body=True,
    )


def same(first: Sample, second: Sample) -> bool:
    fields = [field.name for field in dataclasses.fields(Sample)]
    pairs = [(getattr(first, name), getattr(second, name)) for name in fields]
    return all(a is b or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize("heatmaps", ["faults", "labels"])
def test_recorded_people_behind_cutouts(tmp_path: Path, folder: Path, heatmaps: str) -> None:
    plain = recorded(tmp_path, heatmaps)
    data = recorded(tmp_path, heatmaps, cutouts=str(folder), pasted=1.0)
    before, after = plain.block("train", 0), data.block("train", 0)
    assert same(data.block("val", 0), plain.block("val", 0))  # splits other than train are unchanged
    assert same(after, data.block("train", 0)) and not same(after, data.block("train", 1))
    assert same(after, pickle.loads(pickle.dumps(data)).block("train", 0))
    hidden = before.visible & ~after.visible
    assert hidden.any() and (after.visible <= before.visible).all()
    assert torch.equal(before.joints_2d, after.joints_2d)  # labels are unchanged
    assert torch.equal(before.joints_2d_confidence, after.joints_2d_confidence)
    assert (after.image[:, 0] - before.image[:, 0]).amax() > 0.2
    gone = after.heatmaps.flatten(2).amax(-1) == 0
    if heatmaps == "labels":
        assert gone[hidden].all() and torch.equal(after.heatmaps[after.visible], before.heatmaps[after.visible])


def test_recorded_people_without_anything_in_front_are_as_ever(tmp_path: Path) -> None:
    assert same(recorded(tmp_path).block("train", 0), recorded(tmp_path, pasted=0.9).block("train", 0))


@pytest.mark.slow
def test_synthetic_people_with_more_in_front(folder: Path) -> None:
    config = ("data.block_size=8", "data.pictures=true", "data.image_size=48", "data.map_size=48")
    share = f"data.augment={{objects: 0.3, people: 0.3, cutouts: {folder}, pasted: 0.3}}"
    plain, data = (build_data(small_config("unused", *config, *more), *free_body()) for more in ((), (share,)))
    before, after = plain.block("train", 0), data.block("train", 0)
    assert same(plain.block("val", 0), data.block("val", 0)) and same(after, data.block("train", 0))
    for name in ("coarse_vertices", "joints_2d", "joints_2d_confidence", "silhouette", "depth", "camera"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name  # the people are the same
    assert (after.visible_fraction <= before.visible_fraction).all() and (after.visible <= before.visible).all()
    more = after.occlusion & ~before.occlusion
    changed = (before.image - after.image).abs().amax(1) > 0.02
    assert changed[more].float().mean() > 0.8 and not (before.occlusion & ~after.occlusion).any()
    untouched = ~more.flatten(1).any(1)
    assert untouched.any() and not untouched.all()
    assert torch.equal(before.peaks[untouched], after.peaks[untouched])
    assert torch.equal(before.image[untouched], after.image[untouched])
    inside = (after.joints_2d.abs() < 0.98).all(-1)
    pixel = ((after.joints_2d + 1) * 24).long().clamp(0, 47)
    at = after.occlusion.flatten(1).gather(1, pixel[..., 1] * 48 + pixel[..., 0])
    assert (at == ~after.visible)[inside].float().mean() > 0.9  # except at edges
