"""Joint sets: counts, unique names, left-right pairs, and maps by name."""

from __future__ import annotations

import re

import pytest

from hmdiff.body import skeletons as s


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
    """Hard-coded from the sources once: no other test would detect a wrong order in a tuple."""
    assert s.joint_indices(["nose", "left_shoulder", "right_ankle"], s.COCO17) == [0, 5, 16]
    assert s.joint_indices(["neck", "mid_hip", "left_ankle", "right_heel"], s.OPENPOSE25) == [1, 8, 14, 24]
    assert s.joint_indices(["right_hip", "left_ankle", "left_ear"], s.OPENPOSE18) == [8, 13, 17]
    assert s.joint_indices(["left_knee", "head", "left_hand"], s.SMPL24) == [4, 15, 22]
    assert s.joint_indices(["top_head", "neck", "left_big_toe", "left_heel"], s.HALPE26) == [17, 18, 20, 24]
    assert s.HALPE26[:17] == s.COCO17


def test_smpl_tree_is_a_tree_of_the_names() -> None:
    assert len(s.SMPL24_PARENTS) == 24 and s.SMPL24_PARENTS[0] == -1
    assert all(parent < child for child, parent in enumerate(s.SMPL24_PARENTS))  # parents precede their children
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


def test_fourteen_joints_are_found_by_name_in_both_orders_of_human36m() -> None:
    """The published index maps, which are not interchangeable, are reproduced by name."""
    assert s.joint_indices(s.J14, s.SPIN_H36M17) == [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]
    assert s.joint_indices(s.J14, s.H36M17) == [3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10]
    assert s.joint_indices(s.H36M14, s.H36M17) == [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    assert s.joint_indices(s.SPIN24_J14, s.SPIN24) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 18]
    # Human3.6M's seventeen joints in SPIN's preprocessing, in the order of its regressor.
    order = [s.SPIN24_H36M17[i] for i in s.joint_indices(s.SPIN_H36M17, s.H36M17)]
    assert s.joint_indices(order, s.SPIN24) == [14, 3, 4, 5, 2, 1, 0, 16, 12, 17, 18, 9, 10, 11, 8, 7, 6]


def test_smplx_and_mano_joints_are_smplx_s_own() -> None:
    names = pytest.importorskip("smplx.joint_names").JOINT_NAMES
    tips = {
        f"{side}_{finger}": f"{side}_{finger}4"
        for side in ("left", "right")
        for finger in ("thumb", "index", "middle", "ring", "pinky")
    }
    assert s.SMPLX76 == tuple(tips.get(name, name) for name in names[:76])
    assert s.SMPLX76[:55] == s.SMPLX55
    assert tuple(f"right_{name}" for name in s.MANO16[1:]) == s.SMPLX55[40:]
    assert set(s.MANO16) < set(s.HAND21)
