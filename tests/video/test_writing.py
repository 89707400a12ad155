"""Frames are read back from the mp4 of either writer; the reported codec is correct."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hmdiff.errors import UserError
from hmdiff.video import writing
from hmdiff.video.reading import clip_info, read_frames

RATE = 30000 / 1001  # NTSC


def frames(width: int, height: int) -> list[np.ndarray]:
    """A light square that moves over a grey image."""
    found = []
    for number in range(6):
        picture = np.full((height, width, 3), (60, 90, 120), np.uint8)
        picture[20:60, 10 + 12 * number : 50 + 12 * number] = (230, 200, 40)
        found.append(picture)
    return found


@pytest.mark.parametrize("h264", [True, False])
@pytest.mark.parametrize(("width", "height"), [(160, 96), (161, 97)])
def test_frames_come_back(tmp_path: Path, h264: bool, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if h264 and not writing.h264_available():
        pytest.skip("the video extra is not installed")
    monkeypatch.setattr(writing, "h264_available", lambda: h264)
    drawn = frames(width, height)
    with writing.open_clip(tmp_path / "clip.mp4", (width, height), RATE) as writer:
        for picture in drawn:
            writer.write(picture)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    code = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode()
    capture.release()
    assert (writer.codec, code) in ((("H.264", "h264"), ("H.264", "avc1")) if h264 else (("MPEG-4 part 2", "FMP4"),))
    info = clip_info(tmp_path / "clip.mp4")
    assert info.frame_rate == pytest.approx(RATE, abs=1e-3)
    found = [frame.picture for frame in read_frames(info)]
    assert len(found) == len(drawn)
    for picture, expected in zip(found, drawn, strict=True):
        assert picture is not None and abs(picture.shape[0] - height) <= 1 and abs(picture.shape[1] - width) <= 1
        even = np.s_[: height // 2 * 2, : width // 2 * 2]  # OpenCV's writer drops the last line of an odd image
        away = np.abs(picture[even].astype(int) - expected[even]).mean()
        assert away < 4, f"{away} grey levels"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "h264_available", lambda: False)
    with pytest.raises(UserError, match=r"shown\.mp4: OpenCV cannot write an mp4 of 160 x 96 here; try pip install"):
        writing.open_clip(tmp_path / "gone" / "clip.mp4", (160, 96), 25.0, "shown.mp4")
