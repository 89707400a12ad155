"""Retargeting of Acclaim recordings to local rotations of a T-pose body with 24 SMPL-named joints.

The ASF rest pose (legs spread by 20 degrees, elbow hinges rotated by 30) is not a T-pose, so each SMPL joint uses a
bone's W_b · A_b, where the constant A_b rotates the T-pose's (bone direction, hinge axis) to the bone's. Our choice, as
are the distributed forearm twist and the collars that follow raised arms.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hmdiff.body.anatomy import angles_to_rotations, scapular_rhythm
from hmdiff.body.skeletons import SMPL24, SMPL24_PARENTS
from hmdiff.data.synthetic.collision import OFFSETS
from tools.build.acclaim import AcclaimSkeleton, Array, bone_ends

MAX_SPEED = 25.0  # degrees per recorded frame (120 Hz): 3,000 degrees per second is beyond human joints
MEAN_OFFSETS: Array = OFFSETS.double().numpy()  # (24, 3) metres, from parent to joint in the T-pose

# SMPL joint -> ASF bone that provides its orientation. The wrist uses the hand's; hands and neck are set below.
_SOURCE = {
    "pelvis": "root",
    "spine1": "lowerback",
    "spine2": "upperback",
    "spine3": "thorax",
    "head": "head",
    "left_hip": "lfemur",
    "left_knee": "ltibia",
    "left_ankle": "lfoot",
    "left_foot": "ltoes",
    "left_collar": "lclavicle",
    "left_shoulder": "lhumerus",
    "left_elbow": "lradius",
    "left_wrist": "lhand",
    "right_hip": "rfemur",
    "right_knee": "rtibia",
    "right_ankle": "rfoot",
    "right_foot": "rtoes",
    "right_collar": "rclavicle",
    "right_shoulder": "rhumerus",
    "right_elbow": "rradius",
    "right_wrist": "rhand",
}
# Joints whose bone (joint -> child) must point like the ASF bone. The others (pelvis, spine, neck, collars, feet) are
# matched at rest instead: the two rest poses agree there, but the joints are not at the same points.
DIRECTED = {
    "left_hip": "left_knee",
    "right_hip": "right_knee",
    "left_knee": "left_ankle",
    "right_knee": "right_ankle",
    "left_shoulder": "left_elbow",
    "right_shoulder": "right_elbow",
    "left_elbow": "left_wrist",
    "right_elbow": "right_wrist",
    "left_wrist": "left_hand",
    "right_wrist": "right_hand",
}


def tpose_hinge(joint: str) -> Array:  # (3,)
    """Axis of positive flexion in the T-pose: knees x; elbows vertical, so that forearms fold forward; palms down."""
    side = 1.0 if joint.startswith("left_") else -1.0
    if "wrist" in joint:
        return np.array([0.0, 0.0, -side])
    return np.array([0.0, -side, 0.0]) if "shoulder" in joint or "elbow" in joint else np.array([1.0, 0.0, 0.0])


def _frame(primary: Array, secondary: Array) -> Array:  # (3, 3) orthonormal columns
    first = primary / np.linalg.norm(primary)
    second = secondary - (secondary @ first) * first
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)], -1)


def rest_alignment(
    skeleton: AcclaimSkeleton,
    offsets: Array,  # (24, 3) T-pose
) -> dict[str, Array]:  # SMPL joint -> (3, 3) A: from the T-pose to the ASF rest pose
    """The constant rotation of every joint between the two rest poses."""
    alignment = {}
    for joint, source in _SOURCE.items():
        bone = skeleton.bones[source]
        if joint in DIRECTED:
            hinge = bone.frame[:, 0]
            child = offsets[SMPL24.index(DIRECTED[joint])]
            alignment[joint] = _frame(bone.offset, hinge) @ _frame(child, tpose_hinge(joint)).T
        elif joint.endswith(("ankle", "foot")):
            # Soles are flat in both rest poses: apply only the spread of the leg above, a rotation of the frame about z
            # that is independent of the slope from the ankle to the ball of the foot.
            hinge = bone.frame[:, 0]
            alignment[joint] = _frame(hinge, np.array([0.0, 0.0, 1.0]))[:, [0, 2, 1]] * np.array([1.0, -1.0, 1.0])
        else:
            alignment[joint] = np.eye(3)
    return alignment


def retarget(
    skeleton: AcclaimSkeleton,
    world: dict[str, Array],  # bone -> (F, 3, 3)
    offsets: Array = MEAN_OFFSETS,  # (24, 3) metres, T-pose, parent to joint
) -> Array:  # (F, 24, 3, 3) local rotations of the T-pose body; the first is the root's in the world; hands are 0
    """Local rotations that put a T-pose body into the recorded pose."""
    alignment = rest_alignment(skeleton, offsets)
    glob = {joint: world[bone] @ alignment[joint] for joint, bone in _SOURCE.items()}
    # ASF has three neck bones, SMPL one: use the middle of the lower two.
    glob["neck"] = halfway(world["lowerneck"], world["upperneck"])
    for side in ("left", "right"):
        # The ASF forearm twists only in its lower half, skin along its whole length: give half of the twist to the
        # elbow.
        elbow, wrist = f"{side}_elbow", f"{side}_wrist"
        axis = offsets[SMPL24.index(wrist)]
        twist = _twist_angle(np.swapaxes(glob[elbow], -1, -2) @ glob[wrist], axis)
        glob[elbow] = glob[elbow] @ _axis_rotation(axis, twist / 2)
        glob[f"{side}_hand"] = glob[wrist]
        # The recordings have static clavicles; raising an arm without the shoulder blade tears the skin.
        chest, sign = glob["spine3"], np.array([1.0 if side == "left" else -1.0, 1.0, 1.0])
        arm = (np.swapaxes(chest, -1, -2) @ glob[f"{side}_shoulder"])[..., 0] * sign[0] * sign
        glob[f"{side}_collar"] = glob[f"{side}_collar"] @ _collar(arm, sign)
    stacked = np.stack([glob[joint] for joint in SMPL24], 1)
    local = stacked.copy()
    parents = np.array(SMPL24_PARENTS[1:])
    local[:, 1:] = np.swapaxes(stacked[:, parents], -1, -2) @ stacked[:, 1:]
    return local


def _collar(arm: Array, sign: Array) -> Array:  # (F, 3) upper arm, mirrored to the left; (3,) -> (F, 3, 3)
    angles = torch.zeros(len(arm), 24, 3, dtype=torch.float64)
    joint = SMPL24.index("left_collar")
    angles[:, joint, :2] = scapular_rhythm(torch.from_numpy(np.ascontiguousarray(arm)))
    return angles_to_rotations(angles)[:, joint].numpy() * np.outer(sign, sign)


def _axis_rotation(axis: Array, angle: Array) -> Array:  # (3,), (F,) -> (F, 3, 3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle)[:, None, None] * cross + (1 - np.cos(angle))[:, None, None] * (cross @ cross)


def _twist_angle(rotation: Array, axis: Array) -> Array:  # (F, 3, 3), (3,) -> (F,) radians in -pi..pi
    # The twist of the quaternion (w, v) is 2 atan2(v · axis, w); both arguments carry the same positive factor.
    axis = axis / np.linalg.norm(axis)
    sine = (
        np.stack(
            [
                rotation[:, 2, 1] - rotation[:, 1, 2],
                rotation[:, 0, 2] - rotation[:, 2, 0],
                rotation[:, 1, 0] - rotation[:, 0, 1],
            ],
            -1,
        )
        @ axis
    )
    return 2 * np.arctan2(sine, 1 + np.trace(rotation, axis1=1, axis2=2))


def halfway(first: Array, second: Array) -> Array:  # (..., 3, 3) each
    """The rotation midway: the orthonormal matrix nearest to the mean."""
    u, _, vt = np.linalg.svd(first + second)
    return u @ vt


def joint_positions(
    local: Array,  # (F, 24, 3, 3)
    offsets: Array = MEAN_OFFSETS,  # (24, 3)
) -> tuple[Array, Array]:  # joints (F, 24, 3), world rotations (F, 24, 3, 3)
    """Forward kinematics of the 24 joints, the pelvis at 0."""
    glob, joints = local.copy(), np.zeros((*local.shape[:2], 3))
    for joint, parent in enumerate(SMPL24_PARENTS):
        if parent >= 0:
            glob[:, joint] = glob[:, parent] @ local[:, joint]
            joints[:, joint] = joints[:, parent] + glob[:, parent] @ offsets[joint]
    return joints, glob


def direction_error(
    skeleton: AcclaimSkeleton,
    world: dict[str, Array],
    local: Array,  # (F, 24, 3, 3) from `retarget`
    offsets: Array = MEAN_OFFSETS,
) -> dict[str, float]:  # degrees, mean over frames; by limb, and 'trunk' for the line from pelvis to neck
    """Angle between the retargeted and the recorded bones.

    Limbs: 0 up to rounding. Trunk, neck and feet are matched at rest and differ by the difference of the rest poses.
    """
    joints, _ = joint_positions(local, offsets)
    ends = bone_ends(skeleton, world)
    pairs = {
        joint: (
            world[_SOURCE[joint]] @ skeleton.bones[_SOURCE[joint]].offset,
            joints[:, SMPL24.index(child)] - joints[:, SMPL24.index(joint)],
        )
        for joint, child in DIRECTED.items()
    }
    pairs["trunk"] = (ends["thorax"], joints[:, SMPL24.index("neck")])
    neck, head = SMPL24.index("neck"), SMPL24.index("head")
    pairs["neck"] = (ends["upperneck"] - ends["thorax"], joints[:, head] - joints[:, neck])
    for side in ("left", "right"):
        pairs[f"{side}_ankle"] = (
            world[f"{side[0]}foot"] @ skeleton.bones[f"{side[0]}foot"].offset,
            joints[:, SMPL24.index(f"{side}_foot")] - joints[:, SMPL24.index(f"{side}_ankle")],
        )
    return {name: float(np.degrees(_angle(a, b)).mean()) for name, (a, b) in pairs.items()}


def _angle(a: Array, b: Array) -> Array:
    return np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1))


def bad_frames(
    local: Array,  # (F, 24, 3, 3) at the recorded rate
    fastest: float = MAX_SPEED,  # degrees per frame
) -> NDArray[np.bool_]:  # (F,)
    """Frames next to an impossibly fast jump, or with a non-finite value."""
    bad: NDArray[np.bool_] = np.logical_not(np.isfinite(local).reshape(len(local), -1).all(-1))
    step = np.swapaxes(local[:-1], -1, -2) @ local[1:]
    cosine = (np.trace(step, axis1=-2, axis2=-1) - 1) / 2
    jump = (np.degrees(np.arccos(np.clip(cosine, -1, 1))) > fastest).any(-1)
    bad[1:] |= jump
    bad[:-1] |= jump
    return bad
