"""The embedded estimator: heatmaps of a rotated window are mapped to our crop without shift; error messages."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates, spline_filter1d

from hmdiff.body.skeletons import HALPE26
from hmdiff.errors import UserError
from hmdiff.estimators import landmark_files, landmarks
from hmdiff.estimators.landmark_windows import (
    DETECTOR_SIZE,
    Detections,
    anchors,
    decode_detections,
    landmark_window,
    letterbox,
    merge_passes,
    tiles,
)
from hmdiff.heatmaps import Crop, gaussian_heatmaps, heatmap_peaks, soft_argmax

NETWORKS = pytest.mark.skipif(not landmark_files.installed(), reason="the photo extra is not installed")


@pytest.mark.parametrize("turn", [0.0, 0.3, -1.2, math.pi / 2, math.pi])
@pytest.mark.parametrize("crop_turn", [0.0, 0.8])
def test_a_synthetic_landmark_comes_back_within_half_a_photo_pixel(turn: float, crop_turn: float) -> None:
    """Windows of 300 to 900 photo pixels, heatmaps as narrow as the network's."""
    generator = torch.Generator().manual_seed(7)
    for side in (300.0, 900.0):
        of_window = Crop.of(torch.tensor([[500.0, 420.0]]), torch.tensor([side]), torch.tensor([turn]))
        ours = Crop.of(torch.tensor([[512.0, 405.0]]), torch.tensor([0.9 * side]), torch.tensor([crop_turn]))
        points = (torch.rand(1, 20, 2, generator=generator) - 0.5) * 0.8
        values = gaussian_heatmaps(points, torch.ones(1, 20), 1.4)[0].numpy()
        moved = landmarks.resample_to_crop(values, of_window, ours)
        expected = of_window.to_photo(points)[0]
        found = ours.to_photo(heatmap_peaks(moved)[0][None])[0]
        mean = ours.to_photo(soft_argmax(moved)[None])[0]
        assert (found - expected).norm(dim=-1).max() < 0.5
        assert (mean - expected).norm(dim=-1).max() < 0.5
        assert moved.min() >= 0 and 0.9 < moved.amax((1, 2)).min() <= 1.05


class _Passes(landmarks.LandmarkEstimator):
    """Its landmark network sees the person in one window of the photo, whatever window it is given."""

    def __init__(self, person: Crop) -> None:
        self.person, self.windows = person, 0

    def _landmarks(self, picture: np.ndarray) -> dict[int, np.ndarray]:
        # The window's corner is read back from the picture, whose colours are the photo's coordinates.
        self.windows += 1
        pixels = torch.tensor(picture[[64, 64, 192], [64, 192, 64], :2] * 255 * 4, dtype=torch.float32)
        right, down = (pixels[1] - pixels[0]) / 128, (pixels[2] - pixels[0]) / 128
        hips, above = self.person.center[0], self.person.to_photo(torch.tensor([[[0.0, -0.8]]]))[0, 0]
        landmark = torch.zeros(39, 5)
        for number, point in ((33, hips), (34, above)):
            landmark[number, :2] = 64 + torch.linalg.solve(torch.stack([right, down], 1), point - pixels[0])
        size = landmarks.HEATMAP_SIZE**2 * 39
        outputs = [landmark.numpy(), np.full(1, 9.0), np.zeros(size), np.zeros(landmarks.WINDOW**2)]
        return {output.size: output for output in outputs}


@pytest.mark.parametrize(
    ("shift", "factor", "turn", "passes"),
    [(0.05, 1.05, 0.1, 1), (0.2, 1.0, 0.0, 2), (0.0, 1.3, 0.0, 2), (0.0, 1.0, 0.4, 2), (0.0, 1.0, 2 * math.pi, 1)],
)
def test_another_window_gets_another_pass(shift: float, factor: float, turn: float, passes: int) -> None:
    rows, columns = np.mgrid[:1000, :1000]
    photo = np.stack([columns / 4, rows / 4, 0 * rows], -1).astype(np.uint8)
    person = landmark_window(np.array([500.0, 480.0]), np.array([500.0, 320.0]))
    assert person is not None
    estimator = _Passes(person)
    side = float(person.side[0])
    first = Crop.of(person.center + shift * side, factor * person.side, person.rotation + turn)
    found = estimator._person(photo, first)
    assert found is not None and estimator.windows == passes
    near = found.window if passes == 2 else person
    torch.testing.assert_close(near.center, person.center, atol=6.0, rtol=0)
    assert float(near.side[0]) == pytest.approx(side, rel=0.03)


def test_heatmaps_are_resampled_as_scipys_cubic_splines() -> None:
    values = np.random.default_rng(0).random((3, 64, 64))
    coefficients = spline_filter1d(spline_filter1d(values, axis=1), axis=2)
    pixels = torch.rand(20, 30, 2, generator=torch.Generator().manual_seed(0)) * 64 - 0.5  # the borders too
    found = landmarks._cubic_spline(torch.from_numpy(coefficients).float(), pixels)
    at = pixels.flip(-1).permute(2, 0, 1).numpy()
    wanted = np.stack([map_coordinates(of, at, order=3, mode="mirror") for of in values])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)


def test_outside_the_window_there_is_nothing() -> None:
    of_window = Crop.of(torch.tensor([[100.0, 100.0]]), torch.tensor([50.0]))
    far = Crop.of(torch.tensor([[400.0, 100.0]]), torch.tensor([50.0]))
    assert landmarks.resample_to_crop(np.ones((2, 64, 64)), of_window, far).eq(0).all()


def test_the_window_is_turned_so_that_the_second_point_is_above_the_first() -> None:
    for angle in (0.0, 1.0, -2.5):
        middle = np.array([200.0, 150.0])
        above = middle + 80 * np.array([math.sin(angle), -math.cos(angle)])
        found = landmark_window(middle, above)
        assert found is not None and found.side.item() == pytest.approx(200)
        local = found.from_photo(torch.tensor(above[None], dtype=torch.float32))[0]
        assert local[0] == pytest.approx(0, abs=1e-5) and local[1] == pytest.approx(-0.8, abs=1e-5)
    assert landmark_window(middle, middle) is None


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900)])
def test_boxes_of_the_detector_come_back_in_photo_pixels(width: int, height: int) -> None:
    """Two people, each detected by several anchors: one detection each, at the mean of its points."""
    raw, logits = np.zeros((len(anchors()), 12)), np.full(len(anchors()), -100.0)
    affine = letterbox(width, height)
    for person, (x, y) in enumerate([(0.3 * width, 0.4 * height), (0.8 * width, 0.5 * height)]):
        place = (affine @ [x, y, 1]) / DETECTOR_SIZE
        near = np.argsort(np.linalg.norm(anchors() - place, axis=1))[: 3 + person]
        for index in near:
            shift = (place - anchors()[index]) * DETECTOR_SIZE
            raw[index, :4] = *shift, 30, 30
            raw[index, 4:] = np.tile(shift, 4)
            logits[index] = 3.0 - person
    points, scores, _ = decode_detections(raw, logits, affine)
    assert len(points) == 2 and scores[0] > scores[1] > 0.8
    np.testing.assert_allclose(points[0], np.tile([0.3 * width, 0.4 * height], (4, 1)), atol=1e-6)
    np.testing.assert_allclose(points[1], np.tile([0.8 * width, 0.5 * height], (4, 1)), atol=1e-6)
    assert len(decode_detections(raw, np.full_like(logits, -9.0), affine)[0]) == 0


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (3000, 200)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_cover_the_photo_and_overlap(width: int, height: int, count: int) -> None:
    """Anything up to three tenths of a tile is complete in one of them."""
    side = max(width, height) / count
    corners = [-affine[:, 2] / affine[0, 0] for affine in tiles(width, height, count)]
    assert all(affine[0, 0] == pytest.approx(DETECTOR_SIZE / side) for affine in tiles(width, height, count))
    size = 0.3 * side
    for x in np.linspace(0, max(width - size, 0), 23):
        for y in np.linspace(0, max(height - size, 0), 23):
            low, high = np.array([x, y]), np.minimum([x + size, y + size], [width, height])
            assert any((low >= each - 1e-6).all() and (high <= each + side + 1e-6).all() for each in corners)


def test_one_person_of_several_looks_is_one() -> None:
    def detected_at(*people: tuple[float, float, float, float], count: int = 1) -> Detections:  # x, y, reach, score
        points = np.array([[[x, y], [x, y - reach], [x, y], [x, y]] for x, y, reach, _ in people]).reshape(-1, 4, 2)
        return Detections(points, np.array([each[3] for each in people]), np.full(len(people), count))

    wide = detected_at((100, 100, 80, 0.6), (400, 100, 80, 0.9))
    close = detected_at((105, 98, 85, 0.95), (130, 60, 30, 0.9), (250, 100, 75, 0.7), count=4)
    found = merge_passes([wide, close])
    assert found.points[:, 0, 0].tolist() == [400, 250, 100], "the same again, and a hand on somebody, are left out"
    assert found.tiles_per_side.tolist() == [1, 4, 1]
    assert len(merge_passes([detected_at(), detected_at(count=2)]).scores) == 0


# -- the networks themselves


@pytest.fixture(scope="module")
def estimator() -> landmarks.LandmarkEstimator:
    return landmarks.LandmarkEstimator(threads=1)


@NETWORKS
def test_nobody_in_a_grey_photo(estimator: landmarks.LandmarkEstimator) -> None:
    for size in ((200, 300), (1, 1)):
        with pytest.raises(UserError, match=r"no person was found.*--box"):
            estimator.estimate(np.full((*size, 3), 120, np.uint8))
    with pytest.raises(UserError, match="lies outside"):
        estimator.estimate(np.zeros((20, 20, 3), np.uint8), [(50, 50, 60, 60)])


@NETWORKS
@pytest.mark.parametrize(("name", "limit"), [("skier", 0.05), ("lunge_barbell", 0.05)])
def test_joints_lie_where_the_labels_say(
    estimator: landmarks.LandmarkEstimator, shared_data: Path, name: str, limit: float
) -> None:
    from hmdiff.heatmaps import read_keypoints
    from hmdiff.heatmaps.keypoints import on_halpe26
    from hmdiff.viz.canvas import read_picture

    photo = shared_data / "photos" / f"{name}.jpg"
    seen = estimator.estimate(read_picture(photo))
    assert len(seen.heatmaps) == 1 and seen.heatmaps.valid[0].sum() == 21
    labels, valid = on_halpe26(read_keypoints(photo.with_suffix(".json"), photo))
    places, confidence = heatmap_peaks(seen.heatmaps.values)
    found = seen.heatmaps.crop.to_photo(places)
    both = valid & (labels[..., 2] > 0.2) & (confidence > 0.2)
    distance = (found - labels[..., :2]).norm(dim=-1)[both]
    assert len(distance) >= 14 and distance.mean() < limit * seen.heatmaps.side[0]
    assert not seen.heatmaps.valid[0, HALPE26.index("top_head")]


@NETWORKS
def test_somebody_who_hangs_upside_down_is_seen_in_a_turned_crop(
    estimator: landmarks.LandmarkEstimator, shared_data: Path
) -> None:
    from hmdiff.viz.canvas import read_picture

    photo = read_picture(shared_data / "photos" / "warrior_yoga.jpg")
    upright, turned = estimator.estimate(photo), estimator.estimate(np.ascontiguousarray(photo[::-1, ::-1]))
    assert upright.heatmaps.crop.rotation.item() == 0 and abs(turned.heatmaps.crop.rotation.item()) > 2.5
    size = torch.tensor([photo.shape[1], photo.shape[0]])
    places = [each.heatmaps.crop.to_photo(heatmap_peaks(each.heatmaps.values)[0])[0] for each in (upright, turned)]
    sure = heatmap_peaks(upright.heatmaps.values)[1][0] > 0.5
    distance = (places[0] - (size - places[1])).norm(dim=-1)[sure]
    assert distance.median() < 0.03 * upright.heatmaps.side[0]


def test_a_joint_that_is_not_in_the_picture_has_no_peak_and_its_landmark_sets_the_crop() -> None:
    of_window = Crop.of(torch.tensor([[300.0, 300.0]]), torch.tensor([512.0]))
    heat = gaussian_heatmaps(torch.full((1, 33, 2), -0.5), torch.full((1, 33), 0.8), 1.5)[0].numpy()
    found = np.zeros((33, 5), np.float32)
    found[:, :2], found[:, 4] = (192, 224), 9.0  # right of the middle and below; certainly in the image
    ankle = 27
    found[ankle, 4] = -4.0  # 0.018
    person = landmarks._Person(of_window, heat, found, np.zeros((600, 600), np.float32))
    assert person.heatmaps[ankle].max() < 0.02 < 0.7 < person.heatmaps[26].max()
    assert person.points[ankle].tolist() == pytest.approx([428, 492])  # 300 + 512 (192 / 256 - 1 / 2), ...
    assert person.points[26].tolist() == pytest.approx([172, 172], abs=5)  # the peak, up to a heatmap pixel


@NETWORKS
def test_legs_below_the_photos_edge_are_no_evidence(estimator: landmarks.LandmarkEstimator, shared_data: Path) -> None:
    """The skier cut at the hips, and the whole skier."""
    from hmdiff.viz.canvas import read_picture

    photo = read_picture(shared_data / "photos" / "skier.jpg")
    cut = np.ascontiguousarray(photo[:235])
    whole, seen = estimator.estimate(photo).heatmaps, estimator.estimate(cut).heatmaps
    ankles = [HALPE26.index(f"{side}_ankle") for side in ("left", "right")]
    shoulders = [HALPE26.index(f"{side}_shoulder") for side in ("left", "right")]
    before, after = (heatmap_peaks(each.values)[1][0] for each in (whole, seen))
    assert before[ankles].min() > 0.5 and after[ankles].max() < 0.25 < 0.4 < after[shoulders].min()
    bottom = [float(each.center[0, 1] + each.side[0] / 2) for each in (whole, seen)]
    assert bottom[1] > 300  # the crop has room for the legs outside the photo


@pytest.mark.slow
@NETWORKS
def test_a_crowd_of_thirty_is_seen_in_parts(estimator: landmarks.LandmarkEstimator, shared_data: Path) -> None:
    """Each too small to be detected in the whole photo, the only pass for video frames."""
    from hmdiff.viz.canvas import read_picture

    person = read_picture(shared_data / "photos" / "skier.jpg")[:, 220:560]
    crowd = np.tile(person, (5, 6, 1))
    crowds = landmarks.LandmarkEstimator(threads=1, max_people=40)
    with pytest.raises(UserError, match="no person was found"):
        crowds.estimate_frame(crowd)
    seen = crowds.estimate(crowd)
    cells = {(int(x // 340), int(y // 425)) for x, y in seen.heatmaps.crop.center.tolist()}
    assert len(cells) >= 28 and len(seen.heatmaps) == len(cells)
    limited = estimator.estimate(crowd)
    assert len(limited.heatmaps) == landmarks.MAX_PEOPLE and limited.num_skipped >= 18


@pytest.mark.slow
@NETWORKS
def test_people_beyond_the_most_are_said(shared_data: Path, tmp_path: Path) -> None:
    """The skier twice, side by side."""
    from PIL import Image

    from hmdiff.estimators.people import read_people
    from hmdiff.viz.canvas import read_picture

    photo = read_picture(shared_data / "photos" / "skier.jpg")
    Image.fromarray(np.concatenate([photo, photo], axis=1)).save(tmp_path / "two.png")
    one, both = (
        read_people(tmp_path / "two.png", source=landmarks.LandmarkEstimator(threads=1, max_people=most))
        for most in (1, 2)
    )
    assert len(one.heatmaps) == 1 and len(both.heatmaps) == 2 and not both.notes
    assert one.notes == (
        f"{tmp_path}/two.png: more people may be in it than the 1 that were taken; --max-people N takes more",
    )


# -- the files


def test_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(landmark_files, "package_folder", lambda: None)
    with pytest.raises(UserError, match=r'not installed: pip install "hmdiff\[photo\]"'):
        landmark_files.read_networks()
    with pytest.raises(UserError, match=r"no pose_detection\.tflite in it"):
        landmark_files.read_networks(tmp_path)
    (tmp_path / "x.task").write_bytes(b"no zip")
    with pytest.raises(UserError, match="no pose landmarker"):
        landmark_files.read_networks(tmp_path / "x.task")


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    for name in (landmark_files.DETECTOR, landmark_files.LANDMARKS):
        (tmp_path / name).write_bytes(b"another network")
    with pytest.raises(UserError, match=r"checksum .* found, 9ba9dd3d42ef expected"):
        landmark_files.read_networks(tmp_path)


@NETWORKS
def test_a_folder_and_mediapipes_download_serve_as_well(tmp_path: Path) -> None:
    networks = landmark_files.read_networks()
    for name, content in networks.items():
        (tmp_path / name).write_bytes(content)
    assert landmark_files.read_networks(tmp_path) == networks
    with zipfile.ZipFile(tmp_path / "pose_landmarker_full.task", "w") as archive:
        archive.writestr("pose_detector.tflite", networks[landmark_files.DETECTOR])
        archive.writestr("pose_landmarks_detector.tflite", networks[landmark_files.LANDMARKS])
    assert landmark_files.read_networks(tmp_path / "pose_landmarker_full.task") == networks
