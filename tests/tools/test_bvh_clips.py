"""Clips of a BVH skeleton: row-vector convention, hinges, and retargeting of bent limbs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hmdiff.body.anatomy import rotations_to_angles
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from tools.build.bvh_clips import read_clips
from tools.build.mocap import joint_positions, retarget

# name, parent, offset in millimetres: the archive's skeleton, rounded
JOINTS = [
    ("Hips", -1, (0, 0, 0)),
    ("LHipJoint", 0, (0, 0, 0)),
    ("LeftUpLeg", 1, (116, -126, 44)),
    ("LeftLeg", 2, (182, -500, 0)),
    ("LeftFoot", 3, (174, -479, 0)),
    ("LeftToeBase", 4, (14, -38, 150)),
    ("LeftToeEnd", 5, (0, 0, 78)),
    ("RHipJoint", 0, (0, 0, 0)),
    ("RightUpLeg", 7, (-116, -126, 44)),
    ("RightLeg", 8, (-182, -500, 0)),
    ("RightFoot", 9, (-174, -479, 0)),
    ("RightToeBase", 10, (-14, -38, 150)),
    ("RightToeEnd", 11, (0, 0, 78)),
    ("LowerBack", 0, (0, 0, 0)),
    ("Spine", 13, (0, 144, -10)),
    ("Spine1", 14, (0, 145, -4)),
    ("Neck", 15, (0, 0, 0)),
    ("Neck1", 16, (0, 110, 10)),
    ("Head", 17, (0, 109, -7)),
    ("HeadEnd", 18, (0, 114, -4)),
    ("LeftShoulder", 15, (0, 0, 0)),
    ("LeftArm", 20, (248, 63, -12)),
    ("LeftForeArm", 21, (341, 0, 0)),
    ("LeftHand", 22, (235, 0, 0)),
    ("LeftFingerBase", 23, (0, 0, 0)),
    ("LeftHandIndex1", 24, (46, 0, 0)),
    ("RightShoulder", 15, (0, 0, 0)),
    ("RightArm", 26, (-248, 63, -12)),
    ("RightForeArm", 27, (-341, 0, 0)),
    ("RightHand", 28, (-235, 0, 0)),
    ("RightFingerBase", 29, (0, 0, 0)),
    ("RightHandIndex1", 30, (-46, 0, 0)),
]
NAMES = [name for name, _, _ in JOINTS]
COS, SIN = np.cos(np.radians(20)), np.sin(np.radians(20))


def archive(folder: Path, **angles: tuple[float, float, float]) -> Path:  # joint -> axis-angle of the second frame
    clip = np.zeros((2, len(JOINTS), 3))
    for name, value in angles.items():
        clip[1, NAMES.index(name)] = value
    np.savez(
        folder / "clips.npz",
        names=np.array(NAMES),
        parents=np.array([parent for _, parent, _ in JOINTS]),
        offsets=np.array([offset for _, _, offset in JOINTS], float),
        clip_bent=clip.astype(np.float16),
    )
    return folder / "clips.npz"


def angles(path: Path) -> dict[str, list[float]]:  # second frame, degrees
    ((_, skeleton, world),) = read_clips(path)
    found = rotations_to_angles(torch.from_numpy(retarget(skeleton, world)[1:]).float())[0] * 180 / np.pi
    return dict(zip(SMPL24, found.round(decimals=1).tolist(), strict=True))


def test_rest_is_a_t_pose_with_legs_apart(tmp_path: Path) -> None:
    ((name, skeleton, world),) = read_clips(archive(tmp_path))
    assert name == "bent"
    joints, _ = joint_positions(retarget(skeleton, world)[:1])
    at = {joint: joints[0, SMPL24.index(joint)] for joint in SMPL24}
    for side, sign in (("left", 1), ("right", -1)):
        leg = at[f"{side}_ankle"] - at[f"{side}_hip"]
        assert np.degrees(np.arctan2(sign * leg[0], -leg[1])) == pytest.approx(20, abs=1.0)
        arm = at[f"{side}_wrist"] - at[f"{side}_shoulder"]
        assert sign * arm[0] / np.linalg.norm(arm) > 0.999


def test_a_bent_knee_and_elbow_are_flexions_alone(tmp_path: Path) -> None:
    """The row-vector convention rotates by minus the angle in the file."""
    bent = {
        "LeftLeg": (-1.0 * COS, -1.0 * SIN, 0.0),
        "RightForeArm": (0.0, -0.8 * 0.866, 0.8 * 0.5),
        "LeftForeArm": (0.0, 0.4 * 0.866, -0.4 * 0.5),
    }
    found = angles(archive(tmp_path, **bent))  # type: ignore[arg-type]
    assert found["left_knee"][0] == pytest.approx(57.3, abs=0.5)
    assert np.abs(found["left_knee"][1:]).max() < 1.0 and np.abs(found["right_knee"]).max() < 0.5
    for side, degrees in (("left", 22.9), ("right", 45.8)):
        elbow = np.abs(found[f"{side}_elbow"])
        assert elbow[0] == pytest.approx(degrees, abs=0.5) and elbow[1:].max() < 1.0  # no twist of the forearm
        assert np.abs(found[f"{side}_wrist"][1:]).max() < 1.0  # our hand slopes by 6 degrees, a flexion


def test_archives_of_another_layout_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", names=np.array(["Hips"]), clip_a=np.zeros((1, 1, 3)))
    with pytest.raises(UserError, match="no clips of the 38-joint BVH skeleton"):
        list(read_clips(tmp_path / "other.npz"))
