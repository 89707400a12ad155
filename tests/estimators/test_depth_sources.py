"""Depth of photos: files, callables and networks return 'larger = farther'; crops match the photo's."""

import importlib.util
import sys

import cv2
import numpy as np
import pytest
import torch

from hmdiff.body.skeletons import COCO17
from hmdiff.data.transforms import Augmentation, crop_affine, warp_crop
from hmdiff.errors import UserError
from hmdiff.estimators.depth_network import EstimatedDepth
from hmdiff.estimators.depth_sources import (
    CallableDepth,
    DepthFile,
    crop_depth,
    depth_file_beside,
    farther_is_larger,
    read_depth,
    warp_depth,
)
from hmdiff.estimators.people import crops
from hmdiff.heatmaps import Crop, heatmaps_from_values

HEIGHT, WIDTH = 60, 80


def people_at(center, side):
    values = torch.rand(len(center), 17, 64, 64)
    return heatmaps_from_values(values, COCO17, torch.tensor(center), torch.tensor(side))


def ramp(height=HEIGHT, width=WIDTH):
    """Depth that is affine in the photo: 2 + x / W + 3 y / H at the pixel centres."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return (2 + x[None] + 3 * y[:, None]).astype(np.float32)


# -- crops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_size", [(HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH), (HEIGHT // 2, WIDTH // 2)])
@pytest.mark.parametrize("size", [8, 64])
def test_a_ramp_stays_the_ramp_in_the_crop(map_size, size):
    center, side = torch.tensor([[40.0, 30.0], [28.0, 33.0]]), torch.tensor([24.0, 30.0])
    found = crop_depth(torch.from_numpy(ramp(*map_size)), (WIDTH, HEIGHT), Crop.of(center, side), size)
    place = ((torch.arange(size) + 0.5) / size - 0.5)[None] * side[:, None]
    x, y = center[:, :1] + place, center[:, 1:] + place
    expected = 2 + x[:, None] / WIDTH + 3 * y[:, :, None] / HEIGHT
    torch.testing.assert_close(found, expected, rtol=0, atol=0.004)  # OpenCV rounds positions to 1/32 of a pixel


@pytest.mark.parametrize("side", [30.0, 200.0])
def test_depth_is_cut_as_the_photo_is(side):
    """The photo itself as the depth map: both crops are the same image, up to its 8 bits."""
    height, width = 240, 320
    photo = np.random.default_rng(0).integers(20, 200, (height // 8, width // 8), np.uint8)
    photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_CUBIC)
    people = people_at([[150.0, 110.0], [180.5, 121.25]], [side, side / 2])
    expected = 255 * crops(np.repeat(photo[..., None], 3, 2), people, 64)[:, 0]
    found = crop_depth(torch.from_numpy(photo).float(), (width, height), people.crop, 64)
    known = found.isfinite()
    assert known.float().mean() > 0.95
    inside = torch.nn.functional.max_pool2d((~known).float()[None], 5, 1, 2)[0] == 0  # the photo's edge is darker
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1.5)


def test_outside_the_photo_nothing_is_known():
    crop = Crop.of(torch.tensor([[0.0, 30.0]]), torch.tensor([40.0]))
    found = crop_depth(torch.from_numpy(ramp()), (WIDTH, HEIGHT), crop, 20)
    assert found[0, :, 11:].isfinite().all() and found[0, :, :9].isnan().all()


def test_unknown_pixels_stay_unknown_and_spread_nothing():
    depth = torch.full((HEIGHT, WIDTH), 3.0)
    depth[:, 30:50] = torch.nan
    for size in (8, 32, 128):
        center, side = torch.tensor([[40.0, 30.0]]), torch.tensor([48.0])
        found = crop_depth(depth, (WIDTH, HEIGHT), Crop.of(center, side), size)[0]
        assert found[:, size // 2].isnan().all() and found[:, 0].isfinite().all()
        torch.testing.assert_close(found[found.isfinite()], torch.full_like(found[found.isfinite()], 3.0))
    nothing = crop_depth(torch.full((HEIGHT, WIDTH), torch.nan), (WIDTH, HEIGHT), Crop.of(center, side), 16)
    assert nothing.isnan().all()
    assert crop_depth(depth, (WIDTH, HEIGHT), Crop.of(torch.zeros(0, 2), torch.zeros(0)), 16).shape == (0, 16, 16)


def test_millimetres_and_another_origin_give_the_same_crop():
    depth = torch.from_numpy(ramp())
    depth[5:20, 40:60] = torch.nan
    center, side = torch.tensor([[44.0, 21.0]]), torch.tensor([36.0])
    plain = crop_depth(depth, (WIDTH, HEIGHT), Crop.of(center, side), 24)
    scaled = crop_depth(1000 * depth + 50_000, (WIDTH, HEIGHT), Crop.of(center, side), 24)
    assert torch.equal(plain.isnan(), scaled.isnan()) and plain.isnan().any()
    torch.testing.assert_close((scaled - 50_000) / 1000, plain, rtol=0, atol=1e-4, equal_nan=True)


def test_a_turned_and_mirrored_crop_is_that_of_the_picture():
    photo = np.random.default_rng(1).integers(20, 200, (30, 40), np.uint8)
    photo = cv2.resize(photo, (160, 120), interpolation=cv2.INTER_CUBIC)
    affine = crop_affine(np.array([80.0, 62.0]), 60.0, Augmentation(flip=True, angle=0.4, scale=1.1))
    expected = warp_crop(np.repeat(photo[..., None], 3, 2), (0, 0, 160, 120), affine, 48)[..., 0]
    found = warp_depth(torch.from_numpy(photo).float(), (160, 120), affine, 48)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=0, atol=1.5)


# -- files --------------------------------------------------------------------------------------------------------


def written(folder, kind):
    values = ramp()
    values[3, 4] = np.nan
    path = folder / f"map.{kind.split(':')[0]}"
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez_compressed(path, depth=values.astype(np.float64)[None], other=np.zeros(3))
    elif kind == "npz:alone":
        np.savez(path, values)
    elif kind == "png":
        cv2.imwrite(str(path), (np.nan_to_num(values) * 1000).round().astype(np.uint16))
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "npz:alone", "png"])
def test_every_kind_of_file_gives_the_map(tmp_path, kind):
    found = read_depth(written(tmp_path, kind), (WIDTH, HEIGHT))
    assert found.shape == (HEIGHT, WIDTH) and found.dtype == torch.float32
    expected = torch.from_numpy(ramp()) * (1000 if kind == "png" else 1)
    assert found[3, 4].isnan() and found.isnan().sum() == 1
    torch.testing.assert_close(found[4:], expected[4:], rtol=1e-6, atol=0.51 if kind == "png" else 0)


def test_disparity_is_turned_round(tmp_path):
    np.savez(tmp_path / "a.npz", disparity=1 / ramp())
    np.save(tmp_path / "b.npy", 1 / ramp())
    named, told = read_depth(tmp_path / "a.npz"), read_depth(tmp_path / "b.npy", gives="disparity")
    assert torch.equal(named, told)
    order = torch.from_numpy(ramp()).flatten().argsort()
    assert (named.flatten()[order].diff() >= 0).all() and named.max() > named.min()
    assert farther_is_larger(torch.tensor([1.0, torch.inf, torch.nan]), "disparity").isnan().tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="gives 'inverse': one of depth, disparity is expected"):
        farther_is_larger(torch.zeros(1), "inverse")


def test_another_size_of_the_same_proportions_is_taken(tmp_path):
    np.save(tmp_path / "a.npy", ramp())
    for size in ((WIDTH, HEIGHT), (2 * WIDTH, 2 * HEIGHT), (1001, 752), (159, 120)):
        assert read_depth(tmp_path / "a.npy", size).shape == (HEIGHT, WIDTH)
    with pytest.raises(UserError, match=r"a.npy: 80 x 60 pixels, and the photo has 60 x 80; give the map of"):
        read_depth(tmp_path / "a.npy", (HEIGHT, WIDTH))
    with pytest.raises(UserError, match="proportions"):
        read_depth(tmp_path / "a.npy", (84, 60))


def test_what_is_infinite_is_not_known(tmp_path):
    values = ramp().astype(np.float64)
    values[0, :3] = np.inf, -np.inf, 1e300  # the last exceeds the range of float
    np.save(tmp_path / "a.npy", values)
    assert read_depth(tmp_path / "a.npy").isnan().sum() == 3


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.jpg", lambda path: None, "a depth map is one of .npy, .npz, .png"),
        ("a.npy", lambda path: None, "no such depth map; check the path"),
        ("a.npy", lambda path: path.write_bytes(b"nothing"), "not an npz or npy"),
        ("a.npz", lambda path: path.write_bytes(b"PK\x03\x04broken"), "not an npz or npy"),
        ("a.npy", lambda path: np.save(path, np.array([{}], object)), "pickled Python objects, .*; write it again"),
        ("a.npy", lambda path: np.save(path, np.zeros((3, 4, 5))), r"float64 of shape \(3, 4, 5\); one map"),
        ("a.npy", lambda path: np.save(path, np.zeros((0, 4))), r"shape \(0, 4\)"),
        ("a.npy", lambda path: np.save(path, np.array([["far"]])), "of numbers is expected"),
        ("a.npy", lambda path: np.save(path, np.full((4, 4), np.nan)), "no pixel of it is known"),
        ("a.npz", lambda path: np.savez(path, a=np.ones(2), b=np.ones(2)), r"no array `depth` or .*\(found: a, b"),
        ("a.png", lambda path: cv2.imwrite(str(path), np.ones((4, 4), np.uint8)), "8 bits in 1 channel; .* 16-bit"),
        ("a.png", lambda path: cv2.imwrite(str(path), np.ones((4, 4, 3), np.uint16)), "16 bits in 3 channels"),
        ("a.png", lambda path: path.write_bytes(b"nothing"), "not a picture"),
        ("a.png", lambda path: cv2.imwrite(str(path), np.zeros((4, 4), np.uint16)), "no pixel of it is known"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        read_depth(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_the_map_beside_a_photo(tmp_path):
    photo = tmp_path / "walk.01.jpg"
    assert depth_file_beside(photo) is None
    np.save(tmp_path / "walk.01_depth.npy", ramp())
    assert depth_file_beside(photo) == tmp_path / "walk.01_depth.npy"
    source = DepthFile(tmp_path / "walk.01_depth.npy")
    assert source(torch.rand(1, 3, HEIGHT, WIDTH)).shape == (1, HEIGHT, WIDTH)
    with pytest.raises(UserError, match="depth of one photo, 2 were given"):
        source(torch.rand(2, 3, HEIGHT, WIDTH))


# -- callables ----------------------------------------------------------------------------------------------------


def test_any_callable_is_a_source():
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    assert torch.equal(CallableDepth(lambda pictures: pictures.mean(1))(images), images.mean(1))
    turned = CallableDepth(lambda pictures: pictures[:, :1].numpy(), gives="disparity")
    assert torch.equal(turned(images), -images[:, 0])
    for wrong, message in (
        (lambda p: p, r"gave shape \(2, 3, 60, 80\); \(2, h, w\) is expected"),
        (lambda p: p[:1, 0], r"gave shape \(1, 60, 80\)"),
        (lambda p: p[:, 0].mT, "60 x 80 pixels, and the photo has 80 x 60"),
    ):
        with pytest.raises(UserError, match=message):
            CallableDepth(wrong)(images)


# -- networks -----------------------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers, hmdiff's extra `depth`, is not installed"
)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Depth Anything's class, tiny and random, saved like the published models."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
        "apply_layernorm": True,
    }
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
    )
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(2).add_(0.05)  # keeps the head's ReLU active
    processor = DPTImageProcessor(
        size={"height": 56, "width": 56},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        do_normalize=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    folder = tmp_path_factory.mktemp("depth_anything")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@needs_transformers
def test_a_network_gives_negative_disparity_of_the_photo_s_size(network):
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    estimator = EstimatedDepth(network)
    assert estimator.gives == "disparity"
    found = estimator(images)
    assert found.shape == (2, HEIGHT, WIDTH) and found.isfinite().all()
    # Its own forward pass, prepared by hand.
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    size = (56, 70)  # 60 x 80 rounded to multiples of 14 at that scale
    resized = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        expected = estimator.network(pixel_values=(resized - mean) / std).predicted_depth
    expected = torch.nn.functional.interpolate(expected[:, None], (HEIGHT, WIDTH), mode="bicubic", align_corners=False)
    assert expected.std() > 1e-4
    correlation = torch.corrcoef(torch.stack([expected.flatten(), -found.flatten()]))[0, 1]
    assert correlation > 0.98
    metres = EstimatedDepth(network, gives="depth")(images)
    assert torch.equal(metres, -found)
    torch.testing.assert_close(estimator(images[1:]), found[1:], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@needs_transformers
def test_a_metric_network_gives_depth(network, tmp_path):
    import json
    import shutil

    folder = tmp_path / "metric"
    shutil.copytree(network, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric"}))
    assert EstimatedDepth(folder).gives == "depth"


@needs_transformers
def test_models_that_cannot_be_had_are_named(network, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"depth model 'nobody/no-depth-model' .*the folder: estimator:FOLDER") as e:
        EstimatedDepth("nobody/no-depth-model")
    assert "\n" not in str(e.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no depth model can be read from this folder"):
        EstimatedDepth(tmp_path)
    with pytest.raises(UserError, match="gives 'metres'; one of depth, disparity is expected"):
        EstimatedDepth(network, gives="metres")


def test_kinds_of_networks_whose_sign_is_not_known_are_asked_about():
    from types import SimpleNamespace

    from hmdiff.estimators.depth_network import _output_kind

    assert _output_kind("x", SimpleNamespace(model_type="dpt")) == "disparity"
    assert _output_kind("x", SimpleNamespace(model_type="zoedepth")) == "depth"
    metres = SimpleNamespace(model_type="dpt", backbone_config=SimpleNamespace(model_type="dinov2"))
    for config in (metres, SimpleNamespace(model_type="marigold")):
        with pytest.raises(UserError, match=r"x: whether a model of kind .* gives depth or disparity is not known"):
            _output_kind("x", config)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers, .*pip install 'hmdiff\[depth\]'"):
        EstimatedDepth("anything")
