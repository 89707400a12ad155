"""Unusable heatmaps, photos without people, boxes outside the photo: one line each; ten thousand hypotheses.

Detectors that find nobody, and boxes for mmpose, are tested in test_mmpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_pipeline

from hmdiff.body.skeletons import COCO17, HALPE26
from hmdiff.cli.main import main
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.estimators.people import read_people
from hmdiff.heatmaps import Crop, Heatmaps, gaussian_heatmaps
from hmdiff.pipeline import HMDiffPipeline, reverse

WIDTH, HEIGHT = 160, 200


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def checkpoint(pipe: HMDiffPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (WIDTH, HEIGHT), (120, 130, 140)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def sample(checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `hmdiff sample` on the photo, which must fail and write nothing; returns its single line."""

    def run(*words: Any) -> str:
        code = main(
            [
                "sample",
                str(photo),
                "--checkpoint",
                str(checkpoint),
                "--output",
                str(tmp_path / "out"),
                *map(str, words),
            ]
        )
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("hmdiff: error: ") and error.count("\n") == 1, error
        assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
        return error

    return run


def arrays(**changes: Any) -> dict[str, Any]:
    points = torch.linspace(-0.5, 0.5, 2 * len(COCO17)).reshape(1, -1, 2)
    values = gaussian_heatmaps(points, torch.ones(1, len(COCO17)), 2.0)
    good = {
        "heatmaps": values.numpy(),
        "joints": np.array(COCO17),
        "center": np.array([[80.0, 100.0]]),
        "side": np.array([150.0]),
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def spoilt(value: float) -> np.ndarray:
    heatmaps = arrays()["heatmaps"].copy()
    heatmaps[0, 9, 3, 4] = value
    return heatmaps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heatmaps": spoilt(float("nan"))}, "NaN or infinite values in joint 'left_wrist' of person 0"),
        ({"heatmaps": spoilt(float("inf"))}, "NaN or infinite values in joint 'left_wrist' of person 0"),
        ({"heatmaps": np.zeros((17, 64, 64))}, "all zero for person 0: nobody was seen there"),
        ({"heatmaps": np.full((17, 64, 64), -1.0)}, "all zero for person 0: nobody was seen there"),
        ({"joints": np.array(HALPE26)}, "17 heatmaps but 26 joint names"),
        ({"joints": np.array([*COCO17[:16], "tail"])}, "joint 'tail' is unknown; the nearest known name is"),
        ({"joints": None, "heatmaps": np.ones((19, 64, 64))}, "19 heatmaps without names"),
        ({"heatmaps": np.ones((3, 64, 64)), "joints": np.array(["jaw", "spine1", "spine2"])}, "none of the joints jaw"),
        (
            {"center": np.array([[900.0, 100.0]])},
            "the crop of person 0, 150 pixels about (900, 100), lies outside the "
            "160 x 200 photo; give the heatmaps that were made of this photo at this size",
        ),
        ({"center": np.array([[80.0, float("nan")]])}, "`center` and `side` of the crop must be finite"),
        ({"side": np.array([0.0])}, "the side above 0 pixels"),
    ],
)
def test_heatmaps(sample: Callable[..., str], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "h.npz", **arrays(**changes))
    line = sample("--heatmaps", tmp_path / "h.npz")
    assert message in line and "h.npz" in line


def test_a_good_file_is_not_refused(photo: Path, tmp_path: Path) -> None:
    """The valid file that the tests above modify."""
    np.savez(tmp_path / "h.npz", **arrays())
    found = read_people(photo, heatmaps=tmp_path / "h.npz")
    assert len(found.heatmaps) == 1 and found.heatmaps.valid.sum() == 17


@pytest.mark.parametrize(
    ("people", "message"),
    [
        ([], "no person in it"),
        ([[[0, 0, 0]] * 17], "the confidences of all keypoints are zero"),
        ([[[5000 + i, 5000, 1] for i in range(17)]], "all keypoints of person 0 lie outside the 160 x 200 photo"),
    ],
)
def test_a_photo_with_nobody_in_its_keypoints(
    sample: Callable[..., str], photo: Path, people: list[Any], message: str
) -> None:
    rows = [{"keypoints": [number for point in person for number in point]} for person in people]
    photo.with_suffix(".json").write_text(json.dumps(rows))
    assert message in sample()


@pytest.mark.parametrize("box", ["900,900,950,990", "-90,20,-10,90"])
def test_a_box_outside_the_photo(sample: Callable[..., str], photo: Path, box: str) -> None:
    points = [[60 + 3 * i, 20 + 9 * i, 1] for i in range(17)]
    photo.with_suffix(".json").write_text(json.dumps({"keypoints_coco17": points}))
    assert f"--box {box}: lies outside the 160 x 200 photo" in sample(f"--box={box}")


def example(people: int) -> Heatmaps:
    points = torch.rand(people, 26, 2, generator=torch.Generator().manual_seed(3)) - 0.5
    values = gaussian_heatmaps(points, torch.ones(people, 26), 2.0)
    valid = torch.ones(people, 26, dtype=torch.bool)
    return Heatmaps(values, valid, Crop.of(torch.full((people, 2), 100.0), torch.full((people,), 150.0)))


@pytest.mark.slow
def test_ten_thousand_hypotheses(pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of bounded size, with the same result: the first of 10,000 hypotheses equal those of a small run."""
    heatmaps = example(1)
    conditioning, _ = pipe.model.encode(None, heatmaps.values, heatmaps.valid)
    rows: list[int] = []
    denoise = pipe.model.denoise

    def counted(points: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(points.shape[0] * points.shape[1])
        return denoise(points, *rest)

    monkeypatch.setattr(pipe.model, "denoise", counted)
    with torch.no_grad():
        many, _ = pipe.denoised(conditioning, [0], SamplingConfig(10_000, 2))
        assert many.shape[:2] == (1, 10_000) and many.isfinite().all()
        limit = reverse.ROWS_AT_ONCE
        assert max(rows) <= limit and sum(rows) == 10_000
        few, _ = pipe.denoised(conditioning, [0], SamplingConfig(5, 2))
        torch.testing.assert_close(many[:, :5], few, rtol=0, atol=1e-4)
        monkeypatch.setattr(reverse, "ROWS_AT_ONCE", 37)
        rows.clear()
        some, _ = pipe.denoised(conditioning, [0], SamplingConfig(300, 2))
    assert max(rows) == 37
    torch.testing.assert_close(some, many[:, :300], rtol=0, atol=1e-5)
