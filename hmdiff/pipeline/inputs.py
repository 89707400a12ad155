"""Checks the pipeline's inputs and converts them for the model: image crops, heatmaps, depth maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import HAND21
from hmdiff.errors import UserError
from hmdiff.estimators.people import PhotoPeople, crops
from hmdiff.heatmaps import Heatmaps, concatenate_heatmaps
from hmdiff.models.inputs import check_depth, check_pictures
from hmdiff.models.recovery import MeshRecoveryModel


def photo_inputs(model: MeshRecoveryModel, found: Sequence[PhotoPeople]) -> tuple[Tensor | None, Heatmaps]:
    """Image crops (B, 3, S, S), if the model takes images, and heatmaps of all people in the photos."""
    heatmaps = concatenate_heatmaps([photo.heatmaps for photo in found])
    if model.config.inputs == "heatmaps":
        return None, heatmaps
    size = model.config.image_size
    return torch.cat([crops(photo.pixels(), photo.heatmaps, size) for photo in found]), heatmaps


def model_inputs(
    model: MeshRecoveryModel,
    device: torch.device,
    images: Tensor | None,  # (B, 3, S, S) RGB 0..1
    heatmaps: Heatmaps | None,
    names: tuple[str, ...] | None = None,  # of the body's keypoints; None: it has none
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # (B, 3, S, S), heatmaps (B, J, H, W), valid (B, J) bool
    """Resize images to the model's size. Raises `UserError` for a missing or malformed input."""
    needs = model.config.inputs
    if needs in ("heatmaps", "both") and heatmaps is None:
        raise UserError("this model reads heatmaps: give heatmaps=Heatmaps, from keypoints, a file or mmpose")
    if needs in ("image", "both"):
        if images is None:
            raise UserError("this model reads pictures: give images=(B, 3, S, S) crops, RGB 0..1")
        size = model.config.image_size
        if images.dim() != 4 or images.shape[1] != 3:
            raise UserError(f"images: shape {tuple(images.shape)} found, (B, 3, {size}, {size}) expected")
        if not images.is_floating_point():
            raise UserError(f"images: {images.dtype} found, RGB of 0..1 expected; divide 8-bit pictures by 255")
        if heatmaps is not None and len(heatmaps) != len(images):
            raise UserError(f"{len(images)} images but heatmaps of {len(heatmaps)} people; give one for each")
        check_pictures(images)
        images = torch.nn.functional.interpolate(
            images.to(device), (size, size), mode="bilinear", align_corners=False, antialias=True
        )
    if heatmaps is None:
        return images, None, None
    if names is not None and heatmaps.names != names:
        raise UserError(
            f"heatmaps of {_whose(heatmaps.names)}, and the model's body {model.config.body!r} has the keypoints of "
            f"{_whose(names)}; give heatmaps of those"
        )
    return images, heatmaps.values.to(device), heatmaps.valid.to(device)


def _whose(names: tuple[str, ...]) -> str:
    return f"a {'hand' if names == HAND21 else 'body'} ({len(names)} joints)"


def depth_input(
    model: MeshRecoveryModel, device: torch.device, depth: Tensor | None, people: int
) -> Tensor | None:  # (B, S, S)
    """Validate the depth maps. Raises `UserError` for missing, superfluous or malformed ones."""
    if not model.config.depth_map:
        if depth is not None:
            raise UserError("this model reads no depth maps: leave depth out, or take one with model.depth_map")
        return None
    if depth is None:
        raise UserError("this model reads depth maps: give depth=(B, S, S), NaN where it is not known")
    if depth.dim() != 3 or len(depth) != people or depth.shape[1] != depth.shape[2] or depth.shape[1] < 2:
        found = tuple(depth.shape)
        raise UserError(f"depth: shape {found} found, ({people}, S, S) expected: a map of each square crop")
    if not depth.is_floating_point():
        depth = depth.float()
    check_depth(depth)
    return depth.to(device)
