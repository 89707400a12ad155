"""Lifting: feature map to a volume of 3D features, and the map from metres to coordinates of that volume.

Source: JOTR (arXiv 2307.16377): a 1 x 1 convolution to V·D channels, rescaled relative coordinates (RRC) concatenated
to every voxel, X = r, Y = r, Z = r^k with a learned k, initially 3, in 1..20, then a 2-layer encoder over the D·H·W
voxel tokens with a 1D positional encoding. The decoder samples at (x, y, z^k): a joint at mid-depth and k = 3 is read
at r = 1/8. All sampling here does so, by `volume_coordinates`; JOTR's contrastive loss samples at a linear z instead,
and indexes its voxel mask by (x, y, z) in a volume of (z, y, x). All indices here are (z, y, x).

Ours: r_i = (i + 1/2) / D, the *centres* of the cells (JOTR: i / D), so grid_sample runs with align_corners=False and
its x, y are crop coordinates, as those of the feature map. Depth spans DEPTH_RANGE about the pelvis.

B images, V channels, D x H x W voxels (z, y, x), M points. r: 0..1 along an axis of the volume; z: 0..1 along depth.
With k > 1 the near layers cover more depth: layer i covers the depths r^(1/k) between its borders. At k = 3 and D = 8
the first layer extends to the pelvis, z = 1/2; at k = 1 the pelvis lies between the fourth and the fifth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.geometry import weak_perspective_projection
from hmdiff.models.layers import EncoderBlock, sinusoidal_position_1d

DEPTH_RANGE = 1.2  # metres on each side of the pelvis: contains an adult's arm stretched towards the camera
EXPONENTS = (1.0, 20.0)
NEAREST = 1e-4  # lower bound on z, 0.24 mm: z^k has no derivative in k at 0


class Lifting(nn.Module):
    """Feature map -> volume. Runs once per image; all hypotheses and steps sample the same volume."""

    relative: Tensor  # (S,)
    position: Tensor  # (S³, V)

    def __init__(
        self,
        feature_width: int,  # C
        volume_width: int,  # V
        size: int = 8,  # S: voxels along each axis
        layers: int = 2,
        heads: int = 8,
        exponent: float = 3.0,  # initial k
    ) -> None:
        super().__init__()
        if not EXPONENTS[0] <= exponent <= EXPONENTS[1]:
            raise ValueError(f"exponent {exponent} is not in {EXPONENTS[0]:g}..{EXPONENTS[1]:g}")
        self.size = size
        self.lift = nn.Conv2d(feature_width, volume_width * size, 1)
        self.free_exponent = nn.Parameter(torch.tensor([float(exponent)]))
        self.register_buffer("relative", relative_places(size), persistent=False)
        self.register_buffer("position", sinusoidal_position_1d(size**3, volume_width), persistent=False)
        self.join = nn.Linear(volume_width + 3, volume_width)  # equals JOTR's Conv3d of kernel 1
        self.encoder = nn.ModuleList(EncoderBlock(volume_width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(volume_width)

    @property
    def exponent(self) -> Tensor:  # ()
        """k, clamped to 1..20 with a straight-through gradient, so that it can return from beyond a bound."""
        free = self.free_exponent[0]
        return free + (free.clamp(*EXPONENTS) - free).detach()

    def voxel_coordinates(self) -> Tensor:  # (S, S, S, 3)
        """RRC of every voxel (z, y, x): Z = r^k, Y = r, X = r, in JOTR's order."""
        r = self.relative.to(self.free_exponent.dtype)
        axes = torch.meshgrid(r**self.exponent, r, r, indexing="ij")
        return torch.stack(axes, -1)

    def forward(
        self,
        features: Tensor,  # (B, C, h, w) of the crop, cell centres
    ) -> Tensor:  # (B, V, D, H, W)
        size = self.size
        if features.shape[-2:] != (size, size):
            features = F.adaptive_avg_pool2d(features, size)  # keeps the alignment with the crop
        voxels = self.lift(features).unflatten(1, (-1, size)).flatten(2).mT  # (B, D*H*W, V)
        places = self.voxel_coordinates().flatten(0, 2).expand(len(voxels), -1, -1)
        voxels = self.join(torch.cat([voxels, places.to(voxels.dtype)], -1)) + self.position.to(voxels.dtype)
        for block in self.encoder:
            voxels = block(voxels)
        return self.norm(voxels).mT.unflatten(2, (size, size, size))


def relative_places(size: int) -> Tensor:  # (size,)
    """r of the cell centres along an axis, (i + 1/2) / size."""
    return (torch.arange(size) + 0.5) / size


def volume_coordinates(
    points: Tensor,  # (..., P, 3) metres, pelvis at 0, the model's frame
    camera: Tensor,  # (..., 3) weak perspective: scale (crop half-sides per metre), tx, ty
    exponent: Tensor | float,  # k
) -> Tensor:  # (..., P, 3) x, y, z in -1..1, as for grid_sample
    """Metres to volume coordinates: x and y by weak perspective, depth at r = z^k (JOTR's transformer.py).

    z = (depth + DEPTH_RANGE) / (2 DEPTH_RANGE), 1/2 at the pelvis, larger = farther. Differentiable; points nearer than
    the range are clamped to the near face, without a gradient in z.
    """
    place = weak_perspective_projection(points, camera)
    depth = (points[..., 2:] / (2 * DEPTH_RANGE) + 0.5).clamp_min(NEAREST)
    return torch.cat([place, 2 * depth**exponent - 1], -1)


def sample_volume(
    volume: Tensor,  # (B, V, D, H, W)
    coordinates: Tensor,  # (B, M, 3) x, y, z in -1..1
) -> Tensor:  # (B, M, V)
    """Trilinear sampling with border padding (no gradient in the coordinates beyond the border voxels' centres).

    Differentiable in both arguments, piecewise in the coordinates. The hypotheses of an image are more points M of the
    same volume, which is not copied.
    """
    grid = coordinates[:, None, None]
    # Half precision would move a coordinate by a hundredth of the crop.
    kind = torch.promote_types(volume.dtype, grid.dtype)
    sampled = F.grid_sample(volume.to(kind), grid.to(kind), "bilinear", padding_mode="border", align_corners=False)
    return sampled[:, :, 0, 0].mT


def voxels_away_from(
    coordinates: Tensor,  # (B, K, 3) x, y, z in -1..1 of the joints
    size: tuple[int, int, int],  # D, H, W
) -> Tensor:  # (B, D, H, W) bool
    """JOTR's non-joints: voxels that are not among the 8 interpolated for any joint."""
    depth, height, width = size
    extent = torch.tensor([width, height, depth], device=coordinates.device)
    lower = (((coordinates.detach() + 1) * extent - 1) / 2).floor().long()  # (B, K, 3) x, y, z
    away = torch.ones(len(coordinates), *size, dtype=torch.bool, device=coordinates.device)
    image = torch.arange(len(coordinates), device=coordinates.device)[:, None].expand(lower.shape[:2])
    for corner in torch.cartesian_prod(*[torch.arange(2, device=coordinates.device)] * 3):
        x, y, z = (lower + corner).clamp_min(0).minimum(extent - 1).unbind(-1)
        away[image, z, y, x] = False
    return away
