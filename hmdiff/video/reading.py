"""Frames of a video file with their times, by OpenCV, in display orientation; damaged frames are counted and skipped.

OpenCV reports a damaged frame like the end of the file, so a reader that stops there loses the rest. Here reading
continues, and gaps in the frame times reveal lost frames. OpenCV applies the file's rotation (phones). Symbols: H, W
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

# Silence FFmpeg's own messages about damage: we report it once. Read when OpenCV first opens a video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_LOST = 1.5  # gap between frames, in frame durations, above which a frame is missing
_GIVE_UP = 50  # consecutive failures that mean the end, if the header does not count frames
_USUAL_RATE = 30.0  # frames per second, if the file does not state it


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """The header of a video."""

    path: Path
    width: int  # pixels, as displayed
    height: int
    frame_rate: float  # frames per second
    frames: int  # as stated in the header; 0 if unknown

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


@dataclasses.dataclass(frozen=True)
class Frame:
    number: int  # index among the decoded frames
    time: float  # seconds
    picture: np.ndarray | None  # (H, W, 3) uint8 RGB; None if skipped
    lost: int = 0  # number of undecodable frames before it


def is_clip(path: Path) -> bool:
    """Whether the file name is a video's: tells images and videos apart without opening them."""
    return path.suffix.lower() in SUFFIXES


def clip_info(path: str | Path) -> ClipInfo:
    """Raises `UserError` if the file is missing, or not a video that OpenCV can read."""
    path = Path(path)
    capture = _open(path)
    try:
        width, height = (int(capture.get(each)) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        done, picture = capture.read()  # a valid header may be followed by no valid frame
    finally:
        capture.release()
    if not done:
        raise UserError(f"{path}: no frame of it can be decoded; convert it, such as by ffmpeg -i IN -c:v libx264 OUT")
    height, width = picture.shape[:2]
    rate = rate if np.isfinite(rate) and 0 < rate < 1000 else _USUAL_RATE
    return ClipInfo(path, width, height, float(rate), int(count) if np.isfinite(count) and count > 0 else 0)


def read_frames(
    info: ClipInfo,
    first: int = 0,  # earlier frames are skipped quickly: their picture is None
) -> Iterator[Frame]:
    """All frames in order. A frame with another size than the first (damage) counts as lost.

    Raises:
        UserError: the file can no longer be opened.
    """
    capture = _open(info.path)
    duration, before, number, lost, failed = 1 / info.frame_rate, -1 / info.frame_rate, 0, 0, 0
    try:
        while failed < _GIVE_UP:
            if not capture.grab():  # the end, or an undecodable frame that others may follow
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
