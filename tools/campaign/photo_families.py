"""User inputs: photos, clips, keypoint files of every kind, heatmaps, depth maps, and results of earlier runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from hmdiff.estimators.depth_sources import read_depth
from hmdiff.estimators.people import read_people
from hmdiff.files.resources import asset_path
from hmdiff.heatmaps.arrays import load_heatmaps
from hmdiff.video.reading import clip_info, read_frames
from hmdiff.viz.canvas import read_picture
from hmdiff.viz.viewer import read_result, viewer_page
from tools.campaign.children import Wrong
from tools.campaign.family import Family, finite, support

support()
from keypoint_documents import HEIGHT, ROWS, WIDTH  # noqa: E402

CLIP = (96, 64)  # width, height


def _photos(folder: Path) -> None:
    with Image.open(asset_path("sample.jpg")) as opened:
        picture = opened.resize((128, 96))
    picture.save(folder / "photo.jpg")
    picture.save(folder / "photo.png")
    picture.convert("P").save(folder / "photo.gif")
    for suffix in ("webp", "bmp", "tiff", "ppm"):
        picture.save(folder / f"photo.{suffix}")


def _read_photo(folder: Path, name: str) -> None:
    found = read_picture(folder / name)
    if found.ndim != 3 or found.dtype != np.uint8:
        raise Wrong("not a picture")


def _clips(folder: Path) -> None:
    for name, codec in (("clip.mp4", "mp4v"), ("clip.avi", "MJPG")):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter.fourcc(*codec), 25, CLIP)
        for number in range(8):
            writer.write(np.full((CLIP[1], CLIP[0], 3), 20 * number, np.uint8))
        writer.release()


def _read_clip(folder: Path, name: str) -> None:
    info = clip_info(folder / name)
    before = -1.0
    for frame in read_frames(info):
        if frame.picture is None or frame.picture.shape != (info.height, info.width, 3) or not frame.time > before:
            raise Wrong("frames of other sizes, or times that do not rise")
        before = frame.time


def _file(row: str) -> str:
    """The file name for a row of docs/keypoints.md."""
    suffix = ".txt" if isinstance(ROWS[row][0], str) else ".json"
    return re.sub(r"\W+", "_", row) + suffix


def _keypoints(folder: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "photo.jpg")
    for row, (document, _) in ROWS.items():
        text = document if isinstance(document, str) else json.dumps(document)
        (folder / _file(row)).write_text(text)


def _read_keypoints(folder: Path, name: str) -> None:
    found = read_people(folder / "photo.jpg", keypoints=folder / name)
    crop = found.heatmaps.crop
    finite(found.heatmaps.values, crop.center, crop.side, crop.focal, crop.photo_size)
    finite(*(points for points, _ in found.points))


def _heatmaps(folder: Path) -> None:
    values = np.random.default_rng(0).random((17, 32, 32)).astype(np.float32)
    arrays = {"heatmaps": values, "center": np.array([320.0, 240.0]), "side": np.array(300.0)}
    np.savez(folder / "stored.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(folder / "packed.npz", **arrays)  # type: ignore[arg-type]


def _read_heatmaps(folder: Path, name: str) -> None:
    found = load_heatmaps(folder / name)
    finite(found.values, found.crop.center, found.crop.side)


def _depth(folder: Path) -> None:
    depth = np.random.default_rng(0).uniform(1, 5, (24, 32)).astype(np.float32)
    np.save(folder / "map.npy", depth)
    np.savez(folder / "map.npz", depth=depth)
    Image.fromarray((depth * 1000).astype(np.uint16)).save(folder / "map.png")


def _read_depth(folder: Path, name: str) -> None:
    if np.isinf(np.asarray(read_depth(folder / name))).any():  # NaN means unknown
        raise Wrong("an infinite depth")


def _results(folder: Path) -> None:
    draw, names = np.random.default_rng(0), [f"joint{number}" for number in range(4)]
    arrays = {
        "vertices": draw.normal(size=(2, 30, 3)).astype(np.float32),
        "faces": draw.integers(30, size=(20, 3)),
        "joints": draw.normal(size=(2, 4, 3)).astype(np.float32),
        "translation": np.array([0.0, 0.0, 5.0], np.float32),
        "joint_names": np.array(names),
        "joint_parents": np.array([-1, 0, 1, 1]),
        "spread_mm": draw.random(30).astype(np.float32),
        "center": np.array([64.0, 48.0]),
        "side": np.array(80.0),
        "focal": np.array(200.0),
        "principal_point": np.array([64.0, 48.0]),
        "selected": np.array(1),
        "modes": np.array([0, 1]),
        "mode_weights": np.array([0.5, 0.5]),
    }
    np.savez(folder / "person.npz", **arrays)  # type: ignore[arg-type]


def _read_result(folder: Path, name: str) -> None:
    viewer_page(read_result(folder / name), np.zeros((96, 128, 3), np.uint8), "campaign")


FAMILIES = (
    Family("photos", _photos, _read_photo, tuple(f"photo.{s}" for s in "jpg png gif webp bmp tiff ppm".split())),
    Family("clips", _clips, _read_clip, ("clip.mp4", "clip.avi")),
    Family("keypoints", _keypoints, _read_keypoints, tuple(map(_file, ROWS)), share=4),
    Family("heatmaps", _heatmaps, _read_heatmaps, ("stored.npz", "packed.npz")),
    Family("depth maps", _depth, _read_depth, ("map.npy", "map.npz", "map.png")),
    Family("results", _results, _read_result, ("person.npz",)),
)
