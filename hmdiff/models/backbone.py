"""Backbones: image and heatmaps to context tokens.

`ImageBackbone`: any timm network by name, its last feature map flattened to tokens, optionally with early fusion of
heatmaps (JOTR, arXiv 2307.16377). HMDiff's backbone is not published; METRO and FastMETRO use HRNet-W64.
`ConvHeatmapBackbone`: a small convolutional network for heatmaps alone (our choice).
`JointHeatmapBackbone`: one token per joint, from the characteristic function of its heatmap (our choice).

B images, J joints, C channels, L tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hmdiff.errors import UserError
from hmdiff.files.foreign_weights import read_checkpoint
from hmdiff.models.layers import sinusoidal_position_2d


class GridBackbone(nn.Module):
    """Backbone whose tokens are the cells of a square grid over the crop."""

    grid: int  # cells per side

    def look(
        self,
        maps: Tensor,  # (B, K, S, S) over the crop
        heatmaps: Tensor | None = None,
        heatmap_valid: Tensor | None = None,
    ) -> Tensor:  # (B, L, K): mean over each token's cell
        """Pool maps at the tokens."""
        return nn.functional.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)


class ImageBackbone(GridBackbone):
    """A timm network; the deepest feature map gives the tokens.

    With `heatmap_channels` the heatmaps are upsampled to the image and concatenated as input channels, which works with
    any timm network; JOTR concatenates them after ResNet's stem. With pretrained weights, the heatmap channels of the
    first layer start at zero.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        name: str,  # in timm, such as hrnet_w64 or resnet18
        image_size: int,
        width: int,  # channels of the tokens
        heatmap_channels: int = 0,
        pretrained: bool | str = False,  # True: ImageNet weights, downloaded by timm; or a file, see `initial_weights`
    ) -> None:
        super().__init__()
        import timm  # slow import, not needed by heatmap models

        def build(channels: int, download: bool) -> Any:
            return timm.create_model(
                name, pretrained=download, features_only=True, in_chans=channels, out_indices=(-1,)
            )

        network = build(3 + heatmap_channels, False)
        if pretrained is True:
            network.load_state_dict(_widened(build(3, True).state_dict(), network.state_dict()))
        elif pretrained:
            network.load_state_dict(initial_weights(network, pretrained), strict=False)
        self.heatmap_channels = heatmap_channels
        self.network = network
        info = network.feature_info.info[-1]
        self.grid = math.ceil(image_size / info["reduction"])
        self.project = nn.Linear(info["num_chs"], width)
        self.num_tokens = self.grid**2
        self.register_buffer("position", sinusoidal_position_2d(self.grid, self.grid, width), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(
        self,
        image: Tensor,  # (B, 3, S, S) RGB 0..1
        heatmaps: Tensor | None = None,  # (B, J, h, w)
        heatmap_valid: Tensor | None = None,  # (B, J) bool
    ) -> tuple[Tensor, Tensor]:  # tokens (B, L, C), mask (B, L) bool
        pixels = (image - self.pixel_mean) / self.pixel_std
        if self.heatmap_channels:
            if heatmaps is None or heatmap_valid is None:
                raise ValueError("this model fuses heatmaps with the image: give both")
            maps = _without_dust(heatmaps * heatmap_valid[..., None, None])
            maps = nn.functional.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False)
            pixels = torch.cat([pixels, maps], 1)
        features = self.network(pixels)[-1]
        tokens = self.project(features.flatten(2).transpose(1, 2)) + self.position
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)


_STARTS = ("", "backbone.", "model.")  # prefixes in checkpoints of a network, a pose network, a wrapper


def initial_weights(network: nn.Module, path: str) -> dict[str, Tensor]:
    """Read the weights of a timm network from a checkpoint file, with the network's names.

    Accepts checkpoints of timm, torchvision, or an mmpose pose network with the same backbone: ResNets have the same
    names in all three, and JOTR starts from a ResNet trained for 2D pose. Other weights, such as a head, are ignored.

    Raises:
        UserError: the file cannot be read, or lacks weights of the network.
    """
    stored, _ = read_checkpoint(path)
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    named = [{name: stored[start + name] for name in wanted if start + name in stored} for start in _STARTS]
    found = max(named, key=len)
    found = _widened({name: value.to(wanted[name].dtype) for name, value in found.items()}, wanted)
    lacking = [name for name, value in wanted.items() if name not in found or found[name].shape != value.shape]
    if lacking:
        raise UserError(
            f"{path}: not the weights of this backbone: {len(lacking)} of {len(wanted)} are missing or of another "
            f"size, such as {lacking[0]}"
        )
    return found


def _widened(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero-pad the input channels that only `wanted` has."""
    result = dict(stored)
    for name, value in stored.items():
        target = wanted[name]
        if value.dim() == target.dim() == 4 and value.shape[1] == 3 < target.shape[1]:
            result[name] = torch.cat([value, value.new_zeros(len(value), target.shape[1] - 3, *value.shape[2:])], 1)
    return result


def _without_dust(maps: Tensor) -> Tensor:
    """Set values below 1e-6 to 0: denormal floats in Gaussian tails make CPU convolutions three times slower."""
    return torch.where(maps < 1e-6, torch.zeros_like(maps), maps)


class ConvHeatmapBackbone(GridBackbone):
    """Heatmaps and their validity mask to an 8 x 8 grid of tokens by strided convolutions."""

    def __init__(
        self,
        num_joints: int,
        heatmap_size: int,
        width: int,
    ) -> None:
        super().__init__()
        depth = int(math.log2(heatmap_size / 8))
        if 8 * 2**depth != heatmap_size:
            raise ValueError(f"heatmap size {heatmap_size} must be 8 times a power of two")
        layers: list[nn.Module] = []
        channels = 2 * num_joints
        for level in range(depth):
            out = width if level == depth - 1 else max(32, width >> (depth - 1 - level))
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.GELU()]
            channels = out
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 1)]
        self.network = nn.Sequential(*layers)
        self.grid, self.num_tokens = 8, 64
        self.register_buffer("position", sinusoidal_position_2d(8, 8, width), persistent=False)

    def forward(
        self,
        heatmaps: Tensor,  # (B, J, h, w)
        heatmap_valid: Tensor,  # (B, J) bool
    ) -> tuple[Tensor, Tensor]:  # tokens (B, 64, C), mask (B, 64) bool
        valid = heatmap_valid[..., None, None].to(heatmaps.dtype)
        maps = torch.cat([_without_dust(heatmaps * valid), valid.expand_as(heatmaps)], 1)
        tokens = self.network(maps).flatten(2).transpose(1, 2) + self.position
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)


class JointHeatmapBackbone(nn.Module):
    """One token per joint: E[exp(i w·x)] under its heatmap for fixed frequencies w, its peak and its mass.

    The expectation is linear in the heatmap, so multiple peaks, blur and tails are represented, and it is one matrix
    product. A joint with a missing or empty heatmap is a masked token.
    """

    basis: Tensor
    line: Tensor
    low: Tensor

    def __init__(
        self,
        num_joints: int,
        heatmap_size: int,
        width: int,
        frequencies: int = 8,  # along each axis, geometric from half a turn to eight turns across the crop
        products: int = 4,  # products of the lowest x and y frequencies, which marginals do not determine
    ) -> None:
        super().__init__()
        coordinates = (torch.arange(heatmap_size) + 0.5) * (2 / heatmap_size) - 1
        omega = math.pi / 2 * torch.logspace(0, 4, frequencies, base=2.0)  # radians per crop half-side
        waves = coordinates[:, None] * omega
        axis = torch.cat([waves.sin(), waves.cos(), coordinates[:, None], coordinates[:, None] ** 2], -1)
        low = torch.cat([waves[:, :products].sin(), waves[:, :products].cos()], -1)
        along_x = axis[None].expand(heatmap_size, -1, -1)
        along_y = axis[:, None].expand(-1, heatmap_size, -1)
        both = (low[:, None, :, None] * low[None, :, None, :]).flatten(2)
        self.register_buffer("basis", torch.cat([along_x, along_y, both], -1).flatten(0, 1), persistent=False)
        self.register_buffer("line", axis, persistent=False)  # (size, F) the basis along one axis
        picked = [*range(products), *range(frequencies, frequencies + products)]
        self.register_buffer("low", torch.tensor(picked), persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(self.basis.shape[-1] + 2, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )
        self.joint = nn.Parameter(torch.randn(num_joints, width) * 0.5)
        self.num_tokens = num_joints

    def forward(
        self,
        heatmaps: Tensor,  # (B, J, h, w) >= 0, peak = confidence
        heatmap_valid: Tensor,  # (B, J) bool
    ) -> tuple[Tensor, Tensor]:  # tokens (B, J, C), mask (B, J) bool
        flat, peak = self._above(heatmaps, 0.1)
        mass = flat.sum(-1, keepdim=True)
        there = heatmap_valid & (peak[..., 0] > 1e-3)
        moments = (flat @ self.basis) / mass.clamp_min(1e-6)
        spread = (mass / peak.clamp_min(1e-6) / 25).clamp(max=8)  # area of the peak over that of a sigma 2 Gaussian
        return self._tokens(moments, peak, spread, there)

    def _tokens(self, moments: Tensor, peak: Tensor, spread: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(torch.cat([moments, peak, spread], -1)) + self.joint
        return tokens * there[..., None], there

    def from_peaks(
        self,
        peaks: Tensor,  # (B, J, 2, 4) x, y (crop), height, sigma (heatmap pixels); height 0: no peak
        heatmap_valid: Tensor,  # (B, J) bool
    ) -> tuple[Tensor, Tensor]:  # tokens (B, J, C), mask (B, J) bool
        """`forward` for heatmaps that are sums of these Gaussians, without rendering them.

        A Gaussian of variance s², less a tenth of the heatmap's peak, is nearly a Gaussian of variance s² N / D and
        mass 2 pi s² D times its height, with t = 0.1 peak / height, D = 1 - t + t log t and
        N = 1 - t (1 - log t) - t (log t)² / 2. Its expectations are products of sums over 64 rows and 64 columns. For
        partly overlapping peaks this is an approximation; the tests bound its error.
        """
        place, height, sigma = peaks[..., :2].float(), peaks[..., 2].float(), peaks[..., 3].float()
        size = self.line.shape[0]
        distance = (place[:, :, 0] - place[:, :, 1]).square().sum(-1, keepdim=True) * (size / 2) ** 2
        local = height + height.flip(-1) * torch.exp(-0.5 * distance / sigma.square())  # the heatmap at both places
        peak = local.amax(-1, keepdim=True)
        there = heatmap_valid & (peak[..., 0] > 1e-3)
        cut = (0.1 * peak / local.clamp_min(1e-6)).clamp(0.1, 0.95)
        log = cut.log()
        mass = 1 - cut + cut * log
        narrowed = (sigma * ((1 - cut * (1 - log) - 0.5 * cut * log.square()) / mass).sqrt()).clamp_min(0.4)
        pixel = (place + 1) * (size / 2) - 0.5
        offset = (torch.arange(size, device=pixel.device) - pixel[..., None]) / narrowed[..., None, None]
        density = torch.exp(-0.5 * offset.square())  # (B, J, 2, xy, size)
        inside = density.sum(-1)
        waves = density @ self.line / inside[..., None].clamp_min(1e-6)  # (B, J, 2, xy, F)
        inside = inside / (narrowed[..., None] * math.sqrt(2 * math.pi))
        weight = 2 * math.pi * sigma.square() * height * mass * inside.prod(-1)  # (B, J, 2)
        total = weight.sum(-1, keepdim=True)
        share = weight / total.clamp_min(1e-6)
        low = waves[..., self.low]  # (B, J, 2, xy, f)
        both = ((low[..., 1, :] * share[..., None])[..., :, None] * low[..., 0, None, :]).sum(2)
        along = (waves * share[..., None, None]).sum(2).flatten(-2)
        moments = torch.cat([along, both.flatten(-2)], -1)
        spread = (total / peak.clamp_min(1e-6) / 25).clamp(max=8)
        return self._tokens(moments, peak, spread, there)

    @staticmethod
    def _above(heatmaps: Tensor, share: float) -> tuple[Tensor, Tensor]:  # (B, J, h w), and the peaks (B, J, 1)
        """Subtract a fraction of the peak: the background of a real estimator is weak but covers 4,096 pixels."""
        flat = heatmaps.flatten(2).float()
        peak = flat.amax(-1, keepdim=True)
        return (flat - share * peak).relu(), peak

    def look(
        self,
        maps: Tensor,  # (B, K, S, S) over the crop
        heatmaps: Tensor,  # (B, J, h, w)
        heatmap_valid: Tensor,  # (B, J) bool
    ) -> Tensor:  # (B, J, K): mean weighted by the heatmap above half its peak; 0 for a missing joint
        """Pool maps at the tokens."""
        flat, _ = self._above(heatmaps, 0.5)
        weight = flat * heatmap_valid[..., None] / flat.sum(-1, keepdim=True).clamp_min(1e-6)
        if maps.shape[-2:] != heatmaps.shape[-2:]:
            maps = nn.functional.interpolate(maps, heatmaps.shape[-2:], mode="bilinear", align_corners=False)
        return weight.to(maps.dtype) @ maps.flatten(2).transpose(1, 2)
