"""Every keypoint file family of docs/keypoints.md, row by row, and errors in real users' files."""

from __future__ import annotations

import copy
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from keypoint_documents import BODY, BOX, CROWDPOSE, HEIGHT, INSTANCE, ROWS, WIDTH, XYWH, dataset, flat, places
from PIL import Image

from hmdiff.body.skeletons import COCO17, HALPE26
from hmdiff.errors import UserError
from hmdiff.heatmaps import PhotoInfo, heatmaps_from_keypoints, photo_info, read_keypoints
from hmdiff.heatmaps.formats import about_many, document, has_keypoints, read_people_of
from hmdiff.heatmaps.formats.joint_names import canonical, map_names
from hmdiff.heatmaps.keypoints import body_turn, on_halpe26


def write(folder: Path, data: Any, name: str = "k") -> Path:
    path = folder / (name + (".txt" if isinstance(data, str) else ".json"))
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table(tmp_path: Path, row: str) -> None:
    """Each joint arrives in photo pixels under its own name, and no other name is set."""
    data, names = ROWS[row]
    path = write(tmp_path, data)
    assert has_keypoints(path)
    people, notes = read_people_of(path, "somewhere/photo.jpg", PhotoInfo(WIDTH, HEIGHT))
    assert len(people) == 1 and not notes
    points, valid = on_halpe26(people)
    expected = {name for name in names if name in HALPE26}
    assert {name for name, there in zip(HALPE26, valid[0], strict=True) if there} == expected
    for name in expected:
        found = points[0, HALPE26.index(name)].tolist()
        assert found[:2] == pytest.approx(BODY[name], abs=1e-3), name
        assert found[2] > 0.85, name
    if people[0].box is not None:
        assert people[0].box.tolist() == pytest.approx(BOX, abs=1e-3)
    heatmaps_from_keypoints(people)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "keypoints.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row for row in rows if row in ROWS] == list(ROWS)


# -- names


@pytest.mark.parametrize(
    "spelled",
    [
        "LShoulder",
        "left shoulder",
        "l_shoulder",
        "Left-Shoulder",
        "leftShoulder",
        "shoulder_left",
        "lshoulder",
        "L_Shoulder",
    ],
)
def test_spellings_of_one_joint(spelled: str) -> None:
    assert canonical(spelled) == "left_shoulder"


def test_unknown_names_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="joint names wing_1, wing_2, tail are not known"):
        map_names(["wing_1", "wing_2", "tail"], "x.json")
    data = dataset(["left_fin" if name == "nose" else name for name in COCO17], list(COCO17))
    people, notes = read_people_of(write(tmp_path, data), "photo.jpg", PhotoInfo(WIDTH, HEIGHT))
    assert len(people) == 1 and notes == [f"{tmp_path / 'k.json'}: joints left_fin are not known: left out"]
    with pytest.raises(UserError, match="14 joints without names"):
        read_keypoints(write(tmp_path, [{"image_id": 1, "keypoints": flat(CROWDPOSE)}]))


# -- which photo


def two_photos(first: str, second: str) -> dict[str, Any]:
    data = dataset(list(COCO17), list(COCO17))
    data["images"] = [{"id": 1, "file_name": first}, {"id": 2, "file_name": second}]
    moved = [value + 20 if index % 3 == 0 else value for index, value in enumerate(flat(COCO17, 2))]
    data["annotations"].append(data["annotations"][0] | {"id": 8, "image_id": 2, "keypoints": moved, "bbox": None})
    return data


@pytest.mark.parametrize(
    ("first", "second", "photo", "person"),
    [
        ("images/a/0.jpg", "images/b/0.jpg", "a/0.jpg", 0),
        ("images/a/0.jpg", "images/b/0.jpg", "b/0.jpg", 1),
        (r"..\label\a\0.jpg", r"..\label\b\0.jpg", "b/0.jpg", 1),
        ("x.jpg", "été.jpg", unicodedata.normalize("NFD", "été.jpg"), 1),
        ("a.000001.60_C", "a.000002.60_C", "a.000002.60_C.jpg", 1),
        ("12.jpg", "000012.png", "12.jpg", 0),
        ("x.jpg", "PHOTO.JPG", "photo.jpg", 1),
    ],
)
def test_the_photo_is_found_by_its_name(tmp_path: Path, first: str, second: str, photo: str, person: int) -> None:
    (found,) = read_keypoints(write(tmp_path, two_photos(first, second)), photo)
    assert found.points[0, 0] == BODY["nose"][0] + 20 * person
    results = [
        {"image_id": name, "keypoints": flat(COCO17), "score": index} for index, name in enumerate((first, second))
    ]
    results[1]["keypoints"] = [value + 20 if i % 3 == 0 else value for i, value in enumerate(flat(COCO17))]
    (found,) = read_keypoints(write(tmp_path, results), photo)
    assert found.points[0, 0] == BODY["nose"][0] + 20 * person


def test_two_photos_of_one_name_without_folders_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, two_photos("images/a/0.jpg", "images/b/0.jpg"))
    with pytest.raises(UserError, match=r"may be its images/a/0\.jpg or its images/b/0\.jpg"):
        read_keypoints(path, "c/0.jpg")


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, two_photos("a.jpg", "b.jpg"))
    parsed = []
    real = document.parse_json
    monkeypatch.setattr(document, "parse_json", lambda *words: parsed.append(1) or real(*words))
    assert about_many(path)
    for _ in range(3):
        read_keypoints(path, "a.jpg")
        read_keypoints(path, "b.jpg")
    assert len(parsed) == 1
    path.write_text(json.dumps(two_photos("c.jpg", "d.jpg")) + " ")  # a changed file is read again
    read_keypoints(path, "c.jpg")
    assert len(parsed) == 2


# -- sizes and turns


def labelled(tmp_path: Path, width: int, height: int, scale: float = 1.0) -> Path:
    data = dataset(list(COCO17), list(COCO17))
    data["images"][0] |= {"width": width, "height": height}
    points = [value * scale if index % 3 < 2 else value for index, value in enumerate(flat(COCO17, 2))]
    data["annotations"][0] |= {"keypoints": points, "bbox": [value * scale for value in XYWH]}
    return write(tmp_path, data)


def test_labels_of_a_smaller_copy_are_scaled(tmp_path: Path) -> None:
    path = labelled(tmp_path, WIDTH // 2, HEIGHT // 2, 0.5)
    (person,), notes = read_people_of(path, "photo.jpg", PhotoInfo(WIDTH, HEIGHT))
    torch.testing.assert_close(person.points[:, :2], torch.tensor(places(COCO17, None)))
    assert person.box is not None and person.box.tolist() == BOX
    assert "200 x 150 in the file, 400 x 300 in the photo" in notes[0]


@pytest.mark.parametrize("orientation", [6, 8])
def test_labels_of_the_stored_pixels_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    """The photo is stored on its side; Pillow rotates it for display, and the labels must follow."""
    shown = Image.new("RGB", (WIDTH, HEIGHT))
    stored = shown.rotate(90 if orientation == 6 else -90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif)
    info = photo_info(tmp_path / "photo.jpg")
    assert info.size == (WIDTH, HEIGHT) and info.stored_size == (HEIGHT, WIDTH)
    turned = [(y, WIDTH - x) if orientation == 6 else (HEIGHT - y, x) for x, y in places(COCO17, None)]
    data = dataset(list(COCO17), list(COCO17))
    data["images"][0] |= {"width": HEIGHT, "height": WIDTH}
    data["annotations"][0] |= {"keypoints": [n for x, y in turned for n in (x, y, 2)], "bbox": None}
    (person,), notes = read_people_of(write(tmp_path, data), tmp_path / "photo.jpg", info)
    torch.testing.assert_close(person.points[:, :2], torch.tensor(places(COCO17, None)))
    assert "turned as the photo's EXIF tag" in notes[0]
    del data["images"][0]["width"]  # without a size, joints outside the displayed photo are refused
    tall = [n for x, y in turned for n in (x, y + (40 if orientation == 6 else 0), 2)]
    data["annotations"][0]["keypoints"] = tall
    if max(y for _, y in turned) + 40 > HEIGHT:
        with pytest.raises(UserError, match="as it is stored"):
            read_people_of(write(tmp_path, data), tmp_path / "photo.jpg", info)


def test_sizes_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="640 x 300 in the file, 400 x 300 in the photo"):
        read_keypoints(labelled(tmp_path, 640, 300), "photo.jpg", (WIDTH, HEIGHT))


def test_focal_length_of_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0xA405: 26}
    Image.new("RGB", (400, 300)).save(tmp_path / "a.jpg", exif=exif)
    assert photo_info(tmp_path / "a.jpg").focal == pytest.approx(26 / 43.2666 * 500, rel=1e-4)
    exif[0x8769] = {0xA405: 26, 0xA002: 4000, 0xA003: 3000}
    Image.new("RGB", (300, 300)).save(tmp_path / "b.jpg", exif=exif)  # cropped since: the focal length is unknown
    assert photo_info(tmp_path / "b.jpg").focal is None


# -- joints, boxes, people


def test_a_joint_at_exactly_zero_was_not_found(tmp_path: Path) -> None:
    data = copy.deepcopy(ROWS["mmpose predictions"][0])
    data[0]["keypoints"][9] = [0, 0]
    (person,) = read_keypoints(write(tmp_path, data), "photo.jpg", (WIDTH, HEIGHT))
    assert person.points[9, 2] == 0 and (person.points[:, 2] > 0).sum() == 16
    assert heatmaps_from_keypoints([person]).side < 320


@pytest.mark.parametrize(("place", "score"), [((9000, -3000), 0.06), ((9000, -3000), 0.9), ((390, 290), 0.06)])
def test_far_or_faint_joints_do_not_set_the_crop(tmp_path: Path, place: tuple[int, int], score: float) -> None:
    points = places(COCO17)
    plain = heatmaps_from_keypoints(read_keypoints(write(tmp_path, points), None, (WIDTH, HEIGHT)))
    points[9] = [*map(float, place), score]
    (person,), notes = read_people_of(write(tmp_path, points), None, PhotoInfo(WIDTH, HEIGHT))
    crop = heatmaps_from_keypoints([person])
    assert crop.side[0] <= 1.05 * plain.side[0]
    assert any("left_wrist far outside" in note for note in notes) == (place[0] > WIDTH)


@pytest.mark.parametrize(
    ("row", "box", "note"),
    [
        ("COCO data set", BOX, "read as x1, y1, x2, y2"),
        ("AlphaPose, 17", BOX, "read as x1, y1, x2, y2"),
        ("mmpose predictions", [XYWH], "read as x, y, width, height"),
        ("COCO data set", [5, 5, 0, 10], "does not fit its keypoints"),
        ("COCO data set", [300, 200, 50, 50], "does not fit its keypoints"),
    ],
)
def test_boxes_in_the_other_notation_and_of_no_use(tmp_path: Path, row: str, box: Any, note: str) -> None:
    data = copy.deepcopy(ROWS[row][0])
    item = data["annotations"][0] if isinstance(data, dict) else data[0]
    item["box" if "box" in item else "bbox"] = box
    (person,), notes = read_people_of(write(tmp_path, data), "photo.jpg", PhotoInfo(WIDTH, HEIGHT))
    assert note in notes[0]
    assert (person.box is None) == ("of no use" in note or "does not fit" in note)
    assert person.box is None or person.box.tolist() == BOX


def test_one_bad_person_does_not_keep_the_others(tmp_path: Path) -> None:
    good = ROWS["OpenPose BODY_25"][0]["people"][0]
    two = [120.5, 60.2, 0.21, 121.0, 66.9, 0.18, *[0.0] * 69]
    data = {"people": [good, {"pose_keypoints_2d": two}, {"pose_keypoints_2d": [float("nan"), 1, 1, *two[3:]]}]}
    people, notes = read_people_of(write(tmp_path, data), "photo.jpg", PhotoInfo(WIDTH, HEIGHT))
    assert len(people) == 1 and len(notes) == 2
    assert "span only 6.7 pixels" in notes[0] and "(person 1 left out)" in notes[0] and "NaN" in notes[1]
    with pytest.raises(UserError, match="span only"):
        read_keypoints(write(tmp_path, {"people": data["people"][1:]}), "photo.jpg", (WIDTH, HEIGHT))


def test_who_a_person_is_comes_along(tmp_path: Path) -> None:
    def identity(row: str) -> dict[str, str]:
        (person,) = read_keypoints(write(tmp_path, ROWS[row][0]), "photo.jpg", (WIDTH, HEIGHT))
        return person.identity

    assert identity("COCO data set") == {"annotation": "7"}
    assert identity("AlphaPose, 17") == {"track": "3"} and identity("ultralytics to_json") == {"track": "4"}
    assert identity("OpenPose BODY_25") == {}  # -1 means no id


# -- people who are turned


@pytest.mark.parametrize("degrees", [0, 20, 50, 75, 90, 180, -135])
def test_a_turned_person_gets_a_turned_crop(degrees: int) -> None:
    """The same heatmaps as upright, for any rotation in the photo."""
    from hmdiff.heatmaps import PersonKeypoints

    upright = torch.tensor(places(HALPE26))
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    points = torch.cat([(upright[:, :2] - 200) @ turn.T + 200, upright[:, 2:]], 1)
    found = body_turn(points[:, :2], points[:, 2])
    expected = angle.item() if abs(degrees) > 60 else 0.0
    assert math.cos(found - expected) > 0.999
    before = heatmaps_from_keypoints([PersonKeypoints(upright, HALPE26)])
    after = heatmaps_from_keypoints([PersonKeypoints(points, HALPE26)])
    if abs(degrees) > 60:
        torch.testing.assert_close(after.side, before.side, rtol=0.03, atol=0)
        assert (after.values - before.values).abs().max() < 0.2


def test_who_bends_or_sits_is_upright() -> None:
    points = torch.tensor(places(HALPE26))
    bent = points.clone()
    above = [HALPE26.index(name) for name in ("left_shoulder", "right_shoulder", "neck", "nose")]
    bent[above, 1] = 320 - bent[above, 1]  # the torso hangs, the legs stand
    assert body_turn(bent[:, :2], bent[:, 2]) == 0


@pytest.mark.parametrize(
    "data", [{"instance_info": [3.5]}, {"predictions": [[7, INSTANCE]]}, {"instance_info": [{"instances": [None]}]}]
)
def test_instances_of_mmpose_that_are_none(tmp_path: Path, data: Any) -> None:
    """Regression from `python -m tools.campaign.mutants --seed 20`: numbers in place of instances raised tracebacks."""
    with pytest.raises(UserError, match=r"instance 0 is (3\.5|7|None), a mapping with 'keypoints' is expected"):
        read_keypoints(write(tmp_path, data), "photo.jpg", (WIDTH, HEIGHT))
