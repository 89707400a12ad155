"""The coarse mesh of the diffusion: full <-> coarse, and its edges (patches: `surface.partition_patches`).

V vertices of the full mesh, C coarse ones. Downsampling selects vertices (as in METRO, arXiv 2012.09760); upsampling is
a weighted sum of coarse vertices per full vertex, with weights that sum to 1, so it commutes with rotations,
translations and scalings. Down(Up(x)) = x exactly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmdiff.body.decimation import MeshHierarchy
from hmdiff.body.surface import closest_on_surface, surface_distances
from hmdiff.files.reading import read_npz
from hmdiff.files.storage import atomic_file


class TemplateMesh(Protocol):
    """The required part of a body model: its template mesh."""

    @property
    def v_template(self) -> Tensor: ...  # (V, 3) metres

    @property
    def faces(self) -> Tensor | None: ...  # (F, 3)


def blend(
    coarse: Tensor,  # (..., C, 3)
    index: Tensor,  # (V, k) int64 into C
    weight: Tensor,  # (V, k)
) -> Tensor:  # (..., V, 3)
    """Weighted sums of coarse vertices, once differentiable in `coarse` and in `weight`.

    An embedding bag with the bodies concatenated as features: at 64 bodies of 10,000 vertices and k = 12, 7 ms forward
    and 22 ms backward on one core; a sum of k gathers took 355 and 110 ms.
    """
    batch = coarse.shape[:-2]
    bodies = coarse.reshape(-1, *coarse.shape[-2:])
    table = bodies.transpose(0, 1).flatten(1)  # (C, B * 3)
    full = F.embedding_bag(index, table, per_sample_weights=weight.to(coarse.dtype), mode="sum")
    return full.unflatten(-1, (len(bodies), 3)).transpose(0, 1).reshape(*batch, len(index), 3)


class MeshSampler(nn.Module):
    """Full <-> coarse mesh for one topology. Has no parameters; its buffers follow `.to()` and are not saved.

    The body determines the buffers; `signature` is a short string that a checkpoint can store to check that they still
    match.

    Attributes:
        coarse_ids: (C,) vertices of the full mesh that are kept, ascending.
        coarse_faces: (F', 3) into them.
        up_index, up_weight: (V, 3): the closest point of the coarse surface, barycentric; kept vertices: themselves.
        fitted_index, fitted_weight: (V, k): the same, corrected on posed bodies by `fit_upsampling`; if not fitted,
            equal to `up_index`, `up_weight`.
    """

    coarse_ids: Tensor
    coarse_faces: Tensor
    up_index: Tensor
    up_weight: Tensor
    fitted_index: Tensor
    fitted_weight: Tensor

    def __init__(
        self,
        coarse_ids: Tensor,  # (C,) int64
        coarse_faces: Tensor,  # (F', 3) int64
        up_index: Tensor,  # (V, 3) int64
        up_weight: Tensor,  # (V, 3)
        fitted: tuple[Tensor, Tensor] | None = None,  # index, weight (V, k)
    ) -> None:
        super().__init__()
        fitted_index, fitted_weight = (up_index, up_weight) if fitted is None else fitted
        for name, value in (
            ("coarse_ids", coarse_ids),
            ("coarse_faces", coarse_faces),
            ("up_index", up_index),
            ("up_weight", up_weight),
            ("fitted_index", fitted_index),
            ("fitted_weight", fitted_weight),
        ):
            self.register_buffer(name, value, persistent=False)

    @property
    def num_vertices(self) -> int:
        return len(self.up_index)

    @property
    def num_coarse(self) -> int:
        return len(self.coarse_ids)

    def downsample(
        self,
        vertices: Tensor,  # (..., V, 3)
    ) -> Tensor:  # (..., C, 3)
        """Select the kept vertices."""
        return vertices.index_select(-2, self.coarse_ids)

    def upsample(
        self,
        coarse: Tensor,  # (..., C, 3)
    ) -> Tensor:  # (..., V, 3)
        """Three non-zeros per row: each vertex is a point of the coarse surface. Loses volume on curved parts."""
        return blend(coarse, self.up_index, self.up_weight)

    def upsample_fitted(
        self,
        coarse: Tensor,  # (..., C, 3)
    ) -> Tensor:  # (..., V, 3)
        """Like `upsample` with the weights of `fit_upsampling`, which can leave the coarse surface."""
        return blend(coarse, self.fitted_index, self.fitted_weight)

    def adjacency(self) -> Tensor:  # (C, C) bool
        """Whether two coarse vertices share an edge; true on the diagonal."""
        adjacent = torch.eye(self.num_coarse, dtype=torch.bool, device=self.coarse_faces.device)
        for start, end in ((0, 1), (1, 2), (2, 0)):
            adjacent[self.coarse_faces[:, start], self.coarse_faces[:, end]] = True
        return adjacent | adjacent.mT

    @property
    def signature(self) -> str:
        """Sixteen characters that identify the choice of coarse vertices."""
        ids = self.coarse_ids.cpu().numpy().astype("<i8")
        return hashlib.sha256(ids.tobytes() + str(self.num_vertices).encode()).hexdigest()[:16]


def build_mesh_sampler(
    template: Tensor,  # (V, 3)
    faces: Tensor,  # (F, 3)
    hierarchy: MeshHierarchy,
    num_coarse: int,
) -> MeshSampler:
    """The sampler for one level of a hierarchy, upsampling by the closest point of the template's coarse surface.

    The search walks over the surface from the vertex's representative in the decimation, so it does not jump between
    fingers or thighs.

    Raises:
        ValueError: the hierarchy belongs to another mesh, or has no such level.
    """
    points = np.asarray(template.detach().cpu(), dtype=np.float64)
    if len(points) != hierarchy.num_vertices or not np.array_equal(np.asarray(faces.cpu()), hierarchy.faces):
        raise ValueError(f"the hierarchy is of another mesh ({hierarchy.num_vertices} vertices, not {len(points)})")
    coarse_ids, coarse_faces = hierarchy.level(num_coarse)
    start = np.searchsorted(coarse_ids, hierarchy.ancestors(num_coarse))
    index, weight = closest_on_surface(points, points[coarse_ids], coarse_faces, start)
    index[coarse_ids] = np.arange(num_coarse)[:, None]
    weight[coarse_ids] = (1.0, 0.0, 0.0)
    return MeshSampler(
        torch.from_numpy(coarse_ids),
        torch.from_numpy(coarse_faces),
        torch.from_numpy(index),
        torch.from_numpy(weight).to(torch.float32),
    )


def fit_upsampling(
    sampler: MeshSampler,
    meshes: Tensor,  # (S, V, 3) metres, posed bodies
    neighbours: int = 12,  # k, at least 3
    ridge: float = 3e-3,  # towards the three-weight solution, relative to the neighbours' mean square spread
) -> tuple[Tensor, Tensor]:  # index (V, k) int64, weight (V, k) float32, rows sum to 1
    """Upsampling weights that best reproduce posed bodies: one closed-form ridge regression per full vertex.

    w = w0 + delta with the barycentric w0; minimise sum_s |x_s - sum_j w_j c_sj|^2 + lambda |delta|^2 subject to sum_j
    delta_j = 0. With the neighbours centred on their mean in every pose the constraint is satisfied automatically: the
    columns of the design matrix sum to zero, and the solution of (A + lambda I) delta = b lies in the span of b and A.
    Neighbours are the k coarse vertices nearest along the surface, never across a gap. Kept vertices stay one-hot.

    Raises:
        ValueError: k is below 3 or above C.
    """
    if not 3 <= neighbours <= sampler.num_coarse:
        raise ValueError(f"neighbours is {neighbours}; 3 to {sampler.num_coarse} (the coarse vertices) was expected")
    meshes = meshes.double()
    coarse = sampler.downsample(meshes)
    index, start = _surface_neighbours(sampler, meshes, neighbours)
    weight = start.clone()
    for rows in torch.arange(sampler.num_vertices).split(512):  # a few hundred MB at a time
        near = coarse[:, index[rows]]  # (S, R, k, 3)
        error = meshes[:, rows] - (start[rows][..., None] * near).sum(-2)
        design = (near - near.mean(-2, keepdim=True)).permute(1, 0, 3, 2).flatten(1, 2)  # (R, 3S, k)
        gram = design.mT @ design
        moment = design.mT @ error.permute(1, 0, 2).flatten(1)[..., None]
        pull = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        gram = gram + pull[:, None, None] * torch.eye(neighbours, dtype=gram.dtype)
        weight[rows] += torch.linalg.solve(gram, moment)[..., 0]
    weight[sampler.coarse_ids] = start[sampler.coarse_ids]
    return index, weight.float()


def _surface_neighbours(
    sampler: MeshSampler,
    meshes: Tensor,  # (S, V, 3) float64
    neighbours: int,
) -> tuple[Tensor, Tensor]:  # index (V, k), the barycentric weights on it (V, k)
    coarse = sampler.downsample(meshes)
    between = surface_distances(coarse, sampler.coarse_faces)  # (C, C)
    corners = sampler.up_index.numpy()
    distance = np.full((sampler.num_vertices, sampler.num_coarse), np.inf)
    for corner in range(3):
        step = (meshes - coarse[:, corners[:, corner]]).norm(dim=-1).mean(0).numpy()
        np.minimum(distance, step[:, None] + between[corners[:, corner]], out=distance)
    distance[np.arange(len(distance))[:, None], corners] = -1.0  # the three of w0 come first
    order = np.argsort(distance, axis=1, kind="stable")[:, :neighbours]
    reachable = np.isfinite(np.take_along_axis(distance, order, 1))
    order = np.where(reachable, order, order[:, :1])  # a small separate part has fewer: repeats share a delta
    index = torch.from_numpy(order)
    weight = torch.zeros(order.shape, dtype=meshes.dtype)
    for corner in range(3):
        place = (index == sampler.up_index[:, corner, None]).int().argmax(-1, keepdim=True)
        weight.scatter_add_(1, place, sampler.up_weight[:, corner, None].double())
    return index, weight / weight.sum(-1, keepdim=True)


def read_mesh(
    path: str | Path,
    faces: Tensor,  # (F, 3) of the full mesh
) -> MeshSampler:
    """The sampler written by `save_mesh`. Raises ValueError: other faces; UserError: damaged."""
    stored = read_npz(path)
    return stored_sampler(stored, MeshHierarchy.from_arrays(stored, faces.numpy()))


def stored_sampler(stored: dict[str, np.ndarray], hierarchy: MeshHierarchy) -> MeshSampler:
    """The sampler from the arrays of `save_mesh`."""
    coarse_ids, coarse_faces = map(torch.from_numpy, hierarchy.level(int(stored["num_coarse"])))
    return MeshSampler(coarse_ids, coarse_faces, *_unpack(stored, "up"), fitted=_unpack(stored, "fitted"))


def save_mesh(
    path: str | Path,
    hierarchy: MeshHierarchy,
    sampler: MeshSampler,
) -> None:
    """Write the hierarchy and one level's sampler for `read_mesh`."""
    arrays = {
        **hierarchy.arrays(),
        "num_coarse": np.array(sampler.num_coarse),
        **_pack("up", sampler.up_index, sampler.up_weight),
        **_pack("fitted", sampler.fitted_index, sampler.fitted_weight),
    }
    with atomic_file(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def _pack(
    name: str,
    index: Tensor,  # (V, k)
    weight: Tensor,  # (V, k)
) -> dict[str, np.ndarray]:
    index, order = index.cpu().sort(-1)  # sorted rows compress three times better
    weight = weight.cpu().gather(-1, order)
    return {f"{name}_index": index.numpy().astype(np.uint16), f"{name}_weight": weight.numpy().astype(np.float16)}


def _unpack(
    stored: dict[str, np.ndarray],
    name: str,
) -> tuple[Tensor, Tensor]:  # index (V, k) int64, weight (V, k) float32
    index = torch.from_numpy(stored[f"{name}_index"].astype(np.int64))
    weight = torch.from_numpy(stored[f"{name}_weight"].astype(np.float32))
    return index, weight / weight.sum(-1, keepdim=True)  # float16 rows sum to 1 only approximately
