"""The denoiser of HMDiff (arXiv 2308.13369): vertex self-attention, vertex-image cross-attention, linear.

x_k is a noisy mesh of P points: C coarse vertices, then K body joints. There is one token per patch of p neighbouring
vertices (p = 1 in METRO) and one per joint; patches and joint tokens are ours.

Optional modules, without parameters when off: RLE's scale heads and masked modelling (D2A-HMR, arXiv 2403.09063),
2D-3D fusion at the joints after each block (JOTR, arXiv 2307.16377).
B images, N hypotheses per image, T tokens, L context tokens, C coarse vertices, K joints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmdiff.models.conditioning import Conditioning
from hmdiff.models.flow import scale_of
from hmdiff.models.fusion import JointFusion
from hmdiff.models.layers import Attention, FeedForward, KeysValues, StepModulation, modulated
from hmdiff.models.prediction import Denoised

SCALED = ("joints", "vertices", "joints_2d")  # quantities that RLE can predict σ̂ for


class DenoiserBlock(nn.Module):
    """Vertex self-attention -> vertex-image cross-attention -> linear (the paper's order), modulated by the step."""

    def __init__(self, width: int, heads: int, context_width: int, ratio: float = 4.0, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.self_attention = Attention(width, heads, qk_norm=qk_norm)
        self.cross_attention = Attention(width, heads, context_width, qk_norm)
        self.feed_forward = FeedForward(width, ratio)
        self.modulation = StepModulation(width, branches=3)

    def forward(
        self,
        tokens: Tensor,  # (B*N, T, C)
        step: Tensor,  # (B*N, C), or (1, C): the same for all
        keys_values: KeysValues,  # of the image, (B, H, L, C/H)
        context_mask: Tensor,  # (B, 1, 1, L) bool
        neighbours: Tensor | None,  # (T, T) bool or None for all
        token_mask: Tensor | None = None,  # (B*N, T) bool: tokens that may not read the image
    ) -> Tensor:
        first, second, third = self.modulation(step)
        changed = self.self_attention(modulated(self.norm, tokens, first), mask=neighbours)
        tokens = tokens + first.gate * changed
        # The hypotheses of an image are queries to the same keys, which need not be copied.
        images = len(keys_values[0])
        queries = modulated(self.norm, tokens, second).reshape(images, -1, tokens.shape[-1])
        attended = self.cross_attention(queries, keys_values, context_mask).reshape(tokens.shape)
        if token_mask is not None:
            attended = attended.masked_fill(token_mask[..., None], 0.0)
        tokens = tokens + second.gate * attended
        return tokens + third.gate * self.feed_forward(modulated(self.norm, tokens, third))


class MeshDenoiser(nn.Module):
    """x_k, k, image -> prediction (noise, x_0 or velocity, by the scheduler's `prediction_type`)."""

    patches: Tensor
    place: Tensor
    neighbours: Tensor | None
    _gradient_checkpointing_func: Any  # diffusers' ModelMixin sets it

    def __init__(
        self,
        patches: Tensor,  # (T_v, p) long: coarse vertex indices of each patch, a partition
        num_joints: int,
        width: int,
        depth: int,
        heads: int,
        context_width: int,
        ratio: float = 4.0,
        neighbours: Tensor | None = None,  # (T_v, T_v) bool: FastMETRO's attention mask; joint tokens attend to all
        scaled: Sequence[str] = (),  # subset of SCALED: predict RLE's σ̂ for these
        maskable: bool = False,  # has a mask token
        volume_width: int = 0,  # channels of the image's volume; 0: none
        mesh_scale: float = 0.3,  # metres per unit, to place joints in the volume
        coarse_to_fine: bool = False,  # with a volume: joints and mesh are refined from block to block
        qk_norm: bool = False,  # queries and keys of unit length (arXiv 2010.04245)
    ) -> None:
        super().__init__()
        self.num_patches, patch_size = patches.shape
        num_patches = self.num_patches
        self.num_vertices, self.num_joints = patches.numel(), num_joints
        self.register_buffer("patches", patches.long().clone())  # safetensors does not save shared memory
        self.register_buffer("place", patches.flatten().argsort())
        mask = None
        if neighbours is not None:
            mask = torch.ones(num_patches + num_joints, num_patches + num_joints, dtype=torch.bool)
            mask[:num_patches, :num_patches] = neighbours
        self.register_buffer("neighbours", mask)
        self.embed_patch = nn.Linear(3 * patch_size, width)
        self.embed_joint = nn.Linear(3, width)
        self.identity = nn.Parameter(torch.randn(num_patches + num_joints, width) * 0.5)
        self.embed_step = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DenoiserBlock(width, heads, context_width, ratio, qk_norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        # A bias per token represents the mean mesh, learned in the first training steps.
        self.to_patch = nn.Linear(width, 3 * patch_size, bias=False)
        self.to_joint = nn.Linear(width, 3, bias=False)
        self.patch_bias = nn.Parameter(torch.zeros(num_patches, 3 * patch_size))
        self.joint_bias = nn.Parameter(torch.zeros(num_joints, 3))
        for layer in (self.to_patch, self.to_joint):
            nn.init.zeros_(layer.weight)
        # Optional modules come last, so that they do not change the initial weights of the others.
        self.gradient_checkpointing = False
        self.mesh_scale = mesh_scale
        self.mask_token = nn.Parameter(torch.zeros(width)) if maskable else None
        sizes = {"joints": 3, "vertices": 3 * patch_size, "joints_2d": 2}
        self.to_scale = self._scale_heads({name: sizes[name] for name in scaled}, width)
        fusions = depth - 1 if volume_width else 0
        self.fusions = nn.ModuleList(JointFusion(width, volume_width, num_joints) for _ in range(fusions))
        refined = fusions if coarse_to_fine else 0
        self.refinements = nn.ModuleList(nn.Linear(width, 3 * patch_size, bias=False) for _ in range(refined))
        for refinement in self.refinements:
            assert isinstance(refinement, nn.Linear)
            nn.init.zeros_(refinement.weight)

    @staticmethod
    def _scale_heads(sizes: dict[str, int], width: int) -> nn.ModuleDict:
        heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        for head in heads.values():
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, -1.0)  # initial σ̂ = 0.27 units: 8 cm for a unit of 0.3 m
        return heads

    def keys_values(self, context: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of each block's cross-attention, once per image. context: (B, L, C)."""
        return tuple(block.cross_attention.keys_values(context) for block in self.blocks)  # type: ignore

    def forward(
        self,
        points: Tensor,  # (B, N, P, 3) x_k, about unit variance
        step: Tensor,  # (B, N) timestep as a fraction of K, 0..1; or (1, 1): the same for all, embedded once
        conditioning: Conditioning,  # of the B images
        keys_values: tuple[KeysValues, ...],
        token_mask: Tensor | None = None,  # (B, N, T) bool token mask: True = mask token, no cross-attention
    ) -> Denoised:
        """Raises `ValueError` for a wrong number of points, or a token mask without a mask token.

        Masked modelling follows METRO (arXiv 2012.09760): a masked token keeps its identity embedding, but reads
        neither x_k nor the image.
        """
        images, hypotheses, num_points, _ = points.shape
        if num_points != self.num_vertices + self.num_joints:
            raise ValueError(f"x has {num_points} points, not {self.num_vertices} vertices + {self.num_joints} joints")
        flat = points.flatten(0, 1)
        tokens = self.embed(flat)
        if token_mask is not None:
            if self.mask_token is None:
                raise ValueError("tokens are masked, and this denoiser was made without a mask token")
            token_mask = token_mask.flatten(0, 1)
            tokens = torch.where(token_mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = self.with_context(tokens + self.identity, conditioning.tokens)
        embedded = self.embed_step(_step_waves(step.flatten()))
        context_mask = conditioning.mask[:, None, None, :]
        estimates: list[Tensor] = []
        meshes: list[Tensor] = []
        mesh, start, count = self.patch_bias, None, self.num_patches
        if self.refinements:
            start = self.joint_bias.expand(len(flat), -1, -1)
        for number, (block, pair) in enumerate(zip(self.blocks, keys_values, strict=True)):
            given = (tokens, embedded, pair, context_mask, self.neighbours, token_mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, *given)
            else:
                tokens = block(*given)
            if number < len(self.fusions):
                tokens, found = self._look(number, tokens, estimates[-1] if estimates else start, conditioning)
                estimates.append(found)
                if self.refinements:
                    mesh = mesh + self.refinements[number](self.norm(tokens[:, :count]))
                    meshes.append(mesh.reshape(len(flat), -1, 3)[:, self.place])
        tokens = self.norm(tokens)
        result = self.decode(tokens, mesh, estimates[-1] if self.refinements else self.joint_bias)
        result = result.reshape(images, hypotheses, num_points, 3).to(points.dtype)
        on_the_way = torch.stack(estimates, 1).unflatten(0, (images, hypotheses)) if estimates else None
        refined = torch.stack(meshes, 1).unflatten(0, (images, hypotheses)) if meshes else None
        scale = {name: value.unflatten(0, (images, hypotheses)) for name, value in self._scale(tokens).items()}
        return Denoised(result, scale, on_the_way, refined)

    def embed(
        self,
        points: Tensor,  # (M, P, 3)
    ) -> Tensor:  # (M, T, width)
        """Points to tokens."""
        vertices, joints = points[:, : self.num_vertices], points[:, self.num_vertices :]
        patches = vertices[:, self.patches.flatten()].reshape(len(points), len(self.patches), -1)
        return torch.cat([self.embed_patch(patches), self.embed_joint(joints)], 1)

    def decode(
        self,
        tokens: Tensor,  # (M, T, width)
        mesh: Tensor | None,  # (T_v, 3 p) or (M, T_v, 3 p): added to the patches
        joints: Tensor | None,  # (K, 3) or (M, K, 3): added to the joints
    ) -> Tensor:  # (M, P, 3)
        """Tokens to points."""
        patches = self.to_patch(tokens[:, : self.num_patches]) + mesh
        vertices = patches.reshape(len(tokens), -1, 3)[:, self.place]
        return torch.cat([vertices, self.to_joint(tokens[:, self.num_patches :]) + joints], 1)

    def with_context(
        self,
        tokens: Tensor,  # (M, T, width)
        context: Tensor,  # (B, L, context width), M = B N
    ) -> Tensor:  # (M, T, width)
        """Hook to add context to the tokens before the blocks; the identity here."""
        return tokens

    def _look(
        self, number: int, tokens: Tensor, previous: Tensor | None, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:  # tokens (B*N, T, C), joints (B*N, K, 3)
        """2D-3D fusion: the joint tokens sample the volume at their estimated joints."""
        volume, count = conditioning.volume, self.num_patches
        if volume is None:
            raise ValueError("this denoiser looks into a volume: give a conditioning that has one")
        joint_tokens, found = self.fusions[number](
            tokens[:, count:], previous, volume.features, volume.camera, self.mesh_scale, volume.exponent
        )
        return torch.cat([tokens[:, :count], joint_tokens], 1), found

    def _scale(self, tokens: Tensor) -> dict[str, Tensor]:  # (B*N, K or C, 3 or 2)
        """RLE's σ̂ = sigmoid(linear), as in RLE's code, in units of the diffusion."""
        found, count = {}, len(self.patches)
        for name, head in self.to_scale.items():
            part = tokens[:, :count] if name == "vertices" else tokens[:, count:]
            value = scale_of(head(part))
            found[name] = value.reshape(len(tokens), -1, 3)[:, self.place] if name == "vertices" else value
        return found


def _step_waves(
    step: Tensor,  # (M,) 0..1
) -> Tensor:  # (M, 64)
    """Sinusoidal timestep features, frequencies geometric from 1 to 1,000 radians over the process."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=step.device))
    angle = step[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)
