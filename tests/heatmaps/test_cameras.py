"""Files of intrinsics, and how a photo's camera is applied to the crop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hmdiff.errors import UserError
from hmdiff.heatmaps import Crop, PhotoInfo
from hmdiff.heatmaps.cameras import PhotoCamera, read_intrinsics

K = [[900.0, 0.0, 70.0], [0.0, 900.0, 212.5], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    "data",
    [
        K,
        {"K": K},
        {"camera_matrix": K},
        {"fx": 900, "fy": 900, "cx": 70, "cy": 212.5},
        {"focal": 900, "principal_point": [70, 212.5]},
        {"a.jpg": {"K": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "photo": K},
    ],
)
def test_every_form_gives_the_same_camera(tmp_path: Path, data: Any) -> None:
    (tmp_path / "k.json").write_text(json.dumps(data))
    camera = read_intrinsics(tmp_path / "k.json", "photo.jpg")
    assert camera.focal == 900 and camera.principal_point == (70, 212.5)


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "k.npz", K=np.array(K))
    assert read_intrinsics(tmp_path / "k.npz", "photo.jpg").principal_point == (70, 212.5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"other.jpg": K}, r"nor one of photo\.jpg"),
        ([[1, 2], [3, 4]], "a 3 x 3 matrix K"),
        ({"fx": 900, "fy": 1200}, "not square"),
        ({"fx": -1}, "above 0"),
        ({"K": [["a"]]}, "no camera"),
        ({"f": []}, "no camera"),
        ({"f": 900, "principal_point": [3]}, "no camera"),
        ({"f": 900, "principal_point": {"x": 3}}, "no camera"),
        ({"f": 1e300}, r"a focal length of 1e\+300 pixels"),
        ({"fx": 1e-30}, "a focal length of 1e-30 pixels"),
        ({"f": 900, "cx": 1e300, "cy": 3}, "beyond any photo"),
    ],
)
def test_what_is_no_camera_is_said(tmp_path: Path, data: Any, message: str) -> None:
    (tmp_path / "k.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as caught:
        read_intrinsics(tmp_path / "k.json", "photo.jpg")
    assert str(tmp_path / "k.json") in str(caught.value) and "\n" not in str(caught.value)


def test_the_camera_reaches_the_crop() -> None:
    crop = Crop.of(torch.tensor([[100.0, 90.0], [50.0, 60.0]]), torch.tensor([80.0, 60.0]))
    info = PhotoInfo(390, 425, focal=500.0)
    known = PhotoCamera(900.0, (70.0, 212.5), "k.json").applied(crop, info)
    assert known.photo_size.tolist() == [[390, 425]] * 2 and known.focal.tolist() == [900, 900]
    assert known.principal_point.tolist() == [[70, 212.5]] * 2
    assert PhotoCamera().applied(crop, info).focal.tolist() == [500, 500]  # EXIF's
    guessed = PhotoCamera().applied(crop, PhotoInfo(300, 400))
    assert guessed.focal.tolist() == [500, 500] and guessed.principal_point.tolist() == [[150, 200]] * 2
    said = [PhotoCamera().described(info), PhotoCamera().described(PhotoInfo(3, 4)), PhotoCamera(1.0).described(info)]
    assert said == ["EXIF", "guessed: the photo's diagonal", "given"]
