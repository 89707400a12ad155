"""From published files to samples: prepared shards reproduce the values of a stand-in data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import standin_tables as tables
import standins as s
import torch
from records import make_records
from small import free_body

from hmdiff.body.body import Body, load_body
from hmdiff.body.skeletons import HALPE26, HAND21
from hmdiff.config import Augment
from hmdiff.data.labelled_bodies import LabelledBodies
from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.readers import open_reader
from hmdiff.data.record import Record
from hmdiff.data.recorded import RecordedPeople
from hmdiff.data.sample import Sample
from hmdiff.data.shards import PreparedShards, RecordFiles
from hmdiff.errors import UserError
from hmdiff.geometry import perspective_projection

TURNED = Augment(flip=0.5, noise=0, upright=0)


@pytest.fixture
def bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = s.licensed_folder(tmp_path / "bodies")
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(folder))
    return folder


def samples(
    folder: Path, name: str, split: str | None, body: Body, coarse: torch.Tensor, same_body: bool = False
) -> tuple[Sample, Sample, list[str]]:
    """The whole data set as a split, as many people of the augmented stream, and the records' names."""
    prepare_dataset(open_reader(name, folder / "raw", split), folder / "out", shard_records=2)
    shards = PreparedShards(folder / "out")
    data = RecordedPeople(
        shards, body, coarse, len(shards), full_mesh=True, image_size=32, augment=TURNED, same_body=same_body
    )
    return data.block("val", 0), data.block("train", 0), [shards[number].record.name for number in range(len(shards))]


def agrees(sample: Sample, tolerance: float, of: Sequence[int] | None = None) -> None:
    """Labelled 2D keypoints match the projected body."""
    seen = perspective_projection(sample.keypoints_3d + sample.pelvis[:, None], sample.focal, sample.principal_point)
    there = (sample.joints_2d_confidence > 0) & sample.has_keypoints_3d
    if of is not None:
        there &= torch.isin(torch.arange(there.shape[1]), torch.tensor(of))
    assert there.any(-1).all() and (seen - sample.joints_2d)[there].abs().max() < tolerance


def test_3dpw(tmp_path: Path) -> None:
    truths = s.make_3dpw(tmp_path / "raw")
    body, mesh = free_body()
    sample, turned, names = samples(tmp_path, "3dpw", "all", body, mesh.coarse_ids, same_body=True)
    assert set(names) == set(truths) and sample.image.shape == (len(names), 3, 32, 32)
    for row, name in enumerate(names):
        truth, found = truths[name], sample.joints_3d[row] + sample.pelvis[row]
        np.testing.assert_allclose(found.numpy(), truth.joints, atol=1e-4)
        support = sample.vertices[row, body.keypoint_support()] + sample.pelvis[row]
        np.testing.assert_allclose(support.numpy(), truth.vertices, atol=1e-4)
    # fx and fy differ by 1 % in the stand-in, but a crop's camera has one focal length.
    agrees(sample, 0.02)
    agrees(turned, 0.02)


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_freihand(tmp_path: Path, bodies: Path, split: str) -> None:
    hand = load_body("mano")
    truths = s.make_freihand(tmp_path / "raw", load_body("mano"), rows=2)
    sample, turned, names = samples(tmp_path, "freihand", split, hand, torch.arange(40))
    assert len(names) == (8 if split == "training" else 2)
    for row, name in enumerate(names):
        found = sample.vertices[row] + sample.pelvis[row]
        np.testing.assert_allclose(found.numpy(), truths[name].vertices, atol=1e-4)
    assert sample.keypoints_3d.shape[1:] == (21, 3) and sample.heatmaps is None
    # Augmented but never mirrored. Only fingertips are single vertices; no regressor gives the other joints exactly.
    tips = [HAND21.index(name) for name in ("thumb4", "index4", "middle4", "ring4", "pinky4")]
    agrees(sample, 1e-4, tips)
    agrees(turned, 1e-4, tips)


def test_a_left_hand_is_mirrored_to_the_models_side(tmp_path: Path, bodies: Path) -> None:
    """A left hand's labels become those of its mirror image, a right hand, and its image is mirrored too."""
    hand = load_body("mano")
    pose, betas = 0.2 * np.random.default_rng(1).normal(size=(16, 3)), np.zeros(10)
    right = Record("right", np.array([50.0, 50]), 80.0, "row 0", body="mano", hand="right", pose=pose, betas=betas)
    left = Record("left", right.center, 80.0, "row 1", body="mano", hand="left", pose=pose * [1, -1, -1], betas=betas)
    data = RecordedPeople(RecordFiles([right, left]), hand, torch.arange(40), 2, full_mesh=True)
    sample = data.block("val", 0)
    # MANO's mean pose is added to both labels.
    torch.testing.assert_close(sample.vertices[1], sample.vertices[0], rtol=0, atol=1e-5)


def test_bedlam(tmp_path: Path, bodies: Path) -> None:
    body = load_body("smplx")
    truths = tables.make_bedlam(tmp_path / "raw", body)
    body = load_body("smplx")
    sample, _, names = samples(tmp_path, "bedlam", None, body, torch.arange(20))
    assert set(names) == set(truths)
    for row, name in enumerate(names):
        found = sample.vertices[row] + sample.pelvis[row]
        np.testing.assert_allclose(found.numpy(), truths[name].vertices, atol=1e-4)


def test_coco_has_no_third_dimension(tmp_path: Path) -> None:
    tables.make_coco(tmp_path / "raw")
    body, mesh = free_body()
    prepare_dataset(open_reader("coco", tmp_path / "raw"), tmp_path / "out")
    shards = PreparedShards(tmp_path / "out")
    sample = RecordedPeople(shards, body, mesh.coarse_ids, len(shards)).block("train", 0)
    assert not sample.has_vertices.any() and not sample.has_camera.any() and not sample.has_keypoints_3d.any()
    assert (sample.joints_2d_confidence > 0).any(-1).all() and sample.heatmaps.amax((1, 2, 3)).gt(0).all()


@pytest.mark.parametrize("stream", ["val", "train"])
def test_joints_without_a_body_are_placed_before_their_camera(tmp_path: Path, stream: str) -> None:
    """Joints in the camera frame locate the root even without a pose label; 2D labels, or joints, match."""
    body, mesh = free_body()
    records = make_records(tmp_path, 4, photos=False)
    posed = RecordedPeople(
        RecordFiles(records), body, mesh.coarse_ids, 4, augment=TURNED, heatmaps="none", same_body=True
    ).block(stream, 0)
    names = (*HALPE26, "pelvis")
    bare = []
    for number, record in enumerate(records):
        whole = RecordedPeople(RecordFiles([record]), body, mesh.coarse_ids, 1, heatmaps="none", same_body=True).block(
            "val", 0
        )
        joints = torch.cat([whole.keypoints_3d[0] + whole.pelvis[0], whole.pelvis]).double().numpy()
        unseen = {"keypoints_2d": None, "keypoints_2d_confidence": None, "keypoint_names": ()} if number == 3 else {}
        bare.append(
            dataclasses.replace(
                record, pose=None, betas=None, translation=None, joints_3d=joints, joint_names=names, **unseen
            )
        )
    people = RecordedPeople(RecordFiles(bare), body, mesh.coarse_ids, 4, augment=TURNED, heatmaps="none")
    sample = people.block(stream, 0)
    assert sample.has_perspective.all() and sample.has_camera.all() and not sample.has_vertices.any()
    for field in ("pelvis", "keypoints_3d", "focal", "principal_point", "joints_2d"):
        torch.testing.assert_close(getattr(sample, field), getattr(posed, field), rtol=1e-4, atol=1e-4, msg=field)
    agrees(sample, 1e-3)
    # Joints relative to the pelvis have no position.
    relative = [dataclasses.replace(r, joints_3d=r.joints_3d - r.joints_3d[-1:]) for r in bare]  # type: ignore[operator]
    nowhere = RecordedPeople(RecordFiles(relative), body, mesh.coarse_ids, 4, heatmaps="none").block("val", 0)
    assert not nowhere.has_perspective.any() and nowhere.has_keypoints_3d.all()


def test_gendered_bodies(tmp_path: Path, bodies: Path) -> None:
    """A female record of a neutral model is posed by the female body; a missing file is named."""
    neutral = load_body("smplx")
    record = Record(
        "one", np.zeros(2), 9.0, "row 5", body="smplx", gender="female", pose=np.zeros((22, 3)), betas=np.ones(11)
    )
    posing = LabelledBodies(neutral, torch.arange(9), full_mesh=True)
    assert posing.body_name(record) == "smplx_female"
    with pytest.raises(UserError, match=r"SMPLX_FEMALE.npz not found"):
        posing.pose("smplx_female", [record.pose], [record.betas])
    arrays = s.body_arrays(90, s.SMPLX_PARENTS, scale=0.7)
    np.savez(bodies / "SMPLX_FEMALE.npz", **arrays)
    posed = posing.pose("smplx_female", [record.pose], [record.betas])  # 33 joints at rest, the eleventh beta dropped
    shaped = arrays["v_template"] + arrays["shapedirs"].sum(-1)
    np.testing.assert_allclose((posed.vertices[0] + posed.root[0]).numpy(), shaped, atol=1e-5)
    np.savez(bodies / "SMPLX_MALE.npz", **s.body_arrays(80, s.SMPLX_PARENTS, scale=0.7))
    with pytest.raises(UserError, match=r"body 'smplx_male' has 80 vertices, the model's 'smplx' 90: labels of one"):
        posing.pose("smplx_male", [record.pose], [record.betas])
