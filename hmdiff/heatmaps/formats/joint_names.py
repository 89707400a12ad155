"""Joint names of external files, mapped to canonical names. Joints are mapped by name, never by index.

Orders: COCO-WholeBody 133 (Jin et al., ECCV 2020), Halpe 136 (arXiv 2211.03375), MediaPipe's 33 landmarks (BlazePose,
arXiv 2006.10204). Face and hand points are listed only to distinguish them from unknown names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hmdiff.body.skeletons import COCO17, HALPE26, JOINT_SETS
from hmdiff.errors import UserError

_FEET = tuple(f"{side}_{part}" for side in ("left", "right") for part in ("big_toe", "small_toe", "heel"))
_FACE = tuple(f"face_{index}" for index in range(68))
_HANDS = tuple(f"{side}_hand_{index}" for side in ("left", "right") for index in range(21))
WHOLEBODY133 = (*COCO17, *_FEET, *_FACE, *_HANDS)
HALPE136 = (*HALPE26, *_FACE, *_HANDS)
HALPE68 = (*HALPE26, *_HANDS)
WHOLEBODY_FEET = _FEET
MEDIAPIPE33 = tuple(
    """
    nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye right_eye_outer left_ear right_ear
    mouth_left mouth_right left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_pinky
    right_pinky left_index right_index left_thumb right_thumb left_hip right_hip left_knee right_knee left_ankle
    right_ankle left_heel right_heel left_big_toe right_big_toe
    """.split()
)
# Only orders that the number of joints identifies. (14 are CrowdPose's or AIC's, 16 MPII's or others'.)
BY_COUNT: dict[int, tuple[str, ...]] = {17: COCO17, 26: HALPE26, 68: HALPE68, 133: WHOLEBODY133, 136: HALPE136}
LEAST_KNOWN = 3  # minimum number of canonical joints in a body's file

_SAME = {
    "head_top": "top_head",
    "headtop": "top_head",
    "tophead": "top_head",
    "top_of_head": "top_head",
    "midhip": "mid_hip",
    "root": "mid_hip",
    "pelvis": "mid_hip",
    "hip_center": "mid_hip",
    "mid_shoulder": "neck",
    "shoulder_center": "neck",
    "left_foot_index": "left_big_toe",
    "right_foot_index": "right_big_toe",
    "left_bigtoe": "left_big_toe",
    "right_bigtoe": "right_big_toe",
    "left_smalltoe": "left_small_toe",
    "right_smalltoe": "right_small_toe",
}
# Joints of other skeletons without a canonical counterpart: known, and dropped.
_OTHERS = set(
    """
    head head_bottom upper_neck neck_base thorax spine chest belly naval jaw chin forehead head_center left_foot
    right_foot left_toe right_toe background mouth_left mouth_right mouth left_eye_inner left_eye_outer
    right_eye_inner right_eye_outer
    """.split()
)
_HAND = re.compile(
    r"^(left_|right_)?(hand|palm|thumb|index|middle|ring|pinky|forefinger|middle_finger|ring_finger|pinky_finger|"
    r"face|eyebrow|eyelid|lip|clavicle|collar|knuckle|finger).*"
)
_KNOWN = {name for names in JOINT_SETS.values() for name in names} | {*WHOLEBODY133, *HALPE136, *MEDIAPIPE33}


def canonical(name: str) -> str:
    """One spelling: ``LShoulder``, ``left shoulder``, ``l_shoulder`` and ``shoulder_left`` are ``left_shoulder``."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.strip())
    text = re.sub(r"[\s\-.]+", "_", text).lower()
    text = re.sub(
        r"^(l|r|left|right)_?(?=(eye|ear|shoulder|elbow|wrist|hip|knee|ankle|heel|foot|toe|big|small)\w*$)",
        lambda found: {"l": "left_", "r": "right_"}[found[1][0]],
        text,
    )
    text = re.sub(r"^(l|r)_(?=\w)", lambda found: {"l": "left_", "r": "right_"}[found[1]], text)
    text = re.sub(r"^(\w+)_(left|right)$", lambda found: f"{found[2]}_{found[1]}", text)
    return _SAME.get(text, text)


def map_names(
    names: Sequence[str],  # as the file spells them
    where: str,  # file name for errors
) -> tuple[tuple[str, ...], tuple[str, ...]]:  # canonical names in the file's order; unknown names
    """Map a file's names to canonical ones. A joint without a counterpart keeps a unique name.

    Some names mean different joints in different sets: Human3.6M's foot is an ankle, its and MPII's thorax the middle
    of the shoulders, Halpe's head is its top and its hip the middle of the hips.

    Raises:
        UserError: fewer than three body joints, or a duplicate.
    """
    found = [canonical(str(name)) for name in names]
    there = set(found)
    if "left_ankle" not in there and {"left_foot", "left_knee"} <= there:
        found = [re.sub("^(left|right)_foot$", r"\1_ankle", name) for name in found]
    if "neck" not in there:
        found = ["neck" if name == "thorax" else name for name in found]
    if {"neck", "hip", "left_big_toe"} <= there:
        found = [{"head": "top_head", "hip": "mid_hip"}.get(name, name) for name in found]
    known = [name for name in found if name in HALPE26]
    listed = ", ".join(map(str, names[:6])) + (", ..." if len(names) > 6 else "")
    if len(known) < LEAST_KNOWN:
        raise UserError(
            f"{where}: joint names {listed} are not known: no joints of a body; known are {', '.join(HALPE26)}"
        )
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two of its joints are {twice!r}; correct the list of names")
    unknown = tuple(
        str(given)
        for given, name in zip(names, found, strict=True)
        if name not in _KNOWN and name not in _OTHERS and not _HAND.match(name)
    )
    return tuple(found), unknown
