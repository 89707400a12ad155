"""Prepared data sets: round trip, resuming an interrupted preparation, and errors that name the place."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from records import HEIGHT, MARKED, WIDTH, ListReader, draw_photo, make_records, red_place

from hmdiff.cli import main as cli
from hmdiff.data import prepare as dataset
from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.record import SHAPES, Record
from hmdiff.data.record_crops import read_crop
from hmdiff.data.shards import INDEX, PreparedShards, RecordFiles, ShardWriter
from hmdiff.data.transforms import Augmentation, crop_affine, map_points
from hmdiff.errors import UserError
from hmdiff.files.locks import try_claim
from hmdiff.lab.loading import Crops, compare_loading, measure_loading


def prepared(folder: Path, records: list[Record], **options: object) -> PreparedShards:
    prepare_dataset(ListReader(records), folder, **{"shard_records": 4, **options})  # type: ignore[arg-type]
    return PreparedShards(folder)


def same(stored: Record, given: Record) -> None:
    for field in dataclasses.fields(Record):
        found, expected = getattr(stored, field.name), getattr(given, field.name)
        if field.name == "image":
            assert found is None
        elif field.name in SHAPES and expected is not None:
            assert found.shape == np.shape(expected)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        else:
            assert found == expected, field.name


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    records = make_records(tmp_path, 6)
    bare = dataclasses.replace(
        records[1],
        pose=None,
        betas=None,
        translation=None,
        intrinsics=None,
        keypoints_2d=None,
        keypoints_2d_confidence=None,
        keypoint_names=(),
        image=None,
        gender="female",
    )
    joints = np.array([[0.0, 0, 3], [np.nan, 0, 0], [1, 2, 3]])
    hand = dataclasses.replace(
        bare,
        name="hand",
        group="sequence_2",
        body="mano",
        hand="left",
        joints_3d=joints,
        vertices=np.random.default_rng(0).normal(size=(778, 3)),
        joint_names=("wrist", "b", "c"),
        joints_3d_valid=np.array([True, False, True]),
    )
    records[1], records[4] = bare, hand
    shards = prepared(tmp_path / "out", records)
    assert len(shards) == 6 and [shard["records"] for shard in shards.index["shards"]] == [4, 2]
    for number in (5, 0, 4, 1, 3, 2):  # in any order
        same(shards[number].record, records[number])
        assert (shards[number].picture is None) == (records[number].image is None)
    assert shards[4].record.joints_3d_valid.dtype == bool
    shards[0].record.pose[0] = 7  # the caller owns the array
    same(shards[0].record, records[0])
    assert shards.groups().tolist() == [record.group for record in records]
    assert shards.names().tolist() == [record.name for record in records]
    assert shards.select_groups(["sequence_0", "sequence_2"]).tolist() == [0, 1, 4, 5]
    assert shards.select_groups("*_1").tolist() == [2, 3]
    with pytest.raises(UserError, match=r"no group is 'sequence_9'; there are 3, such as sequence_0"):
        shards.select_groups(["sequence_9"])
    with pytest.raises(IndexError):
        shards[6]
    assert json.loads((tmp_path / "out" / INDEX).read_text())["groups"] == {f"sequence_{i}": 2 for i in range(3)}


def test_pictures_are_in_the_mapped_file(tmp_path: Path) -> None:
    """Images are not copied, and another process maps the files itself."""
    shards = prepared(tmp_path / "out", make_records(tmp_path, 2))
    picture = shards[0].picture
    assert picture is not None and not picture.flags.writeable and not picture.flags.owndata
    assert len(pickle.dumps(shards)) < 3000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shards))[0].picture, picture)


def test_the_stored_part_shows_the_person(tmp_path: Path) -> None:
    records = make_records(tmp_path, 3)
    shards = prepared(tmp_path / "out", records, resolution=100)
    for number, record in enumerate(records):
        stored = shards[number]
        picture = cv2.imdecode(stored.picture, cv2.IMREAD_COLOR)
        x0, y0, x1, y1 = stored.region
        assert picture.shape[1] / (x1 - x0) == pytest.approx(100 / record.side, rel=0.01)
        assert 0 <= x0 and x1 <= WIDTH and 0 <= y0 and y1 <= HEIGHT
        # The whole crop at scale 1.25, rotated by 45 degrees, lies inside it or outside the photo.
        reach = 0.5 * 1.25 * 2**0.5 * record.side
        assert x0 <= max(0, record.center[0] - reach) and x1 >= min(WIDTH, record.center[0] + reach)
        affine = crop_affine(record.center, record.side, Augmentation(flip=True, angle=0.4))
        for source in (stored, RecordFiles(records)[number]):  # the original file gives the same crop
            place = red_place(read_crop(source, affine, 96))
            np.testing.assert_allclose(place, map_points(record.keypoints_2d[MARKED], affine), atol=0.02)


def test_a_photo_that_is_kept_whole_keeps_its_bytes(tmp_path: Path) -> None:
    draw_photo(tmp_path / "small.jpg", np.array([30.0, 40]), (64, 64))
    record = dataclasses.replace(
        make_records(tmp_path, 1)[0], image=tmp_path / "small.jpg", center=np.array([32.0, 32]), side=64.0
    )
    stored = prepared(tmp_path / "out", [record])[0]
    assert stored.picture.tobytes() == (tmp_path / "small.jpg").read_bytes() and stored.region == (0, 0, 64, 64)


def test_exif_orientation_is_not_followed(tmp_path: Path) -> None:
    """Labels refer to the pixels as stored in the file."""
    draw_photo(tmp_path / "plain.jpg", np.array([100.0, 80]), (320, 240))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "plain.jpg").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    record = dataclasses.replace(
        make_records(tmp_path, 1)[0], image=tmp_path / "turned.jpg", center=np.array([110.0, 90]), side=60.0
    )
    affine = crop_affine(record.center, record.side)
    for stored in (prepared(tmp_path / "out", [record])[0], RecordFiles([record])[0]):
        place = red_place(read_crop(stored, affine, 96))
        np.testing.assert_allclose(place, map_points(np.array([100.0, 80]), affine), atol=0.02)


# -- stopped and started again ---------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != INDEX}


def test_a_killed_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_records(tmp_path, 11)
    prepared(tmp_path / "whole", records)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(ListReader(records, stop_at=10), tmp_path / "out", shard_records=4, workers=1)
    done = json.loads((tmp_path / "out" / INDEX).read_text())
    assert done["records"] == 4
    with pytest.raises(UserError, match=rf"only {done['records']} records are prepared; run the same hmdiff prepare"):
        PreparedShards(tmp_path / "out")
    (tmp_path / "out" / "shard_00001.arrow").write_bytes(b"a kill came before the index told of it")

    read: list[Path] = []
    original = dataset._read_photo
    monkeypatch.setattr(dataset, "_read_photo", lambda path: read.append(path) or original(path))
    report = prepare_dataset(ListReader(records), tmp_path / "out", shard_records=4)
    assert len(read) == 11 - done["records"] == 11 - report["of them there already"]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    again = prepare_dataset(ListReader(records), tmp_path / "out", shard_records=4)
    assert again["of them there already"] == 11 and len(read) == 11 - done["records"]


def test_workers_change_nothing(tmp_path: Path) -> None:
    records = make_records(tmp_path, 7)
    prepared(tmp_path / "one", records, workers=1)
    prepared(tmp_path / "three", records, workers=3)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_another_source_or_setting_is_refused(tmp_path: Path) -> None:
    records = make_records(tmp_path, 10, photos=False)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(ListReader(records, stop_at=9), tmp_path / "out", shard_records=2, workers=1)
    settings = {"shard_records": 2, "workers": 1}
    with pytest.raises(UserError, match=r"was prepared with margin 1.8, now it is 2.5; give the same"):
        prepare_dataset(ListReader(records), tmp_path / "out", margin=2.5, **settings)  # type: ignore[arg-type]
    changed = [dataclasses.replace(records[0], name="other"), *records[1:]]
    with pytest.raises(UserError, match=r"row 0: record 0 is 'other', and was 'standin/0/000' when .* has changed"):
        prepare_dataset(ListReader(changed), tmp_path / "out", **settings)  # type: ignore[arg-type]
    prepare_dataset(ListReader(records), tmp_path / "out", **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"10 records are prepared, the source has 5; remove the folder"):
        prepare_dataset(ListReader(records[:5]), tmp_path / "out", **settings)  # type: ignore[arg-type]


def test_another_process_in_the_folder_is_refused(tmp_path: Path) -> None:
    records = make_records(tmp_path, 3, photos=False)
    folder = tmp_path / "out"
    folder.mkdir()
    with try_claim(folder, None) as mine:
        assert mine
        with pytest.raises(UserError, match="another process works in it; wait for it"):
            prepare_dataset(ListReader(records), folder)
    assert not list(folder.iterdir())
    assert prepare_dataset(ListReader(records), folder)["records"] == 3


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("promised", "message"), [(5, "3 records found, 5 promised"), (2, "3 records found, 2 prom")])
def test_wrong_counts(tmp_path: Path, promised: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_dataset(ListReader(make_records(tmp_path, 3, photos=False), promised), tmp_path / "out")
    with pytest.raises(UserError, match="only 0 records are prepared"):
        PreparedShards(tmp_path / "out")


def test_an_empty_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="standin: no record in it; check the folder and the split"):
        prepare_dataset(ListReader([]), tmp_path / "out")


def test_faults_of_pictures_name_file_and_row(tmp_path: Path) -> None:
    records = make_records(tmp_path, 3)
    image = records[1].image
    assert image is not None
    whole = image.read_bytes()

    def fails(message: str, record: Record = records[1]) -> None:
        with pytest.raises(UserError, match=message):
            prepare_dataset(ListReader([records[0], record, records[2]]), tmp_path / "out")

    image.write_bytes(whole[: len(whole) // 2])
    fails(r"labels.npz row 1: its image cannot be read \(.*image_001.jpg: a damaged picture .*truncated")
    image.write_bytes(b"no picture")
    fails(r"labels.npz row 1: its image cannot be read \(.*image_001.jpg: not a picture")
    image.unlink()
    fails(r"labels.npz row 1: its image .*image_001.jpg is missing; complete the data set's images")
    image.write_bytes(whole)
    outside = dataclasses.replace(records[1], center=np.array([5000.0, 10]))
    fails(r"row 1: its crop, centre \(5000, 10\) and side .* lies outside the 640 x 480 photo", outside)
    fails(r"row 1: a second record of the name 'standin/0/000'", dataclasses.replace(records[1], name=records[0].name))


BAD_RECORDS = [
    ({"pose": np.full((24, 3), np.nan)}, "pose has NaN or infinity in it"),
    ({"betas": np.array([np.inf] * 10)}, "betas has NaN"),
    ({"keypoints_2d": np.full((26, 2), np.nan)}, "keypoints_2d has NaN"),
    ({"pose": np.zeros((24, 4))}, r"pose has shape \(24, 4\), expected \(J, 3\)"),
    ({"center": np.zeros(3)}, r"center has shape \(3,\), expected \(2,\)"),
    ({"keypoints_2d_confidence": np.ones(25)}, r"keypoints_2d_confidence has shape \(25,\), expected \(26,\)"),
    ({"keypoint_names": ("nose",)}, "keypoints_2d has 26 points and 1 names"),
    ({"keypoints_2d_confidence": -np.ones(26)}, "a confidence below 0"),
    ({"side": 0.0}, "a crop of side 0.0, expected more than 0 pixels"),
    ({"side": float("nan")}, "a crop of side nan"),
    ({"betas": None}, "pose and betas go together"),
    ({"body": "star"}, "body is 'star', expected one of smpl, smplx, mano"),
    ({"gender": "m"}, "gender is 'm', expected one of neutral, male, female"),
    ({"body": "mano"}, "a MANO pose that does not say which hand"),
    ({"name": ""}, "a record without a name"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_RECORDS)
def test_faults_of_labels_name_file_and_row(tmp_path: Path, changed: dict, message: str) -> None:
    record = make_records(tmp_path, 1, photos=False)[0]
    assert record.check() is record
    with pytest.raises(UserError, match=f"labels.npz row 0: {message}"):
        dataclasses.replace(record, **changed).check()


def test_an_unlabelled_joint_may_hold_anything(tmp_path: Path) -> None:
    record = make_records(tmp_path, 1, photos=False)[0]
    points, confidence = record.keypoints_2d.copy(), record.keypoints_2d_confidence.copy()
    points[3], confidence[3] = np.nan, 0
    dataclasses.replace(record, keypoints_2d=points, keypoints_2d_confidence=confidence).check()


def test_faults_of_a_prepared_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=r"not a prepared data set \(no index.json\); make it with hmdiff prepare"):
        PreparedShards(folder)
    prepared(folder, make_records(tmp_path, 6))
    shard, index = folder / "shard_00001.arrow", folder / INDEX
    whole, told = shard.read_bytes(), index.read_text()

    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"shard_00001.arrow: {len(whole) - 100} bytes, {len(whole)} were written"):
        PreparedShards(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard_00001.arrow: missing; copy it again"):
        PreparedShards(folder)
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=r"shard_00001.arrow: its checksum is not the one in index.json"):
        PreparedShards(folder).verify()
    shard.write_bytes(b"0" * len(whole))
    with pytest.raises(UserError, match=r"shard_00001.arrow: a damaged shard"):
        PreparedShards(folder)[5]
    shard.write_bytes(whole)
    PreparedShards(folder).verify()

    index.write_text(told[:50])
    with pytest.raises(UserError, match=r"index.json: not JSON, .*; remove the folder"):
        PreparedShards(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index.json: not the index of a prepared data set"):
        PreparedShards(folder)
    for key, value, message in (("version", 9, "version 9, this hmdiff reads 1"), ("records", 7, "7 records promised")):
        index.write_text(json.dumps({**json.loads(told), key: value}))
        with pytest.raises(UserError, match=message):
            PreparedShards(folder)


def test_a_writer_takes_records_one_by_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", {"of": "nothing"}, shard_records=2)
    for record in make_records(tmp_path, 3, photos=False):
        writer.add(record, None, None)
    assert writer.records == 2 and writer.boundary_names() == {0: "standin/0/000", 1: "standin/0/001"}
    writer.finish({"summary": ["three"]})
    assert PreparedShards(tmp_path / "out").index["summary"] == ["three"]


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prepare_and_bench_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make_records(tmp_path / "raw", 5)
    asked = []

    def reader(name: str, source: Path, split: str | None) -> ListReader:
        asked.append((name, Path(source), split))
        return ListReader(records)

    monkeypatch.setattr("hmdiff.data.readers.open_reader", reader)
    raw, out = str(tmp_path / "raw"), str(tmp_path / "out")
    assert cli.main(["prepare", "3dpw", raw, out, "--split", "train", "--shard-records", "2"]) == 0
    printed = capsys.readouterr().out
    assert "standin: 5 people" in printed and "written to" in printed and asked == [("3dpw", tmp_path / "raw", "train")]
    assert len(PreparedShards(out)) == 5
    monkeypatch.setattr("hmdiff.lab.loading.BATCHES", 2)
    monkeypatch.setattr("hmdiff.lab.loading.WORKERS", (0,))
    assert cli.main(["bench", "--shards", out, "data.image_size=32"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("images/s") == 2 and "raw files  0 workers" in printed
    assert asked[1] == ("3dpw", tmp_path / "raw", "train")
    assert cli.main(["prepare", "3dpw", raw, out]) == 2
    assert "was prepared with split 'train', now it is ''" in capsys.readouterr().err


def test_loading_is_measured(tmp_path: Path) -> None:
    records = make_records(tmp_path, 3)
    shards = prepared(tmp_path / "out", records)
    crops = Crops(shards, 4, 16, 3)
    batch, memory = crops[1]
    assert batch.shape == (4, 3, 16, 16) and 0 < memory < 50
    assert (batch == crops[1][0]).all() and not (batch == crops[2][0]).all()
    assert measure_loading(shards, 16, 2, 2, workers=1)["images_per_second"] > 0
    (row,) = compare_loading(tmp_path / "out", None, 16, 2, 2, (0,))  # without the path of the original files
    assert row["store"] == "shards" and row["workers"] == 0
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the data set's own files, or leave --raw out"):
        compare_loading(tmp_path / "out", tmp_path / "nowhere")
    prepared(tmp_path / "blind", make_records(tmp_path, 2, photos=False))
    with pytest.raises(UserError, match="its records have no pictures, so there is nothing to load"):
        compare_loading(tmp_path / "blind")
    assert io.BytesIO(shards[0].picture.tobytes()).read(2) == b"\xff\xd8"  # jpg


# -- damage and malice -----------------------------------------------------------------------------------------------


def test_one_flipped_bit_is_noticed_when_its_record_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    prepared(folder, make_records(tmp_path, 6, photos=False))
    shard = folder / "shard_00000.arrow"
    whole = shard.read_bytes()
    values = np.asarray(PreparedShards(folder)[2].record.pose, np.float32)[5]
    place = whole.index(values.tobytes())
    shard.write_bytes(whole[: place + 3] + bytes([whole[place + 3] ^ 64]) + whole[place + 4 :])
    shards = PreparedShards(folder)
    assert shards[1].record.name  # the others are intact
    with pytest.raises(UserError, match=r"shard_00000.arrow: record 2 has another checksum"):
        shards[2]
    # Folders without checksums of records: the whole shard is verified when it is opened.
    told = json.loads((folder / INDEX).read_text())
    for entry in told["shards"]:
        del entry["crc32"]
    (folder / INDEX).write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"shard_00000.arrow: its checksum is not the one"):
        PreparedShards(folder)[1]
    shard.write_bytes(whole)
    assert PreparedShards(folder)[2].record.name


def test_offsets_that_lie_do_not_crash(tmp_path: Path) -> None:
    """Arrow trusts them when reading: without validation the interpreter crashed."""
    folder = tmp_path / "out"
    prepared(folder, make_records(tmp_path, 4, photos=False))
    shard = folder / "shard_00000.arrow"
    whole = bytearray(shard.read_bytes())
    offsets = np.array([0, 26, 52, 78, 104], np.int32).tobytes()  # of the keypoints of four records
    place = whole.index(offsets)
    whole[place + 8 : place + 12] = np.array([2**30], np.int32).tobytes()
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=r"shard_00000.arrow: a damaged shard"):
        PreparedShards(folder)[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("records", "6", "records is '6', int expected"),
        ("complete", 1, "complete is 1, bool expected"),
        ("shards", {}, r"shards is \{\}, list expected"),
        ("shards", [5], r"shards\[0\] is 5"),
        ("groups", {"a": None}, r"groups\['a'\] is None"),
        ("file", "../../shard_00000.arrow", r"shards\[0\].file '../../shard_00000.arrow' is not a shard's name"),
        ("file", "/etc/passwd", ".* is not a shard's name"),
        ("file", None, r"shards\[0\].file is None, str expected"),
        ("bytes", -5, r"shards\[0\].bytes is -5"),
        ("records of it", 2.0, r"shards\[0\].records is 2.0, int expected"),
        ("crc32", [1], r"shards\[0\].crc32 is not a number for each record"),
        ("crc32", "text", r"shards\[0\].crc32 is not a number for each record"),
    ],
)
def test_an_index_of_other_types_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    prepared(tmp_path / "out", make_records(tmp_path, 4, photos=False))
    path = tmp_path / "out" / INDEX
    index = json.loads(path.read_text())
    if field in index:
        index[field] = value
    else:
        index["shards"][0][field.removesuffix(" of it")] = value
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"index.json: {message}"):
        PreparedShards(tmp_path / "out")


@pytest.mark.slow
def test_mutants_of_a_prepared_folder(tmp_path: Path) -> None:
    """Mutated shards, with and without the checksums that would detect it: a record or one error line, no crash."""
    folder = tmp_path / "out"
    prepared(folder, make_records(tmp_path, 4, photos=False))
    shard, index = folder / "shard_00000.arrow", folder / INDEX
    whole, told = shard.read_bytes(), json.loads(index.read_text())
    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        content = bytearray(whole)
        for place in generator.integers(len(content), size=generator.integers(1, 4)).tolist():
            content[place] = int(generator.integers(256))
        shard.write_bytes(content)
        told["shards"][0].pop("crc32", None)
        told["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()  # as an attacker would
        index.write_text(json.dumps(told))
        try:
            shards = PreparedShards(folder)
            for number in range(len(shards)):
                shards[number].record.check()
        except UserError:
            refused += 1
    assert 20 < refused < 150
