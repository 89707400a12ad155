"""A monocular depth network by name, through transformers: a depth source (hmdiff/estimators/depth_sources.py).

The default is Depth Anything V2 small (arXiv 2406.09414), since the second version of D2A-HMR used Depth Anything. B
photos of H x W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.estimators.depth_sources import GIVES, farther_is_larger

DEFAULT_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
# Meaning of `predicted_depth` by model type. Depth Anything states it in its config.
_GIVES = {"dpt": "disparity", "zoedepth": "depth", "glpn": "depth", "depth_pro": "depth"}


class EstimatedDepth:
    """A depth network of transformers; weights are read from safetensors only.

    Args:
        model: its name, downloaded once, or a folder that holds it.
        gives: "depth" or "disparity"; None: known for Depth Anything, MiDaS's DPT, ZoeDepth, GLPN and Depth Pro.

    Raises:
        UserError: transformers is not installed; the model does not exist or cannot be downloaded; it is not a depth
            model, or the meaning of its output is unknown.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        device: torch.device | str = "cpu",
        gives: str | None = None,
    ) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModelForDepthEstimation
        except ImportError:
            raise UserError(
                "a depth estimator needs transformers, which is not installed; pip install 'hmdiff[depth]', or give a "
                "depth map as a file"
            ) from None
        self.name = str(model)
        if gives is not None and gives not in GIVES:
            raise UserError(f"{self.name}: gives {gives!r}; one of {', '.join(GIVES)} is expected")
        try:
            # transformers builds the class at run time, so mypy sees Any.
            network: Any = AutoModelForDepthEstimation.from_pretrained(self.name, use_safetensors=True)
            self.processor: Any = AutoImageProcessor.from_pretrained(self.name)
        except (OSError, ValueError, KeyError) as error:
            raise _loading_error(self.name, error) from None
        self.gives = _output_kind(self.name, network.config) if gives is None else gives
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,  # (B, 3, H, W) RGB 0..1
    ) -> Tensor:  # (B, H, W) larger = farther
        height, width = images.shape[-2:]
        inputs = self.processor(images=list(images.float()), do_rescale=False, return_tensors="pt")
        outputs = self.network(pixel_values=inputs["pixel_values"].to(self.device, self.network.dtype))
        sizes = [(height, width)] * len(images)
        options = {"source_sizes": sizes} if self.network.config.model_type == "zoedepth" else {}
        predictions = self.processor.post_process_depth_estimation(outputs, target_sizes=sizes, **options)
        maps = torch.stack([prediction["predicted_depth"].reshape(height, width) for prediction in predictions])
        return farther_is_larger(maps.cpu(), self.gives)


def _output_kind(name: str, config: Any) -> str:
    kind = str(config.model_type)
    if kind == "depth_anything":
        return "depth" if getattr(config, "depth_estimation_type", "relative") == "metric" else "disparity"
    backbone = str(getattr(getattr(config, "backbone_config", None), "model_type", ""))
    if kind not in _GIVES or (kind == "dpt" and "dinov2" in backbone):  # DPT heads on DINOv2 predict metres
        raise UserError(
            f"{name}: whether a model of kind {kind!r} gives depth or disparity is not known; say which it is"
        )
    return _GIVES[kind]


def _loading_error(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).strip().split("\n")[0].split())[:160]
    if Path(name).is_dir():
        return UserError(f"{name}: no depth model can be read from this folder ({reason}); give one of save_pretrained")
    return UserError(
        f"depth model {name!r} could not be loaded or downloaded ({reason}); download it where there is a network, "
        "then give the folder: estimator:FOLDER with its config.json, preprocessor_config.json and model.safetensors"
    )
