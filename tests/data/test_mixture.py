"""Recorded people as samples, mixtures of data sets, and that a missing label never contributes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import MARKED, ListReader, make_records, red_place
from small import awaken, free_body, people, small_config
from torch import Tensor

from hmdiff.body.mesh import MeshSampler
from hmdiff.body.skeletons import HALPE26, SMPL24, mirror_permutation
from hmdiff.build import build_data, build_model, build_scheduler, build_source
from hmdiff.config import Augment, Config, LossConfig
from hmdiff.data.mixture import PERIOD, Mixture, NamedSplits, schedule
from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.record import Record
from hmdiff.data.recorded import RecordedPeople
from hmdiff.data.sample import MASKS, Sample, concatenate
from hmdiff.data.shards import RecordFiles
from hmdiff.errors import UserError
from hmdiff.evaluate.mean_mesh import _mean_person
from hmdiff.geometry import axis_angle_to_matrix, perspective_projection, weak_perspective_projection
from hmdiff.losses.objective import objective
from hmdiff.train.loop import Trainer
from hmdiff.train.step import Draws, training_losses
from hmdiff.train.stream import TrainingStream

PLAIN = Augment(flip=0, noise=0, rotation=0, scale=0)
WILD = Augment(flip=0.5, noise=0, upright=0, scale=0.25)


def recorded(records: list[Record], **options: Any) -> RecordedPeople:
    body, mesh = free_body()
    values = {"block_size": 4, "full_mesh": True, "same_body": True, **options}
    return RecordedPeople(RecordFiles(records), body, mesh.coarse_ids, **values)


def equal(one: Sample, other: Sample) -> bool:
    for field in dataclasses.fields(Sample):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
            return False
    return True


# -- recorded people -------------------------------------------------------------------------------------------------


def test_a_split_is_the_labels_themselves(tmp_path: Path) -> None:
    records = make_records(tmp_path, 6)
    body, mesh = free_body()
    data = recorded(records, image_size=64, heatmaps="labels")
    sample = concatenate([data.block("val", 0), data.block("val", 1)])
    assert len(sample) == 6 and sample.index.tolist() == list(range(6))
    for row, record in enumerate(records):
        rotations = axis_angle_to_matrix(torch.from_numpy(record.pose).float())
        output = body(torch.from_numpy(record.betas).float(), rotations)
        root = output.joints[0]
        torch.testing.assert_close(sample.vertices[row], output.vertices - root, rtol=0, atol=2e-6)
        torch.testing.assert_close(sample.joints_3d[row], output.joints - root, rtol=0, atol=2e-6)
        torch.testing.assert_close(
            sample.pelvis[row].numpy(), (root.numpy() + record.translation), rtol=0, atol=1e-5, check_dtype=False
        )
        seen = (record.keypoints_2d - record.center) * 2 / record.side
        np.testing.assert_allclose(sample.joints_2d[row].numpy(), seen, atol=1e-6)
        np.testing.assert_allclose(red_place(sample.image[row].permute(1, 2, 0).numpy()), seen[MARKED], atol=0.03)
        peak = sample.heatmaps[row, MARKED].flatten().argmax().item()
        place = (np.array([peak % 64, peak // 64]) + 0.5) / 32 - 1
        np.testing.assert_allclose(place, seen[MARKED], atol=1 / 64 + 1e-6)
    assert torch.equal(sample.coarse_vertices, sample.vertices[:, mesh.coarse_ids])
    assert sample.has_vertices.all() and sample.has_joints_3d.all() and sample.has_keypoints_3d.all()
    light = recorded(records, full_mesh=False, heatmaps="labels").block("val", 0)
    assert light.vertices is None and light.image is None
    torch.testing.assert_close(light.coarse_vertices, sample.coarse_vertices[:4], rtol=0, atol=2e-6)
    torch.testing.assert_close(light.keypoints_3d, sample.keypoints_3d[:4], rtol=0, atol=2e-6)


def test_every_label_agrees_after_augmentation(tmp_path: Path) -> None:
    """3D joints projected by the camera match the 2D labels and the dot in the image after any augmentation."""
    data = recorded(make_records(tmp_path, 6), image_size=96, augment=WILD, heatmaps="labels")
    sample = concatenate([data.block("train", number) for number in range(6)])
    assert sample.has_perspective.all() and sample.has_camera.all()
    projected = perspective_projection(
        sample.keypoints_3d + sample.pelvis[:, None], sample.focal, sample.principal_point
    )
    # The free body is only nearly mirror symmetric: a millimetre or two, 0.003 of the crop's half-side.
    torch.testing.assert_close(projected, sample.joints_2d, rtol=0, atol=4e-3)
    weak = weak_perspective_projection(sample.keypoints_3d, sample.camera)
    assert (weak - sample.joints_2d).abs().mean() < 0.04  # only perspective effects remain
    pelvis = perspective_projection(sample.pelvis[:, None], sample.focal, sample.principal_point)
    torch.testing.assert_close(weak_perspective_projection(torch.zeros(24, 1, 3), sample.camera), pelvis)
    # The dot was drawn at the left wrist: in a mirrored person it is the right one.
    image = sample.image.permute(0, 2, 3, 1).numpy()
    other = mirror_permutation(HALPE26)[MARKED]
    nearest, flipped = [], 0
    for row in range(24):
        red = image[row, ..., 0] - image[row, ..., 2]
        if red.max() < 0.3:
            continue  # outside the crop
        distances = [np.abs(red_place(image[row]) - sample.joints_2d[row, j].numpy()).max() for j in (MARKED, other)]
        nearest.append(min(distances))
        flipped += distances[1] < distances[0]
    assert max(nearest) < 0.1 and np.median(nearest) < 0.01  # a dot at the photo's edge is cut
    assert 4 < flipped < 20 and len(nearest) > 16


def test_blocks_are_functions_of_their_number(tmp_path: Path) -> None:
    records = make_records(tmp_path, 6)
    data = recorded(records, image_size=32)
    third = data.block("train", 3)
    data.block("train", 0)
    assert equal(data.block("train", 3), third) and equal(recorded(records, image_size=32).block("train", 3), third)
    for other in (data.block("train", 4), recorded(records, image_size=32, seed=1).block("train", 3)):
        assert not torch.equal(other.coarse_vertices, third.coarse_vertices)
    assert equal(data.block("val", 0), recorded(records, image_size=32, seed=9).block("val", 0))


def test_an_epoch_is_everybody_once_in_a_new_order(tmp_path: Path) -> None:
    records = make_records(tmp_path, 6, photos=False)
    data = recorded(records, block_size=3, augment=PLAIN, heatmaps="none")
    own = recorded(records, block_size=6, heatmaps="none").block("val", 0).coarse_vertices

    def who(block: int) -> list[int]:
        found = data.block("train", block).coarse_vertices
        return [int((own - body).abs().amax((1, 2)).argmin()) for body in found]

    epochs = [who(2 * epoch) + who(2 * epoch + 1) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_split_ends(tmp_path: Path) -> None:
    data = recorded(make_records(tmp_path, 6, photos=False))
    assert len(data.block("val", 1)) == 2
    with pytest.raises(UserError, match=r"split 'val' has 6 people, and more are asked for; give evaluation.people=6"):
        data.block("val", 2)
    chosen = recorded(make_records(tmp_path, 6, photos=False), numbers=np.array([4, 1]), heatmaps="none")
    expected = data.block("val", 0).coarse_vertices[1]
    assert len(chosen) == 2
    torch.testing.assert_close(chosen.block("val", 0).coarse_vertices[1], expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="no record is left of the data set"):
        recorded([], numbers=np.array([], int))


def test_data_sets_without_some_labels(tmp_path: Path) -> None:
    whole = make_records(tmp_path, 4, photos=False)
    full = recorded(whole, heatmaps="none").block("val", 0)
    keep = {"keypoints_2d": None, "keypoints_2d_confidence": None, "keypoint_names": ()}
    no_body = {"pose": None, "betas": None, "translation": None}
    joints = (full.joints_3d[0] + full.pelvis[0]).numpy()
    valid = np.ones(24, bool)
    records = [
        dataclasses.replace(whole[0], **keep),  # 2D keypoints from the camera
        dataclasses.replace(whole[1], intrinsics=None),  # a camera fitted to the 2D keypoints
        dataclasses.replace(whole[2], **no_body),  # 2D only
        dataclasses.replace(whole[0], **no_body, **keep, joints_3d=joints, joints_3d_valid=valid, joint_names=SMPL24),
    ]
    sample = recorded(records, heatmaps="none", full_mesh=False).block("val", 0)
    torch.testing.assert_close(sample.joints_2d[0], full.joints_2d[0], rtol=0, atol=1e-5)
    assert (sample.joints_2d_confidence[0] == 1).all()
    assert sample.has_perspective.tolist() == [True, False, False, True]  # the last has joints in the camera frame
    torch.testing.assert_close(sample.pelvis[3], full.pelvis[0], rtol=0, atol=1e-5)
    assert sample.has_camera.tolist() == [True, True, False, True]
    torch.testing.assert_close(sample.camera[1], full.camera[1], rtol=0.1, atol=0.05)
    assert sample.has_vertices.tolist() == [True, True, False, False]
    assert sample.has_joints_3d.tolist() == [True, True, False, True]
    torch.testing.assert_close(sample.joints_3d[3], full.joints_3d[0], rtol=0, atol=1e-5)
    named = [name in SMPL24 for name in HALPE26]
    assert sample.has_keypoints_3d[2:].tolist() == [[False] * 26, named]
    assert (sample.joints_2d_confidence[3] > 0).tolist() == named  # projected where no 2D keypoints are labelled
    at = [SMPL24.index(name) for name in HALPE26 if name in SMPL24]
    camera = (sample.focal[3], sample.principal_point[3])
    seen = perspective_projection((full.joints_3d[0, at] + full.pelvis[0])[None], camera[0][None], camera[1][None])[0]
    torch.testing.assert_close(sample.joints_2d[3, named], seen, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"row 2: no body is labelled, so split 'val' cannot be evaluated on it"):
        recorded(records).block("val", 0)


def test_heatmaps(tmp_path: Path) -> None:
    records = make_records(tmp_path, 4, photos=False)
    confidence = np.ones(26)
    confidence[5] = 0
    records[0] = dataclasses.replace(records[0], keypoints_2d_confidence=confidence)
    sample = recorded(records).block("val", 0)
    assert not sample.heatmap_valid[0, 5] and (sample.heatmaps[0, 5] == 0).all()
    assert sample.heatmaps.amax((-1, -2))[1:].amax(1).gt(0.2).all()
    exact = recorded(records, heatmaps="labels").block("val", 0)
    assert not torch.equal(sample.heatmaps, exact.heatmaps) and exact.heatmap_valid.sum() == 4 * 26 - 1
    assert recorded(records, heatmaps="none").block("val", 0).heatmaps is None
    with pytest.raises(UserError, match=r"heatmaps 'made': faults, labels, none or a folder of NAME.npz is exp"):
        recorded(records, heatmaps="made")


def test_an_estimators_heatmaps_follow_the_crop(tmp_path: Path) -> None:
    """Heatmaps of the photo's crop, resampled, match heatmaps of the augmented labels."""
    records = make_records(tmp_path, 4, photos=False)
    made = recorded(records, heatmaps="labels").block("val", 0)
    for row, record in enumerate(records):
        path = tmp_path / "maps" / f"{record.name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = np.array(HALPE26)
        np.savez(path, heatmaps=made.heatmaps[row].numpy(), joints=names, center=record.center, side=record.side)
    read = recorded(records, heatmaps=tmp_path / "maps").block("val", 0)
    torch.testing.assert_close(read.heatmaps, made.heatmaps, rtol=0, atol=1e-4)
    same_size = Augment(flip=0.5, upright=0, scale=0)
    for number in range(2):
        given, drawn = (
            recorded(records, heatmaps=kind, augment=same_size).block("train", number)
            for kind in (tmp_path / "maps", "labels")
        )
        assert (given.heatmaps - drawn.heatmaps).abs().mean() < 2e-3 < drawn.heatmaps.abs().mean() * 2
        assert (given.heatmaps * drawn.heatmaps).sum() > 0.95 * drawn.heatmaps.square().sum() * 0.95
    (tmp_path / "maps" / f"{records[2].name}.npz").unlink()
    with pytest.raises(UserError, match=r"row 2: its heatmaps .*002.npz are missing"):
        recorded(records, heatmaps=tmp_path / "maps").block("val", 0)


def test_bodies_that_do_not_fit_are_named(tmp_path: Path) -> None:
    records = make_records(tmp_path, 4, photos=False)
    with pytest.raises(UserError, match=r"row 0: its labels are of the body 'smpl', and the model's is 'free'; giv"):
        recorded(records, same_body=False).block("val", 0)
    long = dataclasses.replace(records[1], pose=np.zeros((55, 3)))
    with pytest.raises(UserError, match=r"body 'free': a pose of 55 joints for its 24"):
        recorded([long]).block("val", 0)
    mesh = dataclasses.replace(records[1], pose=None, betas=None, vertices=np.zeros((778, 3)))
    with pytest.raises(UserError, match=r"row 1: a mesh of 778 vertices, and the model's body 'free' has 12410"):
        recorded([mesh]).block("val", 0)
    with pytest.raises(UserError, match=r"row 1: it has no picture, and the model reads pictures"):
        recorded(records[1:2], image_size=32).block("val", 0)


def test_meshes_that_are_given_directly(tmp_path: Path) -> None:
    records = make_records(tmp_path, 4, photos=False)
    full = recorded(records, heatmaps="none").block("val", 0)
    meshes = [
        dataclasses.replace(record, pose=None, betas=None, translation=None, vertices=(v + p).numpy())
        for record, v, p in zip(records, full.vertices, full.pelvis, strict=True)
    ]
    sample = recorded(meshes, heatmaps="none").block("val", 0)
    # Their root is regressed from the posed mesh, some millimetres from the joint; its position is exact.
    torch.testing.assert_close(
        sample.vertices + sample.pelvis[:, None], full.vertices + full.pelvis[:, None], rtol=0, atol=1e-5
    )
    assert (sample.pelvis - full.pelvis).norm(dim=-1).median() < 0.02
    assert (sample.joints_3d[:, 0] == 0).all()
    turned = recorded(meshes, heatmaps="none", augment=WILD).block("train", 0)
    seen = perspective_projection(turned.keypoints_3d + turned.pelvis[:, None], turned.focal, turned.principal_point)
    torch.testing.assert_close(seen, turned.joints_2d, rtol=0, atol=1e-4)  # meshes are never mirrored


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_shares_are_exact_and_spread() -> None:
    for weights in ([1.0], [1, 1], [3, 1], [0.7, 0.2, 0.1], [1000, 1, 1]):
        order = schedule(weights)
        share = np.array(weights) / sum(weights)
        counts = np.stack([np.cumsum(order == source) for source in range(len(weights))])
        np.testing.assert_allclose(counts[:, -1], PERIOD * share, atol=1)
        assert (counts[:, -1] >= 1).all()
        behind = np.abs(counts - counts[:, -1:] / PERIOD * np.arange(1, PERIOD + 1))
        assert behind.max() <= len(weights)  # at most that many blocks behind its weight
    assert schedule([1, 1])[:6].tolist() == [0, 1, 0, 1, 0, 1]


def test_every_source_gives_its_blocks_one_after_the_other() -> None:
    mixture = Mixture([people(), people()], [3, 1])
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number in range(2 * PERIOD + 10):
        source, own = mixture.source_of(number)
        seen[source].append(own)
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())
    assert Counter({source: len(numbers) for source, numbers in seen.items()})[1] == pytest.approx(502, abs=2)
    source, own = mixture.source_of(7)
    assert equal(mixture.block("train", 7), people().block("train", own)) and source in (0, 1)


def test_mixtures_that_cannot_be() -> None:
    for weights in ([1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(UserError, match=r"weights \[1, .*\]: numbers above 0 are expected"):
            Mixture([people(), people()], weights)
    with pytest.raises(UserError, match="a mixture of 0 sources with 0 weights"):
        Mixture([], [])
    with pytest.raises(UserError, match=r"the sources of a mixture differ in block_size: \['4', '8'\]"):
        Mixture([people(), people(False, 4)], [1, 1])
    with pytest.raises(UserError, match=r"split 'test' is not there \(val\); give data.splits.test"):
        NamedSplits(people(), {"val": people()}).block("test", 0)


def test_missing_labels_are_marked() -> None:
    one = Sample(
        heatmaps=torch.rand(2, 26, 4, 4),
        heatmap_valid=torch.ones(2, 26).bool(),
        coarse_vertices=torch.rand(2, 5, 3),
        camera=torch.rand(2, 3),
        silhouette=torch.rand(2, 8, 8),
        index=torch.arange(2),
    )
    other = Sample(
        heatmaps=torch.rand(1, 26, 4, 4),
        heatmap_valid=torch.zeros(1, 26).bool(),
        joints_2d=torch.rand(1, 26, 2),
        joints_2d_confidence=torch.rand(1, 26),
        keypoints_3d=torch.rand(1, 26, 3),
        index=torch.arange(1),
    )
    both = concatenate([one, other])
    assert both.has_vertices.tolist() == both.has_camera.tolist() == both.has_silhouette.tolist() == [True, True, False]
    assert both.has_keypoints_3d.tolist() == [[False] * 26] * 2 + [[True] * 26]
    assert torch.equal(both.joints_2d_confidence[2:], other.joints_2d_confidence)
    assert (both.joints_2d_confidence[:2] == 0).all() and (both.camera[2] == 0).all()
    assert torch.equal(both.coarse_vertices[:2], one.coarse_vertices) and both.vertices is None
    assert equal(concatenate([one, one]).map(lambda tensor: tensor[:2]), one)  # no mask where none is needed
    swapped = concatenate([other, one])
    assert swapped.has_camera.tolist() == [False, True, True]
    for name, mask in MASKS.items():
        assert {name, mask} <= {field.name for field in dataclasses.fields(Sample)}


def test_what_cannot_be_concatenated() -> None:
    image, none = Sample(image=torch.rand(1, 3, 4, 4), index=torch.arange(1)), Sample(index=torch.arange(1))
    with pytest.raises(ValueError, match="field 'image' is there in 1 of 2 batches"):
        concatenate([image, none])
    whole = Sample(vertices=torch.rand(1, 9, 3), coarse_vertices=torch.rand(1, 3, 3), has_vertices=torch.ones(1).bool())
    coarse = dataclasses.replace(whole, vertices=None)
    with pytest.raises(ValueError, match="'has_vertices' says that 'vertices' is there, and it is not"):
        concatenate([whole, coarse])


def test_silenced_is_zero_exactly_where_it_is_masked() -> None:
    camera = torch.tensor([[1.0, 2, 3], [float("nan")] * 3])
    sample = Sample(camera=camera, has_camera=torch.tensor([True, False]), pelvis=torch.ones(2, 3))
    quiet = sample.zero_unlabelled()
    assert quiet.camera.tolist() == [[1, 2, 3], [0, 0, 0]] and quiet.pelvis is sample.pelvis


# -- a missing label never contributes -------------------------------------------------------------------------------

EVERY_TERM = LossConfig(edges=0.3, camera=0.4, joints=0.7)


def small_parts(config: Config) -> tuple[Any, Any, MeshSampler]:
    body, mesh = free_body()
    model = build_model(config, body, mesh)
    awaken(model)
    return model, build_scheduler(config), mesh


def marked(sample: Sample, rows: dict[str, list[bool]]) -> Sample:
    """The sample with the given masks."""
    masks: dict[str, Tensor] = {name: torch.tensor(row) for name, row in rows.items()}
    if "has_keypoints_3d" in masks:
        masks["has_keypoints_3d"] = masks["has_keypoints_3d"][:, None].expand(-1, 26)
    if "joints_2d_confidence" in masks:
        masks["joints_2d_confidence"] = masks["joints_2d_confidence"][:, None].float().expand(-1, 26)
    return dataclasses.replace(sample, **masks)


def with_garbage(sample: Sample, value: float) -> Sample:
    """The sample with `value` in every masked label; the network's inputs are kept."""
    changed = {}
    for name, mask_name in MASKS.items():
        field, mask = getattr(sample, name), getattr(sample, mask_name)
        if field is not None and mask is not None and field.is_floating_point() and name not in ("heatmaps", "peaks"):
            there = (mask > 0).reshape(*mask.shape, *(1,) * (field.dim() - mask.dim()))
            changed[name] = torch.where(there, field, value)
    return dataclasses.replace(sample, **changed)


@pytest.mark.parametrize("mode", ["diffusion", "direct"])
@pytest.mark.parametrize("kind", ["sample", "epsilon"])
def test_garbage_in_a_masked_label_changes_nothing(mode: str, kind: str) -> None:
    """NaN, infinity or a large number affects neither the loss nor any gradient through the network."""
    if mode == "direct" and kind == "epsilon":
        pytest.skip("the direct baseline predicts no noise")
    config = small_config("unused", f"model.mode={mode}", f"diffusion.prediction_type={kind}")
    model, scheduler, _ = small_parts(config)
    sample = marked(
        people(False, 4).block("train", 0),
        {
            "has_vertices": [True, False, True, False],
            "has_joints_3d": [True, True, False, False],
            "has_camera": [True, False, False, True],
            "has_keypoints_3d": [True, True, False, True],
            "joints_2d_confidence": [True, False, True, True],
            "has_perspective": [False, True, True, True],
        },
    )
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(200, (4, 2), generator=generator)
    noise = torch.randn(4, 2, model.num_points, 3, generator=generator)
    edges = torch.stack([torch.arange(20), torch.arange(1, 21)], 1)
    found = []
    for value in (0.0, float("nan"), float("inf"), 1e4):
        model.zero_grad()
        given = with_garbage(sample, value)
        assert value == 0 or not torch.equal(given.camera, sample.camera)
        terms = training_losses(model, scheduler, EVERY_TERM, given, Draws(steps, noise), edges)
        terms["loss"].backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((terms, gradients))
    for terms, gradients in found[1:]:
        assert all(torch.equal(terms[name], found[0][0][name]) and terms[name].isfinite() for name in terms)
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(gradients, found[0][1], strict=True))


def test_a_label_counts_where_it_is_there() -> None:
    """A counterpart to the test above, which would also pass if no label counted: unmasked labels change the loss."""
    config = small_config()
    model, scheduler, _ = small_parts(config)
    rows = {"has_vertices": [True, False, True, False], "has_joints_3d": [True, True, False, False]}
    sample = marked(people(False, 4).block("train", 0), rows)
    steps, noise = torch.full((4, 2), 100), torch.randn(4, 2, model.num_points, 3)

    def points(given: Sample) -> Tensor:
        return training_losses(model, scheduler, EVERY_TERM, given, Draws(steps, noise))["points"]

    plain = points(sample)
    for row in range(4):
        for name, mask in (("coarse_vertices", "has_vertices"), ("joints_3d", "has_joints_3d")):
            field = getattr(sample, name).clone()
            field[row] += 0.1
            counts = bool(getattr(sample, mask)[row])
            assert torch.equal(points(dataclasses.replace(sample, **{name: field})), plain) is not counts


def test_a_term_of_a_mixture_is_the_mean_over_the_parts_that_have_its_label(tmp_path: Path) -> None:
    """Each part with its own labels; concatenated with zeros and masks in the gaps."""
    config = small_config("unused", "data.block_size=4")
    model, scheduler, _ = small_parts(config)
    whole = make_records(tmp_path, 4, photos=False)
    flat = [dataclasses.replace(record, pose=None, betas=None, translation=None, body="smpl") for record in whole]
    drawn = build_data(small_config("unused", "data.block_size=4", "data.kind=mixture"), *free_body())
    synthetic = dataclasses.replace(drawn.block("train", 0), has_joints_3d=None, has_vertices=None)
    parts = [
        synthetic,  # no masks
        recorded(whole, full_mesh=False).block("train", 0),
        recorded(flat, full_mesh=False).block("train", 1),
        dataclasses.replace(drawn.block("train", 2), camera=None),  # its keypoints determine the camera
    ]
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randint(200, (4, 2), generator=generator) for _ in parts]
    noise = [torch.randn(4, 2, model.num_points, 3, generator=generator) for _ in parts]
    edges = torch.stack([torch.arange(20), torch.arange(1, 21)], 1)

    def losses(sample: Sample, k: Tensor, e: Tensor) -> dict[str, Tensor]:
        return training_losses(model, scheduler, EVERY_TERM, sample, Draws(k, e), edges)

    each = [losses(*given) for given in zip(parts, steps, noise, strict=True)]
    together = losses(concatenate(parts), torch.cat(steps), torch.cat(noise))
    assert each[2]["points"] == 0 and each[2]["camera"] == 0 and each[0]["points"] > 0 and each[3]["camera"] > 0
    for name in together.keys() - {"loss"}:
        labelled = [part[name] for part in each if part[name] != 0]
        torch.testing.assert_close(together[name], torch.stack(labelled).mean(), msg=name)


def test_objective_takes_masks_of_one_kind_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    prediction = torch.randn(2, 1, 5, 3, generator=generator, requires_grad=True)
    given: dict[str, Any] = {
        "prediction": prediction,
        "target": torch.randn(2, 1, 5, 3, generator=generator),
        "clean": prediction,
        "truth": torch.zeros(2, 1, 5, 3),
        "level_weight": torch.ones(2, 1),
        "share": torch.ones(2, 1),
        "camera": torch.ones(2, 3),
        "num_coarse": 3,
    }
    sample = Sample(has_joints_3d=torch.tensor([True, False]))
    objective(LossConfig(camera=0), sample, **given)["loss"].backward()
    assert (prediction.grad[1, :, 3:] == 0).all() and (prediction.grad[1, :, :3] != 0).all()
    assert (prediction.grad[0] != 0).all()


# -- the config ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A prepared data set with images, and one of only 2D keypoints."""
    tmp_path = tmp_path_factory.mktemp("prepared")
    whole = make_records(tmp_path, 6)
    flat = [dataclasses.replace(record, pose=None, betas=None, translation=None) for record in whole]
    for name, records in (("whole", whole), ("flat", flat)):
        prepare_dataset(ListReader(records), tmp_path / name, shard_records=4)
    return str(tmp_path / "whole"), str(tmp_path / "flat")


def mixed(folders: tuple[str, str], output: Path, *overrides: str) -> Config:
    whole, flat = folders
    config = small_config(
        output,
        "data.kind=mixture",
        "training.steps=3",
        "training.evaluate_every=3",
        "training.checkpoint_every=3",
        "training.warmup_steps=1",
        "training.picture_every=9",
        *overrides,
    )
    config.data.sources = [
        "synthetic",
        {"path": whole, "weight": 2, "same_body": True},
        {"path": flat, "weight": 1, "same_body": True},
    ]
    config.data.splits = {"val": {"path": whole, "same_body": True, "groups": ["sequence_1", "sequence_2"]}}
    return config


@pytest.mark.slow
def test_a_mixture_trains_together(tmp_path: Path, folders: tuple[str, str]) -> None:
    """Synthetic people, recorded bodies and 2D keypoints in one run, with two blocks a batch."""
    options = (
        "training.batch_size=8",
        "model.inputs=both",
        "model.image_size=32",
        "model.backbone=resnet18",
        "model.pretrained=false",
        "training.threads=1",
    )
    body, mesh = free_body()
    config = mixed(folders, tmp_path / "run", *options)
    stream = TrainingStream(build_source(config, body, mesh), config, 0, 1, build_model(config, body, mesh))
    sample = stream[0][0]
    assert sample.image.shape == (8, 3, 32, 32) and len(sample.has_vertices) == 8
    result = Trainer(config).run()
    assert np.isfinite(result["errors"]["pve"]["mean"]["value"]) and result["people"] == 2
    log = (tmp_path / "run" / "log.csv").read_text()
    assert "nan" not in log and "points" in log


def test_a_recorded_data_set_trains_alone(tmp_path: Path, folders: tuple[str, str]) -> None:
    config = mixed(folders, tmp_path / "run", "data.kind=recorded", "data.augment.flip=0")
    config.data.sources = config.data.sources[1:2]
    body, mesh = free_body()
    data = build_source(config, body, mesh, full_mesh=True)
    assert data.block("train", 0).vertices.shape == (4, body.num_vertices, 3)
    assert len(data.block("val", 0)) == 4 and data.image_size is None


def test_sources_that_cannot_be_are_named(tmp_path: Path, folders: tuple[str, str]) -> None:
    body, mesh = free_body()

    def fails(message: str, full_mesh: bool = False, *overrides: str, **changed: Any) -> None:
        config = mixed(folders, tmp_path / "run", *overrides)
        for name, value in changed.items():
            setattr(config.data, name, value)
        with pytest.raises(UserError, match=message):
            build_source(config, body, mesh, full_mesh)

    whole = folders[0]
    fails("data.kind 'real' is not known; choose one of synthetic, recorded, mixture", kind="real")
    fails("data.sources and data.splits are of data.kind recorded and mixture", kind="synthetic")
    fails("data.kind recorded takes one source, data.sources has 3; give mixture", kind="recorded")
    fails("a mixture of 0 sources", sources=[])
    fails(r"data.sources\[0\]: there is no key 'pth'; did you mean 'path'", sources=[{"pth": whole}])
    fails(r"data.sources\[0\]: 3; a prepared folder is expected", sources=[3])
    fails(r"data.sources\[0\]: give path, a folder that hmdiff prepare wrote, or kind", sources=[{"weight": 1}])
    fails("data.sources: weights .*'much'", sources=[{"path": whole, "weight": "much"}])
    fails("weights .*: numbers above 0", sources=[{"path": whole, "weight": 0}])
    fails("not a prepared data set", sources=[str(tmp_path)])
    fails("no group is 'nowhere'", sources=[{"path": whole, "groups": ["nowhere"]}])
    fails("data.splits.val is missing: give a folder", True, splits={})
    fails(
        "data.splits.test is missing: .* or evaluation.test_people=0",
        True,
        "evaluation.test_people=3",
        splits={"val": "synthetic"},
    )
    fails("data.splits.val has 4 people, and evaluation.people is 5; give fewer", True, "evaluation.people=5")


def test_the_mean_mesh_is_of_those_who_have_one(tmp_path: Path) -> None:
    whole = make_records(tmp_path, 4, photos=False)
    flat = [dataclasses.replace(record, pose=None, betas=None, translation=None) for record in whole]
    options = {"augment": PLAIN, "heatmaps": "none"}
    both = Mixture([recorded(flat, **options), recorded(whole, **options)], [1, 1])
    expected = recorded(whole, **options).block("train", 0).vertices.mean(0)
    torch.testing.assert_close(_mean_person(both, 8, "train")[0], expected)
