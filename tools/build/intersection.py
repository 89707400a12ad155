"""Self-intersection of a posed mesh as one number per body, for comparing pose samplers. Our choice throughout.

A vertex counts if the nearest vertex of the rest of the body faces away from it: (x - v) · n_v < -DEPTH. The rest of
the body excludes vertices within two bones along the same limb or close at rest, where skin folds anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.viz.renderer import vertex_normals

DEPTH = 0.015  # metres: minimum depth, since soft tissue deforms
NEAR_AT_REST = 0.10  # metres
REACH = 0.10  # metres; farther nearest vertices do not determine inside and outside


def self_intersection(
    body: Body,
    rotations: Tensor,  # (N, 24, 3, 3)
    betas: Tensor | None = None,  # (N, B); None: the mean shape
    stride: int = 5,  # test only every stride-th vertex
) -> Tensor:  # fraction of the vertices inside another body part, 0..1
    """Fraction of a posed body's vertices that lie inside another body part."""
    if body.faces is None:
        raise ValueError("the body has no faces, so no inside")
    betas = torch.zeros(len(rotations), body.num_betas) if betas is None else betas
    chosen = torch.arange(0, body.num_vertices, stride)
    apart = _apart(body, chosen)
    shares = []
    with torch.no_grad():
        for pose, beta in zip(rotations, betas, strict=True):
            vertices = body(beta[None], pose[None]).vertices
            points, normals = vertices[0, chosen], vertex_normals(vertices, body.faces)[0, chosen]
            distance = torch.cdist(points, points).masked_fill(~apart, torch.inf)
            nearest_distance, nearest = distance.min(-1)
            depth = ((points[nearest] - points) * torch.nn.functional.normalize(normals[nearest], dim=-1)).sum(-1)
            shares.append(((depth > DEPTH) & (nearest_distance < REACH)).float().mean())
    return torch.stack(shares)


def _apart(
    body: Body,
    chosen: Tensor,  # (M,)
) -> Tensor:  # (M, M) bool: pairs of vertices that should not intersect
    part = body.lbs_weights[chosen].argmax(-1)
    bone = torch.eye(body.num_joints)
    for joint, parent in enumerate(body.parents):
        if parent >= 0:
            bone[joint, parent] = bone[parent, joint] = 1
    # Left and right do not fold into each other, even for the thighs, which are two bones apart.
    side = torch.tensor([name.startswith("left_") - name.startswith("right_") for name in body.joint_names])
    folding = (bone @ bone > 0) & (side[:, None] * side != -1)
    rest = body.v_template[chosen]
    return ~folding[part[:, None], part[None]] & (torch.cdist(rest, rest) > NEAR_AT_REST)
