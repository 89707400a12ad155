"""A small mmpose pose estimator trained on our synthetic people, as a source of realistic heatmaps.

`hmdiff prepare estimator` writes its folder: config.py, readable by mmpose's `init_model`, and model.safetensors, its
weights in half precision. Inputs are the square crops as tensors, so that experiments on rendered people contain a real
network's errors instead of simulated ones. The config is parsed, never executed. B images of S x S pixels; the network
reads N x N and returns M x M.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.body.skeletons import HALPE26
from hmdiff.errors import UserError
from hmdiff.estimators.openmmlab import import_openmmlab, load_weights, quiet
from hmdiff.heatmaps.crop import Crop
from hmdiff.heatmaps.distribution import HEATMAP_SIZE, Heatmaps, pixel_coordinates

CONFIG, WEIGHTS = "config.py", "model.safetensors"


class SyntheticEstimator:
    """The network with the crop's conventions. Results do not depend on the batch."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()
        self.image_size, self.heatmap_size = codec_sizes(network)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> SyntheticEstimator:
        """Raises `UserError` for missing or damaged files, and if mmpose is not installed."""
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name} in it; give a folder that 'hmdiff prepare estimator' wrote")
        network = build_network(read_config(folder / CONFIG))
        load_weights(network, folder / WEIGHTS)
        return cls(network.to(device))

    @torch.no_grad()
    def estimate(
        self,
        images: Tensor,  # (B, 3, S, S) RGB 0..1, square crops
    ) -> Tensor:  # (B, 26, 64, 64) >= 0, float32; HALPE26 order, peak = confidence
        """The network's raw regression on our grid, clamped at 0. Images of another size are resized first."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise UserError(f"pictures: shape {tuple(images.shape)} found, (B, 3, S, S) expected: square RGB crops")
        images = images.to(next(self.network.parameters()).device).float()
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
        values = self.network(network_input(self.network, images), None, mode="tensor").float()
        # Bicubic, because bilinear interpolation would shift peaks towards the pixels of a coarser grid.
        along = pixel_coordinates(HEATMAP_SIZE, values) - grid_shift(self.image_size, self.heatmap_size)
        grid = torch.stack(torch.meshgrid(along, along, indexing="xy"), -1).expand(len(images), -1, -1, -1)
        values = F.grid_sample(values, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        return values.clamp_min(0)

    def heatmaps(
        self,
        images: Tensor,  # (B, 3, S, S)
    ) -> Heatmaps:
        """The same as `Heatmaps`; the crop is the photo, two pixels per side (as in `evaluate.evaluation`)."""
        values = self.estimate(images)
        count = len(values)
        valid = torch.ones(count, len(HALPE26), dtype=torch.bool, device=values.device)
        return Heatmaps(values, valid, Crop.of(values.new_ones(count, 2), values.new_full((count,), 2.0)))


def codec_sizes(network: Any) -> tuple[int, int]:  # N, M
    """Sides of image and heatmap. Raises `UserError` for a codec with another grid than assumed here."""
    codec = network.head.decoder
    if type(codec).__name__ != "MSRAHeatmap":
        raise UserError(f"pose estimator: codec {type(codec).__name__} found, MSRAHeatmap expected; prepare it again")
    return int(codec.input_size[0]), int(codec.heatmap_size[0])


def grid_shift(
    image_size: int,  # N
    heatmap_size: int,  # M
) -> float:  # crop coordinates
    """Centre of mmpose's heatmap in our crop.

    The MSRA codec divides pixel indices: heatmap pixel j corresponds to image pixel j N/M, whose centre lies at ``-1 +
    2 (j N/M + 1/2) / N``. Dividing the crop into M pixel areas would put it at ``-1 + 2 (j + 1/2) / M``.
    """
    return (1 - image_size / heatmap_size) / image_size


def network_input(
    network: Any,
    images: Tensor,  # (B, 3, N, N) RGB 0..1
) -> Tensor:  # (B, 3, N, N) BGR, as the network's own preprocessor computes from the 8-bit image
    preprocessor = network.data_preprocessor
    return (images * 255 - preprocessor.mean) / preprocessor.std


def read_config(path: str | Path) -> dict[str, Any]:
    """Parse a config of plain ``name = value`` assignments. Raises `UserError` for any other code."""
    path = Path(path)
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        values = {}
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
                raise ValueError(f"line {statement.lineno} is no plain assignment")
            values[statement.targets[0].id] = ast.literal_eval(statement.value)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a config that 'hmdiff prepare estimator' wrote ({error})") from None
    if "model" not in values:
        raise UserError(f"{path}: no 'model' in it; give a config that 'hmdiff prepare estimator' wrote")
    return values


def build_network(config: dict[str, Any]) -> nn.Module:
    """Build mmpose's model of a config, untrained. Raises `UserError` if mmpose is missing or refuses the config."""
    models = import_openmmlab("mmpose.models")
    from mmengine.registry import DefaultScope

    try:
        with quiet(), DefaultScope.overwrite_default_scope("mmpose"):
            network: nn.Module = models.build_pose_estimator(config["model"])
    except Exception as error:  # mmengine passes on any exception of a constructor
        raise UserError(f"pose estimator: mmpose cannot build it ({' '.join(str(error).split())[:160]})") from None
    return network
