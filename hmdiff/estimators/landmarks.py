"""The embedded pose estimator: two small MediaPipe networks run by LiteRT; the default source for photos without
labels.

BlazePose (Bazarevsky et al., arXiv 2006.10204): a face detector that also gives the body's size and rotation, and a
landmark network with 33 landmarks, their 64 x 64 heatmaps and a silhouette. We use the heatmaps, not the landmarks,
resampled from the rotated window to our crop, which keeps both modes of an ambiguous joint. Joints outside the photo
still have a peak, so each heatmap is multiplied by the network's probability that the joint is in the image (presence),
and such joints set the crop by their landmarks. docs/keypoints.md has the measured errors. P people, W = 256 pixels per
side of a window.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import spline_filter1d
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, shared_joints
from hmdiff.errors import UserError
from hmdiff.estimators.landmark_files import DETECTOR, INSTALL, LANDMARKS, read_networks
from hmdiff.estimators.landmark_windows import (
    DETECTOR_SIZE,
    Detections,
    decode_detections,
    landmark_window,
    landmark_window_of_box,
    merge_passes,
    tiles,
)
from hmdiff.estimators.source import Box, DetectedPeople, check_boxes
from hmdiff.heatmaps import HEATMAP_SIZE, Crop, Heatmaps, concatenate_heatmaps, crop_from_keypoints
from hmdiff.heatmaps.distribution import pixel_coordinates
from hmdiff.heatmaps.formats.joint_names import MEDIAPIPE33
from hmdiff.heatmaps.keypoints import body_turn

WINDOW = 256
MAX_PEOPLE = 10
_MIN_PERSON_SCORE = 0.5  # minimum score of a person in the window
_MIN_FACE_SCORE = 0.5  # minimum detection score; 0.2 if that detects nobody
_MIN_FACE_SCORE_RETRY = 0.2
_TILE_PASSES = (2, 4)  # tiles along the photo's longer side, in the passes after the whole photo
# Relative to the photo's longer side: one person of at least this hip-to-head distance ends the search.
_FILLS_PHOTO = 0.24
# Median joint confidence of people found in tiles: above 0.6 for people, below 0.4 for others.
_MIN_MEDIAN_CONFIDENCE = 0.5
_MIN_TILE_SIDE = 160  # minimum side of a tile, photo pixels
_MIN_PRESENCE = 0.5  # presence from which a joint's peak sets the crop instead of its landmark
_LANDMARK_PASSES = 2  # at most
# A window that its first pass moves or resizes by less than this share, and turns by less, is kept: a second pass
# changes the joints by 0.5 to 0.75 % of the crop, as a third does, and is no closer to the labels (LOG.md).
_SAME_WINDOW, _SAME_TURN = 0.1, 0.15
_SAME_PERSON = 0.25  # mean joint distance, relative to their extent, below which two detections are one person
_WINDOW_LANDMARKS = (33, 34)  # landmarks that set the next window, like the detector's first two points


class LandmarkEstimator:
    """Raises `UserError` if the networks or their runtime are not installed, or are not the tested versions."""

    name = "embedded pose estimator (MediaPipe BlazePose)"

    def __init__(
        self,
        place: str | Path | None = None,  # a folder or .task with the networks; None: the installed package's
        threads: int = 2,
        max_people: int = MAX_PEOPLE,
    ) -> None:
        networks = read_networks(place)
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise UserError(f"the pose estimator needs ai-edge-litert, which is not installed: {INSTALL}") from None
        self._detector, self._landmarks = (
            _Network(Interpreter(model_content=networks[name], num_threads=threads)) for name in (DETECTOR, LANDMARKS)
        )
        self.max_people = max_people

    def estimate(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        boxes: Sequence[Box] | None = None,
    ) -> DetectedPeople:
        """Everybody, by falling score. Raises `UserError` if nobody is detected.

        Unless one person fills the photo, tiles of it are searched too: the detector misses small people.
        """
        return self._estimate(photo, boxes, _TILE_PASSES)

    def estimate_frame(self, photo: np.ndarray, boxes: Sequence[Box] | None = None) -> DetectedPeople:
        """As `estimate`, without tiles: for video frames, where tiles would be slow."""
        return self._estimate(photo, boxes, ())

    def _estimate(self, photo: np.ndarray, boxes: Sequence[Box] | None, tile_passes: Sequence[int]) -> DetectedPeople:
        height, width = photo.shape[:2]
        if boxes is not None:
            windows = [(landmark_window_of_box(box), False) for box in check_boxes(boxes, width, height).tolist()]
        else:
            detected = self._detect(photo, tile_passes)
            pairs = zip(detected.points, detected.tiles_per_side > 1, strict=True)
            windows = [
                (window, from_tile)
                for points, from_tile in pairs
                if (window := landmark_window(points[0], points[1])) is not None
            ]
        people: list[_Person] = []
        num_skipped = 0
        for number, (initial, from_tile) in enumerate(windows):
            person = self._person(photo, initial)
            if person is not None and from_tile and float(person.confidence.median()) < _MIN_MEDIAN_CONFIDENCE:
                continue
            if boxes is None and (person is None or any(_is_same_person(person, other) for other in people)):
                continue
            if person is None:
                raise UserError("no person is seen in the given box; give the box of a whole person, or none")
            people.append(person)
            if boxes is None and len(people) == self.max_people:
                num_skipped = len(windows) - number - 1
                break
        if not people:
            raise UserError(
                "no person was found by the pose estimator; give the person's place by --box X1,Y1,X2,Y2, keypoints by "
                "--keypoints FILE, or another estimator by --pose MODEL"
            )
        heatmaps = concatenate_heatmaps([_heatmaps(person) for person in people])
        masks = tuple(person.silhouette for person in people)
        return DetectedPeople(heatmaps, torch.stack([_box(person) for person in people]), num_skipped, masks)

    def _detect(self, photo: np.ndarray, tile_passes: Sequence[int]) -> Detections:
        height, width = photo.shape[:2]
        whole = self._detect_in_tiles(photo, 1)
        confident = whole.of(whole.scores >= _MIN_FACE_SCORE)
        if len(confident.scores) == 1:
            (hips, above) = confident.points[0, :2]
            if np.linalg.norm(above - hips) > _FILLS_PHOTO * max(width, height):
                tile_passes = ()
        passes = [
            self._detect_in_tiles(photo, count) for count in tile_passes if max(width, height) >= count * _MIN_TILE_SIDE
        ]
        return merge_passes(
            [
                confident if len(confident.scores) else whole,
                *(detected.of(detected.scores >= _MIN_FACE_SCORE) for detected in passes),
            ]
        )

    def _detect_in_tiles(self, photo: np.ndarray, count: int) -> Detections:
        detections = []
        affines = tiles(photo.shape[1], photo.shape[0], count)
        smoothed = _smoothed(photo, affines[0])
        for affine in affines:
            picture = _warp_affine(smoothed, affine, DETECTOR_SIZE).astype(np.float32) / 127.5 - 1
            outputs = self._detector(picture)
            detections.append(
                decode_detections(outputs[2254 * 12], outputs[2254].ravel(), affine, _MIN_FACE_SCORE_RETRY, count)
            )
        return merge_passes([Detections(*map(np.concatenate, zip(*detections, strict=True)))])

    def _person(self, photo: np.ndarray, initial: Crop) -> _Person | None:
        """The landmark network's outputs, again in the window of its own first pass where that one is another."""
        current = initial
        for number in range(_LANDMARK_PASSES):
            affine = np.array(current.affine(0, WINDOW))
            picture = _warp(photo, affine, WINDOW).astype(np.float32) / 255
            outputs = self._landmarks(picture)
            if float(outputs[1].ravel()[0]) < _MIN_PERSON_SCORE:
                return None
            landmarks = outputs[39 * 5].reshape(39, 5)
            if number < _LANDMARK_PASSES - 1:
                local = torch.tensor(landmarks[list(_WINDOW_LANDMARKS), :2] / (WINDOW / 2) - 1)[None]
                hips, above = current.to_photo(local)[0].numpy()
                refined = landmark_window(hips, above) or current
                if _is_same_window(refined, current):
                    break
                current = refined
        values = _sigmoid(outputs[HEATMAP_SIZE**2 * 39].reshape(HEATMAP_SIZE, HEATMAP_SIZE, 39)[..., :33])
        mask = _sigmoid(outputs[WINDOW * WINDOW].reshape(WINDOW, WINDOW))
        silhouette = functools.partial(_mask_in_photo, mask, affine, photo.shape[:2])
        return _Person(current, values.transpose(2, 0, 1), landmarks[:33], silhouette)


class _Network:
    """One network; outputs are identified by their number of elements."""

    def __init__(self, interpreter: Any) -> None:
        interpreter.allocate_tensors()
        self._interpreter = interpreter
        self._input = interpreter.get_input_details()[0]["index"]
        self._outputs = [detail["index"] for detail in interpreter.get_output_details()]

    def __call__(self, picture: np.ndarray) -> dict[int, np.ndarray]:
        self._interpreter.set_tensor(self._input, picture[None])
        self._interpreter.invoke()
        outputs = [self._interpreter.get_tensor(index)[0] for index in self._outputs]
        return {int(output.size): output for output in outputs}


class _Person:
    def __init__(
        self,
        window: Crop,
        heatmaps: np.ndarray,  # (33, 64, 64) 0..1 over the window
        landmarks: np.ndarray,  # (33, 5) x, y, z pixels of the window, logits of visibility and presence
        silhouette: Callable[[], np.ndarray],  # (H, W) 0..1 over the photo
    ) -> None:
        self.window, self.silhouette = window, silhouette
        presence = _sigmoid(landmarks[:, 4])
        self.heatmaps = heatmaps * presence[:, None, None]
        best = heatmaps.reshape(33, -1).argmax(1)
        pixels = np.stack([best % HEATMAP_SIZE, best // HEATMAP_SIZE], -1)
        local = torch.tensor((pixels + 0.5) * (2 / HEATMAP_SIZE) - 1, dtype=torch.float32)
        peaks = window.to_photo(local[None])[0]
        self.confidence = torch.tensor(self.heatmaps.reshape(33, -1).max(1))
        regressed = torch.tensor(landmarks[:, :2] / (WINDOW / 2) - 1, dtype=torch.float32)
        present = torch.tensor(presence >= _MIN_PRESENCE)[:, None]
        self.points = torch.where(present, peaks, window.to_photo(regressed[None])[0])  # (33, 2) photo pixels


def resample_to_crop(
    values: np.ndarray,  # (J, S, S) over a window
    window: Crop,  # one person
    crop: Crop,  # one person
    size: int = HEATMAP_SIZE,
) -> Tensor:  # (J, size, size) >= 0, 0 outside the window
    """Resample heatmaps to another crop of the photo, rotated or not, by cubic splines."""
    grid = pixel_coordinates(size, crop.side)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    local = window.from_photo(crop.to_photo(torch.stack([x, y], -1)[None]))[0]
    pixels = (local + 1) * (values.shape[-1] / 2) - 0.5
    filtered = spline_filter1d(spline_filter1d(values.astype(np.float64), axis=1), axis=2)
    resampled = _cubic_spline(torch.from_numpy(filtered).float(), pixels) * (local.abs() <= 1).all(-1)
    return resampled.clamp_min(0)


def _cubic_spline(
    coefficients: Tensor,  # (J, S, S) of B-splines
    pixels: Tensor,  # (H, W, 2) x, y
) -> Tensor:  # (J, H, W)
    """A cubic B-spline as four bilinear samples (Sigg and Hadwiger, GPU Gems 2, chapter 20), for all joints at once.

    scipy's `map_coordinates` computes the same, joint by joint, in three times the time (LOG.md).
    """
    start = pixels.floor()
    t = pixels - start
    first, second = (1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2
    left = first + second  # weight of the pixels at -1 and 0; those at 1 and 2 have the rest
    weights = (left, 1 - left)
    places = (start - first / left, start + 1 + (t**3 / 6) / (1 - left))
    total = coefficients.new_zeros(len(coefficients), *pixels.shape[:2])
    for i, j in itertools.product(range(2), range(2)):
        grid = torch.stack([places[i][..., 0], places[j][..., 1]], -1) * (2 / (coefficients.shape[-1] - 1)) - 1
        sampled = F.grid_sample(coefficients[None], grid[None], padding_mode="reflection", align_corners=True)[0]
        total += weights[i][..., 0] * weights[j][..., 1] * sampled
    return total


def _heatmaps(person: _Person) -> Heatmaps:
    source, target = shared_joints(MEDIAPIPE33, HALPE26)
    points, confidence = torch.zeros(len(HALPE26), 2), torch.zeros(len(HALPE26))
    points[target], confidence[target] = person.points[source], person.confidence[source]
    turn = body_turn(points, confidence)
    axes = torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], dtype=torch.float32)
    center, side = crop_from_keypoints(points @ axes, confidence)
    crop = Crop.of((axes @ center)[None], side[None], torch.tensor([turn], dtype=torch.float32))
    values = torch.zeros(len(HALPE26), HEATMAP_SIZE, HEATMAP_SIZE)
    values[target] = resample_to_crop(person.heatmaps[source], person.window, crop)
    valid = torch.zeros(len(HALPE26), dtype=torch.bool)
    valid[target] = True
    return Heatmaps(values[None], valid[None], crop)


def _box(person: _Person) -> Tensor:  # (4,)
    """Bounding box of the landmarks, enlarged by a tenth to cover the person's outline."""
    low, high = person.points.amin(0), person.points.amax(0)
    margin = 0.1 * (high - low).amax()
    return torch.cat([low - margin, high + margin])


def _is_same_window(window: Crop, other: Crop) -> bool:
    """Whether another pass would change the landmarks no more than any pass does."""
    side = float(other.side[0])
    shift = float((window.center - other.center).norm()) / side
    turn = (float(window.rotation[0] - other.rotation[0]) + np.pi) % (2 * np.pi) - np.pi
    return shift < _SAME_WINDOW and abs(float(window.side[0]) / side - 1) < _SAME_WINDOW and abs(turn) < _SAME_TURN


def _is_same_person(person: _Person, other: _Person) -> bool:
    extent = (other.points.amax(0) - other.points.amin(0)).amax()
    return bool((person.points - other.points).norm(dim=-1).mean() < _SAME_PERSON * extent)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -50, 50)))


def _warp(photo: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
    """A square crop of the photo, smoothed before downsampling; black outside the photo."""
    return _warp_affine(_smoothed(photo, affine), affine, size)


def _smoothed(photo: np.ndarray, affine: np.ndarray) -> np.ndarray:
    scale = float(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
    return photo if scale >= 0.7 else cv2.GaussianBlur(photo, (0, 0), 0.4 / scale)


def _warp_affine(photo: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
    # OpenCV's origin is the centre of the first pixel, ours its corner.
    shifted = affine.copy()
    shifted[:, 2] += shifted[:, :2] @ [0.5, 0.5] - 0.5
    return cv2.warpAffine(photo, shifted, (size, size), flags=cv2.INTER_LINEAR)


def _mask_in_photo(mask: np.ndarray, affine: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shifted = affine.copy()
    shifted[:, 2] += shifted[:, :2] @ [0.5, 0.5] - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask.astype(np.float32), shifted, size[::-1], flags=flags)
