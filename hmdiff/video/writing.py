"""Frames to an mp4: H.264 by PyAV if installed, else MPEG-4 part 2 by OpenCV.

Browsers, phones and messengers play H.264; MPEG-4 part 2 plays in VLC, ffplay and QuickTime. OpenCV's wheels have no
H.264 encoder. PyAV (BSD) ships x264, which is under the GPL, and is therefore an optional extra, `video`. No sound.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import cv2
import numpy as np

from hmdiff.errors import UserError

H264 = "H.264"
INSTALL = 'pip install "hmdiff[video]"'
_QUALITY = "20"  # x264's CRF: visually lossless
_CODEC = "mp4v"


class ClipWriter(Protocol):
    codec: str  # name shown by players

    def write(self, picture: np.ndarray) -> None:
        """Add a frame, (H, W, 3) uint8 RGB."""
        ...

    def __enter__(self) -> ClipWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_clip(
    path: str | Path,  # .mp4
    size: tuple[int, int],  # width, height
    frame_rate: float,
    named: str | Path | None = None,  # file name for messages, if `path` is temporary
) -> ClipWriter:
    """Raises `UserError` if neither PyAV nor OpenCV can write such a video."""
    if h264_available():
        return _PyAVWriter(path, size, frame_rate)
    return _OpenCVWriter(path, size, frame_rate, path if named is None else named)


def h264_available() -> bool:
    try:
        import av

        av.codec.Codec("h264", "w")
    except Exception:  # not installed, or built without the encoder: av raises its own type
        return False
    return True


class _Closing:
    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class _PyAVWriter(_Closing):
    codec = H264

    def __init__(self, path: str | Path, size: tuple[int, int], frame_rate: float) -> None:
        import av

        self._av, self._container = av, av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        stream: Any = self._container.add_stream("h264", rate=Fraction(frame_rate).limit_denominator(10_000))
        # Chroma has half the resolution, so sides must be even: repeat the last line of odd ones.
        stream.width, stream.height = (side + side % 2 for side in size)
        stream.pix_fmt, stream.options = "yuv420p", {"crf": _QUALITY}
        self._stream = stream

    def write(self, picture: np.ndarray) -> None:
        odd = (0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(picture, odd, "edge")), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


class _OpenCVWriter(_Closing):
    codec = "MPEG-4 part 2"

    def __init__(self, path: str | Path, size: tuple[int, int], frame_rate: float, named: str | Path) -> None:
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*_CODEC), frame_rate, size)
        if not self._writer.isOpened():
            width, height = size
            raise UserError(f"{named}: OpenCV cannot write an mp4 of {width} x {height} here; try {INSTALL}")

    def write(self, picture: np.ndarray) -> None:
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()
