"""ViTPose of transformers as a source: a tiny model with random weights; its processor is the oracle."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hmdiff.body.skeletons import COCO17, HALPE26, joint_indices
from hmdiff.errors import UserError
from hmdiff.estimators.choose import load_source
from hmdiff.heatmaps import heatmap_peaks

transformers = pytest.importorskip("transformers", reason="ViTPose is an extra")
BOX = (40.0, 20.0, 100.0, 140.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("vitpose") / "tiny"
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[64, 48],
        patch_size=[16, 16],
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=1,
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=True)
    transformers.VitPoseForPoseEstimation(config).save_pretrained(place)
    transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(place)
    return place


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (160, 150, 3), dtype=np.uint8)


def test_a_model_from_a_folder_sees_the_boxes(folder: Path) -> None:
    source = load_source(f"vitpose:{folder}")
    assert source.name == f"vitpose {folder}"
    seen = source.estimate(photo(), [BOX, (10.0, 5.0, 60.0, 150.0)])
    assert len(seen.heatmaps) == 2 and seen.boxes.tolist()[0] == list(BOX)
    known = torch.zeros(26, dtype=torch.bool)
    known[joint_indices(COCO17, HALPE26)] = True
    assert (seen.heatmaps.valid == known).all()
    assert seen.heatmaps.values[:, known].flatten(2).amax(-1).min() > 0


@pytest.mark.parametrize("box", [BOX, (10.0, 60.0, 140.0, 110.0)], ids=["upright", "wide"])
def test_peaks_are_where_its_processor_puts_them(
    folder: Path, box: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within half a pixel of our heatmap, for peaks on its grid and between."""
    source: Any = load_source(f"vitpose:{folder}")
    y, x = np.mgrid[:16, :12]
    places = np.random.default_rng(1).uniform([3, 3], [8, 12], (17, 2))
    maps = np.stack([np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 1.5**2)) for a, b in places])
    output = SimpleNamespace(heatmaps=torch.tensor(maps[None], dtype=torch.float32))
    answers = type("Answers", (), {"config": source._model.config, "__call__": lambda *a, **k: output})
    monkeypatch.setattr(source, "_model", answers())
    seen = source.estimate(photo(), [box]).heatmaps
    xywh = [[box[0], box[1], box[2] - box[0], box[3] - box[1]]]
    expected = source._processor.post_process_pose_estimation(output, boxes=[xywh], threshold=0.0)[0][0]["keypoints"]
    peaks, _ = heatmap_peaks(seen.values)
    found = seen.crop.to_photo(peaks)[0, joint_indices(COCO17, HALPE26)]
    pixel = float(seen.crop.side[0]) / seen.values.shape[-1]
    assert (found - (expected + 0.5)).norm(dim=-1).max() < 0.75 * pixel


def test_names_of_its_own_are_mapped(folder: Path, tmp_path: Path) -> None:
    model = transformers.VitPoseForPoseEstimation.from_pretrained(folder)
    names = list(reversed([name.replace("_", " ").title() for name in COCO17]))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(tmp_path / "named")
    transformers.VitPoseImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "named")
    source: Any = load_source(f"vitpose:{tmp_path / 'named'}")
    assert list(source.names) == list(reversed(COCO17))


def test_no_such_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no model"):
        load_source("vitpose:")
    with pytest.raises(UserError, match=r"vitpose:.*nothing: cannot be loaded"):
        load_source(f"vitpose:{tmp_path / 'nothing'}")
