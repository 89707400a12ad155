"""Tracking by keypoints: assigns the people of each frame to tracks.

One linear assignment (scipy) per frame between the tracks' predicted keypoints (constant velocity) and the detected
ones. Existing trackers were considered: norfair (BSD-3) needs filterpy, unmaintained since 2018, `trackers`
(Apache-2.0) needs supervision and numpy 2, boxmot is AGPL. All match boxes or points without confidence, while our
sources give keypoints with confidence, which separate two people whose boxes coincide. Our sources also have no weak
detections, for which ByteTrack (arXiv 2110.06864) was made. P people, T tracks, J keypoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

_FAR = 0.35  # mean keypoint distance, relative to the person's extent, above which two people differ
_SAME = 0.1  # the same, below which two sightings in a frame are one person
_FAINT = 0.1  # minimum confidence of a keypoint
_VELOCITY = 0.7  # seconds without a sighting after which the velocity is dropped
_LOOK_AGAIN = 0.5  # seconds after a sighting during which a missed person is searched
_AWAY = 1.0  # seconds after which a returning person gets a new track
_JUMP = 0.05  # relative to the extent, RMS over the joints: minimum distance of a jump from both neighbours,
_ACCELERATION = 30.0  # and its minimum acceleration, above that of bodies; extents / s^2, about 50 m/s^2


@dataclasses.dataclass
class _Track:
    number: int
    time: float  # last sighting
    points: np.ndarray  # (J, 3) at that time
    velocity: np.ndarray  # (2,) pixels per second, of the whole person

    def predicted(self, time: float) -> np.ndarray:  # (J, 2)
        ahead = time - self.time
        return self.points[:, :2] + (self.velocity * ahead if ahead <= _VELOCITY else 0)


class Tracker:
    """Assigns track numbers to the people of each frame; frames must come in temporal order."""

    def __init__(self) -> None:
        self._tracks: list[_Track] = []
        self._next = 0

    def update(
        self,
        time: float,  # seconds
        people: np.ndarray,  # (P, J, 3) photo pixels and confidence
    ) -> list[int]:  # P track numbers, from 0 in order of first appearance
        self._tracks = [each for each in self._tracks if time - each.time <= _AWAY]
        numbers = [-1] * len(people)
        if self._tracks and len(people):
            cost = np.array(
                [[_distance(each.predicted(time), each.points, seen) for seen in people] for each in self._tracks]
            )
            # Cap infinite costs, still far above the limit, so that the assignment prefers valid pairs.
            for track, person in zip(*linear_sum_assignment(np.minimum(cost, 10 * _FAR)), strict=True):
                if cost[track, person] <= _FAR:
                    numbers[person] = self._tracks[track].number
                    self._seen(self._tracks[track], time, people[person])
        for person, number in enumerate(numbers):
            if number < 0:
                self._tracks.append(_Track(self._next, time, people[person], np.zeros(2)))
                numbers[person] = self._next
                self._next += 1
        return numbers

    def replay(
        self,
        time: float,
        people: np.ndarray,  # (P, J, 3)
        numbers: Sequence[int],  # P, as returned by `update`
    ) -> None:
        """Process an already assigned frame, for resuming."""
        self._tracks = [each for each in self._tracks if time - each.time <= _AWAY]
        known = {each.number: each for each in self._tracks}
        for points, number in zip(people, numbers, strict=True):
            if number in known:
                self._seen(known[number], time, points)
            else:
                self._tracks.append(_Track(number, time, points, np.zeros(2)))
                self._next = max(self._next, number + 1)

    def missed(
        self,
        time: float,  # seconds, the frame last passed to `update`
    ) -> list[np.ndarray]:  # each (J, 3): predicted keypoints of people seen recently but not in this frame
        gone = [each for each in self._tracks if 0 < time - each.time <= _LOOK_AGAIN]
        return [np.concatenate([each.predicted(time), each.points[:, 2:]], 1) for each in gone]

    def _seen(self, track: _Track, time: float, points: np.ndarray) -> None:
        both = (track.points[:, 2] > _FAINT) & (points[:, 2] > _FAINT)
        ahead = max(time - track.time, 1e-6)
        if both.any():
            found = np.median((points - track.points)[both, :2], axis=0) / ahead
            track.velocity = 0.5 * (track.velocity + found)
        track.time, track.points = time, points


def same_person(first: np.ndarray, second: np.ndarray) -> bool:  # (J, 3) each
    """Whether two sightings in one frame are the same person."""
    return _distance(first[:, :2], first, second) < _SAME


def jumps(
    times: np.ndarray,  # (S,) seconds, ascending, one person's sightings
    points: np.ndarray,  # (S, J, 3) photo pixels and confidence
) -> np.ndarray:  # (S,) bool
    """Single-frame errors of the estimator: sightings far from both neighbours, which agree with each other.

    A jump is far from the point between its neighbours, and farther than they are from each other apart from the
    walking speed. Of two adjacent jumps only the larger counts, so adjacent frames are never both removed. Our choice.
    """
    away = np.zeros(len(points))  # pixels, nonzero for jumps
    clear = points[..., 2] > _FAINT
    for here in range(1, len(points) - 1):
        every = clear[here - 1 : here + 2].all(0)
        if every.sum() < 3:
            continue
        first, seen, last = points[here - 1 : here + 2, every, :2].astype(np.float64)
        before, after = times[here] - times[here - 1], times[here + 1] - times[here]
        middle = first + (last - first) * before / (before + after)
        allowed = _JUMP + 0.5 * _ACCELERATION * before * after
        far, apart = _rms(seen - middle), _rms(last - first - np.median(last - first, 0))
        if far > max(apart, allowed * np.linalg.norm(np.ptp(seen, 0))):
            away[here] = far
    found: np.ndarray = away > 0
    found[1:-1] &= (away[1:-1] > away[:-2]) & (away[1:-1] >= away[2:])
    return found


def _rms(offsets: np.ndarray) -> float:  # (J, 2)
    return float(np.sqrt(np.square(offsets).sum(-1).mean()))


def _distance(
    predicted: np.ndarray,  # (J, 2)
    before: np.ndarray,  # (J, 3) the sighting that the prediction is based on
    seen: np.ndarray,  # (J, 3)
) -> float:
    """Mean distance of common keypoints, relative to the person's extent; inf without common ones."""
    both = (before[:, 2] > _FAINT) & (seen[:, 2] > _FAINT)
    if not both.any():
        return float("inf")
    clear = seen[seen[:, 2] > _FAINT, :2]
    extent = max(float(np.linalg.norm(np.ptp(clear, axis=0))), 1.0)
    return float(np.linalg.norm(predicted[both] - seen[both, :2], axis=1).mean()) / extent
