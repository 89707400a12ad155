"""People keep their numbers through crossings, in any order of detection, and through short absences."""

from __future__ import annotations

import numpy as np
import pytest

from hmdiff.video.tracking import Tracker, jumps, same_person

SHAPE = np.array([[0, 0], [-20, 40], [20, 40], [-15, 100], [15, 100]], float)


def person(x: float, y: float = 50.0, sure: float = 0.9) -> np.ndarray:  # (5, 3)
    return np.concatenate([SHAPE + np.array([x, y]), np.full((5, 1), sure)], 1)


def test_two_people_cross() -> None:
    """At the crossing they are 6 pixels apart, less than their motion per frame: only velocity separates them."""
    tracker, generator = Tracker(), np.random.default_rng(0)
    for frame in range(40):
        people = [person(100 + 8 * frame), person(420 - 8 * frame, 56.0)]
        order = generator.permutation(2)
        numbers = tracker.update(frame / 25, np.stack([people[index] for index in order]))
        if frame == 0:
            named = {int(index): number for index, number in zip(order, numbers, strict=True)}
        assert [named[int(index)] for index in order] == numbers


def test_back_after_a_short_absence() -> None:
    tracker = Tracker()
    for frame in range(5):
        assert tracker.update(frame / 25, np.stack([person(100 + 10 * frame)])) == [0]
    assert tracker.update(9 / 25, np.stack([person(190.0), person(400.0)])) == [0, 1]


def test_somebody_new_after_a_long_absence() -> None:
    tracker = Tracker()
    tracker.update(0.0, np.stack([person(100.0)]))
    assert tracker.update(3.0, np.stack([person(100.0)])) == [1]


def test_one_far_away_is_somebody_else() -> None:
    tracker = Tracker()
    tracker.update(0.0, np.stack([person(100.0)]))
    assert tracker.update(0.04, np.stack([person(400.0)])) == [1]


def test_nobody() -> None:
    tracker = Tracker()
    assert tracker.update(0.0, np.zeros((0, 5, 3))) == []
    assert tracker.update(0.1, np.stack([person(0.0)])) == [0]
    assert tracker.update(0.2, np.zeros((0,))) == []


def test_who_is_missed_is_expected_where_they_walk() -> None:
    tracker = Tracker()
    for frame in range(30):
        tracker.update(frame / 25, np.stack([person(100 + 10 * frame)]))
    tracker.update(30 / 25, np.zeros((0,)))
    (predicted,) = tracker.missed(30 / 25)
    assert predicted[:, :2] == pytest.approx(person(400.0)[:, :2], abs=0.5)
    tracker.update(50 / 25, np.zeros((0,)))
    assert tracker.missed(50 / 25) == []


def test_sightings_without_a_common_joint_are_of_two() -> None:
    upper, lower = person(0.0), person(0.0)
    upper[3:, 2] = lower[:3, 2] = 0
    assert not same_person(upper, lower)
    assert same_person(person(0.0), person(3.0))


def test_a_replayed_tracker_goes_on_as_the_one_before() -> None:
    """Including people found by the second search, after the others of their frame."""
    first, second = Tracker(), Tracker()
    for frame in range(12):
        people = np.stack([person(100 + 8 * frame), person(300 - 6 * frame, 60.0)])
        numbers = first.update(frame / 25, people[:1]) + first.update(frame / 25, people[1:])
        second.replay(frame / 25, people, numbers)
    people = np.stack([person(300 - 6 * 12, 60.0), person(100 + 8 * 12), person(600.0)])
    assert first.update(12 / 25, people) == second.update(12 / 25, people) == [1, 0, 2]


def striding(frames: int, swing: float = 25.0, rate: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """A walker: the whole body moves right, the feet back and forth, a stride per second, a pixel of noise."""
    times = np.arange(frames) / rate
    points = np.stack([person(100 + 90 * time) for time in times])
    swung = swing * np.sin(2 * np.pi * times)
    points[:, 3, 0] += swung
    points[:, 4, 0] -= swung
    points[:, :, :2] += np.random.default_rng(0).standard_normal(points[:, :, :2].shape)
    return times, points


@pytest.mark.parametrize("rate", [10.0, 30.0])
def test_a_lone_frame_whose_joints_are_elsewhere_is_a_jump(rate: float) -> None:
    times, points = striding(30, rate=rate)
    assert not jumps(times, points).any()
    points[7, :3, :2] += (35.0, -30.0)
    points[20, [3, 4]] = points[20, [4, 3]] + np.array([40.0, 0.0, 0.0])
    assert np.flatnonzero(jumps(times, points)).tolist() == [7, 20]
    points[7, :, 2] = 0.05
    assert np.flatnonzero(jumps(times, points)).tolist() == [20], "faint joints are no evidence"


def test_what_does_not_come_back_is_no_jump() -> None:
    """Another mode, two frames of it, the ends of a clip; and with alternating frames no two neighbours are removed."""
    times, points = striding(30)
    for part in (slice(15, None), slice(10, 12), slice(0, 1), slice(29, 30)):
        changed = points.copy()
        changed[part, :2, 0] += 60.0
        assert not jumps(times, changed).any()
    points[::2, :2, 0] += 60.0
    found = jumps(times, points)
    assert found.any() and not (found[1:] & found[:-1]).any()
    assert not jumps(times[:2], points[:2]).any()
