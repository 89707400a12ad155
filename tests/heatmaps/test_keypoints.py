"""Every supported kind of keypoint file, and one-line errors for invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hmdiff.body.skeletons import COCO17, HALPE26, OPENPOSE18, OPENPOSE25
from hmdiff.errors import UserError
from hmdiff.heatmaps import PersonKeypoints, heatmap_peaks, heatmaps_from_keypoints, load_heatmaps, read_keypoints

PERSON = [[100.0 + 7 * j, 50.0 + 11 * j, 0.9] for j in range(17)]
FLAT = [number for joint in PERSON for number in joint]
FLAGS = [number for j in range(17) for number in (100 + 7 * j, 50 + 11 * j, (2, 1, 0)[j % 3])]
OPENPOSE = [number for j in range(25) for number in (100 + 7 * j, 50 + 11 * j, 0.8)]


def write(tmp_path: Path, data: Any, name: str = "k.json") -> Path:
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def annotation(**more: Any) -> dict[str, Any]:
    return {"image_id": 7, "keypoints": FLAGS, "num_keypoints": 12, "bbox": [90, 40, 200, 300]} | more


def coco(*annotations: dict[str, Any]) -> dict[str, Any]:
    images = [{"id": 7, "file_name": "dir/photo.jpg"}, {"id": 8, "file_name": "other.jpg"}]
    return {"images": images, "annotations": list(annotations)}


@pytest.mark.parametrize(
    ("data", "people"),
    [
        (PERSON, 1),
        (FLAT, 1),
        ([PERSON, PERSON], 2),
        ([FLAT, FLAT, FLAT], 3),
        ({"keypoints": PERSON}, 1),
        ({"keypoints": FLAT}, 1),
        ({"keypoints": [PERSON, PERSON]}, 2),
        ({"keypoints_coco17": PERSON, "box_xyxy": [1, 2, 300, 400], "licence": "-"}, 1),
        ([{"image_id": 1, "category_id": 1, "keypoints": FLAT, "score": 0.7}], 1),
    ],
)
def test_plain_forms(tmp_path: Path, data: Any, people: int) -> None:
    persons = read_keypoints(write(tmp_path, data))
    assert len(persons) == people
    for person in persons:
        assert person.names == COCO17
        torch.testing.assert_close(person.points, torch.tensor(PERSON))
    assert persons[0].box is None or persons[0].box.tolist() == [1, 2, 300, 400]


def test_coco_annotations_are_matched_by_the_photos_name(tmp_path: Path) -> None:
    other = annotation(image_id=8, bbox=[1, 2, 3, 4])
    path = write(tmp_path, coco(annotation(), other, annotation(iscrowd=1), annotation(num_keypoints=0)))
    (person,) = read_keypoints(path, "/anywhere/photo.jpg", (640, 480))
    assert person.points[:6, 2].tolist() == [1, 0.5, 0, 1, 0.5, 0]  # visibility 2, 1, 0
    assert person.box is not None and person.box.tolist() == [90, 40, 290, 340]
    with pytest.raises(UserError, match=r"none of its 2 images is 'third\.jpg'"):
        read_keypoints(path, "third.jpg")
    # All flags 1 means 'labelled but occluded' here, while in a detector's results 1 is a confidence.
    hidden = [number if i % 3 < 2 else 1 for i, number in enumerate(FLAGS)]
    (person,) = read_keypoints(write(tmp_path, coco(annotation(keypoints=hidden))), "photo.jpg")
    assert person.points[:, 2].eq(0.5).all()
    (person,) = read_keypoints(write(tmp_path, [{"image_id": 1, "keypoints": hidden}]))
    assert person.points[:, 2].eq(1).all()


def test_coco_results_of_several_images(tmp_path: Path) -> None:
    moved = [number + 5 for number in FLAT[:-1]] + [0.5]
    moved = [number if i % 3 < 2 else 0.5 for i, number in enumerate(moved)]
    path = write(tmp_path, [{"image_id": 785, "keypoints": FLAT}, {"image_id": 9, "keypoints": moved}])
    (person,) = read_keypoints(path, "000000000785.jpg")
    torch.testing.assert_close(person.points, torch.tensor(PERSON))
    with pytest.raises(UserError, match="results of several images, none with image_id '12'"):
        read_keypoints(path, "12.jpg")


@pytest.mark.parametrize(("count", "names"), [(25, OPENPOSE25), (18, OPENPOSE18)])
def test_openpose(tmp_path: Path, count: int, names: tuple[str, ...]) -> None:
    values = OPENPOSE[: 3 * count]
    values[3:6] = [0, 0, 0]  # no neck was detected
    path = write(tmp_path, {"version": 1.3, "people": [{"pose_keypoints_2d": values}] * 2})
    persons = read_keypoints(path, photo_size=(640, 480))
    assert len(persons) == 2 and persons[0].names == names
    heatmaps = heatmaps_from_keypoints(persons)
    peaks, confidence = heatmap_peaks(heatmaps.values)
    neck, ankle = HALPE26.index("neck"), HALPE26.index("left_ankle")
    assert heatmaps.valid[0, neck] and confidence[0, neck] == 0  # this source has necks, but detected none here
    assert heatmaps.valid[0, HALPE26.index("mid_hip")] == (count == 25)
    assert not heatmaps.valid[0, HALPE26.index("top_head")]
    expected = heatmaps.crop.from_photo(persons[0].points[None, :, :2])[0]
    torch.testing.assert_close(peaks[0, ankle], expected[names.index("left_ankle")], rtol=0, atol=1e-3)


def test_heatmaps_of_keypoints() -> None:
    points = torch.tensor(PERSON)
    points[3, 2], points[4, 2] = 0, 0.4
    boxed = PersonKeypoints(points, COCO17, torch.tensor([90.0, 40, 230, 240]))
    heatmaps = heatmaps_from_keypoints([boxed, PersonKeypoints(points, COCO17)])
    torch.testing.assert_close(heatmaps.center[0], torch.tensor([160.0, 140]))
    assert heatmaps.side[0] == 250
    torch.testing.assert_close(heatmaps.side[1], torch.tensor(1.4 * 16 * 11))
    assert heatmaps.valid.sum(1).tolist() == [17, 17]
    peaks, confidence = heatmap_peaks(heatmaps.values[:, :17])
    assert confidence[0, 3] == 0 and 0.37 < confidence[0, 4] <= 0.4
    found = points[:, 2] > 0
    for index in range(2):
        expected = heatmaps.crop[[index]].from_photo(points[None, :, :2])[0]
        torch.testing.assert_close(peaks[index, found], expected[found], rtol=0, atol=1e-3)
    given = heatmaps_from_keypoints([boxed], center=torch.tensor([[150.0, 130]]), side=torch.tensor([400.0]))
    assert given.side.tolist() == [400]
    with pytest.raises(UserError, match="all zero for person 0"):
        heatmaps_from_keypoints([boxed], center=torch.tensor([[5000.0, 130]]), side=torch.tensor([400.0]))
    with pytest.raises(UserError, match="no person"):
        heatmaps_from_keypoints([])


def changed(index: int, value: Any) -> list[Any]:
    return [*FLAT[:index], value, *FLAT[index + 1 :]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no person"),
        ({}, "no keypoints"),
        ({"box_xyxy": [1, 2, 3, 4]}, r"no keypoints \('box_xyxy' found\)"),
        ('"text"', "must be a list, str found"),
        ({"people": []}, "no person"),
        (coco(), "no person"),
        ({"people": [{"face": []}]}, "'pose_keypoints_2d'"),
        ({"people": [{"pose_keypoints_2d": FLAT}]}, "75 values .* got 51"),
        ({"people": 3}, "'people' must be a list"),
        (FLAT[:-1], "51 values expected .* got 50"),
        (PERSON[:16], "51 values expected .* got 48"),
        ({"keypoints": []}, "no person"),
        ([{"image_id": 1}], "without 'keypoints'"),
        ([{"image_id": 1, "keypoints": FLAT[:30]}], "51 values expected .* got 30"),
        (changed(27, float("nan")), "NaN or infinite value in keypoint 'left_wrist'"),
        (changed(27, 1e308), "a value too large for any photo in keypoint 'left_wrist'"),
        (changed(27, float("inf")), "NaN or infinite"),
        (changed(3, None), "must be numbers, null found"),
        (changed(3, "12"), "must be numbers"),
        (changed(2, 17.5), "confidence 17.5"),
        (changed(2, -0.5), "confidence -0.5"),
        ([[x, y, 0] for x, y, _ in PERSON], "all keypoints are zero"),
        ([[x + 1000, y, c] for x, y, c in PERSON], "outside the 640 x 480 photo"),
        ([[x / 640, y / 480, c] for x, y, c in PERSON], "span only"),
        ({"keypoints": FLAT, "box_xyxy": [10, 10, 5, 20]}, "box without size"),
        ({"keypoints": FLAT, "box_xyxy": [10, 10, 5]}, "four finite numbers"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, data: Any, message: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(UserError, match=message) as caught:
        read_keypoints(path, "photo.jpg", (640, 480))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json: cannot be read"):
        read_keypoints(tmp_path / "missing.json")
    with pytest.raises(UserError, match="is a folder, a file was expected"):
        read_keypoints(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not JSON"):
        read_keypoints(tmp_path / "binary.json")


def test_somebody_partly_outside_is_kept_and_nobody_seen_is_left_out(tmp_path: Path) -> None:
    partly = [[x - 150, y, c] for x, y, c in PERSON]
    nobody = [[0, 0, 0]] * 17
    (person,) = read_keypoints(write(tmp_path, [nobody, partly]), photo_size=(640, 480))
    assert person.points[0, 0] == -50


@pytest.mark.parametrize(("photo", "size", "joints"), [("lunge_barbell", (601, 900), 25), ("skier", (640, 425), 17)])
def test_real_keypoints_agree_with_the_real_heatmaps(
    shared_data: Path, photo: str, size: tuple[int, int], joints: int
) -> None:
    (person,) = read_keypoints(shared_data / "photos" / f"{photo}.json", f"{photo}.jpg", size)
    assert len(person.names) == joints and person.box is not None
    estimated = load_heatmaps(shared_data / "photos" / f"{photo}_heatmaps.npz")
    given = heatmaps_from_keypoints([person], estimated.center, estimated.side)
    ours = heatmaps_from_keypoints([person])
    torch.testing.assert_close(ours.side, estimated.side, rtol=1e-3, atol=0)  # the same box, the same padding
    (a, sure), (b, there) = heatmap_peaks(estimated.values), heatmap_peaks(given.values)
    distance = ((a - b).norm(dim=-1) * 32)[(sure > 0.3) & (there > 0.3)]
    assert len(distance) >= 8 and distance.median() < 2  # heatmap pixels: two sources, one convention
