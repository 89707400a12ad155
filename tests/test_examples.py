"""The examples run, on a small pipeline and a source that sees two people."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from clips import Walkers, write_clip
from PIL import Image
from pose_sources import Source
from small import small_pipeline

from hmdiff.pipeline import HMDiffPipeline

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def small(name: str) -> HMDiffPipeline:
        assert name == "hmdiff_small"
        pipe = small_pipeline()
        pipe.source = Source()
        return pipe

    monkeypatch.setattr(HMDiffPipeline, "from_pretrained", small)
    for name in ("hmdiff.viz.sheets.hypotheses_sheet", "hmdiff.viz.spread.spread_sheet"):
        monkeypatch.setattr(name, lambda *args, **kwargs: np.zeros((4, 4, 3), np.uint8))
    Image.fromarray(np.full((90, 160, 3), 120, np.uint8)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"photo.py", "camera.py", "video.py"}


@pytest.mark.slow
def test_photo(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "photo.py"))["main"](str(photo), str(photo.parent / "out"))
    assert "person 1: hypothesis" in capsys.readouterr().out
    assert (photo.parent / "out" / "photo_1.glb").is_file()


def test_camera(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "camera.py"))["main"](str(photo))
    text = capsys.readouterr().out
    assert "m away, from pixel" in text and "betas (5, " in text


@pytest.mark.slow
def test_video(photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def small(name: str) -> HMDiffPipeline:
        pipe = small_pipeline()
        pipe.source = Walkers()
        return pipe

    monkeypatch.setattr(HMDiffPipeline, "from_pretrained", small)
    clip, out = write_clip(photo.parent / "clip.mp4", 3), photo.parent / "out"
    runpy.run_path(str(EXAMPLES / "video.py"))["main"](str(clip), str(out))
    assert "track 1: 3 frames" in capsys.readouterr().out
    assert (out / "clip_track_1_animated.glb").is_file() and (out / "clip_overlay.mp4").is_file()
