"""The pose estimator's config for mmpose: a small HRNet, or a ResNet-18 with deconvolutions.

HRNet: Wang et al., arXiv 1908.07919, in the smallest published form (one module per stage, two blocks per branch);
ResNet and head: Xiao et al., arXiv 1804.06208; codec: MSRA heatmaps with unrounded Gaussians (arXiv 1910.06278). Sizes
are our choice: N pixels in, N/2 heatmaps out; N = 96 trains on one CPU core, N = 128 gives the 64-pixel heatmaps of the
mesh models. HRNet is the smaller file; ResNet weights can also initialise a mesh model's backbone (`model.pretrained`).
"""

from __future__ import annotations

import pprint
from pathlib import Path
from typing import Any

from hmdiff.body.skeletons import HALPE26, mirror_permutation
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file
from hmdiff.heatmaps.distribution import BOX_PADDING

NETWORKS = ("hrnet", "resnet18")
SIGMA = 2.0  # heatmap pixels, for heatmaps of 64 x 64
# ImageNet statistics, as in mmpose's models.
_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_LOSS_WEIGHT = 1000.0  # the mean squared error over mostly empty heatmaps is tiny
# OKS sigmas of mmpose's halpe26: unused here, but required by its metainfo.
_SIGMAS = [
    *map(
        float,
        "0.026 0.025 0.025 0.035 0.035 0.079 0.079 0.072 0.072 0.062 0.062 0.107 0.107 0.087 0.087 0.089 0.089".split(),
    ),
    *map(float, "0.026 0.026 0.066 0.079 0.079 0.079 0.079 0.079 0.079".split()),
]


def estimator_config(
    image_size: int = 96,  # N pixels
    width: int = 16,  # channels of HRNet's finest branch; half of the channels of ResNet's last deconvolution
    network: str = "hrnet",
) -> dict[str, Any]:
    """The config's top-level variables. Raises `UserError` for an unknown network or a size not divisible by 32."""
    if network not in NETWORKS:
        raise UserError(f"network {network!r} is not known; choose one of {', '.join(NETWORKS)}")
    if image_size % 32 or image_size < 32:
        raise UserError(f"image_size {image_size}: a multiple of 32 is needed, such as 96")
    heatmap = image_size // 2
    deconvolutions: tuple[int, ...]
    if network == "hrnet":
        backbone, channels, deconvolutions = _hrnet(width), width, (2 * width,)
    else:
        backbone, channels = {"type": "ResNet", "depth": 18, "in_channels": 3, "out_indices": (3,)}, 512
        deconvolutions = (4 * width, 4 * width, 4 * width, 2 * width)
    model = {
        "type": "TopdownPoseEstimator",
        "data_preprocessor": {"type": "PoseDataPreprocessor", "mean": _MEAN, "std": _STD, "bgr_to_rgb": True},
        "backbone": backbone,
        "head": {
            "type": "HeatmapHead",
            "in_channels": channels,
            "out_channels": len(HALPE26),
            "deconv_out_channels": deconvolutions,
            "deconv_kernel_sizes": (4,) * len(deconvolutions),
            "loss": {"type": "KeypointMSELoss", "use_target_weight": True, "loss_weight": _LOSS_WEIGHT},
            "decoder": {
                "type": "MSRAHeatmap",
                "input_size": (image_size, image_size),
                "heatmap_size": (heatmap, heatmap),
                "sigma": SIGMA * heatmap / 64,
                "unbiased": True,
            },
        },
        "train_cfg": {"compute_acc": False},
        "test_cfg": {"flip_test": False, "output_heatmaps": True},
    }
    pipeline = [
        {"type": "LoadImage"},
        {"type": "GetBBoxCenterScale", "padding": BOX_PADDING},
        {"type": "TopdownAffine", "input_size": (image_size, image_size)},
        {"type": "PackPoseInputs"},
    ]
    return {
        "default_scope": "mmpose",
        "model": model,
        "train_dataloader": {"dataset": {"metainfo": _metainfo()}},
        "test_dataloader": {"dataset": {"pipeline": pipeline}},
    }


def _hrnet(width: int) -> dict[str, Any]:
    channels = [width * 2**branch for branch in range(4)]

    def stage(branches: int) -> dict[str, Any]:
        return {
            "num_modules": 1,
            "num_branches": branches,
            "block": "BASIC",
            "num_blocks": (2,) * branches,
            "num_channels": tuple(channels[:branches]),
        }

    first = {
        "num_modules": 1,
        "num_branches": 1,
        "block": "BOTTLENECK",
        "num_blocks": (1,),
        "num_channels": (2 * width,),
    }
    stages = {
        "stage1": first,
        "stage2": stage(2),
        "stage3": stage(3),
        "stage4": {**stage(4), "multiscale_output": False},
    }
    return {"type": "HRNet", "in_channels": 3, "extra": stages}


def _metainfo() -> dict[str, Any]:
    """Names, sides and left-right pairs of the 26 keypoints, as mmpose's `parse_pose_metainfo` reads them."""
    upper = HALPE26.index("left_hip")
    keypoints = {
        index: {
            "name": name,
            "id": index,
            "type": "upper" if index < upper or name in ("top_head", "neck") else "lower",
            "swap": "" if mirrored == index else HALPE26[mirrored],
        }
        for index, (name, mirrored) in enumerate(zip(HALPE26, mirror_permutation(HALPE26), strict=True))
    }
    return {
        "dataset_name": "hmdiff_synthetic_halpe26",
        "keypoint_info": keypoints,
        "skeleton_info": {},
        "joint_weights": [1.0] * len(HALPE26),
        "sigmas": _SIGMAS,
    }


def write_config(config: dict[str, Any], path: str | Path) -> None:
    """Write the config as a Python file of plain assignments, which mmengine executes and hmdiff parses."""
    lines = ['"""A pose estimator of mmpose\'s classes, trained on synthetic people: `hmdiff prepare estimator`."""\n']
    lines += [f"{name} = {pprint.pformat(value, width=110, sort_dicts=False)}" for name, value in config.items()]
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
