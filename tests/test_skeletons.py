"""Joint sets: counts, unique names, left-right pairs, and maps that go by name."""

from __future__ import annotations

import re

import pytest

from hmdiff import skeletons as s


@pytest.mark.parametrize("name", s.JOINT_SETS)
def test_sets_hold_as_many_unique_names_as_they_say(name: str) -> None:
    joints = s.JOINT_SETS[name]
    assert len(set(joints)) == len(joints) == int(re.findall(r"\d+$", name)[0])


@pytest.mark.parametrize("name", s.JOINT_SETS)
def test_mirroring_twice_is_the_identity_and_swaps_sides(name: str) -> None:
    joints = s.JOINT_SETS[name]
    mirror = s.mirror_permutation(joints)
    assert [mirror[index] for index in mirror] == list(range(len(joints)))
    for index, joint in enumerate(joints):
        other = joints[mirror[index]]
        assert other == joint.replace("left", "#").replace("right", "left").replace("#", "right")


def test_known_indices() -> None:
    """Spelled out from the sources, once: a slip in the order of a tuple would be found nowhere else."""
    assert s.joint_indices(["nose", "left_shoulder", "right_ankle"], s.COCO17) == [0, 5, 16]
    assert s.joint_indices(["neck", "mid_hip", "left_ankle", "right_heel"], s.OPENPOSE25) == [1, 8, 14, 24]
    assert s.joint_indices(["right_hip", "left_ankle", "left_ear"], s.OPENPOSE18) == [8, 13, 17]
    assert s.joint_indices(["left_knee", "head", "left_hand"], s.SMPL24) == [4, 15, 22]
    assert s.joint_indices(["top_head", "neck", "left_big_toe", "left_heel"], s.HALPE26) == [17, 18, 20, 24]
    assert s.HALPE26[:17] == s.COCO17


def test_smpl_tree_is_a_tree_of_the_names() -> None:
    assert len(s.SMPL24_PARENTS) == 24 and s.SMPL24_PARENTS[0] == -1
    assert all(parent < child for child, parent in enumerate(s.SMPL24_PARENTS))  # a parent comes before its children
    tree = {joint: s.SMPL24[parent] for joint, parent in zip(s.SMPL24[1:], s.SMPL24_PARENTS[1:], strict=True)}
    for side in ("left", "right"):
        chain = [f"{side}_{name}" for name in ("hand", "wrist", "elbow", "shoulder", "collar")]
        assert [tree[joint] for joint in chain] == [*chain[1:], "spine3"]
        chain = [f"{side}_{name}" for name in ("foot", "ankle", "knee", "hip")]
        assert [tree[joint] for joint in chain] == [*chain[1:], "pelvis"]
    assert tree["head"] == "neck" and tree["neck"] == "spine3"


def test_shared_joints_go_by_name() -> None:
    source, target = s.shared_joints(s.OPENPOSE25, s.HALPE26)
    assert [s.OPENPOSE25[i] for i in source] == [s.HALPE26[i] for i in target]
    assert set(s.HALPE26) - {s.HALPE26[i] for i in target} == {"top_head"}
    assert target == sorted(target)
    assert s.shared_joints(("a",), ("b",)) == ([], [])


def test_a_missing_joint_is_named() -> None:
    with pytest.raises(KeyError, match="'jaw' is not among nose, left_eye"):
        s.joint_indices(["nose", "jaw"], s.COCO17)
    with pytest.raises(KeyError, match="'right_eye'"):
        s.mirror_permutation(["left_eye"])
