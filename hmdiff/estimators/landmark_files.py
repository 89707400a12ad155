"""Locates the embedded estimator's two networks: in an installed package, a folder, or MediaPipe's own download.

The networks are BlazePose's detector and `full` landmark model (Bazarevsky et al., arXiv 2006.10204; Apache-2.0), as
shipped in MediaPipe wheels before 0.10.30. The package is never imported: only the two files are read, and their
checksums verified.
"""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

from hmdiff.errors import UserError

DETECTOR, LANDMARKS = "pose_detection.tflite", "pose_landmark_full.tflite"
_IN_PACKAGE = {DETECTOR: f"modules/pose_detection/{DETECTOR}", LANDMARKS: f"modules/pose_landmark/{LANDMARKS}"}
_IN_TASK = {DETECTOR: "pose_detector.tflite", LANDMARKS: "pose_landmarks_detector.tflite"}
SHA256 = {
    DETECTOR: "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
    LANDMARKS: "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
}
INSTALL = 'pip install "hmdiff[photo]" (Python 3.11 or 3.12; in a clone: uv sync)'


def installed() -> bool:
    """Whether the default pose source is installed; does not import it."""
    return importlib.util.find_spec("ai_edge_litert") is not None and package_folder() is not None


def package_folder() -> Path | None:
    """The folder of an installed `mediapipe` package with both files."""
    try:
        spec = importlib.util.find_spec("mediapipe")
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if all((Path(location) / inside).is_file() for inside in _IN_PACKAGE.values()):
            return Path(location)
    return None


def read_networks(place: str | Path | None = None) -> dict[str, bytes]:
    """Both networks, by name.

    Args:
        place: a folder with the two files, or a `pose_landmarker_*.task` of MediaPipe; None: the installed package.

    Raises:
        UserError: not installed (the message names the install command); a file is missing; a checksum is wrong.
    """
    if place is None:
        folder = package_folder()
        if folder is None:
            raise UserError(
                f"the pose estimator is not installed: {INSTALL}; or give keypoints by --keypoints FILE, or another "
                "estimator by --pose MODEL"
            )
        return {name: _checked(folder / inside, name, SHA256[name]) for name, inside in _IN_PACKAGE.items()}
    place = Path(place)
    if place.is_dir():
        return {name: _checked(_inside(place, name), name, SHA256[name]) for name in (DETECTOR, LANDMARKS)}
    return _from_task(place)


def _inside(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / _IN_PACKAGE[name]):
        if path.is_file():
            return path
    raise UserError(f"{folder}: no {name} in it; give the folder of {DETECTOR} and {LANDMARKS}")


def _checked(path: Path, name: str, expected: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); install it again: {INSTALL}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise UserError(
            f"{path}: checksum {digest[:12]} found, {expected[:12]} expected: not the {name} that was tested; install "
            f"it again: {INSTALL}"
        )
    return content


def _from_task(path: Path) -> dict[str, bytes]:
    """Read both networks from MediaPipe's download, a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(inside) for name, inside in _IN_TASK.items()}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: no pose landmarker ({error}); give MediaPipe's pose_landmarker_full.task, or a folder of "
            f"{DETECTOR} and {LANDMARKS}"
        ) from None
