"""Crops and augmentation: the image, its points, its camera and its 3D labels stay consistent."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from records import INTRINSICS, draw_photo, make_records, red_place
from small import free_body

from hmdiff.body.skeletons import HALPE26, SMPL24
from hmdiff.config import Augment
from hmdiff.data.transforms import (
    Augmentation,
    augment_points,
    augment_pose,
    crop_affine,
    crop_camera,
    map_points,
    sample_augmentation,
    scale_channels,
    swap_left_right,
    warp_crop,
)
from hmdiff.geometry import axis_angle_to_matrix

CHANGES = [
    Augmentation(flip, math.radians(degrees), scale)
    for flip, degrees, scale in itertools.product((False, True), (0, 25, -60), (1, 1.25))
]
CENTER, SIDE = np.array([200.0, 140.0]), 180.0


def test_without_change_it_is_the_upright_crop() -> None:
    points = np.random.default_rng(0).uniform(0, 400, (9, 2))
    np.testing.assert_allclose(map_points(points, crop_affine(CENTER, SIDE)), (points - CENTER) * 2 / SIDE, atol=1e-12)


def test_known_places() -> None:
    right = CENTER + np.array([SIDE / 2, 0])  # centre of the crop's right edge
    for augmentation, expected in (
        (Augmentation(), [1, 0]),
        (Augmentation(flip=True), [-1, 0]),
        (Augmentation(angle=math.pi / 2), [0, 1]),
        (Augmentation(flip=True, angle=math.pi / 2), [0, 1]),
        (Augmentation(scale=2), [0.5, 0]),
    ):
        np.testing.assert_allclose(map_points(right, crop_affine(CENTER, SIDE, augmentation)), expected, atol=1e-12)


@pytest.mark.parametrize("augmentation", CHANGES)
def test_projection_and_crop_agree(augmentation: Augmentation) -> None:
    """Projecting and then cropping equals turning the people and projecting with the crop's camera."""
    points = np.random.default_rng(1).normal(size=(20, 3)) * 0.5 + [0.4, -0.2, 4]
    photo = points @ INTRINSICS.T
    affine = crop_affine(CENTER, SIDE, augmentation)
    seen = map_points(photo[:, :2] / photo[:, 2:], affine)
    focal, principal = crop_camera(INTRINSICS, affine)
    turned = augment_points(points, augmentation)
    np.testing.assert_allclose(turned[:, :2] / turned[:, 2:] * focal + principal, seen, atol=1e-12)
    assert focal == pytest.approx(2 * 600 / (augmentation.scale * SIDE))


@pytest.mark.parametrize("augmentation", CHANGES)
def test_the_pose_turns_as_the_body_does(augmentation: Augmentation, tmp_path) -> None:  # type: ignore[no-untyped-def]
    body, _ = free_body()
    record = make_records(tmp_path, 1, photos=False)[0]

    def keypoints(pose: np.ndarray) -> np.ndarray:
        output = body(torch.from_numpy(record.betas).float(), axis_angle_to_matrix(torch.from_numpy(pose).float()))
        return (body.keypoints(output.vertices) - output.joints[0]).numpy()

    expected = swap_left_right(augment_points(keypoints(record.pose), augmentation), HALPE26, augmentation)
    found = keypoints(augment_pose(record.pose, SMPL24, augmentation))
    # The free body is only nearly mirror symmetric.
    np.testing.assert_allclose(found, expected, atol=2e-3 if augmentation.flip else 2e-6)


def test_a_mirrored_mirror_image_is_the_person() -> None:
    pose = np.random.default_rng(2).normal(size=(24, 3))
    flip = Augmentation(flip=True)
    np.testing.assert_allclose(augment_pose(augment_pose(pose, SMPL24, flip), SMPL24, flip), pose, atol=1e-12)
    left, right = SMPL24.index("left_knee"), SMPL24.index("right_knee")
    np.testing.assert_array_equal(augment_pose(pose, SMPL24, flip)[left], pose[right] * [1, -1, -1])


def test_a_whole_number_crop_copies_pixels() -> None:
    picture = np.random.default_rng(3).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    affine = crop_affine(np.array([40.0, 30.0]), 32.0)
    np.testing.assert_array_equal(warp_crop(picture, (0, 0, 80, 60), affine, 32), picture[14:46, 24:56])
    part = picture[10:50, 20:60]  # the same crop from a stored part of the photo
    np.testing.assert_array_equal(warp_crop(part, (20, 10, 60, 50), affine, 32), picture[14:46, 24:56])
    outside = warp_crop(picture, (0, 0, 80, 60), crop_affine(np.array([0.0, 30.0]), 32.0), 32)
    assert (outside[:, :15] == 0).all() and (outside[:, 16:] == picture[14:46, :16]).all()


@pytest.mark.parametrize("augmentation", CHANGES)
@pytest.mark.parametrize("stored", [1.0, 0.5])
def test_the_picture_lands_where_its_points_do(augmentation: Augmentation, stored: float, tmp_path) -> None:  # type: ignore
    import cv2

    dot = np.array([223.4, 121.7])
    draw_photo(tmp_path / "dot.png", dot)
    photo = cv2.imread(str(tmp_path / "dot.png"))[..., ::-1]
    part = photo[20:300, 50:400]
    if stored < 1:
        part = cv2.resize(part, None, fx=stored, fy=stored, interpolation=cv2.INTER_AREA)
    affine = crop_affine(CENTER, SIDE, augmentation)
    crop = warp_crop(np.ascontiguousarray(part), (50, 20, 400, 300), affine, 128)
    np.testing.assert_allclose(red_place(crop), map_points(dot, affine), atol=0.008)  # half a pixel


def test_nothing_aliases() -> None:
    board = np.indices((400, 400)).sum(0) % 2 * 255
    picture = np.repeat(board[..., None].astype(np.uint8), 3, -1)
    crop = warp_crop(picture, (0, 0, 400, 400), crop_affine(np.array([200.0, 200.0]), 330.0), 100)
    assert abs(crop.astype(float) - 127.5).max() < 4


def test_draws_follow_their_figures() -> None:
    drawn = [sample_augmentation(Augment(), np.random.default_rng([5, number])) for number in range(4000)]
    angles, scales = np.degrees([d.angle for d in drawn]), np.array([d.scale for d in drawn])
    gains = np.array([d.gains for d in drawn])
    assert np.mean([d.flip for d in drawn]) == pytest.approx(0.5, abs=0.03)
    assert (angles == 0).mean() == pytest.approx(0.6, abs=0.03)
    assert abs(angles).max() == pytest.approx(60) and angles[angles != 0].std() == pytest.approx(28.8, abs=1.5)
    assert (scales.min(), scales.max()) == (0.75, 1.25) and scales.mean() == pytest.approx(1, abs=0.01)
    assert gains.min() >= 0.6 and gains.max() <= 1.4 and gains.std() == pytest.approx(0.8 / 12**0.5, abs=0.01)
    assert sample_augmentation(Augment(), np.random.default_rng([5, 7])) == drawn[7]
    still = sample_augmentation(Augment(flip=0, noise=0, rotation=0, scale=0), np.random.default_rng(0))
    assert still == Augmentation()


def test_colours() -> None:
    picture = np.full((2, 2, 3), 200, np.uint8)
    assert scale_channels(picture, Augmentation(gains=(0.5, 1.0, 1.4)))[0, 0].tolist() == [100, 200, 255]
    assert scale_channels(picture, Augmentation()) is picture
