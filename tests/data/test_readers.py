"""The readers on stand-ins in the published formats: bodies, joints and projections are recovered; faults are named."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import standin_tables as tables
import standins as s

from hmdiff.body.body import Body, load_body
from hmdiff.body.skeletons import COCO17, H36M17, HALPE26, J14, SMPL24, SPIN24, joint_indices
from hmdiff.data.readers import READERS, open_reader
from hmdiff.data.readers import splits as parts
from hmdiff.data.readers.lens import Lens, fit_pinhole
from hmdiff.data.record import Record
from hmdiff.errors import UserError


def _records(name: str, folder: Path, split: str | None = None) -> dict[str, Record]:
    reader = open_reader(name, folder, split)
    records = list(reader.records())
    assert reader.count() == len(records) and reader.summary
    found = {record.name: record for record in records}
    assert len(found) == len(records)  # names are unique
    return found


def _mesh(record: Record, body: Body, mean_pose: bool = False) -> np.ndarray:
    """The mesh of the record's pose, shape and translation in its camera frame."""
    assert record.pose is not None and record.betas is not None and record.translation is not None
    pose = record.pose
    if mean_pose and body.mean_pose is not None:
        pose = pose + body.mean_pose.double().numpy()
    return s.posed(body, pose, record.betas[: body.num_betas], record.translation)[0]


def _check_projection(record: Record, limit: float = 0.5) -> None:
    """3D joints that are also 2D keypoints project onto them with the record's camera."""
    assert record.joints_3d is not None and record.keypoints_2d is not None and record.intrinsics is not None
    shared = [name for name in record.joint_names if name in record.keypoint_names]
    assert len(shared) > 10
    seen = s.project(record.joints_3d[joint_indices(shared, record.joint_names)], record.intrinsics)
    given = record.keypoints_2d[joint_indices(shared, record.keypoint_names)]
    assert np.abs(seen - given).max() < limit


@pytest.fixture
def licensed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = s.licensed_folder(tmp_path / "bodies")
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(folder))
    return folder


@pytest.fixture
def unlicensed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMDIFF_BODY_DIR", raising=False)


# The registry.


def test_every_reader_is_there_and_the_command_offers_it() -> None:
    for entry in READERS.values():
        module, function = entry.function.split(":")
        assert callable(getattr(__import__(f"hmdiff.data.readers.{module}", fromlist=[function]), function))
        assert entry.needs


def test_unknown_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data set '3dwp' has no reader; the nearest is '3dpw'"):
        open_reader("3dwp", tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such folder; coco is read from a folder with annotations/person"):
        open_reader("coco", tmp_path / "nowhere")
    with pytest.raises(UserError, match="split 'tset' of 3dpw is not known; choose one of test, train, validation"):
        open_reader("3dpw", tmp_path, "tset")


# 3DPW.


def test_3dpw_gives_the_bodies_before_their_cameras(tmp_path: Path) -> None:
    truths = s.make_3dpw(tmp_path)
    records = _records("3dpw", tmp_path, "all")
    assert set(records) == set(truths)
    for name, record in records.items():
        truth = truths[name]
        np.testing.assert_allclose(_mesh(record, s.small_free_body()), truth.vertices, atol=1e-6)
        np.testing.assert_allclose(record.joints_3d, truth.joints, atol=1e-9)
        assert record.joint_names == SMPL24 and record.body == "smpl"
        assert record.gender == ("male", "female")[int(name[-1])]
        seen = s.project(_halpe(record, s.small_free_body()), record.intrinsics)
        there = record.keypoints_2d_confidence > 0
        rows = joint_indices([n for n, t in zip(record.keypoint_names, there, strict=True) if t], HALPE26)
        assert there.sum() == 17 and np.abs(seen[rows] - record.keypoints_2d[there]).max() < 0.5
        # The box: around the keypoints with confidence, times 1.2.
        low, high = record.keypoints_2d[there].min(0), record.keypoints_2d[there].max(0)
        np.testing.assert_allclose(record.center, (low + high) / 2)
        assert record.side == pytest.approx(1.2 * (high - low).max())
        assert record.image.name == f"image_{int(name.split('/')[2]):05d}.jpg"  # by position, not by img_frame_ids


def _halpe(record: Record, body: Body) -> np.ndarray:
    import torch

    return body.keypoints(torch.from_numpy(_mesh(record, body))).numpy()


def test_3dpw_leaves_out_frames_without_a_valid_camera(tmp_path: Path) -> None:
    s.make_3dpw(tmp_path, frames=4, first=1)
    names = set(_records("3dpw", tmp_path, "test"))
    assert names == {f"3dpw/downtown_bus_00/0000{f}/{p}" for f, p in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1))}


def test_3dpw_without_joint_positions_has_no_translation(tmp_path: Path) -> None:
    s.make_3dpw(tmp_path)
    path = tmp_path / "sequenceFiles/test/downtown_bus_00.pkl"
    data = pickle.loads(path.read_bytes(), encoding="latin1")
    data["jointPositions"] = [joints + np.linspace(0, 9, 3)[:, None] for joints in data["jointPositions"]]
    s.write_python2_pickle(path, data)
    record = next(iter(_records("3dpw", tmp_path).values()))
    assert record.translation is None and record.joints_3d is not None  # they are inconsistent with this trans
    del data["jointPositions"]
    s.write_python2_pickle(path, data)
    record = next(iter(_records("3dpw", tmp_path).values()))
    assert record.translation is None and record.joints_3d is None and record.pose is not None


def test_3dpw_keypoints_that_nobody_has_leave_the_row_out(tmp_path: Path) -> None:
    s.make_3dpw(tmp_path)
    path = tmp_path / "sequenceFiles/test/downtown_bus_00.pkl"
    data = pickle.loads(path.read_bytes(), encoding="latin1")
    data["poses2d"][0][1] = 0
    s.write_python2_pickle(path, data)
    reader = open_reader("3dpw", tmp_path)
    assert reader.count() == len(list(reader.records())) == 4
    assert any(line.startswith("1 people without any 2D keypoint") for line in reader.summary)


def test_named_parts_of_3dpw_take_their_sequences_and_frames() -> None:
    assert len(parts.OC_SEQUENCES) == 17 and len(parts.PC_FRAMES) == 6
    taken = [frame for frame in range(3000) if parts.has_frame("3dpw_pc", "downtown_bus_00", frame)]
    assert taken == list(range(1620, 1900))  # as in ROMP: the end is exclusive
    assert sum(end - first for first, end in parts.PC_FRAMES.values()) == 1380
    assert parts.has_sequence("3dpw_oc", "courtyard_basketball_01")
    assert parts.has_sequence("3dpw_oc", "outdoors_slalom_00")
    assert not parts.has_sequence("3dpw_oc", "courtyard_basketballs_00")
    assert not parts.has_sequence("3dpw_oc", "downtown_bus_00")
    assert parts.SPLITS_OF["3dpw_crowd"] == ("validation",)
    assert parts.has_frame("3dpw_crowd", "courtyard_hug_00", 0)
    assert not parts.has_frame("3dpw_crowd", "courtyard_hug_01", 0)


def test_named_parts_of_3dpw_are_read_from_all_their_splits(tmp_path: Path) -> None:
    sequences = (
        ("train", "courtyard_golf_00"),
        ("test", "downtown_stairs_00"),
        ("validation", "courtyard_dancing_00"),
        ("test", "downtown_cafe_00"),
    )
    s.make_3dpw(tmp_path, sequences, frames=1)
    assert {r.group for r in _records("3dpw_oc", tmp_path).values()} == {"courtyard_golf_00", "downtown_stairs_00"}
    assert {r.group for r in _records("3dpw_crowd", tmp_path).values()} == {"courtyard_dancing_00"}
    assert not _records("3dpw_pc", tmp_path)  # frame 0 is before the selected range
    with pytest.raises(UserError, match="train: no such folder; 3dpw_oc of 3DPW needs it"):
        (tmp_path / "sequenceFiles/train/courtyard_golf_00.pkl").unlink()
        (tmp_path / "sequenceFiles/train").rmdir()
        open_reader("3dpw_oc", tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", r"downtown_bus_00\.pkl: not a pickle of plain arrays"),
        ("image", r"downtown_bus_00\.pkl, person 0, frame 1: its image .*image_00001\.jpg is missing"),
        ("nan", r"downtown_bus_00\.pkl, person 0, frame 2: pose has NaN"),
        ("nan camera", r"downtown_bus_00\.pkl, person 0, frame 2: pose has NaN"),
        ("nan keypoint", r"downtown_bus_00\.pkl, person 0, frame 2: keypoints_2d has NaN"),
        ("count", r"poses2d of person 0 has shape \(2, 3, 18\), expected \(3, 3, 18\) for the 3 frames"),
        ("people", r"downtown_bus_00\.pkl: betas of 1 and genders of 2 people, poses of 2"),
        ("key", r"downtown_bus_00\.pkl: not a 3DPW sequence: no cam_poses in it"),
        ("list", r"downtown_bus_00\.pkl: not a 3DPW sequence: no poses, poses2d"),
        ("empty", "sequenceFiles: no sequence of test in it"),
        ("gender", r"person 0, frame 0: gender is 'x'"),
    ],
)
def test_3dpw_faults_are_named(tmp_path: Path, fault: str, message: str) -> None:
    s.make_3dpw(tmp_path, (("test", "downtown_bus_00"),))
    path = tmp_path / "sequenceFiles/test/downtown_bus_00.pkl"
    data: Any = pickle.loads(path.read_bytes(), encoding="latin1")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "image":
        (tmp_path / "imageFiles/downtown_bus_00/image_00001.jpg").unlink()
    elif fault == "empty":
        path.unlink()
    else:
        if fault == "nan":
            data["poses"][0][2, 0] = np.nan
        elif fault == "nan camera":
            data["cam_poses"][2, 0, 0] = np.nan
        elif fault == "nan keypoint":
            data["poses2d"][0][2, 0, 3] = np.nan
        elif fault == "count":
            data["poses2d"][0] = data["poses2d"][0][:2]
        elif fault == "people":
            data["betas"] = data["betas"][:1]
        elif fault == "key":
            del data["cam_poses"]
        elif fault == "gender":
            data["genders"][0] = "x"
        else:
            data = [1, 2]
        s.write_python2_pickle(path, data)
    with pytest.raises(UserError, match=message):
        list(open_reader("3dpw", tmp_path).records())


def test_3dpw_is_never_unpickled_freely(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    s.make_3dpw(tmp_path)
    (tmp_path / "sequenceFiles/test/downtown_bus_00.pkl").write_bytes(pickle.dumps({"poses": Attack()}))
    with pytest.raises(UserError, match="mkdir is not allowed"):
        open_reader("3dpw", tmp_path)
    assert not (tmp_path / "made").exists()


# FreiHAND.


def test_freihand_trains_on_poses_of_mano(tmp_path: Path, licensed: Path) -> None:
    hand = load_body("mano", "right")
    truths = s.make_freihand(tmp_path, hand, vertices=False)
    records = _records("freihand", tmp_path, "training")
    assert len(records) == 12 and set(records) == {name for name in truths if "/training/" in name}
    for name, record in records.items():
        np.testing.assert_allclose(_mesh(record, hand, mean_pose=True), truths[name].vertices, atol=1e-5)
        np.testing.assert_allclose(record.joints_3d, truths[name].joints, atol=1e-9)
        assert record.body == "mano" and record.hand == "right" and record.vertices is None
        assert record.side == 224 and tuple(record.center) == (112, 112)
        _check_projection(record)
    versions = [record.group for record in records.values()]
    assert versions == [f"training_{version}" for version in ("gs", "hom", "sample", "auto") for _ in range(3)]
    # All four versions show the same hand.
    first, last = records["freihand/training/00000001"], records["freihand/training/00000010"]
    np.testing.assert_array_equal(first.pose, last.pose)
    assert first.image != last.image


def test_freihand_is_evaluated_on_its_own_vertices(tmp_path: Path, licensed: Path) -> None:
    truths = s.make_freihand(tmp_path, load_body("mano", "right"))
    records = _records("freihand", tmp_path)
    assert len(records) == 3
    for name, record in records.items():
        np.testing.assert_allclose(record.vertices, truths[name].vertices, atol=1e-6)
        np.testing.assert_allclose(record.joints_3d, truths[name].joints, atol=1e-9)
        assert record.pose is None
        _check_projection(record)


def test_freihand_without_mano_takes_the_vertices(
    tmp_path: Path, licensed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truths = s.make_freihand(tmp_path, load_body("mano", "right"))
    monkeypatch.delenv("HMDIFF_BODY_DIR")
    reader = open_reader("freihand", tmp_path, "training")
    for record in reader.records():
        np.testing.assert_allclose(record.vertices, truths[record.name].vertices, atol=1e-6)
    assert any("no MANO file was found" in line for line in reader.summary)
    (tmp_path / "training_verts.json").unlink()
    with pytest.raises(UserError, match=r"MANO_RIGHT\.pkl not found"):
        open_reader("freihand", tmp_path, "training")


def test_freihand_says_which_versions_are_there(tmp_path: Path, licensed: Path) -> None:
    s.make_freihand(tmp_path, load_body("mano", "right"))
    for number in range(6, 12):
        (tmp_path / f"training/rgb/{number:08d}.jpg").unlink()
    reader = open_reader("freihand", tmp_path, "training")
    assert reader.count() == 6 and reader.summary[1].endswith("gs, hom")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("evaluation_verts.json", None, "missing; it is in FreiHAND_pub_v2_eval.zip"),
        ("evaluation_K.json", None, "missing; it is in FreiHAND_pub_v2.zip"),
        ("evaluation_xyz.json", lambda text: text[:-40], r"evaluation_xyz\.json, row 2: damaged or cut short"),
        ("evaluation_xyz.json", lambda text: text.rstrip("]") + "]]", r"evaluation_xyz\.json: cut short after row 2"),
        ("evaluation_xyz.json", lambda text: json.dumps(json.loads(text)[:2]), r"2 rows, evaluation_K\.json has 3"),
        ("evaluation_xyz.json", lambda text: "{}", "not a JSON list of rows"),
        ("evaluation_verts.json", lambda text: json.dumps([[[1, 2, 3]]]), r"verts\.json, row 0: .*expected \(778, 3\)"),
        ("evaluation_xyz.json", lambda text: text.replace(text[3:9], "NaN, ", 1), "row 0: joints_3d has NaN"),
    ],
)
def test_freihand_faults_are_named(
    tmp_path: Path, licensed: Path, file: str, change: Callable[[str], str] | None, message: str
) -> None:
    s.make_freihand(tmp_path, load_body("mano", "right"))
    path = tmp_path / file
    if change is None:
        path.unlink()
    elif "NaN" in message:
        data = json.loads(path.read_text())
        data[0][4][1] = float("nan")
        path.write_text(json.dumps(data))
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        list(open_reader("freihand", tmp_path).records())


def test_freihand_missing_images_are_named(tmp_path: Path, licensed: Path) -> None:
    s.make_freihand(tmp_path, load_body("mano", "right"))
    (tmp_path / "evaluation/rgb/00000001.jpg").unlink()
    with pytest.raises(UserError, match=r"row 1: its image .*00000001\.jpg is missing"):
        list(open_reader("freihand", tmp_path).records())
    (tmp_path / "evaluation/rgb/00000000.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00000000\.jpg: not a picture"):
        open_reader("freihand", tmp_path)
    (tmp_path / "evaluation/rgb/00000000.jpg").unlink()
    with pytest.raises(UserError, match=r"00000000\.jpg: missing; unpack FreiHAND's images"):
        open_reader("freihand", tmp_path)


# SPIN and HMR 2.0.


def test_spin_rows_hold_what_was_written(tmp_path: Path) -> None:
    truths = tables.make_spin(tmp_path)
    records = _records("spin", tmp_path)
    assert set(records) == set(truths)
    body = s.small_free_body()
    for number, (name, record) in enumerate(records.items()):
        person = s.make_person(body, number, extrinsics=np.eye(4))
        center, side = tables.box(person.points)
        np.testing.assert_allclose(record.center, center)
        assert record.side == pytest.approx(side)  # scale is the side over 200
        assert record.joint_names == SPIN24 and record.joints_3d_valid.sum() == 17
        seen, root = s.h36m_joints(person)[0], truths[name].joints[0]
        rows = [tables.SPIN_TO_H36M[row] for row in range(17)]
        np.testing.assert_allclose(record.joints_3d[rows], seen - root, atol=1e-9)
        points = dict(zip(record.keypoint_names, record.keypoints_2d, strict=True))
        for joint in (*COCO17, "neck", "mid_hip", "left_heel"):
            np.testing.assert_allclose(points[joint], person.points[HALPE26.index(joint)], atol=1e-9)
        confidence = dict(zip(record.keypoint_names, record.keypoints_2d_confidence, strict=True))
        # The annotator's point if labelled, else OpenPose's, else unlabelled.
        assert confidence["left_knee"] == 1 and confidence["left_heel"] == 0.7 and confidence["jaw"] == 0
        if number == 2:
            assert record.pose is None and record.betas is None  # has_smpl is 0
        else:
            assert record.gender == ("male", "female")[number]
            np.testing.assert_allclose(s.posed(body, record.pose, record.betas, person.translation)[0], person.vertices)


def test_hmr2_scale_is_pixels_and_may_have_two_sides(tmp_path: Path) -> None:
    truths = tables.make_hmr2(tmp_path)
    square = _records("hmr2", tmp_path)
    assert set(square) == set(truths)
    tables.make_hmr2(tmp_path, tall=True)
    tall = _records("hmr2", tmp_path, "3dpw_test")
    for number, (name, record) in enumerate(square.items()):
        person = s.make_person(s.small_free_body(), number, extrinsics=np.eye(4))
        assert record.side == pytest.approx(tables.box(person.points)[1]) == tall[name].side
        known = dict(zip(record.joint_names, zip(record.joints_3d, record.joints_3d_valid, strict=True), strict=True))
        np.testing.assert_allclose(known["left_knee"][0], person.joints[4] - person.joints[0], atol=1e-9)
        assert known["left_knee"][1] and not known["mid_hip"][1]  # 3D limbs of the OpenPose set are not used
        assert record.gender == "female" and record.image.is_file()
        assert (record.pose is None) == (number == 0)  # has_betas is 0 there: pose and betas go together


def test_hmr2_object_arrays_are_read_by_the_restricted_unpickler(tmp_path: Path) -> None:
    tables.make_hmr2(tmp_path)
    plain = _records("hmr2", tmp_path)
    tables.make_hmr2(tmp_path, objects=True)
    assert set(_records("hmr2", tmp_path)) == set(plain)

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    names = np.empty(3, object)
    names[:] = [Attack()] * 3
    with np.load(tmp_path / "3dpw_test.npz", allow_pickle=True) as arrays:
        np.savez(tmp_path / "3dpw_test.npz", **{**arrays, "imgname": names})
    with pytest.raises(UserError, match=r"3dpw_test\.npz, array imgname: not a pickle .*mkdir is not allowed"):
        open_reader("hmr2", tmp_path)
    assert not (tmp_path / "made").exists()


def _edit(path: Path, **changes: Any) -> None:
    """Rewrite an npz with some arrays changed; None removes one."""
    with np.load(path) as arrays:
        kept = {**arrays, **changes}
    np.savez(path, **{key: value for key, value in kept.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imgname": None}, "no 'imgname' among its arrays"),
        ({"center": None}, "no array 'center'; it has S, gender"),
        ({"center": np.zeros((2, 2))}, "center has 2 rows, imgname has 3; the file is not whole"),
        ({"pose": np.zeros((3, 24, 4))}, r"pose has rows of shape \(24, 4\), expected \(72,\)"),
        ({"S": np.full((3, 24, 4), np.nan)}, "row 0: joints_3d|row 0: keypoints"),
        ({"scale": np.array([0.2, np.nan, 0.2])}, "row 1: a crop of side nan"),
        ({"scale": np.array([0.2, 0.2, 0.0])}, r"row 2: a crop of side 0\.0"),
        ({"pose": np.full((3, 72), np.nan)}, "row 0: pose has NaN"),
    ],
)
def test_npz_faults_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tables.make_spin(tmp_path)
    if "S" in changes:
        changes["S"][..., 3] = 1
    _edit(tmp_path / "coco_2014_train.npz", **changes)
    with pytest.raises(UserError, match=rf"coco_2014_train\.npz(:|, ).*({message})"):
        list(open_reader("spin", tmp_path).records())


def test_npz_files_cut_short_missing_or_many_are_named(tmp_path: Path) -> None:
    tables.make_spin(tmp_path)
    path = tmp_path / "coco_2014_train.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"coco_2014_train\.npz: not an npz or npy file"):
        open_reader("spin", tmp_path)
    damaged = bytearray(whole)
    damaged[whole.index(b"shape.npy") + 300] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"coco_2014_train\.npz: a damaged file of arrays .*'shape\.npy'"):
        open_reader("spin", tmp_path)
    path.write_bytes(whole)
    (tmp_path / "train2014/COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"coco_2014_train\.npz, row 1: its image .*000001\.jpg is missing"):
        list(open_reader("spin", tmp_path).records())
    (tmp_path / "train2014/COCO_train2014_000000000000.jpg").unlink()
    with pytest.raises(UserError, match=r"coco_2014_train\.npz, row 0: its image train2014.* is in none of"):
        open_reader("spin", tmp_path)
    (tmp_path / "other.npz").write_bytes(whole)
    with pytest.raises(UserError, match="several label files; name one as the split, of coco_2014_train, other"):
        open_reader("spin", tmp_path)
    with pytest.raises(UserError, match=r"no third\.npz; give one of coco_2014_train, other as the split"):
        open_reader("spin", tmp_path, "third")
    with pytest.raises(UserError, match=r"no label file \*\.npz in it"):
        open_reader("spin", tmp_path / "train2014")


# Human3.6M.


@pytest.mark.parametrize("layout", ["spin", "mmpose", "json"])
def test_human36m_protocol_2_takes_its_frames(tmp_path: Path, layout: str) -> None:
    truths = tables.make_human36m(tmp_path, layout)
    p2, p1, train = (_records("human36m", tmp_path, split) for split in ("p2", "p1", "train"))
    frames = 3 if layout == "spin" else 4  # SPIN's file contains only every fifth
    assert len(p2) == 2 * 3 and len(p1) == 2 * 2 * 3 and len(train) == 1 * 2 * frames
    names = [record.image.stem for record in p2.values()]
    if layout == "json":
        assert all(name.startswith(("s_09", "s_11")) and "_ca_04_" in name for name in names)
    else:
        assert all(name.startswith(("S9_", "S11_")) and ".60457274_" in name for name in names)
    assert {name[-6:] for name in names} == {"000001", "000006", "000011"}  # frames 0, 5, 10
    for record in (*p1.values(), *train.values()):
        truth = truths[record.name]
        assert record.joint_names == H36M17
        np.testing.assert_allclose(record.joints_3d, truth.joints, atol=1e-6)
        assert joint_indices(J14, record.joint_names)  # raises if one of the fourteen joints is missing
        if layout == "spin":
            assert record.intrinsics is None and record.keypoints_2d is None
            np.testing.assert_allclose(record.joints_3d[0], 0, atol=1e-12)
        else:
            _check_projection(record)


def test_human36m_frames_of_the_two_files_of_spin_are_the_same(tmp_path: Path) -> None:
    tables.make_human36m(tmp_path, "spin")
    own = _records("human36m", tmp_path, "p2")
    (tmp_path / "h36m_valid_protocol2.npz").unlink()
    assert set(_records("human36m", tmp_path, "p2")) == set(own)  # from protocol 1's file


def test_human36m_of_mmpose_may_be_in_the_world(tmp_path: Path) -> None:
    truths = tables.make_human36m(tmp_path, "mmpose", world=True)
    for record in _records("human36m", tmp_path).values():
        np.testing.assert_allclose(record.joints_3d, truths[record.name].joints, atol=1e-6)
        _check_projection(record)


def test_human36m_json_is_read_with_either_meaning_of_t(tmp_path: Path) -> None:
    truths = tables.make_human36m(tmp_path, "json", t_is_place=True)
    for record in _records("human36m", tmp_path, "p1").values():
        np.testing.assert_allclose(record.joints_3d, truths[record.name].joints, atol=1e-6)
        _check_projection(record)


def test_human36m_json_gives_the_fitted_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truths = tables.make_human36m(tmp_path, "json")
    body = s.small_free_body()
    monkeypatch.setattr("hmdiff.data.readers.human36m_json.load_body_if_installed", lambda *_: body)
    for record in _records("human36m", tmp_path).values():
        np.testing.assert_allclose(_mesh(record, body), truths[record.name].vertices, atol=1e-6)
    monkeypatch.setattr("hmdiff.data.readers.human36m_json.load_body_if_installed", lambda *_: None)
    record = next(iter(_records("human36m", tmp_path).values()))
    assert record.translation is None and record.pose is not None
    for path in (tmp_path / "annotations").glob("*_smpl_param.json"):
        path.unlink()
    reader = open_reader("human36m", tmp_path)
    assert next(reader.records()).pose is None and any("without SMPL" in line for line in reader.summary)


def test_human36m_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of Human3\.6M's layouts for p2: neither h36m_valid_protocol2\.npz, nor"):
        open_reader("human36m", tmp_path)
    tables.make_human36m(tmp_path, "mmpose")
    path, cameras = tmp_path / "annotation_body3d/fps10/h36m_test.npz", tmp_path / "annotation_body3d/cameras.pkl"
    with np.load(path) as arrays:
        joints, names = arrays["S"], arrays["imgname"]
    _edit(path, S=joints + np.array([0.3, 0, 0, 0]))
    with pytest.raises(UserError, match=r"h36m_test\.npz, row 4: its 3D joints are .* pixels from its 2D ones"):
        list(open_reader("human36m", tmp_path).records())
    joints[4, 3, 1] = np.nan
    _edit(path, S=joints)
    with pytest.raises(UserError, match=r"h36m_test\.npz, row 4: joints_3d has NaN"):
        list(open_reader("human36m", tmp_path).records())
    _edit(path, imgname=np.where(np.arange(len(names)) == 3, names[0].replace("S9", "X9"), names))
    with pytest.raises(UserError, match=r"h36m_test\.npz, row 3: image .*, expected a name like S9_Directions_1"):
        open_reader("human36m", tmp_path)
    _edit(path, imgname=names)
    s.write_python2_pickle(cameras, {("S9", "60457274"): {"R": np.eye(3)}})
    with pytest.raises(UserError, match=r"cameras\.pkl, camera \('S9', '60457274'\), T: damaged"):
        open_reader("human36m", tmp_path)
    s.write_python2_pickle(cameras, {})
    with pytest.raises(UserError, match=r"h36m_test\.npz, row 4: camera 60457274 of S9 is not in cameras\.pkl"):
        list(open_reader("human36m", tmp_path).records())
    cameras.unlink()
    with pytest.raises(UserError, match=r"cameras\.pkl: missing; mmpose's preprocess_h36m\.py"):
        open_reader("human36m", tmp_path)


def test_human36m_spin_needs_joints(tmp_path: Path) -> None:
    tables.make_human36m(tmp_path, "spin")
    _edit(tmp_path / "h36m_valid_protocol2.npz", S=None)
    with pytest.raises(UserError, match=r"h36m_valid_protocol2\.npz: no array 'S', so no 3D joints"):
        open_reader("human36m", tmp_path)


def test_human36m_json_faults_are_named(tmp_path: Path) -> None:
    tables.make_human36m(tmp_path, "json")
    start = tmp_path / "annotations"
    whole = (start / "Human36M_subject9_joint_3d.json").read_text()
    (start / "Human36M_subject9_joint_3d.json").write_text(whole[:-30])
    with pytest.raises(UserError, match=r"subject9_joint_3d\.json: not JSON, or cut short"):
        open_reader("human36m", tmp_path)
    joints = json.loads(whole)
    moved = json.loads(whole)
    for frames in moved["2"].values():
        frames.update({frame: np.array(place) + 9000 for frame, place in frames.items()})
    s.write_json(start / "Human36M_subject9_joint_3d.json", moved)
    with pytest.raises(UserError, match="annotation 4: camera 4 does not see the joints in their box"):
        list(open_reader("human36m", tmp_path).records())
    del joints["2"]["4"]["5"]
    s.write_json(start / "Human36M_subject9_joint_3d.json", joints)
    message = r"joint_3d\.json, action 2, subaction 4, frame 5 \(of .*subject9_data\.json, annotation 6\): damaged"
    with pytest.raises(UserError, match=message):
        list(open_reader("human36m", tmp_path).records())
    (start / "Human36M_subject11_camera.json").unlink()
    with pytest.raises(UserError, match=r"subject11_camera\.json: no such file"):
        open_reader("human36m", tmp_path)
    s.write_json(start / "Human36M_subject9_data.json", {"images": []})
    with pytest.raises(UserError, match=r"subject9_data\.json: not in the layout of I2L-MeshNet \(KeyError\('annot"):
        open_reader("human36m", tmp_path)


def test_lens_is_opencv_s() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(30, 3)) * [0.8, 0.8, 0.5] + [0.3, -0.2, 4]
    k, p = random.normal(size=3) * 0.1, random.normal(size=2) * 0.01
    turn = cv2.Rodrigues(random.normal(size=3))[0]
    place = random.normal(size=3)
    lens = Lens(turn, place, np.array([1145.0, 1143]), np.array([512.0, 515]), k, p)
    intrinsics = np.array([[1145.0, 0, 512], [0, 1143, 515], [0, 0, 1]])
    expected = cv2.projectPoints(points, np.zeros(3), np.zeros(3), intrinsics, np.array([*k[:2], *p, k[2]]))[0][:, 0]
    np.testing.assert_allclose(lens.project(points), expected, atol=1e-9)
    np.testing.assert_allclose(lens.to_camera(points @ turn + place), points, atol=1e-12)


def test_pinhole_about_a_person_takes_most_of_the_distortion() -> None:
    """With Human3.6M's lens, anywhere in the room: less than half of the error of the lens's own pinhole."""
    random = np.random.default_rng(0)
    focal, principal = np.array([1145.0, 1143]), np.array([512.0, 515])
    bent = np.array([-0.207, 0.248, -0.003]), np.array([-0.0014, -0.001])
    lens = Lens(np.eye(3), np.zeros(3), focal, principal, *bent)
    plain, fitted = [], []
    for _ in range(100):
        middle = [random.uniform(-1, 1), random.uniform(-0.3, 0.5), random.uniform(4, 6)]
        points = random.normal(size=(17, 3)).clip(-1.5, 1.5) * [0.25, 0.45, 0.2] + middle
        pixels = lens.project(points)
        for found, intrinsics in (
            (fitted, fit_pinhole(points, pixels, lens)),
            (plain, np.array([[focal[0], 0, principal[0]], [0, focal[1], principal[1]], [0, 0, 1]])),
        ):
            found.append(np.linalg.norm(s.project(points, intrinsics) - pixels, axis=1).mean())
    assert np.mean(fitted) < 0.5 * np.mean(plain) and np.mean(fitted) < 0.6
    straight = Lens(np.eye(3), np.zeros(3), focal, principal, np.zeros(3), np.zeros(2))
    intrinsics = fit_pinhole(points, straight.project(points), straight)
    np.testing.assert_allclose(intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]], [*focal, *principal], rtol=1e-9)


# BEDLAM.


@pytest.mark.parametrize("lying", [False, True])
def test_bedlam_gives_the_bodies_before_their_cameras(tmp_path: Path, licensed: Path, lying: bool) -> None:
    body = load_body("smplx")
    truths = tables.make_bedlam(tmp_path, body, lying)
    for name, record in _records("bedlam", tmp_path).items():
        vertices, joints = truths[name].vertices, truths[name].joints
        if lying:  # the upright image, turned a quarter to the left: x' = y, y' = width - x
            vertices, joints = (np.stack([p[:, 1], -p[:, 0], p[:, 2]], 1) for p in (vertices, joints))
        np.testing.assert_allclose(_mesh(record, body), vertices, atol=1e-5)
        seen = s.project(joints, record.intrinsics)
        assert np.abs(seen - record.keypoints_2d[:55]).max() < 1e-6
        assert record.body == "smplx" and len(record.keypoint_names) == 76
        assert record.gender == "neutral"  # eleven betas belong to the neutral body, although `gender` is female
        middle = (record.keypoints_2d[:22].min(0) + record.keypoints_2d[:22].max(0)) / 2
        np.testing.assert_allclose(record.center, middle, atol=1e-6)


def test_bedlam_lying_scenes_without_a_body_file_have_no_translation(
    tmp_path: Path, licensed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.make_bedlam(tmp_path, load_body("smplx"), lying=True)
    monkeypatch.delenv("HMDIFF_BODY_DIR")
    assert all(record.translation is None for record in _records("bedlam", tmp_path).values())


def test_bedlam_faults_are_named(tmp_path: Path, licensed: Path) -> None:
    with pytest.raises(UserError, match=r"no SCENE\.npz in training_labels/all_npz_12_training, processed_labels"):
        open_reader("bedlam", tmp_path)
    tables.make_bedlam(tmp_path, load_body("smplx"))
    path = tmp_path / "training_labels/all_npz_12_training/static_6fps.npz"
    with np.load(path) as arrays:
        points, ext = arrays["gtkps"], arrays["cam_ext"]
    _edit(path, gtkps=points[:, :10])
    with pytest.raises(UserError, match=r"static_6fps\.npz: gtkps has rows of shape \(10, 3\), expected \(127, 3\)"):
        list(open_reader("bedlam", tmp_path).records())
    ext[1, 0, 3] = np.inf
    _edit(path, gtkps=points, cam_ext=ext)
    with pytest.raises(UserError, match=r"static_6fps\.npz, row 1: translation has NaN or infinity"):
        list(open_reader("bedlam", tmp_path).records())
    image = tmp_path / "training_images/static_6fps/png/seq_000000/seq_000000_0000.png"
    image.write_bytes(b"")
    with pytest.raises(UserError, match=r"0000\.png: the file is empty"):
        list(open_reader("bedlam", tmp_path).records())
    image.unlink()
    with pytest.raises(UserError, match=r"static_6fps\.npz, row 0: its image seq_000000/.* is in none of"):
        list(open_reader("bedlam", tmp_path).records())


# COCO.


def test_coco_people_are_boxes_and_keypoints(tmp_path: Path) -> None:
    truths = tables.make_coco(tmp_path)
    reader = open_reader("coco", tmp_path)
    assert any(line.startswith("2 annotations without keypoints, or of crowds") for line in reader.summary)
    records = _records("coco", tmp_path)
    assert set(records) == set(truths)
    for name, record in records.items():
        low, size = truths[name].extra["box"]
        np.testing.assert_allclose(record.center, low + size / 2)
        assert record.side == pytest.approx(1.2 * size.max())
        np.testing.assert_allclose(record.keypoints_2d, truths[name].extra["points"])
        np.testing.assert_array_equal(record.keypoints_2d_confidence, [1, 0.5, *[1] * 14, 0])
        assert record.keypoint_names == COCO17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["annotations"][1].update(keypoints=[1, 2, 3]), r"annotation 1 \(id 501\): damaged"),
        (lambda data: data["annotations"][1].pop("bbox"), r"annotation 1 \(id 501\): damaged \(KeyError\('bbox'\)\)"),
        (lambda data: data["annotations"][1]["keypoints"].__setitem__(2, 3), "annotation 1 .*: visibility 3; 0, 1 or"),
        (lambda data: data["annotations"][1].update(bbox=[1, 1, 0, 0]), "annotation 1 .*: a crop of side 0.0"),
        (lambda data: data.pop("images"), r"val2017\.json: no 'images' and 'annotations' in it"),
    ],
)
def test_coco_faults_are_named(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    tables.make_coco(tmp_path)
    path = tmp_path / "annotations/person_keypoints_val2017.json"
    data = json.loads(path.read_text())
    change(data)
    s.write_json(path, data)
    with pytest.raises(UserError, match=message) as error:
        list(open_reader("coco", tmp_path).records())
    assert str(path) in str(error.value)


def test_coco_missing_files_are_named(tmp_path: Path) -> None:
    tables.make_coco(tmp_path)
    (tmp_path / "val2017/000000000139.jpg").unlink()
    with pytest.raises(UserError, match=r"val2017\.json: its image 000000000139\.jpg is in none of .*images/val2017"):
        open_reader("coco", tmp_path)
    with pytest.raises(UserError, match=r"person_keypoints_train2017\.json: no such file"):
        open_reader("coco", tmp_path, "train2017")


# 3DOH50K.


@pytest.mark.parametrize("world", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_3doh_is_in_metres_whatever_its_unit(tmp_path: Path, world: bool, inner: bool) -> None:
    truths = tables.make_3doh(tmp_path, world, inner)
    records = _records("3doh", tmp_path)
    assert set(records) == set(truths)
    for name, record in records.items():
        np.testing.assert_allclose(record.joints_3d, truths[name].joints, atol=1e-9)
        np.testing.assert_allclose(_mesh(record, s.small_free_body()), truths[name].vertices, atol=1e-6)
        _check_projection(record)
        low, high = record.keypoints_2d.min(0), record.keypoints_2d.max(0)
        assert record.side == pytest.approx(1.2 * (high - low).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("extri"), r"annots\.json, entry 00001: damaged or not 3DOH50K's \(KeyError\('extri"),
        (lambda entry: entry.update(betas=[[1, 2]]), "entry 00001: damaged or not 3DOH50K's"),
        (lambda entry: entry.update(scale=[0]), r"entry 00001: scale 0\.0, more than 0"),
        (lambda entry: entry.update(smpl_joints_2d=[[0, 0]] * 24), "entry 00001: its 3D joints are .* pixels"),
        (lambda entry: entry["pose"][0].__setitem__(0, float("nan")), "entry 00001: pose has NaN"),
        (lambda entry: entry.update(img_path="images/9.jpg"), r"entry 00001: its image .*images/9\.jpg is missing"),
    ],
)
def test_3doh_faults_are_named(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    tables.make_3doh(tmp_path)
    path = tmp_path / "testset/annots.json"
    data = json.loads(path.read_text())
    change(data["00001"])
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        list(open_reader("3doh", tmp_path).records())
    path.write_text("[]")
    with pytest.raises(UserError, match=r"annots\.json: a list, where entries by number were expected"):
        open_reader("3doh", tmp_path)


def test_3doh_leaves_out_a_translation_that_makes_no_sense(tmp_path: Path) -> None:
    tables.make_3doh(tmp_path)
    path = tmp_path / "testset/annots.json"
    data = json.loads(path.read_text())
    data["00000"]["trans"] = [[90, 90, 90]]
    path.write_text(json.dumps(data))
    first, second = _records("3doh", tmp_path).values()
    assert first.translation is None and second.translation is not None


# Sports.


def test_sports_rows_hold_what_was_written(tmp_path: Path) -> None:
    truths = tables.make_sports(tmp_path)
    records = _records("sports", tmp_path, "all")
    assert set(records) == set(truths)
    for name, record in records.items():
        points, joints = truths[name].extra["points"], truths[name].joints
        there = record.keypoints_2d_confidence > 0
        assert there.sum() == 25 and not there[record.keypoint_names.index("left_ear")]
        labelled = joint_indices([n for n, t in zip(record.keypoint_names, there, strict=True) if t], HALPE26)
        np.testing.assert_allclose(record.keypoints_2d[there], points[labelled])
        known = [n for n, valid in zip(record.joint_names, record.joints_3d_valid, strict=True) if valid]
        assert "left_hand" not in known and "pelvis" in known
        rows = joint_indices(known, record.joint_names)
        np.testing.assert_allclose(record.joints_3d[rows], joints[joint_indices(known, SMPL24)])
        np.testing.assert_allclose(record.intrinsics, s.INTRINSICS)
        seen = points[there] if name.startswith("sports/game1/2/") else points  # the last row's box is of its keypoints
        np.testing.assert_allclose(record.center, (seen.min(0) + seen.max(0)) / 2)
    assert len(_records("sports", tmp_path)) == 2 and len(_records("sports", tmp_path, "train")) == 1
    assert not _records("sports", tmp_path, "val")


def test_sports_may_be_a_coco_file(tmp_path: Path) -> None:
    truths = tables.make_coco(tmp_path, "images", "sports")
    os.rename(tmp_path / "annotations/person_keypoints_images.json", tmp_path / "annotations.json")
    assert set(_records("sports", tmp_path)) == set(truths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("left_knee_x", "left_kne_x"), "'left_kne_x' is not known; the nearest is 'left"),
        (lambda text: text.replace("image,", "picture,", 1), "no column 'image' in its header"),
        (lambda text: text.replace("nose_c,", ""), "no column 'nose_c'; a joint needs _x, _y, _c"),
        (lambda text: text + "a,b\n", r"frames\.csv, line 5: 2 cells, the header has"),
        (lambda text: text.replace("240.0", "wide", 1), r"frames\.csv, line 2: could not convert .*'wide', in fx, fy"),
        (lambda text: text.replace("0.9", "nan", 1), r"frames\.csv, line 2: keypoints_2d_confidence has NaN"),
        (lambda text: text.replace("game1/0000.jpg", "game1/9.jpg"), r"csv, line 2: its image .*9\.jpg is missing"),
        (lambda text: re.sub(r"(?<![\d.])0\.9(?!\d)", "0", text), "line 4: neither a box nor a labelled keypoint"),
    ],
)
def test_sports_faults_are_named(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    tables.make_sports(tmp_path)
    path = tmp_path / "frames.csv"
    text = path.read_text()
    if "nose_c" in message:  # with its column of cells
        header, *lines = [line.split(",") for line in text.splitlines()]
        at = header.index("nose_c")
        text = "\n".join(",".join(cells[:at] + cells[at + 1 :]) for cells in (header, *lines))
    else:
        text = change(text)
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(open_reader("sports", tmp_path, "all").records())


def test_sports_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"frames\.csv: cannot be read .*; nor is there annotations\.json"):
        open_reader("sports", tmp_path)
    (tmp_path / "frames.csv").write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"frames\.csv: not UTF-8 text"):
        open_reader("sports", tmp_path)
