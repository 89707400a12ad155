"""Before training: checks the config's names, and initialises a model from a saved pipeline."""

from __future__ import annotations

import torch

from hmdiff.config import Config
from hmdiff.diffusion.noising import WEIGHTINGS
from hmdiff.errors import UserError
from hmdiff.losses.mesh import POINT_LOSSES
from hmdiff.losses.rle import RLE_VARIANTS
from hmdiff.models.layers import EncoderBlock
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train.optimizer import OPTIMIZERS, SCHEDULES


def check_names(config: Config) -> None:
    """Raises `UserError` for names that would fail deep in the loop; `load_config` checks the ranges."""
    choices = (
        ("loss.points", config.loss.points, POINT_LOSSES),
        ("loss.weighting", config.loss.weighting, WEIGHTINGS),
        ("model.rle_variant", config.model.get("rle_variant", "exact"), RLE_VARIANTS),
        ("training.optimizer", config.training.optimizer, OPTIMIZERS),
        ("training.schedule", config.training.schedule, SCHEDULES),
        ("training.mixed_precision", config.training.mixed_precision, ("no", "bf16", "fp16")),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"{name} {value!r} is not known; choose one of {', '.join(allowed)}")


# Options of optional modules: a module that the saved pipeline lacks keeps its initialisation.
_PATHS = tuple(
    """
    depth_map depth_layers depth_size rle rle_variant silhouette masked lifting volume_width volume_size volume_exponent
    coarse_to_fine hybrid_position
    """.split()
)


# A model may have more blocks than the saved one: the additional ones start as identities.
_DEPTHS = ("encoder_depth", "depth")


def take_weights(model: MeshRecoveryModel, name: str) -> None:
    """Load the weights of a saved pipeline. Added modules keep their initialisation; added blocks start as identities.

    Raises:
        UserError: the two models differ in more than added modules or blocks.
    """
    stored = HMDiffPipeline.from_pretrained(name).model
    for key, value in model.config.items():
        other = stored.config.get(key)
        if key in _DEPTHS and value >= other and not model.config.coarse_to_fine:
            continue
        if not key.startswith("_") and key not in ("mode", "pretrained", "frame", *_PATHS) and other != value:
            raise UserError(f"training.start_from {name}: its model has {key} {other!r}, this one {value!r}")
    mine, theirs = model.state_dict(), stored.state_dict()
    for key, value in theirs.items():
        if key not in mine or mine[key].shape != value.shape:
            path = next((path for path in _PATHS if stored.config.get(path) != model.config.get(path)), key)
            raise UserError(
                f"training.start_from {name}: its model has {path} {stored.config.get(path)!r}, this one "
                f"{model.config.get(path)!r}: a path can be added, not taken away or changed in size"
            )
    model.load_state_dict(theirs, strict=False)
    if isinstance(model.encoder, torch.nn.ModuleList):
        for block in list(model.encoder)[stored.config.encoder_depth :]:
            assert isinstance(block, EncoderBlock)
            block.make_identity()  # denoiser blocks need not: their gates are zero-initialised
