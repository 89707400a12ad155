"""2D-3D fusion: sample the image's feature volume at the currently estimated joints.

Source: JOTR (arXiv 2307.16377), whose decoder refines the joints after every layer and samples its volume there. Here
the estimate is x̂_0, so the sampled locations change with the denoising steps as well as the layers. JOTR bounds joints
by a sigmoid; points of unit variance need none: previous + Linear([h, previous]). JOTR appends the sampled features to
the decoder's memory; here they are added to the joint's own token, because keys and values are shared by all hypotheses
and steps of an image, and the locations are not.

B images, N hypotheses, K joints, C and V channels of tokens and volume, D x H x W voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmdiff.models.layers import sinusoidal_position_1d
from hmdiff.models.lifting import sample_volume, volume_coordinates


class JointFusion(nn.Module):
    """After a block of the denoiser: refine the joints, sample the volume there, add the features to their tokens."""

    position: Tensor  # (K, V): JOTR's 1D positional code of the sampled joints

    def __init__(
        self,
        width: int,  # C
        volume_width: int,  # V
        num_joints: int,  # K
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.refine = nn.Linear(width + 3, 3)
        self.add = nn.Linear(volume_width, width)
        self.register_buffer("position", sinusoidal_position_1d(num_joints, volume_width), persistent=False)
        # Zero-initialised: the module starts as an identity, since the first estimates are not yet joint locations.
        for layer in (self.refine, self.add):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Tensor,  # (B*N, K, C) of the joints, the hypotheses of an image adjacent
        previous: Tensor | None,  # (B*N, K, 3) estimate of the previous block, units of the diffusion; None: 0
        volume: Tensor,  # (B, V, D, H, W)
        camera: Tensor,  # (B, 3) scale, tx, ty
        scale: float,  # metres per unit of the diffusion
        exponent: Tensor | float,  # k of the volume
    ) -> tuple[Tensor, Tensor]:  # tokens (B*N, K, C), joints (B*N, K, 3) in units of the diffusion
        """Tokens with the sampled features added, and the refined joints, for the next block and for a loss.

        Differentiable in the sampled locations. Raises `ValueError` if the rows are not a multiple of the images.
        """
        images, rows = len(volume), len(tokens)
        if rows % images:
            raise ValueError(f"{rows} rows of tokens are not as many hypotheses of each of {images} volumes")
        kind = torch.promote_types(tokens.dtype, torch.float32)
        start = tokens.new_zeros((*tokens.shape[:2], 3), dtype=kind) if previous is None else previous.to(kind)
        joints = start + self.refine(torch.cat([self.norm(tokens), start.to(tokens.dtype)], -1)).to(kind)
        places = volume_coordinates(joints.reshape(images, -1, 3) * scale, camera, exponent)
        sampled = sample_volume(volume, places).reshape(*tokens.shape[:2], -1)
        sampled = sampled + self.position.to(sampled.dtype)
        return tokens + self.add(sampled).to(tokens.dtype), joints
