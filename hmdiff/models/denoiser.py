"""The denoiser of HMDiff (arXiv 2308.13369): vertex self-attention, vertex-image cross-attention, linear.

x_k is a noisy mesh of P points: C coarse vertices, then K body joints. The points become tokens, one per patch of p
neighbouring vertices (p = 1 is the paper's lineage) and one per joint; the joint tokens and the patches are ours.
B images, N hypotheses of each, T tokens, L context tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hmdiff.models.conditioning import Conditioning
from hmdiff.models.layers import Attention, FeedForward, KeysValues, StepModulation


class DenoiserBlock(nn.Module):
    """Vertex self-attention -> vertex-image cross-attention -> linear (the paper's order), modulated by the step."""

    def __init__(self, width: int, heads: int, context_width: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, context_width)
        self.feed_forward = FeedForward(width, ratio)
        self.modulation = StepModulation(width, branches=3)

    def forward(
        self,
        tokens: Tensor,  # (B*N, T, C)
        step: Tensor,  # (B*N, C)
        keys_values: KeysValues,  # of the image, (B, H, L, C/H)
        context_mask: Tensor,  # (B, 1, 1, L) bool
        neighbours: Tensor | None,  # (T, T) bool or None for all
    ) -> Tensor:
        (scale_1, shift_1, gate_1), (scale_2, shift_2, gate_2), (scale_3, shift_3, gate_3) = self.modulation(step)
        tokens = tokens + gate_1 * self.self_attention(self.norm(tokens) * scale_1 + shift_1, mask=neighbours)
        # The hypotheses of an image are more queries to the same keys, so that these are neither copied nor recomputed.
        images = len(keys_values[0])
        queries = (self.norm(tokens) * scale_2 + shift_2).reshape(images, -1, tokens.shape[-1])
        attended = self.cross_attention(queries, keys_values, context_mask).reshape(tokens.shape)
        tokens = tokens + gate_2 * attended
        return tokens + gate_3 * self.feed_forward(self.norm(tokens) * scale_3 + shift_3)


class MeshDenoiser(nn.Module):
    """x_k, k, image -> the prediction (noise, clean mesh or velocity: the scheduler's `prediction_type` decides)."""

    patches: Tensor
    place: Tensor
    neighbours: Tensor | None

    def __init__(
        self,
        patches: Tensor,  # (T_v, p) long: coarse vertex ids of every patch, a partition
        num_joints: int,
        width: int,
        depth: int,
        heads: int,
        context_width: int,
        ratio: float = 4.0,
        neighbours: Tensor | None = None,  # (T_v, T_v) bool: FastMETRO's mask between vertex tokens; joints see all
    ) -> None:
        super().__init__()
        num_patches, patch_size = patches.shape
        self.num_vertices, self.num_joints = patches.numel(), num_joints
        self.register_buffer("patches", patches.long().clone())  # of its own: safetensors saves no shared memory
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
        self.blocks = nn.ModuleList(DenoiserBlock(width, heads, context_width, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        # Every token has its own bias: the mean mesh, found in the first steps of a training.
        self.to_patch = nn.Linear(width, 3 * patch_size, bias=False)
        self.to_joint = nn.Linear(width, 3, bias=False)
        self.patch_bias = nn.Parameter(torch.zeros(num_patches, 3 * patch_size))
        self.joint_bias = nn.Parameter(torch.zeros(num_joints, 3))
        for layer in (self.to_patch, self.to_joint):
            nn.init.zeros_(layer.weight)

    def keys_values(self, context: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of every block's cross-attention, once per image. context: (B, L, C)."""
        return tuple(block.cross_attention.keys_values(context) for block in self.blocks)  # type: ignore

    def forward(
        self,
        points: Tensor,  # (B, N, P, 3) x_k, about unit variance
        step: Tensor,  # (B, N) the step as a fraction of K, 0..1
        conditioning: Conditioning,  # of the B images, with keys and values
        keys_values: tuple[KeysValues, ...],
    ) -> Tensor:  # (B, N, P, 3)
        images, hypotheses, num_points, _ = points.shape
        if num_points != self.num_vertices + self.num_joints:
            raise ValueError(f"x has {num_points} points, not {self.num_vertices} vertices + {self.num_joints} joints")
        flat = points.flatten(0, 1)
        vertices, joints = flat[:, : self.num_vertices], flat[:, self.num_vertices :]
        patches = vertices[:, self.patches.flatten()].reshape(len(flat), len(self.patches), -1)
        tokens = torch.cat([self.embed_patch(patches), self.embed_joint(joints)], 1) + self.identity
        embedded = self.embed_step(_step_waves(step.flatten()))
        context_mask = conditioning.mask[:, None, None, :]
        for block, pair in zip(self.blocks, keys_values, strict=True):
            tokens = block(tokens, embedded, pair, context_mask, self.neighbours)
        tokens = self.norm(tokens)
        count = len(self.patches)
        patches = self.to_patch(tokens[:, :count]) + self.patch_bias
        vertices = patches.reshape(len(flat), -1, 3)[:, self.place]
        joints = self.to_joint(tokens[:, count:]) + self.joint_bias
        return torch.cat([vertices, joints], 1).reshape(images, hypotheses, num_points, 3).to(points.dtype)


def _step_waves(
    step: Tensor,  # (M,) 0..1
) -> Tensor:  # (M, 64)
    """Sines and cosines of the step, geometric from one radian to 1,000 across the process."""
    frequency = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=step.device))
    angle = step[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)
