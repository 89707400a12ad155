"""Conversion between the points of the diffusion, coarse vertices and joints in metres, and the full mesh.

P points = C coarse vertices, then K body joints, in units of `mesh_scale`; V vertices of the full mesh.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.body.body import Body
from hmdiff.body.lbs_basis import LBSBasis
from hmdiff.body.mesh import blend
from hmdiff.models.denoiser import MeshDenoiser
from hmdiff.models.part_denoiser import PartDenoiser


class MeshPoints:
    """Mesh methods of `MeshRecoveryModel`, whose constructor sets these attributes."""

    config: Any
    denoisers: nn.ModuleList
    coarse_ids: Tensor  # (C,) full vertices in the coarse mesh
    upsample_index: Tensor  # (V, k) coarse vertices, with patch tokens
    upsample_weight: nn.Parameter | None
    basis_full: Tensor  # with part tokens
    basis_from_coarse: Tensor

    def set_topology(
        self,
        coarse_ids: Tensor,  # (C,) full vertices in the coarse mesh
        patches: Tensor,  # (T_v, p) partition of the coarse vertices
        adjacency: Tensor,  # (C, C) bool
        upsample_index: Tensor,  # (V, k) coarse vertices
        upsample_weight: Tensor,  # (V, k) rows sum to 1: initial weights
    ) -> None:
        """Set the mesh topology of a body, with patch tokens. Saved in checkpoints."""
        self.coarse_ids.copy_(coarse_ids)
        assert self.upsample_weight is not None
        self.upsample_index.copy_(upsample_index)
        with torch.no_grad():
            self.upsample_weight.copy_(upsample_weight)
        for denoiser in self.denoisers:
            assert isinstance(denoiser, MeshDenoiser)
            denoiser.patches.copy_(patches)
            denoiser.place.copy_(patches.flatten().argsort())
            if denoiser.neighbours is not None:
                between = adjacency[patches.flatten()][:, patches.flatten()]
                between = between.reshape(len(patches), patches.shape[1], len(patches), patches.shape[1]).any(3).any(1)
                denoiser.neighbours[: len(patches), : len(patches)] = between

    def set_basis(self, basis: LBSBasis) -> None:
        """Set the LBS basis of a body, with part tokens. Not saved: the body determines it."""
        for denoiser in self.denoisers:
            assert isinstance(denoiser, PartDenoiser)
            denoiser.set_basis(basis.points)
        device = self.coarse_ids.device
        self.basis_full, self.basis_from_coarse = basis.full.to(device), basis.from_coarse.to(device)

    @property
    def num_points(self) -> int:
        return self.config.num_coarse + self.config.num_joints

    def to_coarse(self, points: Tensor) -> Tensor:
        """Points (..., P, 3) of the diffusion -> coarse vertices (..., C, 3) in metres."""
        return points[..., : self.config.num_coarse, :] * self.config.mesh_scale

    def to_joints(self, points: Tensor) -> Tensor:
        """Points (..., P, 3) of the diffusion -> body joints (..., K, 3) in metres."""
        return points[..., self.config.num_coarse :, :] * self.config.mesh_scale

    def to_points(
        self,
        coarse: Tensor,  # (..., C, 3) metres
        joints: Tensor,  # (..., K, 3) metres
    ) -> Tensor:  # (..., P, 3)
        return torch.cat([coarse, joints], -2) / self.config.mesh_scale

    def upsample(
        self,
        coarse: Tensor,  # (..., C, 3)
    ) -> Tensor:  # (..., V, 3)
        """Coarse mesh to full mesh: by the LBS basis (parts), or a weighted sum of near coarse vertices (patches).

        Vertices of the coarse mesh are copied. Weights sum to 1, so upsampling commutes with translation.
        """
        if self.config.tokens == "parts":
            # Transposed, so that it is one matrix product for all meshes.
            coordinates = coarse.to(self.basis_full.dtype).mT @ self.basis_from_coarse.mT
            return F.linear(coordinates, self.basis_full).mT
        assert self.upsample_weight is not None
        weight = self.upsample_weight / self.upsample_weight.sum(-1, keepdim=True)
        coarse = coarse.to(weight.dtype)
        return blend(coarse, self.upsample_index, weight).index_copy(-2, self.coarse_ids, coarse)

    @torch.no_grad()
    def keypoint_regressor(
        self,
        body: Body,  # with keypoints
    ) -> Tensor:  # (J, C)
        """Upsampling and the body's keypoint regressor as one matrix, from the coarse mesh.

        Only vertices with a regressor weight are upsampled.
        """
        support, device = body.keypoint_support().to(self.coarse_ids.device), self.coarse_ids.device
        if self.config.tokens == "parts":
            rows = self.basis_full[support] @ self.basis_from_coarse  # (S, C)
        else:
            assert self.upsample_weight is not None
            weight = self.upsample_weight[support]
            weight = weight / weight.sum(-1, keepdim=True)
            rows = weight.new_zeros(len(support), self.config.num_coarse)
            rows.scatter_add_(1, self.upsample_index[support], weight)
            kept = support[:, None] == self.coarse_ids  # vertices of the coarse mesh are copied
            rows = torch.where(kept.any(1, keepdim=True), kept.to(rows), rows)
        return body.support_weights.to(device, rows.dtype) @ rows
