"""Depth tokens: a person's depth map as tokens, fused with the image tokens by cross- and self-attention.

D2A-HMR (arXiv 2403.09063): pseudo-depth is tokenised and fused with the image tokens by a transformer encoder, under a
hybrid positional encoding (a sinusoidal 2D code plus a learned table). Which of the two is the query is unknown; that
the image tokens are, and the normalisation, are our choices.

Attention finds out only slowly where a token should look. So each image token also reads the map at its own place (a
joint's under its heatmap, a cell's over the cell), which is our addition.

B people, L image tokens, M depth tokens, C channels, S pixels a side of the map, p pixels a side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.models.layers import Attention, EncoderBlock, sinusoidal_position_2d

FLAT = 1e-5  # of the map's largest value: deviations below are rounding, and the map is constant


def resize_depth(
    depth: Tensor,  # (B, h, w) larger = farther, NaN or infinite = not known
    size: int,  # S
) -> tuple[Tensor, Tensor]:  # (B, S, S) 0 where not known; (B, S, S) bool: known
    """The map at another size: the mean of the known values that a new pixel covers, known where half of it was.

    A smaller map is enlarged by repeating its pixels. Both commute with a change of units and of the origin.
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
    """Less the median, over the mean absolute deviation from it, of each map's known pixels.

    The same for depth and a * depth + b with a > 0, which is all that a monocular estimator leaves unknown (MiDaS,
    arXiv 1907.01341). A constant map is all 0.
    """
    flat = torch.where(known, values, torch.nan).flatten(1)
    largest = torch.where(known, values.abs(), 0.0).flatten(1).amax(1, keepdim=True)
    # In units of the largest value first, so that no sum overflows.
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
    """The relief of what stands in the middle of the crop, enlarged; what is far behind it saturates.

    A wall ten metres behind a person leaves them a few hundredths of the normalised range. The person is taken to be at
    the nearer quartile of the middle half of the crop (our choice).
    """
    size = normalised.shape[-1]
    middle = slice(size // 4, size - size // 4)
    window = torch.where(known, normalised, torch.nan)[:, middle, middle].flatten(1)
    person = window.nanquantile(0.25, dim=1).nan_to_num(0.0)[:, None, None]
    return torch.where(known, torch.tanh(4 * (normalised - person)), 0.0)


class DepthAtTokens(nn.Module):
    """What each image token sees of the depth map at its own place. It adds nothing before it has learned."""

    def __init__(self, width: int, map_size: int = 64, nearness: float = 5.0, limit: float = 4.0) -> None:
        super().__init__()
        self.map_size = map_size
        # How much more a near pixel counts: a limb is thin, and what is beside it is behind it. Without it what is read
        # hardly correlates with the joints' depths (tests/models/test_depth.py has both).
        self.nearness = nearness
        self.limit = limit  # of the profile: a limb's depth beside a wall's
        self.embed = nn.Sequential(nn.Linear(3, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        for parameter in self.embed[2].parameters():
            nn.init.zeros_(parameter)

    def profile(
        self,
        depth: Tensor,  # (B, h, w) larger = farther, in any unit, NaN or infinite = not known
        look: Callable[[Tensor], Tensor],  # maps (B, K, S, S) to what each token sees of them, (B, L, K)
    ) -> Tensor:  # (B, L, 3): depth among the tokens' depths, relief, the share that is known; 0 where nothing is
        """The same for any a * depth + b with a > 0."""
        values, known = resize_depth(depth.detach().float(), self.map_size)
        normalised = normalise_depth(values, known)
        relief, there = near_relief(normalised, known), known.to(normalised.dtype)
        weight = there * (-self.nearness * (relief + 1)).exp()  # relief is -1 where it is nearest
        seen = look(torch.stack([normalised * weight, relief * weight, weight, there], 1))
        share = seen[..., 3]
        some = share > 1e-3
        mean = seen[..., :2] / seen[..., 2:3].clamp_min(1e-12) * some[..., None]
        # The wall behind a person is most of the map's range: once more, among the places that tokens look at.
        among = normalise_depth(mean[..., 0, None], some[..., None])[..., 0].clamp(-self.limit, self.limit)
        return torch.stack([among, mean[..., 1], torch.where(some, share, 0.0)], -1)

    def forward(
        self,
        depth: Tensor,  # (B, h, w)
        look: Callable[[Tensor], Tensor],
    ) -> Tensor:  # (B, L, C), to add to the tokens; 0 for a token that sees nothing known
        seen = self.profile(depth, look)
        read: Tensor = self.embed(seen.to(next(self.embed.parameters()).dtype))
        return read * (seen[..., 2:] > 0)


class DepthLayer(nn.Module):
    """Image tokens ask the depth tokens, then each other; both with a residual, pre-norm as everywhere here."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm_image = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.block = EncoderBlock(width, heads, ratio)
        # It adds nothing at the start, so that depth can join a model that is trained already (training.start_from).
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
    """A depth map into the image tokens.

    Patches of the normalised map, of its relief and of which pixels are known become tokens; a patch with nothing known
    is masked.
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
    ) -> tuple[Tensor, Tensor]:  # (B, M, C); (B, M) bool: something of the patch is known
        """The depth tokens. The same for any a * depth + b with a > 0."""
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
        """The fused image tokens; of a person with no known depth, the very tokens that were given.

        Raises:
            ValueError: the map has another shape.
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
        # Attention to nothing is undefined: who has no depth attends to all of his empty patches, and it is dropped.
        there = there | ~someone
        attended = mask | ~mask.any(1, keepdim=True)
        fused = tokens
        for layer in self.layers:
            fused = layer(fused, attended, read, there)
        return torch.where(someone[..., None], fused, tokens)
