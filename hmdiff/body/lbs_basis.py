"""The linear basis of skinned bodies: every posed and shaped mesh is within millimetres of a space of 12 J dimensions.

Linear blend skinning with affine bones is linear in the bones: v_i = sum_j w_ij (A_j t_i + b_j) = (B C)_i, with rows
B_i = [w_ij (t_i, 1)]_j and C the stacked 4 x 3 matrices (A_j, b_j)^T. Pose enters through C exactly, shape
approximately. An orthonormal basis of B's columns, as close as possible to the bones' columns (Löwdin, J. Chem. Phys.
18, 365 (1950)), has four coordinates per bone: Gaussian noise of the points is Gaussian noise of the coordinates, and
surfaces that affine bones cannot form (crumpled ones) are not representable. Our choice.

J bones, C coarse vertices, P = C + J points (the vertices, then the joints), V vertices of the full mesh.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hmdiff.body.body import Body

SMALLEST = 1e-5  # smallest eigenvalue of the bones' Gram matrix, relative to the largest, of a spanned direction


class LBSBasis(NamedTuple):
    """The basis of one body's coarse mesh and joints. Float32, on the body's device."""

    points: Tensor  # (P, 4 J) orthonormal columns, four per bone: points = points @ coordinates
    full: Tensor  # (V, 4 J): the full mesh from the same coordinates
    from_coarse: Tensor  # (4 J, C): least-squares coordinates of coarse vertices


def lbs_basis(
    body: Body,
    coarse_ids: Tensor,  # (C,) vertices of the coarse mesh
) -> LBSBasis:
    """The basis of a body of any skeleton, from its template, skinning weights and rest-pose joints.

    A joint is skinned half by its bone and half by the parent's. Bones with few vertices (fingertips of a coarse mesh)
    may span fewer than four directions; their other coordinates then have no effect.
    """
    template, weights = body.v_template.double(), body.lbs_weights.double()
    joints = body.joint_template.double()
    bones = len(joints)
    middle = joints  # of each bone: coordinates relative to it are better conditioned
    own = weights.new_zeros(bones, bones)
    for joint, parent in enumerate(body.parents):
        own[joint, joint] += 0.5
        own[joint, parent if parent >= 0 else joint] += 0.5

    def rows(points: Tensor, weight: Tensor) -> Tensor:  # (M, 3), (M, J) -> (M, J, 4)
        relative = points[:, None] - middle
        return weight[..., None] * torch.cat([relative, torch.ones_like(relative[..., :1])], -1)

    ids = coarse_ids.to(template.device)
    spanned = torch.cat([rows(template[ids], weights[ids]), rows(joints, own)])  # (P, J, 4)
    # Orthonormal within each bone, then symmetrically among all of them.
    scale = torch.linalg.cholesky(_positive(torch.einsum("pja,pjb->jab", spanned, spanned)))
    local = torch.linalg.solve_triangular(scale, spanned.permute(1, 2, 0), upper=False)  # (J, 4, P)
    local = local.flatten(0, 1).mT  # (P, 4 J)
    values, vectors = torch.linalg.eigh(local.mT @ local)
    kept = values > SMALLEST * values[-1]
    root = (vectors * torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)) @ vectors.mT
    points = local @ root
    everything = torch.linalg.solve_triangular(scale, rows(template, weights).permute(1, 2, 0), upper=False)
    full = everything.flatten(0, 1).mT @ root
    from_coarse = torch.linalg.pinv(points[: len(ids)], rtol=SMALLEST**0.5)
    return LBSBasis(points.float(), full.float(), from_coarse.float())


def _positive(gram: Tensor) -> Tensor:  # (J, 4, 4), regularised where a bone spans fewer than four directions
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(1e-12)
    return gram + 1e-9 * size * torch.eye(4, dtype=gram.dtype, device=gram.device)
