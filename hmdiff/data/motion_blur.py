"""Motion blur of a model's inputs, for evaluation: images and heatmaps are blurred along a line, one line per person.

Models a camera that shakes during the exposure: one direction and one length for the whole crop, centred on the label.
A heatmap is blurred along the same line, so its peak sinks and its tails grow, as for an estimator that is uncertain
along the blur. Depth maps are unchanged: a depth network's errors on blurred images are another corruption
(`data.depth_faults`). Our choice throughout. `Blurred` adds a blurred twin to every split, `test_blur` to `test`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.data.synthetic.people import block_generator

SUFFIX = "_blur"
LENGTHS = (0.1, 0.4)  # blur length, crop half-sides: 5 to 20 % of the crop's side


def line_kernels(
    length: Tensor,  # (B,) pixels
    angle: Tensor,  # (B,) radians
    size: int,  # S, odd
) -> Tensor:  # (B, S, S), each sums to 1
    """Line segments through the centre, a pixel wide. Length 0 is a single 1."""
    offset = torch.arange(size, dtype=length.dtype, device=length.device) - size // 2
    direction = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None]  # (B, 1, 1, 2)
    position = torch.stack(torch.meshgrid(offset, offset, indexing="xy"), -1)[None]  # (1, S, S, 2)
    along_line = (position * direction).sum(-1)
    half = length[:, None, None] / 2
    nearest = torch.minimum(torch.maximum(along_line, -half), half)[..., None] * direction
    weight = (1 - (position - nearest).norm(dim=-1)).clamp_min(0)
    return weight / weight.sum((1, 2), keepdim=True)


def blur_along_lines(
    maps: Tensor,  # (B, C, H, W)
    length: Tensor,  # (B,) crop half-sides
    angle: Tensor,  # (B,) radians, 0 along x
    padding: str = "constant",  # outside the map: zeros ("constant"), or the edge repeated ("replicate")
) -> Tensor:  # (B, C, H, W)
    """Each person's maps averaged along their own line."""
    pixels = length * (maps.shape[-1] / 2)
    reach = math.ceil(float(pixels.max()) / 2) + 1 if len(pixels) else 1
    kernels = line_kernels(pixels, angle, 2 * reach + 1).to(maps)
    # People are groups of the convolution, channels its batch.
    padded = F.pad(maps.transpose(0, 1), (reach,) * 4, mode=padding)
    return F.conv2d(padded, kernels[:, None], groups=len(maps)).transpose(0, 1)


def motion_blur(
    sample: Sample,
    generator: torch.Generator,  # CPU
    lengths: tuple[float, float] = LENGTHS,  # crop half-sides; uniform between
) -> Sample:
    """The sample with its image and its heatmaps blurred along the same lines; labels are unchanged."""
    draw = torch.rand(len(sample), 2, generator=generator)
    length, angle = lengths[0] + (lengths[1] - lengths[0]) * draw[:, 0], math.pi * draw[:, 1]
    changed = {}
    for name, padding in (("image", "replicate"), ("heatmaps", "constant")):
        maps = getattr(sample, name)
        if maps is not None:
            changed[name] = blur_along_lines(maps, length.to(maps.device), angle.to(maps.device), padding)
    return dataclasses.replace(sample, **changed)


class Blurred:
    """Adds the split SPLIT_blur to every split of a source: the same people with blurred inputs."""

    def __init__(self, source: PeopleSource, lengths: tuple[float, float] = LENGTHS) -> None:
        self.source, self.lengths = source, lengths
        self.block_size, self.full_mesh, self.image_size = source.block_size, source.full_mesh, source.image_size

    def block(self, stream: str, number: int) -> Sample:
        if not stream.endswith(SUFFIX):
            return self.source.block(stream, number)
        sample = self.source.block(stream.removesuffix(SUFFIX), number)
        return motion_blur(sample, block_generator(0, stream, number), self.lengths)
