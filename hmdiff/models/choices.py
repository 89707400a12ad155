"""Valid values and combinations of a model's hyperparameters."""

from __future__ import annotations

from typing import Any

from hmdiff.models.denoiser import SCALED
from hmdiff.models.encoder import ENCODERS

INPUTS = ("heatmaps", "image", "both")
MODES = ("diffusion", "direct")
FRAMES = ("camera", "crop")
TOKENS = ("patches", "parts")


def check_choices(
    config: Any,  # `MeshRecoveryModel.config`
) -> None:
    """Raises `ValueError` for the first invalid value."""
    encoder_type, tokens, backbone = config.encoder_type, config.tokens, config.backbone
    for name, value, allowed in (
        ("mode", config.mode, MODES),
        ("inputs", config.inputs, INPUTS),
        ("frame", config.frame, FRAMES),
        ("tokens", tokens, TOKENS),
        ("encoder_type", encoder_type, ENCODERS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} must be one of {allowed}")
    if isinstance(config.rle, str) or not set(config.rle) <= set(SCALED):
        raise ValueError(f"rle {config.rle!r} must be a list of some of {', '.join(SCALED)}")
    if config.inputs == "heatmaps" and backbone not in ("joints", "conv"):
        raise ValueError(f"backbone {backbone!r} reads images; with heatmaps alone it is 'joints' or 'conv'")
    if config.coarse_to_fine and not config.lifting:
        raise ValueError("coarse_to_fine refines between the looks into a volume: it needs lifting")
    if not 0 <= config.masked < 1:
        raise ValueError(f"masked {config.masked} is the largest share of hidden tokens: 0 to below 1")
    if encoder_type == "mlp" and (backbone != "joints" or tokens != "parts" or config.depth_map):
        raise ValueError("encoder_type 'mlp' needs backbone 'joints' and tokens 'parts', and takes no depth map")
    if tokens == "parts" and config.coarse_to_fine:
        raise ValueError("coarse_to_fine refines patches: it needs tokens 'patches'")
