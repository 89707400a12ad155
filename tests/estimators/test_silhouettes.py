"""Masks by a network: BlazePose's on a photo, a segmentation network's in the box, and those stored by `prepare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import HEIGHT, WIDTH, ListReader, make_records

from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.shards import PreparedShards
from hmdiff.errors import UserError
from hmdiff.estimators import landmark_files
from hmdiff.estimators.silhouettes import SegmentedPeople, _person_classes, load_silhouettes
from hmdiff.files.resources import asset_path
from hmdiff.viz.canvas import read_picture

NETWORKS = pytest.mark.skipif(not landmark_files.installed(), reason="the photo extra is not installed")


def test_names() -> None:
    for name in ("blaze", "", "mmseg:"):
        with pytest.raises(UserError, match=r"give own .*, none, embedded \(BlazePose\) or mmseg:MODEL"):
            load_silhouettes(name)


@NETWORKS
def test_blazepose_sees_the_person_of_the_box_and_nobody_on_the_wall() -> None:
    photo = read_picture(asset_path("sample.jpg"))
    source, (height, width) = load_silhouettes("embedded"), photo.shape[:2]
    mask = source(photo, Path("sample.jpg"), (0.0, 0.0, float(width), float(height)))
    assert mask is not None and mask.shape == (height, width) and mask.dtype == bool
    rows, columns = np.nonzero(mask)
    assert 0.02 < mask.mean() < 0.6 and abs(columns.mean() / width - 0.5) < 0.3 and rows.max() - rows.min() > height / 3
    assert source(np.full_like(photo, 127), Path("wall.jpg"), (0.0, 0.0, float(width), float(height))) is None


def tiny_network() -> Any:
    pytest.importorskip("mmseg")
    from mmengine.config import Config

    norm = {"type": "BN", "requires_grad": True}
    head = {"type": "FCNHead", "in_channels": 32, "in_index": 3, "channels": 8, "num_convs": 1, "num_classes": 3}
    backbone = {"type": "ResNet", "depth": 18, "base_channels": 4, "norm_cfg": norm}
    return Config(
        {
            "default_scope": "mmseg",
            "model": {
                "type": "EncoderDecoder",
                "data_preprocessor": {"type": "SegDataPreProcessor"},
                "backbone": backbone,
                "decode_head": {**head, "norm_cfg": norm},
                "test_cfg": {"mode": "whole"},
            },
            "test_pipeline": [{"type": "LoadImageFromFile"}, {"type": "PackSegInputs"}],
            "test_dataloader": {"dataset": {"metainfo": {"classes": ["wall", "person", "tree"]}}},
        }
    )


@pytest.mark.slow
def test_a_network_of_mmseg_gives_its_people_within_the_box() -> None:
    source = SegmentedPeople(tiny_network(), untrained=True)
    photo, box = np.zeros((48, 64, 3), np.uint8), (10.0, 5.0, 30.0, 40.0)
    with torch.no_grad():
        source.model.decode_head.conv_seg.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    mask = source(photo, Path("a.jpg"), box)
    expected = np.zeros((48, 64), bool)
    expected[5:40, 10:30] = True
    assert mask is not None and np.array_equal(mask, expected)
    with torch.no_grad():
        source.model.decode_head.conv_seg.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    assert source(photo, Path("a.jpg"), box) is not None  # the same photo is not segmented again
    assert source(photo, Path("b.jpg"), box) is None


def test_a_network_without_people_is_refused() -> None:
    assert _person_classes("x", {"dataset_meta": {"classes": ["road", "person", "rider"]}}, {}) == [1, 2]
    for meta in ({}, {"classes": ["road", "car"]}):
        with pytest.raises(UserError, match="x: no class 'person' is named"):
            _person_classes("x", meta, {})


def test_prepare_keeps_the_data_sets_own_mask_and_asks_the_source_for_the_others(tmp_path: Path) -> None:
    records, asked = make_records(tmp_path, 4), []
    x, y = records[0].center
    box = [[x - 20, y - 40, x + 20, y - 40, x + 20, y + 40, x - 20, y + 40]]
    records[0] = dataclasses.replace(records[0], mask=box)

    def mask_function(photo: np.ndarray, path: Path, box: tuple[float, float, float, float]) -> np.ndarray | None:
        asked.append((path, box))
        found = np.zeros(photo.shape[:2], bool)
        found[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        return None if path == records[3].image else found

    figures = prepare_dataset(ListReader(records), tmp_path / "out", mask_function=mask_function, mask_name="mine")
    assert figures["with masks, of those new"] == 3
    assert sorted(path for path, _ in asked) == sorted(record.image for record in records[1:])
    for _, (x1, y1, x2, y2) in asked:  # the crop without its padding, within the photo
        assert 0 <= x1 < x2 <= WIDTH and 0 <= y1 < y2 <= HEIGHT
    store = PreparedShards(tmp_path / "out")
    assert store.index["settings"]["masks of"] == "mine"
    assert [store[number].mask is not None for number in range(4)] == [True, True, True, False]
    none = prepare_dataset(
        ListReader(records), tmp_path / "none", masks=False, mask_function=mask_function, mask_name="mine"
    )
    assert none["with masks, of those new"] == 0
