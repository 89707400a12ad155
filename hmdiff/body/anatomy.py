"""Anatomical joint angles and joint limits: conversion from and to rotations, clamping, violation.

Every joint has three angles (a, b, c). Left and right share one convention: right joints are mirrored first.
  legs, spine, neck, head   R = Rx(a) Rz(b) Ry(c)   a bends forwards (+) or back (hip: flexion is negative), b is
                                                    sideways (leg: abduction), c turns about the bone (leg: outwards)
  collar, elbow, wrist      the same, axes renamed (x, y, z) -> (-y, x, z) so that y is the bone: elbow a = flexion,
                            c = pronation; collar a = forwards, b = up; wrist a = towards the thumb, b = hand up
  shoulder                  upper arm in the chest's frame (collar and shoulder together): a = azimuth from sideways
                            forwards, b = elevation above horizontal, c = turn about the bone from the shortest swing
The limits are rounded values near clinical tables (AAOS normal ranges), widened to include the motion capture; the
dependence of the shoulder's turn on its elevation is our choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hmdiff.body.skeletons import SMPL24, mirror_permutation

# Degrees: a low, high; b low, high; c low, high.
_RANGES: dict[str, tuple[float, float, float, float, float, float]] = {
    "pelvis": (0, 0, 0, 0, 0, 0),
    "hip": (-135, 35, -35, 65, -50, 60),
    "knee": (-5, 155, -6, 6, -15, 15),
    "ankle": (-40, 60, -35, 35, -35, 35),
    "foot": (-70, 45, -5, 5, -5, 5),
    "spine1": (-22, 50, -20, 20, -20, 20),
    "spine2": (-15, 30, -15, 15, -20, 20),
    "spine3": (-25, 25, -20, 20, -20, 20),
    "neck": (-40, 40, -35, 35, -40, 40),
    "head": (-40, 45, -30, 30, -40, 40),
    "collar": (-20, 25, -15, 40, -12, 12),
    "shoulder": (-180, 180, -90, 90, -180, 180),  # not a box: see `_shoulder_excess`
    "elbow": (-6, 155, -15, 15, -60, 60),
    "wrist": (-40, 35, -85, 80, -60, 60),
    "hand": (-15, 15, -15, 15, -15, 15),
}


def kind(joint: str) -> str:
    """Name of a joint without its side."""
    return joint.removeprefix("left_").removeprefix("right_")


LIMITS = torch.tensor([_RANGES[kind(joint)] for joint in SMPL24]).mul(math.pi / 180).unflatten(-1, (3, 2))  # (24, 3, 2)
MIRROR = torch.tensor(mirror_permutation(SMPL24))
_RIGHT = torch.tensor([joint.startswith("right_") for joint in SMPL24])
_ARM = torch.tensor([kind(joint) in ("collar", "shoulder", "elbow", "wrist", "hand") for joint in SMPL24])
_COLLARS = [SMPL24.index("left_collar"), SMPL24.index("right_collar")]
_SHOULDERS = [SMPL24.index("left_shoulder"), SMPL24.index("right_shoulder")]
_FLIP = torch.tensor([-1.0, 1.0, 1.0])
_SIDE = torch.where(_RIGHT[:, None, None], _FLIP[:, None] * _FLIP, torch.ones(3, 3))  # R -> M R M, element-wise
# R' = P R P^T: axes renamed after mirroring right joints. M R M and P R P^T are one change of basis.
_BASIS = torch.where(_ARM[:, None, None], torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), torch.eye(3))


def mirror_pose(
    rotations: Tensor,  # (..., 24, 3, 3)
) -> Tensor:  # (..., 24, 3, 3)
    """The mirror image of a pose: left and right exchanged, an involution."""
    flip = _FLIP.to(rotations)
    return rotations[..., MIRROR.to(rotations.device), :, :] * (flip[:, None] * flip)


def angles_to_rotations(
    angles: Tensor,  # (..., 24, 3) radians
) -> Tensor:  # (..., 24, 3, 3) local rotations, the root's the identity
    """Local rotations from anatomical angles."""
    sine, cosine = angles.sin(), angles.cos()
    (sa, sb, sc), (ca, cb, cc) = sine.unbind(-1), cosine.unbind(-1)
    cb_cc, sb_cc, cb_sc, sb_sc = cb * cc, sb * cc, cb * sc, sb * sc
    turned = torch.stack(
        [
            cb_cc,
            -sb,
            cb_sc,
            ca * sb_cc + sa * sc,
            ca * cb,
            ca * sb_sc - sa * cc,
            sa * sb_cc - ca * sc,
            sa * cb,
            sa * sb_sc + ca * cc,
        ],
        -1,
    ).unflatten(-1, (3, 3))
    basis = _BASIS.to(angles)
    rotations = basis.mT @ turned @ basis
    # Shoulders: a turn about the bone, then the shortest swing to the direction; then into the collar's frame.
    a, b, c = angles[..., _SHOULDERS, :].unbind(-1)
    direction = upper_arm_direction(a, b)
    chest = _swing(direction) @ _turn_x(c)
    rotations[..., _SHOULDERS, :, :] = rotations[..., _COLLARS, :, :].mT @ chest
    rotations = rotations * _SIDE.to(angles)
    rotations[..., 0, :, :] = torch.eye(3, dtype=angles.dtype, device=angles.device)
    return rotations


def rotations_to_angles(
    rotations: Tensor,  # (..., 24, 3, 3)
) -> Tensor:  # (..., 24, 3) radians
    """Inverse of `angles_to_rotations`; the root's angles are always 0."""
    plain = rotations * _SIDE.to(rotations)
    basis = _BASIS.to(rotations)
    turned = basis @ plain @ basis.mT
    angles = torch.stack(
        [
            torch.atan2(turned[..., 2, 1], turned[..., 1, 1]),
            torch.asin((-turned[..., 0, 1]).clamp(-1, 1)),
            torch.atan2(turned[..., 0, 2], turned[..., 0, 0]),
        ],
        -1,
    )
    chest = plain[..., _COLLARS, :, :] @ plain[..., _SHOULDERS, :, :]
    direction = chest[..., 0]
    turn = _swing(direction).mT @ chest
    angles[..., _SHOULDERS, :] = torch.stack(
        [
            torch.atan2(direction[..., 2], direction[..., 0]),
            torch.asin(direction[..., 1].clamp(-1, 1)),
            torch.atan2(turn[..., 2, 1], turn[..., 1, 1]),
        ],
        -1,
    )
    angles[..., 0, :] = 0
    return angles


def _swing(direction: Tensor) -> Tensor:  # (..., 3) unit -> (..., 3, 3) the shortest rotation from x to it
    x, y, z = direction.unbind(-1)
    inverse = 1 / (1 + x).clamp_min(1e-4)  # only reached by an arm that points through the chest
    across = -y * z * inverse
    rows = [x, -y, -z, y, 1 - y * y * inverse, across, z, across, 1 - z * z * inverse]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _turn_x(angle: Tensor) -> Tensor:
    sine, cosine = angle.sin(), angle.cos()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], -1).unflatten(-1, (3, 3))


def scapular_rhythm(
    direction: Tensor,  # (..., 3) of the left upper arm in the chest's frame, unit length
) -> Tensor:  # (..., 2) radians: the collar's (a, b)
    """Scapulohumeral rhythm: the collar rises by a fifth of the arm's angle over 30 degrees from hanging, and advances.

    Less than the 2:1 rhythm of shoulder and shoulder blade (Inman et al., 1944), since the skinning of a raised arm
    depends on the shoulder joint too.
    """
    elevation = torch.asin(direction[..., 1].clamp(-1, 1))
    up = (elevation + math.radians(60)).clamp_min(0) * 0.2
    forwards = torch.asin(direction[..., 2].clamp(-1, 1)) * 0.15
    return torch.stack([forwards, up], -1)


def shoulder_turn_center(
    direction: Tensor,  # (..., 3) of the left upper arm in the chest's frame
) -> tuple[Tensor, Tensor]:  # (...) centre, (...) half width of the range of c, radians
    """Range of the upper arm's axial rotation: both ways for a hanging arm, outwards for a raised one."""
    elevation = torch.asin(direction[..., 1].clamp(-1, 1))
    # Medians of the motion capture: -8 degrees hanging, -70 level, -115 at 60 degrees up (outwards is negative).
    center = -math.radians(70) - torch.where(elevation < 0, 0.69 * elevation, 0.75 * elevation)
    width = math.radians(80) - elevation.clamp_min(0) * 0.2
    return center, width


def upper_arm_direction(
    a: Tensor,  # (...) radians, azimuth
    b: Tensor,  # (...) radians, elevation
) -> Tensor:  # (..., 3) unit length, in the chest's frame, mirrored to the left
    """Direction of an upper arm from two angles of the shoulder."""
    return torch.stack([b.cos() * a.cos(), b.sin(), b.cos() * a.sin()], -1)


def _reach_excess(direction: Tensor) -> Tensor:  # (..., 3) -> (...) radians, above 0 outside
    x, y, z = direction.clamp(-1, 1).unbind(-1)
    # Reach behind the chest: 60 degrees hanging, 40 level, 20 overhead. Across it: 55 in front, 15 behind.
    behind = torch.asin(-z) - (40 - 20 * y) * (math.pi / 180)
    across = torch.asin(-x) - (15 + 40 * (z / 0.5).clamp(0, 1)) * (math.pi / 180)
    return torch.maximum(behind, across)


def reach_excess(
    rotations: Tensor,  # (N, 24, 3, 3)
) -> Tensor:  # (N,) radians
    """How far the upper arms exceed the shoulders' reach, summed: the limit that `clamp_angles` does not enforce."""
    chest = rotations[:, _COLLARS] @ rotations[:, _SHOULDERS]
    # The right arm rests along -x, so its image of x, mirrored, is -x' -> (x', -y', -z').
    signs = rotations.new_tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0]])
    return _reach_excess(chest[..., 0] * signs).clamp_min(0).sum(-1)


def _shoulder_excess(angles: Tensor) -> Tensor:  # (..., 3) -> (...) radians outside
    a, b, c = angles.unbind(-1)
    direction = upper_arm_direction(a, b)
    center, width = shoulder_turn_center(direction)
    return torch.maximum(_reach_excess(direction), _wrapped(c - center).abs() - width).clamp_min(0)


def _wrapped(angle: Tensor) -> Tensor:  # to -pi..pi
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def clamp_angles(
    angles: Tensor,  # (..., 24, 3) radians
) -> Tensor:  # (..., 24, 3)
    """The nearest angles inside the boxes of `LIMITS` (shoulders: only the axial rotation)."""
    low, high = LIMITS.to(angles).unbind(-1)
    middle = (low + high) / 2
    clamped = middle + torch.minimum(torch.maximum(_wrapped(angles - middle), low - middle), high - middle)
    a, b, c = angles[..., _SHOULDERS, :].unbind(-1)
    center, width = shoulder_turn_center(upper_arm_direction(a, b))
    c = center + torch.minimum(torch.maximum(_wrapped(c - center), -width), width)
    clamped[..., _SHOULDERS, :] = torch.stack([a, b, c], -1)
    return clamped


def within_reach(
    angles: Tensor,  # (..., 24, 3) radians
) -> Tensor:  # (..., 24, 3)
    """Upper arms outside the shoulders' reach, moved towards its centre until they are inside.

    `clamp_angles` bounds only a shoulder's axial rotation. The centre points forwards, sideways and down.
    """
    a, b, c = angles[..., _SHOULDERS, :].unbind(-1)
    direction = upper_arm_direction(a, b)
    middle = torch.nn.functional.normalize(angles.new_tensor([0.7, -0.4, 0.6]), dim=0)

    def towards(share: Tensor) -> Tensor:  # (..., S) interpolation weights of the centre -> (..., S, 3)
        mixed = direction[..., None, :] * (1 - share[..., None]) + middle * share[..., None]
        return torch.nn.functional.normalize(mixed, dim=-1)

    # The smallest weight from which on all are inside, on a grid of 64 and then on one of 64 within its last cell.
    cells = torch.linspace(0, 1, 65).to(angles)
    first, width = torch.zeros_like(a), 1.0
    for _ in range(2):
        free = _reach_excess(towards(first[..., None] + width * cells)) <= 0
        number = 65 - free.flip(-1).cumprod(-1).sum(-1)
        first, width = first + width / 64 * (number - 1).clamp_min(0), width / 64
    moved = towards((first + width).clamp(max=1)[..., None])[..., 0, :]
    blocked = _reach_excess(direction) > 0
    limited = angles.clone()
    new_a, new_b = torch.atan2(moved[..., 2], moved[..., 0]), torch.asin(moved[..., 1].clamp(-1, 1))
    limited[..., _SHOULDERS, :] = torch.stack([torch.where(blocked, new_a, a), torch.where(blocked, new_b, b), c], -1)
    return limited


def limit_excess(
    angles: Tensor,  # (..., 24, 3) radians
) -> Tensor:  # (..., 24) radians: each joint's excess over its limits
    """Largest excess of a joint's angles, 0 inside. Angles wrap: a knee at 200 degrees exceeds its 155 by 45."""
    low, high = LIMITS.to(angles).unbind(-1)
    excess = (_wrapped(angles - (low + high) / 2).abs() - (high - low) / 2).clamp_min(0).amax(-1)
    excess[..., _SHOULDERS] = _shoulder_excess(angles[..., _SHOULDERS, :])
    return excess


def joint_limit_violation(
    rotations: Tensor,  # (..., 24, 3, 3) local rotations
) -> Tensor:  # (...) degrees
    """Excess of the worst joint over its limits; 0 when all are inside. The root is ignored."""
    excess = limit_excess(rotations_to_angles(rotations)).amax(-1) * (180 / math.pi)
    # Smaller values are float32 rounding of asin and atan2.
    return torch.where(excess < 1e-3, torch.zeros_like(excess), excess)
