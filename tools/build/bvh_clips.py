"""Clips of CMU's recordings as local rotations of a 38-joint BVH skeleton, read as Acclaim recordings.

An archive holds `names` (J), `parents`, `offsets` (J, 3; millimetres) and one `clip_NAME` (T, J, 3) per clip,
axis-angles at 30 Hz in the row-vector convention: G_child = R G_parent, X_child = offset G_parent + X_parent, y up. The
skeleton's rest pose is the Acclaim rest pose with other names, so `tools.build.mocap` retargets both: the clips turn
knees and elbows about the same hinges (legs rotated by 20 degrees in the frontal plane, elbows by 30 degrees about the
arm).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hmdiff.errors import UserError
from hmdiff.files.reading import read_npz
from tools.build.acclaim import AcclaimSkeleton, Array, Bone

RATE = 30.0  # Hz
_LEG, _ELBOW = np.radians(20.0), np.radians(30.0)
# Acclaim bone -> (BVH joint with its rotation, BVH joint at its end), for the left side and the middle.
_BONES = {
    "root": ("Hips", None),
    "lowerback": ("LowerBack", "Spine"),
    "upperback": ("Spine", "Spine1"),
    "thorax": ("Spine1", "Neck1"),
    "lowerneck": ("Neck", "Neck1"),
    "upperneck": ("Neck1", "Head"),
    "head": ("Head", "HeadEnd"),
    "lfemur": ("LeftUpLeg", "LeftLeg"),
    "ltibia": ("LeftLeg", "LeftFoot"),
    "lfoot": ("LeftFoot", "LeftToeBase"),
    "ltoes": ("LeftToeBase", "LeftToeEnd"),
    "lclavicle": ("LeftShoulder", "LeftArm"),
    "lhumerus": ("LeftArm", "LeftForeArm"),
    "lradius": ("LeftForeArm", "LeftHand"),
    "lhand": ("LeftFingerBase", "LeftHandIndex1"),
}


def _hinge(bone: str, side: float) -> Array:  # (3,) axis of positive flexion at rest; side 1 left, -1 right
    if bone in ("femur", "tibia", "foot", "toes"):
        return np.array([np.cos(_LEG), side * np.sin(_LEG), 0.0])
    if bone == "hand":
        return np.array([0.0, -side * np.sin(_ELBOW), -side * np.cos(_ELBOW)])
    return np.array([0.0, -side * np.cos(_ELBOW), side * np.sin(_ELBOW)])


def _frame(first: Array) -> Array:  # (3,) -> (3, 3) with this first column
    other = np.eye(3)[np.abs(first).argmin()]
    second = np.cross(first, other)
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)], -1)


def _rotations(axis_angles: Array) -> Array:  # (..., 3) in the row-vector convention -> (..., 3, 3) for column vectors
    angle = np.linalg.norm(axis_angles, axis=-1, keepdims=True)
    axis = -axis_angles / np.maximum(angle, 1e-12)
    x, y, z = np.moveaxis(axis, -1, 0)
    zero = np.zeros_like(x)
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    cross = np.stack([np.stack(row, -1) for row in rows], -2)
    angle = angle[..., None]
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def read_clips(path: str | Path) -> Iterator[tuple[str, AcclaimSkeleton, dict[str, Array]]]:
    """Every clip's name, the skeleton, and the world rotation of each Acclaim bone, (T, 3, 3).

    Raises `UserError` for an archive with another layout.
    """
    found = read_npz(Path(path))
    names = [str(name) for name in found.get("names", ())]
    clips = sorted(name for name in found if name.startswith("clip_"))
    ends = {end for pair in _BONES.values() for end in pair if end is not None}
    if not clips or not ends <= set(names):
        raise UserError(f"{path}: no clips of the 38-joint BVH skeleton; `names`, `offsets` and `clip_NAME` are needed")
    offsets = found["offsets"].astype(np.float64) / 1000
    sources: dict[str, int] = {}
    bones: dict[str, Bone] = {}
    for bone, (joint, end) in _BONES.items():
        for side, initial, word in ((1.0, "l", "Left"), (-1.0, "r", "Right")):
            paired = joint.startswith("Left")
            if side < 0 and not paired:
                continue
            name = initial + bone[1:] if paired else bone
            sources[name] = names.index(joint.replace("Left", word) if paired else joint)
            end_joint = end if end is None or not paired else end.replace("Left", word)
            offset = np.zeros(3) if end_joint is None else offsets[names.index(end_joint)]
            bones[name] = Bone(None, offset, _frame(_hinge(bone[1:], side)) if paired else np.eye(3), ())
    skeleton = AcclaimSkeleton(bones, 1.0)
    parents: list[int] = found["parents"].tolist()
    for clip in clips:
        local = _rotations(found[clip].astype(np.float64))
        world = local.copy()
        for child, parent in enumerate(parents):
            if parent >= 0:
                world[:, child] = world[:, parent] @ local[:, child]
        yield clip.removeprefix("clip_"), skeleton, {name: world[:, place] for name, place in sources.items()}
