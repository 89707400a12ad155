"""All frames of a video are read in order; a damaged one affects no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import HEIGHT, RATE, STEP, WIDTH, write_clip

from hmdiff.errors import UserError
from hmdiff.video.reading import clip_info, read_frames


def grey(picture: np.ndarray | None) -> int:
    assert picture is not None
    return round(float(picture.mean()) / STEP)


def test_every_frame_with_its_time(tmp_path: Path) -> None:
    info = clip_info(write_clip(tmp_path / "clip.mp4", 9))
    assert info.size == (WIDTH, HEIGHT) and info.frame_rate == RATE and info.frames == 9
    frames = list(read_frames(info))
    assert [(each.number, grey(each.picture), each.lost) for each in frames] == [(n, n, 0) for n in range(9)]
    assert [each.time for each in frames] == pytest.approx(np.arange(9) / RATE, abs=1e-3)


@pytest.mark.parametrize(("name", "codec"), [("clip.avi", "MJPG"), ("clip.mp4", "mp4v")])
def test_what_follows_a_damaged_frame_is_read(tmp_path: Path, name: str, codec: str) -> None:
    info = clip_info(write_clip(tmp_path / name, 12, codec, damaged=5))
    frames = list(read_frames(info))
    assert [grey(each.picture) for each in frames] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [each.lost for each in frames] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert frames[5].time == pytest.approx(6 / RATE, abs=1e-3)


def test_frames_that_are_done_are_passed_over(tmp_path: Path) -> None:
    frames = list(read_frames(clip_info(write_clip(tmp_path / "clip.mp4", 6)), first=4))
    assert [each.picture is None for each in frames] == [True] * 4 + [False] * 2
    assert grey(frames[5].picture) == 5


def test_no_video_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.mp4: no such file"):
        clip_info(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match=r"text\.mp4: no video that can be read; convert it"):
        clip_info(tmp_path / "text.mp4")
