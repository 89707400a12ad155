"""How much of a posed mesh lies inside itself: one number a body, to compare pose samplers with. Our choice throughout.

A vertex counts when the nearest vertex of the rest of the body turns its back on it: (x - v) · n_v < -DEPTH. The rest
of the body is what is not within two bones along the same limb, nor near at rest, since skin folds there anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.viz.renderer import vertex_normals

DEPTH = 0.015  # metres inside before it counts: soft tissue gives way
NEAR_AT_REST = 0.10  # metres
REACH = 0.10  # metres; a nearest vertex farther than this says nothing about inside and outside


def self_intersection(
    body: Body,
    rotations: Tensor,  # (N, 24, 3, 3)
    betas: Tensor | None = None,  # (N, B); None: the mean shape
    stride: int = 5,  # every so many vertices are tested, and tested against
) -> Tensor:  # (N,) share of the vertices that lie inside another part of the body, 0..1
    """Share of a posed body's vertices that lie inside another part of it."""
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
) -> Tensor:  # (M, M) bool: these two vertices have no business inside each other
    part = body.lbs_weights[chosen].argmax(-1)
    bone = torch.eye(body.num_joints)
    for joint, parent in enumerate(body.parents):
        if parent >= 0:
            bone[joint, parent] = bone[parent, joint] = 1
    # Left and right never fold into each other, though thighs are but two bones apart.
    side = torch.tensor([name.startswith("left_") - name.startswith("right_") for name in body.joint_names])
    folding = (bone @ bone > 0) & (side[:, None] * side != -1)
    rest = body.v_template[chosen]
    return ~folding[part[:, None], part[None]] & (torch.cdist(rest, rest) > NEAR_AT_REST)
