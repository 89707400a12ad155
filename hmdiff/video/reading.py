"""Frames of a video file, by OpenCV: as they are shown, with their times; damaged frames are counted, not fatal.

OpenCV says of a damaged frame what it says of the end, so a reader that stops there loses the rest; here it goes on,
and a jump of the frames' times tells what was lost. Rotations in the file (phones) are applied by OpenCV. Symbols: H, W
pixels of a frame.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from hmdiff.errors import UserError

# FFmpeg's own lines about damage: ours says it once. It is read when OpenCV first opens a video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_LOST = 1.5  # frame durations between two frames from which one is missing
_GIVE_UP = 50  # attempts in a row that fail: behind the end, where a header does not count its frames
_USUAL_RATE = 30.0  # frames a second, where a file does not say


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a video's header says."""

    path: Path
    width: int  # pixels, as shown
    height: int
    frame_rate: float  # frames a second
    frames: int  # as the header counts; 0 where it does not

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclasses.dataclass(frozen=True)
class Frame:
    number: int  # of those that were decoded, from 0
    time: float  # seconds
    picture: np.ndarray | None  # (H, W, 3) uint8 RGB; None where it was skipped over
    lost: int = 0  # frames before it that could not be decoded


def is_clip(path: Path) -> bool:
    """By its name: pictures are told from videos before any is opened."""
    return path.suffix.lower() in SUFFIXES


def clip_info(path: str | Path) -> ClipInfo:
    """Raises `UserError` for a file that is missing, or no video that OpenCV can read."""
    path = Path(path)
    capture = _open(path)
    try:
        width, height = (int(capture.get(each)) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        done, picture = capture.read()  # a header may be whole where nothing behind it is
    finally:
        capture.release()
    if not done:
        raise UserError(f"{path}: no frame of it can be decoded; convert it, such as by ffmpeg -i IN -c:v libx264 OUT")
    height, width = picture.shape[:2]
    rate = rate if np.isfinite(rate) and 0 < rate < 1000 else _USUAL_RATE
    return ClipInfo(path, width, height, float(rate), int(count) if np.isfinite(count) and count > 0 else 0)


def read_frames(
    info: ClipInfo,
    first: int = 0,  # frames before it are passed over quickly: their picture is None
) -> Iterator[Frame]:
    """All frames in their order. A frame of another size than the first (a damaged one) counts as lost.

    Raises:
        UserError: the file can no longer be opened.
    """
    capture = _open(info.path)
    duration, before, number, lost, failed = 1 / info.frame_rate, -1 / info.frame_rate, 0, 0, 0
    try:
        while failed < _GIVE_UP:
            if not capture.grab():  # the end, or a frame that cannot be decoded: then others may follow
                failed += 1
                if info.frames and number + lost + failed > info.frames:
                    break
                continue
            time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if time <= before:  # a file without times
                time = before + (1 + failed) * duration
            steps = (time - before) / duration
            lost += max(failed, round(steps) - 1 if steps > _LOST else 0)
            before, failed = time, 0
            picture = None
            if number >= first:
                done, picture = capture.retrieve()
                if not done or picture.shape[:2] != (info.height, info.width):
                    lost += 1
                    continue
                picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            yield Frame(number, time, picture, lost)
            number, lost = number + 1, 0
    finally:
        capture.release()


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a video ({', '.join(SUFFIXES)})")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if not capture.isOpened():
        capture.release()
        raise UserError(f"{path}: no video that can be read; convert it, such as by ffmpeg -i IN -c:v libx264 OUT.mp4")
    return capture
