"""Geodesic distances, closest points and patches on a triangle mesh: never across a gap, such as between two fingers.

Our choice. C vertices, p vertices per patch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mesh_edges(
    faces: Tensor,  # (F, 3) vertices, from 0
) -> Tensor:  # (E, 2) ascending, each once
    """The edges of a triangle mesh."""
    pairs = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(-1).values
    count = int(faces.max()) + 1 if len(faces) else 1
    key = (pairs[:, 0] * count + pairs[:, 1]).unique()  # as single numbers: sorting rows is much slower
    return torch.stack([key // count, key % count], -1)


def surface_distances(
    vertices: Tensor,  # (..., C, 3)
    faces: Tensor,  # (F, 3)
) -> np.ndarray:  # (C, C) metres, inf between separate parts
    """Shortest paths along edges between all pairs of vertices; edge lengths are averaged over the batch."""
    from scipy.sparse import coo_array  # slow to import, and needed once per body
    from scipy.sparse.csgraph import dijkstra

    pairs = mesh_edges(faces)
    length = (vertices[..., pairs[:, 0], :] - vertices[..., pairs[:, 1], :]).norm(dim=-1)
    mean = length.reshape(-1, len(pairs)).mean(0).double().cpu().numpy()
    i, j = pairs.cpu().numpy().T
    size = vertices.shape[-2]
    graph = coo_array((np.r_[mean, mean], (np.r_[i, j], np.r_[j, i])), shape=(size, size))
    return dijkstra(graph.tocsr(), directed=False)


def closest_on_surface(
    points: np.ndarray,  # (P, 3)
    vertices: np.ndarray,  # (C, 3)
    faces: np.ndarray,  # (F, 3)
    start: np.ndarray,  # (P,) start vertex of each point's search
) -> tuple[np.ndarray, np.ndarray]:  # index (P, 3) into C, barycentric weight (P, 3)
    """The closest point of a surface, found by walking over it, so that the result is not across a gap.

    Each iteration finds the closest point of the triangles around the vertex and its neighbours, and moves there.
    """
    around: list[set[int]] = [set() for _ in vertices]
    for face, corners in enumerate(faces.tolist()):
        for corner in corners:
            around[corner].add(face)
    near = [sorted(set().union(*(around[w] for face in faces_at for w in faces[face].tolist()))) for faces_at in around]
    candidates = np.full((len(vertices), max(map(len, near), default=0)), -1)
    for vertex, listed in enumerate(near):
        candidates[vertex, : len(listed)] = listed

    index = np.repeat(start[:, None], 3, axis=1)
    weight = np.tile([1.0, 0.0, 0.0], (len(points), 1))
    distance = np.square(points - vertices[start]).sum(-1)
    moving, current = np.arange(len(points)), start
    while len(moving):
        face = candidates[current]
        corners = vertices[faces[face]]
        barycentric = _closest_barycentric(points[moving][:, None], corners)
        found = np.square((barycentric[..., None] * corners).sum(-2) - points[moving][:, None]).sum(-1)
        found[face < 0] = np.inf
        best = found.argmin(1)
        row = np.arange(len(moving))
        improved = found[row, best] < distance[moving] * (1 - 1e-9)
        moving, row, best = moving[improved], row[improved], best[improved]
        index[moving] = faces[face[row, best]]
        weight[moving] = barycentric[row, best]
        distance[moving] = found[row, best]
        current = index[moving, weight[moving].argmax(1)]
    return index, weight


def _closest_barycentric(
    point: np.ndarray,  # (..., 3)
    triangle: np.ndarray,  # (..., 3, 3) corners
) -> np.ndarray:  # (..., 3) >= 0, sum 1
    """Barycentric coordinates of a triangle's closest point: on its plane if inside, else the best of its edges."""
    a, b, c = (triangle[..., corner, :] for corner in range(3))
    ab, ac, ap = b - a, c - a, point - a
    d00, d01, d11 = (ab * ab).sum(-1), (ab * ac).sum(-1), (ac * ac).sum(-1)
    d20, d21 = (ap * ab).sum(-1), (ap * ac).sum(-1)
    scale = d00 * d11 - d01 * d01
    flat = scale <= 1e-12 * d00 * d11
    scale = np.where(flat, 1.0, scale)
    v, w = (d11 * d20 - d01 * d21) / scale, (d00 * d21 - d01 * d20) / scale
    plane = np.stack([1 - v - w, v, w], -1)
    inside = (plane >= 0).all(-1) & ~flat
    best, best_distance = plane, np.full(plane.shape[:-1], np.inf)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        p, q = triangle[..., i, :], triangle[..., j, :]
        along = ((point - p) * (q - p)).sum(-1) / np.maximum(((q - p) ** 2).sum(-1), 1e-300)
        along = along.clip(0, 1)
        distance = np.square(p + along[..., None] * (q - p) - point).sum(-1)
        edge = np.zeros(plane.shape)
        edge[..., i], edge[..., j] = 1 - along, along
        closer = distance < best_distance
        best, best_distance = np.where(closer[..., None], edge, best), np.where(closer, distance, best_distance)
    return np.where(inside[..., None], plane, best)


def partition_patches(
    vertices: Tensor,  # (C, 3)
    faces: Tensor,  # (F, 3)
    patch_size: int,  # p
) -> Tensor:  # (C / p, p) int64, every vertex once
    """Partition into equal patches of vertices that are neighbours along the surface. Deterministic.

    Recursive bisection: a set is split along its longest geodesic extent (the first axis of classical multidimensional
    scaling) at a multiple of p. Then pairs of vertices swap patches while that lowers the sum of squared geodesic
    distances within patches.

    Raises:
        ValueError: p does not divide C.
    """
    count = len(vertices)
    if patch_size < 1 or count % patch_size:
        raise ValueError(f"patch_size is {patch_size}, which does not divide the {count} coarse vertices")
    distance = surface_distances(vertices.detach(), faces)
    finite = distance[np.isfinite(distance)]
    straight = torch.cdist(vertices.detach().double(), vertices.detach().double()).cpu().numpy()
    distance = np.where(np.isfinite(distance), distance, finite.max() + straight)  # separate parts: far, yet ordered
    squared = distance**2

    def bisect(members: np.ndarray) -> list[np.ndarray]:
        patches = len(members) // patch_size
        if patches <= 1:
            return [members]
        block = squared[np.ix_(members, members)]
        centred = block - block.mean(0) - block.mean(1)[:, None] + block.mean()
        axis = np.linalg.eigh(-centred)[1][:, -1]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        ranked = members[np.argsort(axis, kind="stable")]
        cut = patches // 2 * patch_size
        return bisect(ranked[:cut]) + bisect(ranked[cut:])

    return torch.from_numpy(_swap_between_patches(np.stack(bisect(np.arange(count))), squared))


def _swap_between_patches(
    patches: np.ndarray,  # (P, p)
    squared: np.ndarray,  # (C, C) squared distances
) -> np.ndarray:  # (P, p)
    """Swap pairs of vertices while that lowers the sum of squared distances inside patches (Kernighan and Lin)."""
    count = patches.size
    label = np.empty(count, dtype=np.int64)
    label[patches] = np.arange(len(patches))[:, None]
    towards = np.stack([squared[:, patch].sum(1) for patch in patches], 1)  # (C, P): cost of joining each patch
    own = towards[np.arange(count), label]
    for _ in range(20 * count):
        # gain[i, j] of swapping i and j: each leaves its patch for the other's; corrected for the pair's own distance.
        to_other = towards[:, label]
        gain = own[:, None] + own[None, :] - to_other - to_other.T + 2 * squared
        gain[label[:, None] == label[None, :]] = 0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-12 * squared.max():
            break
        difference = squared[:, j] - squared[:, i]
        towards[:, label[i]] += difference
        towards[:, label[j]] -= difference
        label[i], label[j] = label[j], label[i]
        own = towards[np.arange(count), label]
    order = np.argsort(label, kind="stable")
    return order.reshape(patches.shape)
