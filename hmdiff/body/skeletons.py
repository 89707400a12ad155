"""Named joint sets and the maps between them. Joints are looked up by name; indices are never hard-coded.

SMPL24: Loper et al., SIGGRAPH Asia 2015. COCO17: Lin et al., ECCV 2014. HALPE26: AlphaPose, arXiv 2211.03375 (COCO17,
then head top, neck, hip and six points of the feet). OPENPOSE25: BODY_25, OPENPOSE18: OpenPose's older COCO output,
arXiv 1812.08008. LSP14: Johnson and Everingham, BMVC 2010. H36M17: Ionescu et al., PAMI 2014. SPIN24: the joints of
other data sets that SPIN adds to OPENPOSE25 (arXiv 1909.12828). MANO16: Romero et al., SIGGRAPH Asia 2017; HAND21 is
also FreiHAND's order (arXiv 1909.04349). SMPLX76: Pavlakos et al., CVPR 2019, without the points of the face.
"""

from __future__ import annotations

from collections.abc import Sequence

SMPL24 = tuple(
    """
    pelvis left_hip right_hip spine1 left_knee right_knee spine2 left_ankle right_ankle spine3 left_foot right_foot
    neck left_collar right_collar head left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist
    left_hand right_hand
    """.split()
)
SMPL24_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)

COCO17 = tuple(
    """
    nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist
    right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle
    """.split()
)

# `neck` of HALPE26, OPENPOSE25 and LSP14 is the midpoint of the shoulders, `mid_hip` that of the hips: neither is the
# SMPL joint of a similar name.
HALPE26 = (
    *COCO17,
    *"top_head neck mid_hip left_big_toe right_big_toe left_small_toe right_small_toe left_heel right_heel".split(),
)

OPENPOSE25 = tuple(
    """
    nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist mid_hip right_hip
    right_knee right_ankle left_hip left_knee left_ankle right_eye left_eye right_ear left_ear left_big_toe
    left_small_toe left_heel right_big_toe right_small_toe right_heel
    """.split()
)

OPENPOSE18 = tuple(
    """
    nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip right_knee
    right_ankle left_hip left_knee left_ankle right_eye left_eye right_ear left_ear
    """.split()
)

LSP14 = tuple(
    """
    right_ankle right_knee right_hip left_hip left_knee left_ankle right_wrist right_elbow right_shoulder
    left_shoulder left_elbow left_wrist neck top_head
    """.split()
)

# The right leg first: Human3.6M's own order, mmpose's, and that of METRO's J_regressor_h36m_correct.
H36M17 = tuple(
    """
    pelvis right_hip right_knee right_ankle left_hip left_knee left_ankle spine neck jaw top_head left_shoulder
    left_elbow left_wrist right_shoulder right_elbow right_wrist
    """.split()
)

# From the wrist outwards, finger by finger, 4 at the tip: OpenPose's and FreiHAND's order (MANO's differs).
HAND21 = (
    "wrist",
    *(f"{finger}{joint}" for finger in ("thumb", "index", "middle", "ring", "pinky") for joint in (1, 2, 3, 4)),
)

# The 14 joints reported in papers, by name: limbs, neck and head. Bodies without H36M's regressor take them from
# HALPE26, which contains all of them.
J14 = LSP14

# The same fourteen in H36M17's order, as in JOTR (arXiv 2307.16377).
H36M14 = tuple(name for name in H36M17 if name not in ("pelvis", "spine", "jaw"))

# The left leg first: the rows of SPIN's J_regressor_h36m. `joint_indices(J14, SPIN_H36M17)` is SPIN's H36M_TO_J14,
# `joint_indices(J14, H36M17)` METRO's H36M_J17_TO_J14: names prevent mixing them up.
SPIN_H36M17 = tuple(
    """
    pelvis left_hip left_knee left_ankle right_hip right_knee right_ankle spine neck jaw top_head left_shoulder
    left_elbow left_wrist right_shoulder right_elbow right_wrist
    """.split()
)

# `top_head` is LSP's; Human3.6M's is `head_h36m`, which H36M17 calls top_head. SPIN evaluates J24_TO_J14 = 0 to 11,
# neck and head_h36m; `SPIN24_H36M17` selects all of H36M17.
SPIN24 = (
    *LSP14,
    *"pelvis thorax spine jaw head_h36m nose left_eye right_eye left_ear right_ear".split(),
)
SPIN24_H36M17 = tuple("head_h36m" if name == "top_head" else name for name in H36M17)  # H36M17 in SPIN24's names
SPIN24_J14 = tuple("head_h36m" if name == "top_head" else name for name in J14)

_FINGERS = ("index", "middle", "pinky", "ring", "thumb")
MANO16 = ("wrist", *(f"{finger}{joint}" for finger in _FINGERS for joint in (1, 2, 3)))
SMPLX55 = (
    *SMPL24[:22],
    "jaw",
    "left_eye_smplhf",
    "right_eye_smplhf",
    *(f"{side}_{finger}{joint}" for side in ("left", "right") for finger in _FINGERS for joint in (1, 2, 3)),
)
# For SMPL and SMPL-X: single vertices, in smplx's order.
FACE_AND_FEET = tuple(
    """
    nose right_eye left_eye right_ear left_ear left_big_toe left_small_toe left_heel right_big_toe right_small_toe
    right_heel
    """.split()
)
SMPLX76 = (
    *SMPLX55,
    *FACE_AND_FEET,
    *(f"{side}_{finger}4" for side in ("left", "right") for finger in ("thumb", "index", "middle", "ring", "pinky")),
)

JOINT_SETS: dict[str, tuple[str, ...]] = {
    "smpl24": SMPL24,
    "coco17": COCO17,
    "halpe26": HALPE26,
    "openpose25": OPENPOSE25,
    "openpose18": OPENPOSE18,
    "lsp14": LSP14,
    "h36m17": H36M17,
    "j14": J14,
    "hand21": HAND21,
    "h36m14": H36M14,
    "spin_h36m17": SPIN_H36M17,
    "spin24": SPIN24,
    "mano16": MANO16,
    "smplx55": SMPLX55,
    "smplx76": SMPLX76,
}


def joint_indices(
    names: Sequence[str],  # wanted joints
    within: Sequence[str],  # available joints
) -> list[int]:
    """Index of every wanted joint; raises `KeyError` naming the first missing one."""
    position = {name: index for index, name in enumerate(within)}
    for name in names:
        if name not in position:
            raise KeyError(f"joint {name!r} is not among {', '.join(within)}")
    return [position[name] for name in names]


def shared_joints(
    source: Sequence[str],
    target: Sequence[str],
) -> tuple[list[int], list[int]]:
    """Indices (into source, into target) of the joints in both sets, in the target's order."""
    position = {name: index for index, name in enumerate(source)}
    pairs = [(position[name], index) for index, name in enumerate(target) if name in position]
    return [a for a, _ in pairs], [b for _, b in pairs]


def mirror_permutation(names: Sequence[str]) -> list[int]:
    """Index of the left-right counterpart of every joint (itself for a joint on the midline)."""

    def mirrored(name: str) -> str:
        if name.startswith("left_"):
            return "right_" + name[5:]
        if name.startswith("right_"):
            return "left_" + name[6:]
        return name

    return joint_indices([mirrored(name) for name in names], names)
