"""2D-3D fusion at the joints of the current estimate: each looks into the image's volume where it believes to be.

Source: JOTR (arXiv 2307.16377), whose decoder refines the joints after every layer and samples its volume there. What
is ours: inside a diffusion model the estimate is x̂_0, so that the places follow the denoising as well as the layers.
JOTR keeps joints in 0..1 by a sigmoid; points of about unit variance need none: previous + Linear([h, previous]).
JOTR puts the sampled features into the decoder's memory; here each goes to its own joint's token, since the memory's
keys and values are shared by all hypotheses of an image and all steps, and the places are each hypothesis' own.

B images, N hypotheses, K joints, C and V channels of tokens and volume, D x H x W voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmdiff.models.layers import sinusoidal_position_1d
from hmdiff.models.lifting import sample_volume, volume_coordinates


class JointFusion(nn.Module):
    """After a block of the denoiser: refine the joints, sample the volume there, add what is found to their tokens."""

    position: Tensor  # (K, V): JOTR's 1-D code of the sampled joints

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
        # Zero at the start, when the places are not yet those of joints: `add` is its own gate, and joints stay put.
        for layer in (self.refine, self.add):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Tensor,  # (B*N, K, C) of the joints, an image's hypotheses one after the other
        previous: Tensor | None,  # (B*N, K, 3) estimate of the block before, units of the diffusion; None at the first
        volume: Tensor,  # (B, V, D, H, W)
        camera: Tensor,  # (B, 3) scale, tx, ty
        scale: float,  # metres per unit of the diffusion
        exponent: Tensor | float,  # k of the volume
    ) -> tuple[Tensor, Tensor]:  # tokens (B*N, K, C), joints (B*N, K, 3) in units of the diffusion
        """Tokens with what the volume holds at their joints, and these joints, for the next block and for a loss.

        Gradients (DAT's, and a loss's on the mesh) pass through the places. Without a previous estimate it counts as 0,
        the pelvis, so that the first joints come from the tokens alone.
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
