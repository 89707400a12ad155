"""Denoiser with one token per body part (its coarse vertices and its joint), which reads and writes the LBS basis.

State and blocks are those of `MeshDenoiser`. The token of a part reads the four coordinates (x 3 axes) of x_k in the
part's columns of the basis (`hmdiff/body/lbs_basis.py`) and writes four, so x̂_0 lies in the basis by construction.
Outside the basis x_k is pure noise, so no information is lost. Part tokens and basis are our choice; affine parts suit
every noise level, since the posterior mean of a rigid part with an uncertain rotation is an affine image of it.
B images, N hypotheses, J parts (tokens, bones, joints).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.models.denoiser import MeshDenoiser
from hmdiff.models.flow import scale_of


class PartLinear(nn.Module):
    """A separate linear layer for each part."""

    def __init__(self, parts: int, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__()
        weight = torch.randn(parts, inputs, outputs) * inputs**-0.5
        self.weight = nn.Parameter(torch.zeros_like(weight) if zero else weight)
        self.bias = nn.Parameter(torch.zeros(parts, outputs))

    def forward(
        self,
        tokens: Tensor,  # (M, J, inputs)
    ) -> Tensor:  # (M, J, outputs)
        return (tokens.transpose(0, 1) @ self.weight.to(tokens.dtype)).transpose(0, 1) + self.bias


class PartDenoiser(MeshDenoiser):
    """`MeshDenoiser` whose tokens are body parts. `basis` comes from the body (`set_basis`) and is not saved."""

    basis: Tensor
    owner: Tensor
    slot: Tensor

    def __init__(
        self,
        num_coarse: int,
        num_parts: int,
        width: int,
        depth: int,
        heads: int,
        context_width: int,
        ratio: float = 4.0,
        scaled: Sequence[str] = (),
        maskable: bool = False,
        volume_width: int = 0,
        mesh_scale: float = 0.3,
        qk_norm: bool = False,
        aligned_context: bool = False,  # context tokens 1 to J correspond to the parts and are added to their tokens
    ) -> None:
        super().__init__(
            torch.zeros(0, 1, dtype=torch.long),
            num_parts,
            width,
            depth,
            heads,
            context_width,
            ratio,
            None,
            (),
            maskable,
            volume_width,
            mesh_scale,
            qk_norm=qk_norm,
        )
        self.num_vertices = num_coarse
        for name in ("embed_patch", "embed_joint", "to_patch", "to_joint", "patch_bias", "joint_bias"):
            delattr(self, name)
        del self.patches, self.place
        self.patch_bias = self.joint_bias = None  # type: ignore[assignment]
        self.register_buffer("basis", torch.zeros(num_coarse + num_parts, 4 * num_parts), persistent=False)
        self.register_buffer("owner", torch.zeros(num_coarse, dtype=torch.long), persistent=False)
        self.read = PartLinear(num_parts, 12, width)
        self.write = PartLinear(num_parts, width, 12, zero=True)
        self.from_context = PartLinear(num_parts, context_width, width) if aligned_context else None
        sizes = {"joints": 3, "vertices": 3, "joints_2d": 2}  # the vertices of a part share one σ̂
        self.to_scale = self._scale_heads({name: sizes[name] for name in scaled}, width)

    def set_basis(
        self,
        basis: Tensor,  # (P, 4 J) orthonormal
    ) -> None:
        """Set the LBS basis; each vertex belongs to the part with the most energy in its row."""
        self.basis.copy_(basis)
        energy = basis[: self.num_vertices].square().unflatten(1, (-1, 4)).sum(-1)
        self.owner.copy_(energy.argmax(-1))

    def embed(
        self,
        points: Tensor,  # (M, P, 3)
    ) -> Tensor:  # (M, J, width)
        with torch.autocast(points.device.type, enabled=False):  # bfloat16 would round x_k by millimetres
            coordinates = F.linear(points.float().mT, self.basis.mT).mT  # one product for all M meshes
        return self.read(coordinates.unflatten(1, (-1, 4)).flatten(2))

    def decode(
        self,
        tokens: Tensor,  # (M, J, width)
        mesh: Tensor | None,
        joints: Tensor | None,
    ) -> Tensor:  # (M, P, 3)
        """Tokens to points in the span of the basis; `mesh` and `joints` are ignored."""
        with torch.autocast(tokens.device.type, enabled=False):
            coordinates = self.write(tokens.float()).unflatten(2, (4, 3)).flatten(1, 2)
            return F.linear(coordinates.mT, self.basis).mT

    def with_context(
        self,
        tokens: Tensor,  # (M, J, width)
        context: Tensor,  # (B, L, context width), M = B N
    ) -> Tensor:  # (M, J, width)
        if self.from_context is None:
            return tokens
        added = self.from_context(context[:, 1:])
        return tokens + added.repeat_interleave(len(tokens) // len(added), 0)

    def _scale(self, tokens: Tensor) -> dict[str, Tensor]:
        """σ̂ of each joint from its part's token; the vertices that belong to a part share one."""
        found = {name: scale_of(head(tokens)) for name, head in self.to_scale.items()}
        if "vertices" in found:
            found["vertices"] = found["vertices"][:, self.owner]
        return found
