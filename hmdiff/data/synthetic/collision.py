"""Self-collision test of a pose, on capsules around the bones; and rejection of colliding samples.

One average adult (our figures, metres) is used for every body: the test is about the pose, not about whether a stout
person's arm touches the belly. Capsules adjacent on the skeleton are not compared. Segment distance: Ericson, Real-Time
Collision Detection (2004), section 5.1.9.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.body.anatomy import angles_to_rotations, clamp_angles, reach_excess
from hmdiff.body.skeletons import SMPL24, SMPL24_PARENTS

# Parent to joint in the T-pose; the free body's mean shape, rounded.
OFFSETS = torch.tensor(
    [
        [0, 0, 0],
        [0.11, -0.02, -0.01],
        [-0.11, -0.02, -0.01],
        [0, 0.15, -0.025],
        [0, -0.38, 0],
        [0, -0.38, 0],
        [0, 0.08, 0],
        [0, -0.43, 0],
        [0, -0.43, 0],
        [0, 0.125, -0.01],
        [0.01, -0.05, 0.14],
        [-0.01, -0.05, 0.14],
        [0, 0.185, 0.04],
        [0.025, 0.11, 0.055],
        [-0.025, 0.11, 0.055],
        [0, 0.095, 0.035],
        [0.15, -0.02, -0.005],
        [-0.15, -0.02, -0.005],
        [0.255, 0, 0],
        [-0.255, 0, 0],
        [0.23, 0, 0],
        [-0.23, 0, 0],
        [0.1, 0, -0.01],
        [-0.1, 0, -0.01],
    ]
)

# Points that move with a joint: name -> (joint, offset). With the joints they are the ends of the capsules.
_POINTS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "crown": ("head", (0, 0.12, 0.02)),
    "brow": ("head", (0, 0.04, 0.03)),
    **{
        f"{side}_{name}": (joint.replace("*", side), (sign * x, y, z))
        for side, sign in (("left", 1), ("right", -1))
        for name, joint, (x, y, z) in (
            ("chest", "spine3", (0.055, 0.02, 0.055)),
            ("waist", "spine2", (0.045, 0.01, 0.055)),
            ("belly", "spine1", (0.05, -0.03, 0.05)),
            ("seat", "pelvis", (0.06, 0, 0.01)),
            ("tip", "*_hand", (0.09, 0, 0)),
            ("toe", "*_foot", (0, 0, 0.07)),
            ("biceps", "*_shoulder", (0.14, 0, 0)),
            ("thigh", "*_hip", (0, -0.09, 0)),
            ("calf", "*_knee", (0, -0.13, -0.02)),
        )
    },
}
_NAMES = (*SMPL24, *_POINTS)
_POINT_JOINTS = [SMPL24.index(joint) for joint, _ in _POINTS.values()]
_POINT_OFFSETS = torch.tensor([offset for _, offset in _POINTS.values()])

# Capsules: name -> (end, end, radius).
_CAPSULES: dict[str, tuple[str, str, float]] = {
    "head": ("brow", "crown", 0.085),
    "chest": ("left_chest", "right_chest", 0.11),
    "ribs": ("left_chest", "right_chest", 0.085),
    "waist": ("left_waist", "right_waist", 0.095),
    "belly": ("left_belly", "right_belly", 0.10),
    "seat": ("left_seat", "right_seat", 0.11),
    **{
        f"{side}_{name}": (f"{side}_{a}", f"{side}_{b}", radius)
        for side in ("left", "right")
        for name, a, b, radius in (
            ("upper_arm", "biceps", "elbow", 0.042),
            ("forearm", "elbow", "wrist", 0.038),
            ("hand", "wrist", "tip", 0.035),
            ("upper_leg", "thigh", "knee", 0.07),
            ("lower_leg", "calf", "ankle", 0.045),
            ("foot", "ankle", "toe", 0.04),
        )
    },
}


def _pairs() -> list[tuple[str, str]]:
    trunk, pairs = ("head", "chest", "waist", "belly", "seat"), []
    for side, other in (("left", "right"), ("right", "left")):
        legs = [f"{s}_{part}" for s in (side, other) for part in ("upper_leg", "lower_leg", "foot")]
        for part in ("forearm", "hand"):
            pairs += [(f"{side}_{part}", target) for target in (*trunk, *legs, f"{other}_upper_arm")]
        # A hanging upper arm touches the chest, so it is tested against the ribs only.
        pairs += [(f"{side}_upper_arm", target) for target in ("head", "ribs", "waist", *legs[::3])]
        pairs += [(f"{side}_hand", f"{side}_upper_arm"), (f"{side}_hand", f"{other}_forearm")]
        pairs += [(f"{side}_{part}", "chest") for part in ("upper_leg", "lower_leg", "foot")]
        for part in ("lower_leg", "foot"):
            pairs += [(f"{side}_{part}", target) for target in ("waist", "belly", "head", "seat")]
        pairs += [
            (f"{side}_{a}", f"{other}_{b}")
            for a, b in (("lower_leg", "upper_leg"), ("foot", "upper_leg"), ("foot", "lower_leg"))
        ]
        pairs += [(f"{side}_foot", f"{side}_upper_leg")]
    for part in ("forearm", "hand", "upper_leg", "lower_leg", "foot", "upper_arm"):
        pairs.append((f"left_{part}", f"right_{part}"))
    return pairs


_PAIRS = _pairs()
_ORDER = {name: index for index, name in enumerate(_CAPSULES)}
_FIRST = torch.tensor([_ORDER[a] for a, _ in _PAIRS])
_SECOND = torch.tensor([_ORDER[b] for _, b in _PAIRS])
_ENDS = torch.tensor([[_NAMES.index(a), _NAMES.index(b)] for a, b, _ in _CAPSULES.values()])
_RADII = torch.tensor([radius for *_, radius in _CAPSULES.values()])
_CONTACT_DISTANCE = _RADII[_FIRST] + _RADII[_SECOND]
SLACK = 0.015  # metres: tolerated penetration, as skin and cloth are soft

# Joints by depth, so that forward kinematics take one matrix product per level instead of one per joint.
_DEPTH = [0] * len(SMPL24)
for _joint, _parent in enumerate(SMPL24_PARENTS[1:], start=1):
    _DEPTH[_joint] = _DEPTH[_parent] + 1
_BY_DEPTH = [[joint for joint in range(24) if _DEPTH[joint] == depth] for depth in range(max(_DEPTH) + 1)]
_LEVELS = [  # joints of each depth, and their parents' rows in the depth above
    (level, [above.index(SMPL24_PARENTS[joint]) for joint in level]) for above, level in itertools.pairwise(_BY_DEPTH)
]
_DEPTH_ORDER = [joint for level in _BY_DEPTH for joint in level]
_FROM_DEPTH_ORDER = [_DEPTH_ORDER.index(joint) for joint in range(24)]


def forward_kinematics(
    rotations: Tensor,  # (N, 24, 3, 3) local rotations
    offsets: Tensor = OFFSETS,  # (24, 3) metres
) -> tuple[Tensor, Tensor]:  # joints (N, 24, 3) metres, pelvis at 0; world rotations (N, 24, 3, 3)
    """Forward kinematics of the 24 joints."""
    # (R | offset) of each joint, so that one product a level transforms both.
    local = torch.cat([rotations, offsets.to(rotations)[:, :, None].expand(len(rotations), -1, -1, -1)], -1)
    transforms = [F.pad(rotations[:, :1], (0, 1))]
    for level, parents in _LEVELS:
        parent = transforms[-1][:, parents]
        child = parent[..., :3] @ local[:, level]
        child[..., 3] += parent[..., 3]
        transforms.append(child)
    world = torch.cat(transforms, 1)[:, _FROM_DEPTH_ORDER]
    return world[..., 3], world[..., :3]


def segment_distance(
    start_a: Tensor,  # (..., 3)
    end_a: Tensor,  # (..., 3)
    start_b: Tensor,  # (..., 3)
    end_b: Tensor,  # (..., 3)
) -> Tensor:  # (...) metres
    """Shortest distance between two segments."""
    u, v, w = end_a - start_a, end_b - start_b, start_a - start_b
    a, b, c = (u * u).sum(-1).clamp_min(1e-9), (u * v).sum(-1), (v * v).sum(-1).clamp_min(1e-9)
    d, e = (u * w).sum(-1), (v * w).sum(-1)
    s = ((b * e - c * d) / (a * c - b * b).clamp_min(1e-9)).clamp(0, 1)
    t = ((b * s + e) / c).clamp(0, 1)
    s = ((b * t - d) / a).clamp(0, 1)
    return (w + s[..., None] * u - t[..., None] * v).norm(dim=-1)


def capsule_penetration(
    rotations: Tensor,  # (N, 24, 3, 3) local rotations; the root's does not matter
) -> Tensor:  # (N,) metres
    """Penetration depth summed over capsule pairs; 0 for a collision-free pose."""
    joints, world = forward_kinematics(rotations)
    points = joints[:, _POINT_JOINTS] + (world[:, _POINT_JOINTS] @ _POINT_OFFSETS.to(rotations)[..., None])[..., 0]
    ends = torch.cat([joints, points], 1)[:, _ENDS.to(rotations.device)]  # (N, C, 2, 3)
    a, b = ends[:, _FIRST.to(ends.device)], ends[:, _SECOND.to(ends.device)]
    distance = segment_distance(a[:, :, 0], a[:, :, 1], b[:, :, 0], b[:, :, 1])
    return (_CONTACT_DISTANCE.to(rotations) - SLACK - distance).clamp_min(0).sum(-1)


ROUNDS = 3  # a quarter of the first samples collide, and a fiftieth after these rounds


def penalty(
    rotations: Tensor,  # (N, 24, 3, 3)
) -> Tensor:  # (N,) 0 for a collision-free pose inside the joint limits
    """Capsule penetration in metres plus the arms' violation of their reach in radians, which the samplers minimise.

    For clamped angles: box-shaped limits are then met already.
    """
    reach = reach_excess(rotations)
    return capsule_penetration(rotations) + torch.where(reach < 1e-4, torch.zeros_like(reach), reach)


def sample_least_penalised(
    draw: Callable[[int, Tensor | None], Tensor],  # (number, slots; None: all in order) -> angles
    count: int,
    score: Callable[[Tensor], Tensor] | None = None,  # of rotations, lower is better; None: `penalty`
    rounds: int = ROUNDS,
    share: float = 0.25,  # fraction of the slots, the worst, resampled in each round
) -> Tensor:  # (count, 24, 3, 3)
    """Sample poses, then resample the worst fraction in several rounds and keep the better of each slot.

    The number of draws is fixed, so the generator's final state does not depend on the values drawn.
    """
    score = score or penalty
    poses = angles_to_rotations(clamp_angles(draw(count, None)))
    cost = score(poses)
    num_resampled = math.ceil(share * count)
    for _ in range(rounds - 1):
        slots = cost.topk(num_resampled).indices
        candidates = angles_to_rotations(clamp_angles(draw(num_resampled, slots)))
        candidate_cost = score(candidates)
        better = candidate_cost < cost[slots]
        poses[slots] = torch.where(better[:, None, None, None], candidates, poses[slots])
        cost[slots] = torch.minimum(candidate_cost, cost[slots])
    return poses
