"""The mmpose source: positions preserved through its warps and codecs, real models, weights, refusals, the commands."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pickle
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small import small_pipeline
from torch import Tensor

from hmdiff.body.skeletons import COCO17, HALPE26, J14
from hmdiff.cli import estimation
from hmdiff.cli.main import main
from hmdiff.errors import UserError
from hmdiff.estimators import openmmlab
from hmdiff.estimators.detector import PersonDetector
from hmdiff.estimators.mmpose_codecs import heatmaps_from_codec, heatmaps_from_simcc
from hmdiff.estimators.mmpose_source import MMPoseEstimator, joint_names
from hmdiff.estimators.openmmlab import find_checkpoint, find_model, import_openmmlab, read_config
from hmdiff.estimators.people import read_people
from hmdiff.estimators.source import DetectedPeople, check_boxes
from hmdiff.files.foreign_weights import read_checkpoint
from hmdiff.heatmaps import Crop, Heatmaps, crop_from_box, heatmap_peaks, load_heatmaps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mmpose") is None, reason="mmpose is not installed: uv sync --extra mmpose"
    ),
]

MSRA = "topdown_heatmap/coco/td-hm_mobilenetv2_8xb64-210e_coco-256x192.py"
UDP = "topdown_heatmap/coco/cspnext-tiny_udp_8xb256-210e_coco-256x192.py"
RTM26 = "rtmpose/body8/rtmpose-t_8xb1024-700e_body8-halpe26-256x192.py"
SIMCC = "simcc/coco/simcc_mobilenetv2_wo-deconv-8xb64-210e_coco-256x192.py"
BOXES = [[50.0, 40.0, 150.0, 280.0], [200.0, 60.0, 390.0, 200.0], [-20.0, 100.0, 60.0, 320.0]]  # tall, wide, partly out


def shipped(name: str) -> Path:
    folder = Path(import_openmmlab("mmpose.apis").__file__ or "").parents[1]
    return folder / ".mim" / "configs" / "body_2d_keypoint" / name


def small_config(name: str) -> Any:
    """One of mmpose's own configs, with smaller networks where needed."""
    return read_config(shipped(name))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)


def awaken(model: Any, *size: int) -> None:
    """Set batch norm statistics from a random batch: otherwise random weights return the same for every photo."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train().forward(torch.randn(8, 3, *size), None, mode="tensor")
    model.eval()


@pytest.fixture(scope="module")
def msra() -> MMPoseEstimator:
    torch.manual_seed(0)
    estimator = MMPoseEstimator(shipped(MSRA), untrained=True)
    awaken(estimator.model, 256, 192)
    return estimator


@pytest.fixture(scope="module")
def weights(msra: MMPoseEstimator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pose.safetensors"
    save_file({name: value.contiguous() for name, value in msra.model.state_dict().items()}, path)
    return path


def places(maps: Heatmaps) -> Tensor:  # (P, 26, 2) photo pixels
    return maps.crop.to_photo(heatmap_peaks(maps.values)[0])


# ---- places ----

SIZES = [((192, 256), (48, 64)), ((288, 384), (72, 96)), ((128, 128), (64, 64)), ((192, 192), (48, 48))]
PHOTO_BOXES = {
    "tall": (300, 100, 520, 700),
    "wide": (100, 300, 640, 560),
    "small": (10, 20, 45, 90),
    "large": (-100, 0, 700, 2000),
}


def warp(box: Any, entry: tuple[int, int], udp: bool, keypoints: np.ndarray | None = None) -> dict[str, Any]:
    """mmpose's own transforms of a box and, if given, of photo keypoints (1, K, 2)."""
    from mmpose.datasets.transforms import GetBBoxCenterScale, TopdownAffine

    results: dict[str, Any] = {"bbox": np.array([box], np.float32), "img": np.zeros((4, 4, 3), np.uint8)}
    if keypoints is not None:
        results["keypoints"] = keypoints.astype(np.float32)
    results = TopdownAffine(entry, use_udp=udp).transform(GetBBoxCenterScale().transform(results))
    assert results is not None
    return results


def wanted_keypoints(box: Any, entry: tuple[int, int], udp: bool, stride: np.ndarray | None) -> np.ndarray:
    """(1, 17, 2) in the inner part of the box; on multiples of the input's stride if the codec rounds."""
    low, high = np.array(box[:2]), np.array(box[2:])
    share = np.random.default_rng(1).uniform(0.08, 0.92, (1, 17, 2))
    keypoints = low + share * (high - low)
    if stride is not None:
        result = warp(box, entry, udp, np.concatenate([keypoints, [[low, high]]], 1))["transformed_keypoints"][0]
        # Two points determine the whole warp: it neither rotates nor shears.
        scale = (high - low) / (result[-1] - result[-2])
        keypoints = (np.round(result[None, :-2] / stride) * stride - result[-2]) * scale + low
    return np.asarray(keypoints)


def round_trip(codec: Any, box: Any, udp: bool, exact: bool) -> float:
    """The largest distance between the keypoints and the peaks in our crop, photo pixels."""
    kind, entry = type(codec).__name__, tuple(codec.input_size)
    stride = None
    if not exact:
        stride = np.full(2, 1 / codec.simcc_split_ratio) if kind == "SimCCLabel" else codec.scale_factor
    keypoints = wanted_keypoints(box, entry, udp, stride)
    results = warp(box, entry, udp, keypoints)
    encoded = codec.encode(results["transformed_keypoints"])
    center, scale = (torch.from_numpy(np.float64(results[key]))[None] for key in ("input_center", "input_scale"))
    crop = (COCO17, codec, center, scale, udp, *crop_from_box(torch.tensor([box], dtype=torch.float32)))
    if kind == "SimCCLabel":
        x, y = (torch.from_numpy(encoded[f"keypoint_{axis}_labels"]) for axis in "xy")
        maps = heatmaps_from_simcc(x, y, torch.full((1, 17), 0.8), *crop)
    else:
        maps = heatmaps_from_codec(torch.from_numpy(encoded["heatmaps"])[None], *crop)
        assert maps.values[0, :17].amax((-2, -1)).min() > 0.75  # the peak is still the confidence
    assert torch.equal(maps.center, crop[-2]) and torch.equal(maps.side, crop[-1])
    return float((places(maps)[0, :17] - torch.from_numpy(keypoints[0])).norm(dim=-1).max())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0][1]}x{size[0][0]}")
@pytest.mark.parametrize("name", ["MSRA", "MSRA unbiased", "UDP", "SimCC", "UDP, plain warp", "SimCC, UDP warp"])
def test_a_keypoint_of_mmposes_codecs_comes_back(name: str, size: tuple[tuple[int, int], tuple[int, int]]) -> None:
    import_openmmlab("mmpose.apis")
    from mmpose.codecs import MSRAHeatmap, SimCCLabel, UDPHeatmap

    entry, grid = size
    sigma = 2 * grid[1] / 64
    codec: Any
    if name.startswith("SimCC"):
        codec = SimCCLabel(entry, sigma=5.66 * entry[1] / 256, normalize=False)
    elif name.startswith("UDP"):
        codec = UDPHeatmap(entry, grid, sigma=sigma)
    else:
        codec = MSRAHeatmap(entry, grid, sigma=sigma, unbiased="unbiased" in name)
    udp = name in ("UDP", "SimCC, UDP warp")
    exact = name not in ("MSRA", "SimCC", "SimCC, UDP warp")  # the others round to their grid before encoding
    found = {kind: round_trip(codec, box, udp, exact) for kind, box in PHOTO_BOXES.items()}
    print(f"{name} {entry[1]}x{entry[0]}:", ", ".join(f"{kind} {value:.3f}" for kind, value in found.items()), "px")
    assert max(found.values()) < 0.5


def test_what_lies_outside_the_model_s_input_is_zero_and_a_mode_stays_a_mode() -> None:
    import_openmmlab("mmpose.apis")
    from mmpose.codecs import MSRAHeatmap, SimCCLabel

    center, scale = torch.tensor([[100.0, 100.0]]).double(), torch.tensor([[150.0, 200.0]]).double()
    crop = (
        ["nose"],
        MSRAHeatmap((192, 256), (48, 64), sigma=2),
        center,
        scale,
        False,
        *crop_from_box(torch.tensor([[60.0, 20, 140, 180]])),
    )
    maps = heatmaps_from_codec(torch.ones(1, 1, 64, 48), *crop)
    # The first of 48 pixels has its centre on the input's left edge, half a pixel before the centre of our 8th;
    # positions half a pixel or more beyond the outer centres are outside.
    assert maps.values[0, 0, 32].nonzero()[:, 0].tolist() == list(range(8, 55))
    assert maps.values[0, 0, :, 32].nonzero()[:, 0].tolist() == list(range(63))
    torch.testing.assert_close(maps.values[0, 0, 20:40, 20:40], torch.ones(20, 20))
    assert maps.valid.sum() == 1

    two = torch.zeros(1, 1, 384)
    two[0, 0, [100, 280]] = torch.tensor([1.0, 0.5])
    one = torch.zeros(1, 1, 512)
    one[0, 0, 256] = 1
    codec = SimCCLabel((192, 256), smoothing_type="standard")
    values = heatmaps_from_simcc(two, one, torch.tensor([[0.6]]), ["nose"], codec, *crop[2:]).values[0, 0]
    row = values[values.amax(1).argmax()]
    peaks = [i for i in range(1, 63) if row[i] > row[i - 1] and row[i] >= row[i + 1]]
    assert len(peaks) == 2 and row[peaks[1]] / row[peaks[0]] == pytest.approx(0.5, abs=0.1)
    assert values.max() == pytest.approx(0.6, rel=0.1)  # between two pixels, the peak itself is not sampled
    width = (row[:32].log()[peaks[0] - 1] + row[:32].log()[peaks[0] + 1] - 2 * row[:32].log()[peaks[0]]).abs()
    assert 1 / width.sqrt() == pytest.approx(2.0, rel=0.02)  # a single bin becomes as wide as a heatmap label


# ---- real models ----


def planted(estimator: MMPoseEstimator, outputs: Callable[[], Any]) -> None:
    """Replace the output of the model's head; the rest of mmpose runs unchanged."""
    estimator.model.head.forward = lambda feats: outputs()
    estimator.model.test_cfg["flip_test"] = False


@pytest.mark.parametrize("name", [UDP, RTM26, SIMCC])
def test_planted_heatmaps_come_back_through_the_whole_of_mmpose(name: str, photo: np.ndarray) -> None:
    """Encoded by the model's own codec, then decoded by mmpose and by us: the same positions in photo pixels."""
    from mmpose.apis import inference_topdown

    estimator = MMPoseEstimator(shipped(name), untrained=True)
    codec, count = estimator.model.head.decoder, estimator.model.head.out_channels
    rounds = name != UDP
    encoded = []
    wanted = []
    for box in BOXES:
        stride = np.full(2, 1 / codec.simcc_split_ratio) if rounds else None
        keypoints = wanted_keypoints(box, codec.input_size, estimator.use_udp, stride)
        keypoints = np.concatenate([keypoints, keypoints[:, : count - 17]], 1)
        wanted.append(keypoints[0])
        encoded.append(codec.encode(warp(box, codec.input_size, estimator.use_udp, keypoints)["transformed_keypoints"]))

    def outputs() -> Any:
        if not rounds:
            return torch.from_numpy(np.stack([one["heatmaps"] for one in encoded]))
        labels = [np.concatenate([one[f"keypoint_{axis}_labels"] for one in encoded]) for axis in "xy"]
        # SimCCHead's loss trains logits of the label, RTMPose's the label itself.
        return tuple(torch.from_numpy(np.log(label + 1e-9) + 30 if name == SIMCC else label) for label in labels)

    planted(estimator, outputs)
    found = estimator.heatmaps(photo, BOXES)
    joints = [HALPE26.index(joint) for joint in estimator.names]
    assert found.valid.sum(1).tolist() == [count] * 3
    distance = (places(found)[:, joints] - torch.from_numpy(np.stack(wanted))).norm(dim=-1)
    assert distance.max() < 0.1
    theirs = inference_topdown(estimator.model, photo[..., ::-1], np.array(BOXES))
    decoded = np.concatenate([one.pred_instances.keypoints for one in theirs])
    assert np.abs(places(found)[:, joints].numpy() - decoded).max() < (0.02 if rounds else 0.5)
    confidence = heatmap_peaks(found.values)[1][:, joints]
    assert confidence.min() > 0.8 and confidence.max() < 1.02


def test_a_person_s_heatmaps_do_not_depend_on_the_others(
    msra: MMPoseEstimator, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = msra.heatmaps(photo, BOXES)
    monkeypatch.setattr("hmdiff.estimators.mmpose_source.PEOPLE_AT_ONCE", 2)
    in_parts = msra.heatmaps(photo, torch.tensor(BOXES))
    for index, box in enumerate(BOXES):
        alone = msra.heatmaps(photo, [box])
        for other in (together[index], in_parts[index]):
            torch.testing.assert_close(other.values, alone.values, rtol=1e-3, atol=5e-4)
            assert torch.equal(other.center, alone.center) and torch.equal(other.side, alone.side)
    assert (together.values[0] - together.values[1]).abs().max() > 1e-3  # the photo affects the result
    assert together.valid[0].nonzero()[:, 0].tolist() == list(range(17))


def test_the_model_sees_the_photo_in_its_own_colours(msra: MMPoseEstimator, photo: np.ndarray) -> None:
    """For RGB, the result must equal mmpose's for the BGR of its own reader."""
    from mmpose.apis import inference_topdown

    (theirs,) = inference_topdown(msra.model, photo[..., ::-1], np.array(BOXES[:1]))
    ours = msra.heatmaps(photo, BOXES[:1])
    meta = [torch.from_numpy(theirs.metainfo[key])[None].double() for key in ("input_center", "input_scale")]
    crop = (COCO17, msra.model.head.decoder, *meta, False, ours.center, ours.side)
    assert torch.equal(heatmaps_from_codec(theirs.pred_fields.heatmaps[None], *crop).values, ours.values)
    swapped = msra.heatmaps(photo[..., ::-1], BOXES[:1])
    assert (swapped.values - ours.values).abs().max() > 1e-3 * ours.values.amax()


def test_what_a_model_says_that_is_no_heatmap(photo: np.ndarray) -> None:
    estimator = MMPoseEstimator(shipped(MSRA), untrained=True)
    planted(estimator, lambda: torch.full((1, 17, 64, 48), float("nan")))
    with pytest.raises(UserError, match=r"mobilenetv2.*NaN or infinite values in joint 'nose' of person 0"):
        estimator.heatmaps(photo, BOXES[:1])
    planted(estimator, lambda: torch.full((1, 17, 64, 48), -0.1))
    with pytest.raises(UserError, match="all zero for person 0: nobody was seen there"):
        estimator.heatmaps(photo, BOXES[:1])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "nobody is given"),
        ([[0, 0, 9]], r"shape \(1, 3\) found"),
        ([[0, 0, float("nan"), 9]], "or NaN"),
        ([[1, 2, 30, 40], [50, 20, 10, 90]], r"box 1 \(50,20,10,90\) has no size"),
        ([[500, 20, 600, 90]], "outside the 400 x 300 photo"),
        ([[-90, 20, -10, 90]], "outside the 400 x 300 photo"),
    ],
)
def test_boxes(boxes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_boxes(boxes, 400, 300)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("topdown_regression/coco/td-reg_res50_8xb64-210e_coco-256x192.py", "RegressionHead regresses coordinates"),
        ("topdown_regression/coco/td-reg_res50_rle-8xb64-210e_coco-256x192.py", "RLEHead regresses coordinates"),
        ("integral_regression/coco/ipr_res50_8xb64-210e_coco-256x256.py", "DSNTHead regresses"),
        ("dekr/coco/dekr_hrnet-w32_8xb10-140e_coco-512x512.py", "BottomupPoseEstimator; a TopdownPoseEstimator"),
        ("topdown_heatmap/coco/td-hm_mspn50_8xb32-210e_coco-256x192.py", "the codec MegviiHeatmap"),
        ("topdown_heatmap/coco/td-hm_hrnet-w32_udp-regress-8xb64-210e_coco-256x192.py", "UDPHeatmap 'combined'"),
    ],
)
def test_models_without_heatmaps(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MMPoseEstimator(shipped(name), untrained=True)


def test_configs_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gone\.py: no such config"):
        MMPoseEstimator(tmp_path / "gone.py")
    with pytest.raises(UserError, match="is a folder"):
        MMPoseEstimator(tmp_path)
    with pytest.raises(UserError, match=r"hrnett: neither a config file nor a model .* did you mean '"):
        MMPoseEstimator("hrnett")
    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(UserError, match=r"broken.py: cannot be read as a config"):
        MMPoseEstimator(tmp_path / "broken.py")
    (tmp_path / "empty.py").write_text("a = 1")
    with pytest.raises(UserError, match=r"empty.py: a config without model"):
        MMPoseEstimator(tmp_path / "empty.py")
    imports = "custom_imports = dict(imports=['no_such_package'], allow_failed_imports=False)"
    (tmp_path / "imports.py").write_text(imports)
    with pytest.raises(UserError, match=r"needs what is not installed .*no_such_package"):
        MMPoseEstimator(tmp_path / "imports.py")

    config = small_config(MSRA)
    config.model.backbone.type = "NoNet"
    with pytest.raises(UserError, match=r"cannot be built .*NoNet"):
        MMPoseEstimator(config, untrained=True)
    config = small_config(MSRA)
    config.model.head.out_channels = 26
    with pytest.raises(UserError, match="gives 26 heatmaps but its data set 'coco' names 17 joints"):
        MMPoseEstimator(config, untrained=True)
    config = small_config(MSRA)
    for part in ("train", "val", "test"):
        config[f"{part}_dataloader"].dataset.pop("type")
    with pytest.raises(UserError, match="names the joints"):
        MMPoseEstimator(config, untrained=True)
    config = small_config(MSRA)
    config.test_dataloader.dataset.pipeline = config.test_dataloader.dataset.pipeline[:1]
    with pytest.raises(UserError, match="no TopdownAffine"):
        MMPoseEstimator(config, untrained=True)
    if importlib.util.find_spec("mmpretrain") is None:
        with pytest.raises(UserError, match="mmpretrain is not installed"):
            MMPoseEstimator(
                shipped("topdown_heatmap/coco/td-hm_ViTPose-small_8xb64-210e_coco-256x192.py"), untrained=True
            )


def test_without_mmpose_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(UserError, match=r"mmpose: mmcv is not installed; .* uv sync --extra mmpose"):
        openmmlab.import_openmmlab.__wrapped__("mmpose.apis")


def test_importing_leaves_no_trace_of_the_stand_in() -> None:
    import_openmmlab("mmpose.apis")
    assert "mmcv._ext" not in sys.modules
    import mmcv.ops

    boxes, scores = torch.rand(60, 4), torch.rand(60)
    boxes[:, 2:] += boxes[:, :2]
    kept = mmcv.ops.nms(boxes, scores, 0.4)[1]
    left, reference = scores.argsort(descending=True).tolist(), []
    while left:
        best, *left = left
        reference.append(best)
        left = [other for other in left if overlap(boxes[best], boxes[other]) <= 0.4]
    assert kept.tolist() == reference and 1 < len(reference) < 60
    with pytest.raises(UserError, match="needs 'roi_align_forward' of the full mmcv build"):
        mmcv.ops.RoIAlign(7)(torch.rand(1, 1, 9, 9), torch.tensor([[0.0, 1, 1, 5, 5]]))


def overlap(a: Tensor, b: Tensor) -> float:
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    shared = (high - low).clamp_min(0).prod()
    return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


# ---- names ----


def test_joints_are_mapped_by_name() -> None:
    assert set(MMPoseEstimator(shipped(RTM26), untrained=True).names) == set(HALPE26)
    mpii = small_config("topdown_heatmap/mpii/td-hm_mobilenetv2_8xb64-210e_mpii-256x256.py")
    names = MMPoseEstimator(mpii, untrained=True).names
    assert set(J14) < set(names) and "mid_hip" in names and names[8] == "upper_neck"
    assert joint_names({"dataset_name": "jhmdb", "keypoint_id2name": {"1": "head", "0": "neck"}}) == ("neck", "head")
    # The model has more joints than requested: the selected ones, in their order.
    config = small_config("topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-aic-256x192-combine.py")
    config.model.backbone = dict(type="MobileNetV2", out_indices=(7,))
    config.model.head.in_channels = 1280
    config.model.head.deconv_out_channels = (256, 256, 256)
    config.model.head.deconv_kernel_sizes = (4, 4, 4)
    assert MMPoseEstimator(config, untrained=True).names == COCO17
    hand = small_config(MSRA)
    hand.train_dataloader.dataset.type = "FreiHandDataset"
    hand.model.head.out_channels = 21
    with pytest.raises(UserError, match=r"none of its joints .* is a body's"):
        MMPoseEstimator(hand, untrained=True)


@pytest.mark.parametrize("suffix", [".py", ".json"])
def test_a_model_of_our_own_training(suffix: str, tmp_path: Path, photo: np.ndarray) -> None:
    """A square input, 26 joints named by the config itself, half-precision safetensors."""
    from hmdiff.train.estimator_config import estimator_config, write_config

    torch.manual_seed(1)
    values, path = estimator_config(64, 4), tmp_path / f"pose{suffix}"
    if suffix == ".py":
        write_config(values, path)
    else:
        path.write_text(json.dumps(values))
    trained = MMPoseEstimator(path, untrained=True)
    assert trained.names == HALPE26
    state = {name: value for name, value in trained.model.state_dict().items() if "num_batches" not in name}
    save_file({name: value.half().contiguous() for name, value in state.items()}, tmp_path / "pose.safetensors")
    loaded = MMPoseEstimator(path, tmp_path / "pose.safetensors")
    first, second = (estimator.heatmaps(photo, BOXES) for estimator in (trained, loaded))
    assert first.valid.all() and first.values.amax() > 0
    torch.testing.assert_close(first.values, second.values, rtol=0.05, atol=float(first.values.amax()) * 0.02)


# ---- weights ----


@pytest.mark.slow
def test_weights_of_both_kinds_are_the_model_s(
    msra: MMPoseEstimator, weights: Path, tmp_path: Path, photo: np.ndarray
) -> None:
    from mmengine.logging import HistoryBuffer

    state = msra.model.state_dict()
    meta = {**msra.model.dataset_meta, "dataset_name": "of the checkpoint"}
    # As saved by mmengine: the training history contains classes and a call of getattr.
    history = {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in state.items()},
            "meta": {"dataset_meta": meta},
            "message_hub": history,
        },
        tmp_path / "pose.pth",
    )
    torch.save(dict(state), tmp_path / "bare.pth")
    expected = msra.heatmaps(photo, BOXES[:1]).values
    for path in (weights, tmp_path / "pose.pth", tmp_path / "bare.pth"):
        loaded = MMPoseEstimator(shipped(MSRA), path)
        assert torch.equal(loaded.heatmaps(photo, BOXES[:1]).values, expected)
        name = "of the checkpoint" if path.name == "pose.pth" else "coco"
        assert loaded.model.dataset_meta["dataset_name"] == name
        assert isinstance(loaded.model.dataset_meta["sigmas"], np.ndarray)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("the pickle was run",)


def test_weights_that_are_no_weights(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"gone.pth: no such checkpoint; .* --pose-checkpoint FILE"):
        MMPoseEstimator(shipped(MSRA), tmp_path / "gone.pth")
    with pytest.raises(UserError, match=r"a config without weights; .* --pose-checkpoint FILE"):
        MMPoseEstimator(shipped(MSRA))
    with pytest.raises(UserError, match=r"not the weights of this config: .* such as .*; give the checkpoint"):
        MMPoseEstimator(shipped(UDP), weights)
    half = weights.read_bytes()
    for name, content in {"cut.safetensors": half[: len(half) // 2], "text.pth": b"hello", "empty.pth": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read as a checkpoint"):
            read_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="no weights in it"):
        read_checkpoint(tmp_path / "none.pth")

    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Evil()}, tmp_path / "evil.pth")
    assert list(read_checkpoint(tmp_path / "evil.pth")[0]) == ["a"]
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "old.pth")
    assert "was run" not in capsys.readouterr().out


def test_a_download_that_fails_names_the_file_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def refused(address: str, place: str, **kwargs: Any) -> None:
        asked.append(address)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(UserError) as caught:
        MMPoseEstimator("human")
    file = asked[0].rsplit("/")[-1]
    assert file.endswith(".pth") and f"download {file} where" in str(caught.value)
    assert "no route to host" in str(caught.value) and "by --pose-checkpoint FILE" in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"rtmdet_m.*--detector-checkpoint FILE"):
        PersonDetector("human")
    # A file at the place named in the message is found.
    (tmp_path / "checkpoints" / file).write_bytes(b"")
    assert find_checkpoint("human", None, asked[0], "mmpose") == tmp_path / "checkpoints" / file

    def delivered(address: str, place: str, **kwargs: Any) -> None:
        Path(place).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", delivered)
    assert MMPoseEstimator(shipped(MSRA), "https://some.where/pose.safetensors").names == COCO17


def test_aliases_name_shipped_configs() -> None:
    for name, scope in (("human", "mmpose"), ("rtmpose-l", "mmpose"), ("human", "mmdet"), ("rtmdet-m", "mmdet")):
        config, address = find_model(name, scope)
        assert config.is_file() and address is not None and address.endswith(".pth")
    config, _ = find_model("td-hm_hrnet-w32_8xb64-210e_coco-256x192", "mmpose")
    assert config.stem == "td-hm_hrnet-w32_8xb64-210e_coco-256x192"


# ---- the detector ----


@pytest.fixture(scope="module")
def detector() -> PersonDetector:
    """mmpose's own small RTMDet for people, with its random boxes enlarged to valid ones."""
    torch.manual_seed(0)
    config = Path(import_openmmlab("mmpose.apis").__file__ or "").parents[1] / ".mim" / "demo" / "mmdetection_cfg"
    found = PersonDetector(config / "rtmdet_nano_320-8xb32_coco-person.py", untrained=True)
    awaken(found.model, 320, 320)
    with torch.no_grad():
        for branch in found.model.bbox_head.rtm_reg:
            branch.bias += 3
    return found


@pytest.mark.slow
def test_people_are_found(detector: PersonDetector, photo: np.ndarray) -> None:
    boxes = detector.boxes(photo, 0.3)
    assert 1 < len(boxes) <= 100
    assert (boxes >= 0).all() and (boxes <= torch.tensor([400, 300, 400, 300])).all()
    assert torch.equal(boxes, check_boxes(boxes, 400, 300))
    whole = [box for box in boxes if (box > 0).all() and (box < torch.tensor([400, 300, 400, 300])).all()]
    assert len(whole) > 3 and max(overlap(a, b) for a, b in itertools.combinations(whole, 2)) <= 0.6  # the config's
    fewer = [detector.boxes(photo, floor) for floor in (0.6, 0.65, 0.7)]
    assert all(torch.equal(few, boxes[: len(few)]) for few in fewer)  # by falling score
    assert len(fewer[-1]) < len(boxes)


def test_a_photo_with_nobody(detector: PersonDetector, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nobody was found by .* at least 1 \(the surest .* by --box X1,Y1,X2,Y2"):
        detector.boxes(photo, 1.0)
    monkeypatch.setattr(detector, "person", 7)
    with pytest.raises(UserError, match="it has no box at all"):
        detector.boxes(photo)


def test_a_detector_of_something_else(tmp_path: Path, detector: PersonDetector) -> None:
    config = Path(detector.name)
    state = detector.model.state_dict()
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ("cat", "dog")}}}, tmp_path / "pets.pth")
    with pytest.raises(UserError, match=r"its 2 classes \(cat, ...\) have no person"):
        PersonDetector(config, tmp_path / "pets.pth")
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"CLASSES": ("cat", "Person")}}}, tmp_path / "both.pth")
    assert PersonDetector(config, tmp_path / "both.pth").person == 1


# ---- the commands ----


@pytest.fixture
def picture(tmp_path: Path, photo: np.ndarray) -> Path:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def box_words() -> list[str]:
    return [word for box in BOXES[:2] for word in ("--box", ",".join(f"{number:g}" for number in box))]


@pytest.mark.slow
def test_heatmaps_are_saved_and_sampled_as_if_estimated(
    picture: Path,
    photo: np.ndarray,
    weights: Path,
    msra: MMPoseEstimator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["--pose", str(shipped(MSRA)), "--pose-checkpoint", str(weights), *box_words(), "--device", "cpu"]
    saved = tmp_path / "maps"
    assert main(["heatmaps", str(picture), *model, "--output", str(saved)]) == 0
    assert "2 people, 17 joints each" in capsys.readouterr().out
    assert {path.name for path in saved.iterdir()} == {"photo_heatmaps.npz", "photo_heatmaps.png"}
    maps = load_heatmaps(saved / "photo_heatmaps.npz")
    assert torch.equal(maps.values, msra.heatmaps(photo, BOXES[:2]).values)
    with Image.open(saved / "photo_heatmaps.png") as drawn:
        assert drawn.size == (400, 300)
        assert np.median(np.asarray(drawn)[40, 50:150]) == 250  # the first box's upper edge, outside joints

    for drawn_by in ("hmdiff.viz.sheets.hypotheses_sheet", "hmdiff.viz.spread.spread_sheet"):
        monkeypatch.setattr(drawn_by, lambda *args, **kwargs: np.zeros((4, 4, 3), np.uint8))
    small_pipeline().save_pretrained(tmp_path / "pipeline")
    quick = ["--checkpoint", str(tmp_path / "pipeline"), "--num-hypotheses", "2", "--steps", "2", "--device", "cpu"]
    assert main(["sample", str(picture), *model[:-2], *quick, "--output", str(tmp_path / "a")]) == 0
    assert "heatmaps of the mmpose" in capsys.readouterr().out
    words = ["--heatmaps", str(saved / "photo_heatmaps.npz")]
    assert main(["sample", str(picture), *words, *quick, "--output", str(tmp_path / "b")]) == 0
    for person in (0, 1):
        with np.load(tmp_path / "a" / f"photo_{person}.npz") as a, np.load(tmp_path / "b" / f"photo_{person}.npz") as b:
            np.testing.assert_allclose(a["vertices"], b["vertices"], atol=1e-6)


def test_the_heat_lies_where_the_heatmap_says(photo: np.ndarray) -> None:
    from hmdiff.cli.heatmaps import heat_picture

    values = torch.zeros(1, 26, 64, 64)
    values[0, 0, 10, 50] = 1.0
    valid = torch.ones(1, 26, dtype=torch.bool)
    crop = Crop.of(torch.tensor([[160.0, 150.0]]), torch.tensor([256.0]))  # 4 photo pixels per pixel
    maps = Heatmaps(values, valid, crop)
    black = np.zeros_like(photo)
    drawn = heat_picture(black, maps, torch.tensor([[0.0, 0, 400, 300]])).astype(int).sum(-1)
    drawn[:3], drawn[-3:], drawn[:, :3], drawn[:, -3:] = 0, 0, 0, 0  # the box
    rows, columns = drawn.nonzero()
    # The pixel's centre: 160 - 128 + 50.5 * 4, 150 - 128 + 10.5 * 4; the keypoint is drawn there too.
    assert abs(rows.mean() + 0.5 - 64) < 1 and abs(columns.mean() + 0.5 - 234) < 1


def fails(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    try:
        code: Any = main([str(word) for word in words])
    except SystemExit as stop:  # of argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("hmdiff: error: "), error
    return error


def test_bad_input_of_the_commands(
    picture: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = ["--output", tmp_path / "out"], ["--pose", shipped(MSRA), "--pose-checkpoint", weights]
    line = fails(capsys, "heatmaps", picture, *model, "--box", "500,20,600,90", *out)
    assert str(picture) in line and "outside the 400 x 300 photo" in line
    assert "--pose none" in fails(capsys, "heatmaps", picture, "--pose", "none", *out)
    assert "2 were given" in fails(capsys, "heatmaps", picture, picture, *model, "--box", "1,2,3,4", *out)
    assert "name its config" in fails(capsys, "sample", picture, "--pose-checkpoint", weights, *out)
    assert "only --pose MODEL" in fails(capsys, "sample", picture, "--pose", "none", *box_words(), *out)
    assert "an argument is empty" in fails(capsys, "sample", picture, "--pose", "", "--box", "1,2,30,40", *out)
    assert "by --pose embedded" in fails(capsys, "sample", picture, "--pose", "none", *out)

    def nobody(self: Any, *args: Any) -> Tensor:
        raise UserError("nobody was found")

    monkeypatch.setattr(estimation.Estimation, "estimate", nobody)
    line = fails(capsys, "sample", picture, *model, *out)
    assert str(picture) in line and "nobody was found" in line
    picture.with_suffix(".json").write_text(json.dumps({"keypoints_coco17": [[9, 9, 1]] * 16 + [[90, 90, 1]]}))
    assert "2 boxes, but keypoints take one" in fails(capsys, "sample", picture, *model, *box_words(), *out)


def test_one_bad_photo_does_not_keep_the_others(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    again = tmp_path / "other" / "photo.png"
    again.parent.mkdir()
    again.write_bytes(picture.read_bytes())
    valid = torch.ones(1, 26, dtype=torch.bool)
    maps = Heatmaps(torch.ones(1, 26, 64, 64), valid, Crop.of(torch.zeros(1, 2), torch.ones(1) * 9))
    seen = DetectedPeople(maps, torch.ones(1, 4))
    monkeypatch.setattr(estimation.Estimation, "estimate", lambda self, photo, boxes: seen)
    photos = map(str, (bad, picture, again))
    assert main(["heatmaps", *photos, "--pose", "human", "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "bad.png: not a picture" in captured.err and "2 people in 2 of 3 photos" in captured.out
    assert {path.name for path in (tmp_path / "out").glob("*.npz")} == {
        f"{tmp_path.name}_photo_heatmaps.npz",
        "other_photo_heatmaps.npz",
    }


def test_what_is_found_beside_a_photo_wins_over_the_estimator(picture: Path, photo: np.ndarray) -> None:
    seen: list[Any] = []
    crop = Crop.of(torch.ones(1, 2) * 99, torch.ones(1) * 90)
    maps = Heatmaps(torch.ones(1, 26, 64, 64), torch.ones(1, 26, dtype=torch.bool), crop)

    class Source:
        name = "pose estimator"

        def estimate(self, given: np.ndarray, boxes: Any = None) -> DetectedPeople:
            assert np.array_equal(given, photo)
            seen.append(boxes)
            return DetectedPeople(maps, torch.ones(1, 4))

    source = Source()
    found = read_people(picture, source=source)
    assert found.heatmaps.values is maps.values and found.source == "heatmaps of the pose estimator"
    assert found.heatmaps.crop.photo_size.tolist() == [[400, 300]] and len(found.points) == 1
    picture.with_suffix(".json").write_text(json.dumps({"box_xyxy": [10, 20, 90, 200]}))
    read_people(picture, source=source)  # a box without keypoints is the person's
    read_people(picture, source=source, boxes=[(1.0, 2.0, 3.0, 4.0)])
    assert seen == [None, [(10.0, 20.0, 90.0, 200.0)], [(1.0, 2.0, 3.0, 4.0)]]
    keypoints = [[60 + 3 * index, 20 + 9 * index, 1] for index in range(17)]
    picture.with_suffix(".json").write_text(json.dumps({"keypoints_coco17": keypoints}))
    assert "keypoints of" in read_people(picture, source=source).source and len(seen) == 3


def test_heatmaps_of_another_photo(picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo_heatmaps.npz"
    arrays = {"heatmaps": np.ones((17, 64, 64), np.float32), "side": np.float32(100)}
    np.savez(path, **arrays, center=np.array([449.0, 100]))  # touches the 400 x 300 photo
    assert read_people(picture).heatmaps.center.tolist() == [[449.0, 100.0]]
    np.savez(path, **arrays, center=np.array([451.0, 100]))
    with pytest.raises(UserError, match=r"crop of person 0, .* outside the 400 x 300 photo; give the heatmaps"):
        read_people(picture)
