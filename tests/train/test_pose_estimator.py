"""The pose estimator trained on synthetic people: mmpose's conventions, learning, resume, save and load, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hmdiff.body.body import load_body
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.body.skeletons import HALPE26, mirror_permutation
from hmdiff.cli.main import main
from hmdiff.data.sample import Sample
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.errors import UserError
from hmdiff.estimators import openmmlab
from hmdiff.estimators.mmpose_source import MMPoseEstimator
from hmdiff.estimators.pose_network import (
    CONFIG,
    WEIGHTS,
    SyntheticEstimator,
    build_network,
    network_input,
    read_config,
)
from hmdiff.heatmaps import HEATMAP_SIZE, gaussian_heatmaps, heatmap_peaks
from hmdiff.models.backbone import ImageBackbone
from hmdiff.train import estimator as preparing
from hmdiff.train.estimator import FIGURES, STATE, EstimatorRun, EstimatorTraining, prepare_estimator, save_estimator
from hmdiff.train.estimator_config import NETWORKS, estimator_config, write_config
from hmdiff.train.estimator_crops import Jitter, jitter_crops, target_heatmaps
from hmdiff.train.estimator_figures import pck_figures, within

pytestmark = pytest.mark.slow  # full-size networks, or mmpose

MMPOSE = importlib.util.find_spec("mmpose") is not None
needs_mmpose = pytest.mark.skipif(not MMPOSE, reason="mmpose is not installed: uv sync --extra mmpose")

TINY = EstimatorTraining(steps=4, people=4, image_size=64, width=4, warmup=1)
STILL = Jitter(rotation=0, scale=(1.0, 1.0), shift=0, mirrored=0, gain=0)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four, so that evaluating a few people renders only those."""
    monkeypatch.setattr(preparing, "_BLOCK", 4)


def drawn(people: int = 4, size: int = 64) -> Sample:
    body = load_body("free")
    data = SyntheticHumans(body, PoseMixture(), load_mesh(body, 432).coarse_ids, people, image_size=size)
    return data.block("train", 0)


# ---- crops ----


def test_jitter_moves_the_picture_and_the_points_alike() -> None:
    """White dots drawn at the keypoints are found at the transformed keypoints."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(8, 26, 2, generator=generator) - 0.5
    dots = gaussian_heatmaps(points[:, :1], torch.ones(8, 1), 2.0, 96).expand(-1, 3, -1, -1)
    images, moved = jitter_crops(dots, points, generator, Jitter(mirrored=0, gain=0))
    found, _ = heatmap_peaks(images[:, :1])
    assert (moved[:, 0].abs() < 0.9).all()
    torch.testing.assert_close(found[:, 0], moved[:, 0], atol=0.01, rtol=0)
    assert (moved - points).abs().amax() > 0.1


def test_a_mirrored_person_has_left_and_right_exchanged() -> None:
    points = torch.rand(2, 26, 2) - 0.5
    _, moved = jitter_crops(
        torch.rand(2, 3, 32, 32), points, torch.Generator().manual_seed(0), dataclasses.replace(STILL, mirrored=1)
    )
    expected = points[:, mirror_permutation(HALPE26)] * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(moved, expected)


def test_jitter_of_nothing_changes_nothing_and_scale_shows_more() -> None:
    images, points = torch.rand(2, 3, 32, 32), torch.rand(2, 26, 2) - 0.5
    same, unmoved = jitter_crops(images, points, torch.Generator().manual_seed(0), STILL)
    torch.testing.assert_close(same, images)
    torch.testing.assert_close(unmoved, points)
    wide = dataclasses.replace(STILL, scale=(2.0, 2.0))
    seen, moved = jitter_crops(images, points, torch.Generator().manual_seed(0), wide)
    torch.testing.assert_close(moved, points / 2)
    assert (seen[..., :7, :] == 0).all() and seen[..., 12:20, 12:20].amin() > 0  # black outside the photo


@needs_mmpose
def test_targets_are_those_of_mmpose() -> None:
    """Compared with the codec's `encode` on pixel indices; a joint outside has weight 0 and an empty heatmap."""
    network: Any = build_network(estimator_config(64, 4))
    codec = network.head.decoder
    points = torch.rand(3, 26, 2, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    heatmaps, weights = target_heatmaps(points, 64, 32, codec.sigma)
    assert 0 < int((weights == 0).sum()) < weights.numel()
    for person in range(3):
        pixels = (points[person].numpy() + 1) / 2 * 64 - 0.5
        encoded = codec.encode(pixels[None].astype(np.float32), weights[person][None].numpy())
        np.testing.assert_allclose(heatmaps[person].numpy(), encoded["heatmaps"], atol=1e-5)
        np.testing.assert_array_equal(weights[person].numpy(), encoded["keypoint_weights"][0])


# ---- figures ----


@needs_mmpose
def test_pck_is_that_of_mmpose() -> None:
    from mmpose.evaluation.functional import keypoint_pck_accuracy

    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(5, 26, 2, generator=generator) * 2 - 1
    found = truth + 0.15 * torch.randn(5, 26, 2, generator=generator)
    mask = np.ones((5, 26), bool)
    each, _, _ = keypoint_pck_accuracy(found.numpy(), truth.numpy(), mask, 0.1, np.full((5, 2), 2.0, np.float32))
    np.testing.assert_allclose(within(found, truth, 0.2).float().mean(0).numpy(), each, atol=1e-6)


class Oracle:
    """A perfect estimator: Gaussians at the ground truth, displaced for hidden joints."""

    def __init__(self, sample: Sample, displaced: float) -> None:
        assert sample.joints_2d is not None and sample.visible is not None
        self.points = sample.joints_2d + displaced * (~sample.visible[..., None])

    def estimate(self, images: Tensor) -> Tensor:
        points = self.points[: len(images)]
        return gaussian_heatmaps(points, torch.ones(points.shape[:2]), 2.0, HEATMAP_SIZE)


def test_figures_of_a_perfect_and_of_a_displaced_estimator() -> None:
    body = load_body("free")
    data = SyntheticHumans(body, PoseMixture(), load_mesh(body, 432).coarse_ids, 8, image_size=32)
    sample = data.block("test_occluded", 0)
    assert sample.joints_2d_confidence is not None and sample.visible is not None
    inside = sample.joints_2d_confidence > 0
    perfect = pck_figures(Oracle(sample, 0.0), data, "test_occluded", 8)  # type: ignore[arg-type]
    assert perfect["visible"]["joints"] == int(sample.visible.sum())
    assert perfect["hidden"]["joints"] == int((inside & ~sample.visible).sum()) > 0
    assert perfect["visible"]["pck@0.05"] == 1 and perfect["visible"]["pckh@0.5"] > 0.95
    # 0.14 half-sides in x and y is a distance of 0.099 sides: outside 0.05, inside 0.1.
    displaced = pck_figures(Oracle(sample, 0.14), data, "test_occluded", 8)  # type: ignore[arg-type]
    assert displaced["visible"] == perfect["visible"]
    assert displaced["hidden"]["pck@0.05"] < 0.1 and displaced["hidden"]["pck@0.1"] > 0.75


# ---- the network ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> EstimatorRun:
    """Fifty steps on the same few crops, enough to overfit them."""
    torch.set_num_threads(1)
    values = EstimatorTraining(
        steps=200, people=4, views=1, image_size=64, width=16, warmup=5, ema_decay=0.8, learning_rate=1e-2
    )
    run = EstimatorRun(tmp_path_factory.mktemp("trained"), values)
    images, points = run.batch(0)
    run.batch = lambda step: (images, points)  # type: ignore[method-assign]
    run.losses = [run.one_step() for _ in range(50)]  # type: ignore[attr-defined]
    return run


@needs_mmpose
def test_it_learns_people_it_has_seen(trained: EstimatorRun) -> None:
    losses = trained.losses  # type: ignore[attr-defined]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    images, points = trained.batch(0)
    inside = (points.abs() < 1).all(-1)

    def share(network: Any) -> float:
        found, _ = heatmap_peaks(SyntheticEstimator(network).estimate(images))
        return within(found, points, 0.2)[inside].float().mean().item()

    untrained = build_network(trained.config)
    after = share(trained.averaged)
    assert after > 0.7 and after > share(untrained) + 0.4


@needs_mmpose
def test_estimates_are_mmposes_own_and_do_not_depend_on_the_batch(trained: EstimatorRun) -> None:
    from mmpose.structures import PoseDataSample

    estimator = SyntheticEstimator(trained.averaged)
    images = (drawn(4).image * 255).round() / 255  # type: ignore[operator]
    values = estimator.estimate(images)
    assert values.shape == (4, 26, 64, 64) and values.dtype == torch.float32 and values.amin() >= 0
    single = torch.cat([estimator.estimate(image[None]) for image in images])
    torch.testing.assert_close(values, single, atol=1e-5, rtol=1e-4)

    # mmpose's input is 8-bit BGR.
    network: Any = trained.averaged
    eight_bits = [(image.flip(0) * 255).round().to(torch.uint8) for image in images]
    prepared = network.data_preprocessor({"inputs": eight_bits, "data_samples": [PoseDataSample() for _ in images]})
    torch.testing.assert_close(network_input(network, images), prepared["inputs"], atol=1e-4, rtol=0)


@needs_mmpose
def test_a_resnet_starts_the_backbone_of_a_model_that_reads_pictures(tmp_path: Path) -> None:
    """mmpose's and timm's ResNet give the same output for the same weights."""
    config = estimator_config(64, 4, "resnet18")
    save_estimator(tmp_path, config, build_network(config))
    network: Any = SyntheticEstimator.load(tmp_path).network
    backbone = ImageBackbone("resnet18", 64, 32, pretrained=str(tmp_path / WEIGHTS)).eval()
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone.network(picture)[-1], network.backbone(picture)[-1], rtol=1e-4, atol=1e-5)
        assert network(picture, None, mode="tensor").shape == (2, 26, 32, 32)
    with pytest.raises(UserError, match="network 'resnet' is not known; choose one of hrnet, resnet18"):
        estimator_config(64, 4, "resnet")


def test_the_command_offers_the_networks_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "estimator", "--network", "resnet"])
    said = capsys.readouterr().err
    assert all(f"'{name}'" in said for name in NETWORKS)


@needs_mmpose
def test_a_target_that_is_learnt_lies_where_the_joint_is() -> None:
    """Between mmpose's grid and ours is a shift: decoding the target itself gives the exact joint."""
    network: Any = build_network(estimator_config(64, 4))
    estimator = SyntheticEstimator(network)
    points = torch.rand(2, 26, 2, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    heatmaps, _ = target_heatmaps(points, 64, 32, 2.0)
    network.forward = lambda *args, **kwargs: heatmaps
    found, peaks = heatmap_peaks(estimator.estimate(torch.rand(2, 3, 64, 64)))
    torch.testing.assert_close(found, points, atol=0.01, rtol=0)
    assert (peaks > 0.9).all()


@needs_mmpose
def test_pictures_of_another_size_and_heatmaps(trained: EstimatorRun) -> None:
    estimator = SyntheticEstimator(trained.averaged)
    small = drawn(2).image
    assert small is not None
    large = torch.nn.functional.interpolate(small, (128, 128), mode="nearest")
    near = estimator.estimate(large) - estimator.estimate(small)
    assert near.abs().mean() < 0.02
    heatmaps = estimator.heatmaps(small)
    assert len(heatmaps) == 2 and heatmaps.valid.all()
    assert heatmaps.side.tolist() == [2, 2] and heatmaps.center.tolist() == [[1, 1], [1, 1]]
    for wrong in (small[0], small[:, :2], small[..., :32]):
        with pytest.raises(UserError, match=r"\(B, 3, S, S\) expected"):
            estimator.estimate(wrong)


@needs_mmpose
def test_saved_and_loaded_it_says_the_same(trained: EstimatorRun, tmp_path: Path) -> None:
    images = drawn(2).image
    assert images is not None
    loaded = save_estimator(tmp_path, trained.config, trained.averaged)
    again = SyntheticEstimator.load(tmp_path)
    assert torch.equal(loaded.estimate(images), again.estimate(images))
    before = SyntheticEstimator(trained.averaged).estimate(images)
    torch.testing.assert_close(again.estimate(images), before, atol=0.02, rtol=0)  # half precision
    assert read_config(tmp_path / CONFIG) == trained.config


@needs_mmpose
def test_mmpose_reads_the_files_itself(trained: EstimatorRun, tmp_path: Path) -> None:
    """`init_model` gives the same network and joint names; its pipeline gives the same keypoints for a picture."""
    openmmlab.import_openmmlab("mmpose.apis")
    from mmpose.apis import inference_topdown, init_model

    estimator = save_estimator(tmp_path, trained.config, trained.averaged)
    model: Any = init_model(str(tmp_path / CONFIG), None, "cpu")
    openmmlab.load_weights(model, tmp_path / WEIGHTS)
    meta = model.dataset_meta
    assert [meta["keypoint_id2name"][i] for i in range(26)] == list(HALPE26)
    assert meta["flip_indices"] == mirror_permutation(HALPE26)
    image = trained.batch(0)[0][:1]
    photo = np.ascontiguousarray((image[0].permute(1, 2, 0).numpy()[..., ::-1] * 255).round().astype(np.uint8))
    low, high = 32 - 32 / 1.25, 32 + 32 / 1.25  # its padded crop is the whole picture
    result = inference_topdown(model, photo, np.array([[low, low, high, high]], np.float32))[0]
    theirs = result.pred_instances.keypoints[0] * (2 / 64) - 1 + 1 / 64  # pixel indices as crop coordinates
    maps = estimator.estimate((image * 255).round() / 255)
    ours, confidence = heatmap_peaks(maps)
    # With two peaks of similar height the decoders may differ: such joints are not compared.
    near = torch.nn.functional.max_pool2d((maps == maps.amax((-2, -1), keepdim=True)).float(), 9, 1, 4) > 0
    second = maps.masked_fill(near, 0.0).amax((-2, -1))
    sure = ((confidence[0] > 0.4) & (second[0] < 0.6 * confidence[0])).numpy()
    assert sure.sum() > 3
    np.testing.assert_allclose(theirs[sure], ours[0].numpy()[sure], atol=0.06)

    # The provider for photos uses mmpose's pixel indices, which differ by half a pixel from our coordinates.
    provider = MMPoseEstimator(tmp_path / CONFIG, tmp_path / WEIGHTS)
    assert provider.names == HALPE26
    found = provider.heatmaps(np.ascontiguousarray(photo[..., ::-1]), [[low, low, high, high]])
    points, _ = heatmap_peaks(found.values)
    np.testing.assert_allclose(points[0].numpy()[sure] + 1 / 64, ours[0].numpy()[sure], atol=0.03)


# ---- the run ----


@needs_mmpose
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = EstimatorRun(tmp_path / "whole", TINY)
    for _ in range(4):
        whole.one_step()
    first = EstimatorRun(tmp_path / "cut", TINY)
    first.one_step()
    first.one_step()
    first.save()
    first.one_step()  # not saved when killed
    second = EstimatorRun(tmp_path / "cut", TINY)
    assert second.step == 2
    second.one_step()
    second.one_step()
    for name, network in (("network", whole.network), ("averaged", whole.averaged)):
        for key, value in getattr(second, name).state_dict().items():
            assert torch.equal(value, network.state_dict()[key]), (name, key)


@needs_mmpose
@pytest.mark.usefixtures("few")
def test_the_command_writes_the_estimator_and_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparing.EstimatorTraining.__init__, "__defaults__", tuple(dataclasses.asdict(TINY).values()))
    folder = tmp_path / "pose"
    words = ["prepare", "estimator", "--output", str(folder), "--steps", "2", "--image-size", "64"]
    words += ["--width", "4", "--people", "4", "--device", "cpu"]
    assert main(words) == 0
    assert "test visible pck@0.05" in capsys.readouterr().out
    report = json.loads((folder / FIGURES).read_text())
    assert report["training"]["steps"] == 2 and set(report["splits"]) == {"test", "test_occluded"}
    figures = [figures for kinds in report["splits"].values() for figures in kinds.values()]
    assert all(math.isfinite(value) for figure in figures for value in figure.values())
    assert report["splits"]["test"]["visible"]["joints"] > 0
    assert not (folder / STATE).exists() and (folder / "training" / "log.csv").read_text().startswith("step,loss")
    assert SyntheticEstimator.load(folder).image_size == 64
    assert main(words) == 2
    assert "a finished estimator is there" in capsys.readouterr().err


# ---- errors ----


@needs_mmpose
def test_other_values_do_not_go_on_with_a_training(tmp_path: Path) -> None:
    EstimatorRun(tmp_path, TINY).save()
    with pytest.raises(UserError, match="begun with steps 4, now 9 is asked for"):
        EstimatorRun(tmp_path, dataclasses.replace(TINY, steps=9))
    (tmp_path / STATE).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"state.safetensors: damaged .* remove it to train from the start"):
        EstimatorRun(tmp_path, TINY)


def test_values_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="views 0: at least 1 is needed"):
        EstimatorRun(tmp_path, dataclasses.replace(TINY, views=0))
    with pytest.raises(UserError, match="image_size 100: a multiple of 32 is needed"):
        estimator_config(100)


def test_a_folder_that_is_no_estimator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.py in it; give a folder that 'hmdiff prepare estimator' wrote"):
        SyntheticEstimator.load(tmp_path)
    write_config(estimator_config(64, 4), tmp_path / CONFIG)
    with pytest.raises(UserError, match=r"no model.safetensors in it"):
        SyntheticEstimator.load(tmp_path)


@pytest.mark.parametrize("text", ["import os", "model = open('x')", "model = {", "other = 1"])
def test_a_config_is_never_run(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match="that 'hmdiff prepare estimator' wrote"):
        read_config(tmp_path / CONFIG)


@needs_mmpose
def test_another_models_weights_and_another_codec(trained: EstimatorRun, tmp_path: Path) -> None:
    save_estimator(tmp_path, trained.config, trained.averaged)
    shutil.copy(tmp_path / WEIGHTS, tmp_path / "kept")
    write_config(estimator_config(64, 4), tmp_path / CONFIG)
    with pytest.raises(UserError, match="not the weights of this config"):
        SyntheticEstimator.load(tmp_path)
    config = estimator_config(64, 4)
    decoder = config["model"]["head"]["decoder"]
    config["model"]["head"]["decoder"] = {**decoder, "type": "UDPHeatmap"}
    del config["model"]["head"]["decoder"]["unbiased"]
    with pytest.raises(UserError, match="codec UDPHeatmap found, MSRAHeatmap expected"):
        SyntheticEstimator(build_network(config))
    config["model"]["backbone"] = {"type": "NoSuchNet"}
    with pytest.raises(UserError, match=r"mmpose cannot build it .*NoSuchNet"):
        build_network(config)


def test_without_mmpose_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openmmlab.import_openmmlab.cache_clear()
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(UserError, match=r"mmpose: mmcv.* is not installed; install the extra mmpose"):
        prepare_estimator(tmp_path / "new", TINY)
    openmmlab.import_openmmlab.cache_clear()
