"""Depth tokens: the depth map of a person as tokens, fused with the image tokens by cross- and self-attention.

D2A-HMR (arXiv 2403.09063): pseudo-depth is tokenised and fused with the image tokens by a transformer encoder, with a
hybrid positional encoding (sinusoidal 2D plus learned). Which of the two is the query is not published: here the image
tokens are. The normalisation is ours. Since attention learns locality slowly, each image token also reads the map
pooled at its own location (a joint's under its heatmap, a cell's over the cell), which is our addition.

B people, L image tokens, M depth tokens, C channels, S pixels per side of the map, p pixels per side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.models.layers import Attention, EncoderBlock, sinusoidal_position_2d

FLAT = 1e-5  # fraction of the map's largest value; smaller deviations are rounding: the map is constant


def resize_depth(
    depth: Tensor,  # (B, h, w) larger = farther, NaN or infinite = not known
    size: int,  # S
) -> tuple[Tensor, Tensor]:  # (B, S, S) 0 where not known; (B, S, S) bool: known
    """Resize by the mean of the known values in each new pixel; known if at least half of the pixel is.

    A smaller map is enlarged by repeating its pixels. Both commute with a change of scale and shift.
    """
    known = depth.isfinite()
    values = torch.where(known, depth, torch.zeros_like(depth))
    if depth.shape[-2:] == (size, size):
        return values, known
    share = F.interpolate(known[:, None].to(values.dtype), (size, size), mode="area")[:, 0]
    mean = F.interpolate(values[:, None], (size, size), mode="area")[:, 0] / share.clamp_min(1e-6)
    known = (share >= 0.5) & mean.isfinite()
    return torch.where(known, mean, torch.zeros_like(mean)), known


def normalise_depth(
    values: Tensor,  # (B, S, S)
    known: Tensor,  # (B, S, S) bool
) -> Tensor:  # (B, S, S) 0 where not known
    """Subtract the median and divide by the mean absolute deviation, over the known pixels of each map.

    Invariant to a * depth + b with a > 0, the ambiguity of a monocular estimator (MiDaS, arXiv 1907.01341). A constant
    map gives 0.
    """
    flat = torch.where(known, values, torch.nan).flatten(1)
    largest = torch.where(known, values.abs(), 0.0).flatten(1).amax(1, keepdim=True)
    # Divide by the largest value first, against overflow of the sums.
    flat = flat / torch.where(largest > 0, largest, torch.ones_like(largest))
    shifted = (flat - flat.nanmedian(1, keepdim=True).values).nan_to_num(0.0)
    count = known.flatten(1).sum(1, keepdim=True).clamp_min(1)
    deviation = shifted.abs().sum(1, keepdim=True) / count
    varied = deviation > FLAT
    return torch.where(varied, shifted / torch.where(varied, deviation, 1.0), 0.0).view_as(values)


def near_relief(
    normalised: Tensor,  # (B, S, S) of `normalise_depth`
    known: Tensor,  # (B, S, S) bool
) -> Tensor:  # (B, S, S) -1..1, 0 where not known
    """Depth relief of the person in the middle of the crop, amplified; a distant background saturates.

    With a wall 10 m behind, a person covers only a few hundredths of the normalised range. The person's depth is taken
    to be the nearer quartile of the middle half of the crop (our choice).
    """
    size = normalised.shape[-1]
    middle = slice(size // 4, size - size // 4)
    window = torch.where(known, normalised, torch.nan)[:, middle, middle].flatten(1)
    person = window.nanquantile(0.25, dim=1).nan_to_num(0.0)[:, None, None]
    return torch.where(known, torch.tanh(4 * (normalised - person)), 0.0)


class DepthAtTokens(nn.Module):
    """The depth map pooled at each image token. Zero-initialised: adds nothing at the start."""

    def __init__(self, width: int, map_size: int = 64, nearness: float = 5.0, limit: float = 4.0) -> None:
        super().__init__()
        self.map_size = map_size
        # Weight on near pixels: a limb is thin, and its surroundings are behind it. Without it the pooled depth hardly
        # correlates with that of the joints (tests/models/test_depth.py).
        self.nearness = nearness
        self.limit = limit  # clamp of the profile, against outliers such as a wall
        self.embed = nn.Sequential(nn.Linear(3, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        for parameter in self.embed[2].parameters():
            nn.init.zeros_(parameter)

    def profile(
        self,
        depth: Tensor,  # (B, h, w) larger = farther, in any unit, NaN or infinite = not known
        look: Callable[[Tensor], Tensor],  # pools maps (B, K, S, S) at the tokens, (B, L, K)
    ) -> Tensor:  # (B, L, 3): depth normalised over the tokens, relief, known fraction; 0 if nothing is known
        """Invariant to a * depth + b with a > 0."""
        values, known = resize_depth(depth.detach().float(), self.map_size)
        normalised = normalise_depth(values, known)
        relief, there = near_relief(normalised, known), known.to(normalised.dtype)
        weight = there * (-self.nearness * (relief + 1)).exp()  # relief is -1 where it is nearest
        seen = look(torch.stack([normalised * weight, relief * weight, weight, there], 1))
        share = seen[..., 3]
        some = share > 1e-3
        mean = seen[..., :2] / seen[..., 2:3].clamp_min(1e-12) * some[..., None]
        # The background takes most of the map's range: normalise again, over the tokens.
        among = normalise_depth(mean[..., 0, None], some[..., None])[..., 0].clamp(-self.limit, self.limit)
        return torch.stack([among, mean[..., 1], torch.where(some, share, 0.0)], -1)

    def forward(
        self,
        depth: Tensor,  # (B, h, w)
        look: Callable[[Tensor], Tensor],
    ) -> Tensor:  # (B, L, C), to add to the tokens; 0 for a token without known depth
        seen = self.profile(depth, look)
        read: Tensor = self.embed(seen.to(next(self.embed.parameters()).dtype))
        return read * (seen[..., 2:] > 0)


class DepthLayer(nn.Module):
    """Cross-attention from image to depth tokens, then self-attention of the image tokens; residual, pre-norm."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm_image = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.block = EncoderBlock(width, heads, ratio)
        # Zero-initialised: adds nothing at the start, so it can be added to a trained model (training.start_from).
        for last in (self.cross_attention.to_out, self.block.attention.to_out, self.block.feed_forward[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Tensor,  # (B, L, C)
        mask: Tensor,  # (B, L) bool
        depth: Tensor,  # (B, M, C)
        depth_mask: Tensor,  # (B, M) bool
    ) -> Tensor:  # (B, L, C)
        pair = self.cross_attention.keys_values(depth)
        tokens = tokens + self.cross_attention(self.norm_image(tokens), pair, depth_mask[:, None, None, :])
        return self.block(tokens, mask)


class DepthFusion(nn.Module):
    """Fuse a depth map into the image tokens.

    Depth tokens are patches of the normalised map, its relief and its validity; a patch without known pixels is masked.
    """

    position: Tensor

    def __init__(
        self,
        width: int,  # C
        heads: int,
        layers: int = 2,
        map_size: int = 64,  # S; maps of another size are resized
        patch: int = 8,  # p
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"depth: {layers} layers; at least 1 is needed")
        if patch < 1 or map_size < patch or map_size % patch:
            raise ValueError(f"depth: a map of {map_size} pixels a side does not fall into patches of {patch}")
        self.map_size, self.patch = map_size, patch
        grid = map_size // patch
        self.embed = nn.Linear(3 * patch**2, width)
        self.register_buffer("position", sinusoidal_position_2d(grid, grid, width), persistent=False)
        self.place = nn.Parameter(torch.randn(grid**2, width) * 0.02)  # the learned half of the hybrid encoding
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(DepthLayer(width, heads) for _ in range(layers))

    def tokens(
        self,
        depth: Tensor,  # (B, h, w) larger = farther, in any unit, NaN or infinite = not known
    ) -> tuple[Tensor, Tensor]:  # (B, M, C); (B, M) bool: the patch has known pixels
        """Depth tokens, invariant to a * depth + b with a > 0."""
        values, known = resize_depth(depth.detach().float(), self.map_size)
        normalised = normalise_depth(values, known)
        maps = torch.stack([normalised, near_relief(normalised, known), known.float()], 1)
        patches = F.unfold(maps, self.patch, stride=self.patch).transpose(1, 2)  # (B, M, 3 p p)
        there = (patches[..., 2 * self.patch**2 :] > 0).any(-1)
        return self.norm(self.embed(patches.to(self.embed.weight.dtype)) + self.position + self.place), there

    def forward(
        self,
        tokens: Tensor,  # (B, L, C) of the image
        mask: Tensor,  # (B, L) bool, True = real token
        depth: Tensor,  # (B, h, w) larger = farther, in any unit, NaN or infinite = not known
    ) -> Tensor:  # (B, L, C)
        """The fused image tokens; unchanged for a person without known depth.

        Raises:
            ValueError: the map has the wrong shape or dtype.
        """
        if depth.dim() != 3 or len(depth) != len(tokens) or 0 in depth.shape:
            found, wanted = tuple(depth.shape), f"({len(tokens)}, {self.map_size}, {self.map_size})"
            raise ValueError(f"depth: shape {found} found, {wanted} expected, a map of each person's crop")
        if depth.shape[1] != depth.shape[2]:
            raise ValueError(f"depth: maps of {depth.shape[1]} x {depth.shape[2]} pixels; a square crop's are expected")
        if not depth.is_floating_point():
            raise ValueError(f"depth: {depth.dtype} found; floating-point numbers are expected, NaN where not known")
        read, there = self.tokens(depth)
        someone = there.any(1, keepdim=True)
        # Attention over an empty set is undefined: a person without depth attends to all patches, and the result is
        # discarded below.
        there = there | ~someone
        attended = mask | ~mask.any(1, keepdim=True)
        fused = tokens
        for layer in self.layers:
            fused = layer(fused, attended, read, there)
        return torch.where(someone[..., None], fused, tokens)
