"""Acclaim files: parsing, kinematics computed by hand, retargeting; and real recordings if available."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hmdiff.body.anatomy import rotations_to_angles
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from tools.build import acclaim, mocap

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "mocap" / "cmu_asfamc_subjects_01-03.tar.xz"

TINY_ASF = """
:version 1.10
:units
  mass 1.0
  length 0.45
  angle deg
:root
  order TX TY TZ RX RY RZ
  axis XYZ
  position 0 0 0
  orientation 0 0 0
:bonedata
  begin
    id 1
    name thigh
    direction 0 -1 0
    length 2
    axis 0 0 0 XYZ
    dof rx ry rz
  end
  begin
    id 2
    name shank
    direction 0 -1 0
    length 1
    axis 0 90 0 XYZ   # the shank's own x axis is the world's -z
    dof rx
  end
:hierarchy
  begin
    root thigh
    thigh shank
  end
"""
TINY_AMC = """#!OML:ASF
:FULLY-SPECIFIED
:DEGREES
1
root 0 0 0 0 0 0
thigh 0 0 0
shank 90
2
root 5 6 7 0 90 0
thigh -90 0 0
shank 0
"""


def test_kinematics_of_a_tiny_skeleton_by_hand():
    skeleton = acclaim.parse_asf(TINY_ASF)
    world = acclaim.world_rotations(skeleton, acclaim.parse_amc(TINY_AMC, skeleton))
    ends = acclaim.bone_ends(skeleton, world)
    # Frame 1: the shank rotates by 90 degrees about -z, so (0, -1, 0) goes to (-1, 0, 0).
    np.testing.assert_allclose(ends["thigh"][0], [0, -2, 0], atol=1e-12)
    np.testing.assert_allclose(ends["shank"][0], [-1, -2, 0], atol=1e-12)
    # Frame 2: the thigh is lifted to +z by -90 about x, then the root's 90 about y takes +z to +x.
    np.testing.assert_allclose(ends["thigh"][1], [2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(ends["shank"][1], [3, 0, 0], atol=1e-12)


def test_euler_matrix_turns_about_x_first():
    angles = np.radians([[30.0, 40.0, 50.0]])

    def single(axis: int) -> np.ndarray:
        alone = np.zeros((1, 3))
        alone[:, axis] = angles[:, axis]
        return acclaim.euler_matrix(alone)

    np.testing.assert_allclose(acclaim.euler_matrix(angles), single(2) @ single(1) @ single(0), atol=1e-12)
    quarter = acclaim.euler_matrix(np.array([math.pi / 2, 0, 0]))
    np.testing.assert_allclose(quarter @ [0, 1, 0], [0, 0, 1], atol=1e-12)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (TINY_AMC.replace("shank 90", "shank"), "numbers"),
        (TINY_AMC.replace("shank 0", "shank zero"), "broken numbers"),
        (TINY_AMC.replace("shank 0\n", ""), "different length"),
        (TINY_AMC.replace("thigh", "tail"), "'tail' is not in the skeleton"),
        ("hello", "no numbered frame"),
    ],
)
def test_broken_motions_are_named(broken, message):
    with pytest.raises(UserError, match=message) as error:
        acclaim.parse_amc(broken, acclaim.parse_asf(TINY_ASF), "walk.amc")
    assert "walk.amc" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("solid cube", "no section"),
        (TINY_ASF.replace("XYZ   #", "ZYX   #"), "axis order ZYX"),
        (TINY_ASF.replace("length 2", "length two"), "broken ASF"),
        (TINY_ASF.replace("name shank", "name shin"), "broken ASF"),
    ],
)
def test_broken_skeletons_are_named(broken, message):
    with pytest.raises(UserError, match=message):
        acclaim.parse_asf(broken, "01.asf")


def test_sources_without_recordings_are_refused(tmp_path):
    with pytest.raises(UserError, match="not there"):
        list(acclaim.read_recordings(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no \.amc"):
        list(acclaim.read_recordings(tmp_path))
    (tmp_path / "cut.tar.xz").write_bytes(b"\xfd7zXZ\x00 and no more")
    with pytest.raises(UserError, match="not a readable"):
        list(acclaim.read_recordings(tmp_path / "cut.tar.xz"))
    (tmp_path / "07_01.amc").write_text(TINY_AMC)
    with pytest.raises(UserError, match=r"07\.asf"):
        list(acclaim.read_recordings(tmp_path))


def test_a_folder_is_read(tmp_path):
    (tmp_path / "07.asf").write_text(TINY_ASF)
    (tmp_path / "07_01.amc").write_text(TINY_AMC)
    ((name, skeleton, angles),) = acclaim.read_recordings(tmp_path)
    assert name == "07_01" and set(skeleton.bones) == {"root", "thigh", "shank"}
    assert angles["shank"].shape == (2, 3)


def cmu_like_skeleton() -> acclaim.AcclaimSkeleton:
    """The bones, rest directions and axes of CMU's skeletons, with our own lengths."""
    leg, arm = (0.342, -0.94, 0.0), (1.0, 0.0, 0.0)
    bones = {
        "lhipjoint": ("root", (0.66, -0.71, 0.25), (0, 0, 0)),
        "lfemur": ("lhipjoint", leg, (0, 0, 20)),
        "ltibia": ("lfemur", leg, (0, 0, 20)),
        "lfoot": ("ltibia", (0.09, -0.24, 0.97), (-90, 0, 20)),
        "ltoes": ("lfoot", (0, 0, 1), (-90, 0, 20)),
        "lowerback": ("root", (0, 1, 0), (0, 0, 0)),
        "upperback": ("lowerback", (0, 1, 0), (0, 0, 0)),
        "thorax": ("upperback", (0, 1, 0), (0, 0, 0)),
        "lowerneck": ("thorax", (0, 1, 0.1), (0, 0, 0)),
        "upperneck": ("lowerneck", (0, 1, 0), (0, 0, 0)),
        "head": ("upperneck", (0, 1, 0), (0, 0, 0)),
        "lclavicle": ("thorax", (0.97, 0.25, 0), (0, 0, 0)),
        "lhumerus": ("lclavicle", arm, (180, -30, -90)),
        "lradius": ("lhumerus", arm, (180, -30, -90)),
        "lwrist": ("lradius", arm, (0, 90, 90)),
        "lhand": ("lwrist", arm, (0, 90, 90)),
    }
    for name, (parent, direction, axis) in list(bones.items()):
        if name[0] == "l" and not name.startswith("lower"):
            above = parent if parent in ("root", "thorax") else "r" + parent[1:]
            bones["r" + name[1:]] = (above, (-direction[0], *direction[1:]), (axis[0], -axis[1], -axis[2]))
    made = {"root": acclaim.Bone(None, np.zeros(3), np.eye(3), ())}
    for name, (parent, direction, axis) in bones.items():
        made[name] = acclaim.Bone(parent, 2.0 * np.array(direction), acclaim.euler_matrix(np.radians(axis)), ())
    return acclaim.AcclaimSkeleton(made, np.pi / 180)


def retargeted(degrees: dict[str, tuple[float, float, float]]) -> torch.Tensor:  # (24, 3) anatomical angles, degrees
    skeleton = cmu_like_skeleton()
    angles = {name: np.zeros((1, 3)) for name in skeleton.bones}
    angles |= {name: np.radians([values]) for name, values in degrees.items()}
    local = mocap.retarget(skeleton, acclaim.world_rotations(skeleton, angles))
    return torch.rad2deg(rotations_to_angles(torch.from_numpy(local)))[0]


def test_limbs_point_as_recorded():
    skeleton = cmu_like_skeleton()
    random = np.random.default_rng(0)
    angles = {name: random.normal(0, 0.5, (20, 3)) for name in skeleton.bones}
    world = acclaim.world_rotations(skeleton, angles)
    local = mocap.retarget(skeleton, world)
    np.testing.assert_allclose(local @ local.swapaxes(-1, -2), np.broadcast_to(np.eye(3), local.shape), atol=1e-9)
    error = mocap.direction_error(skeleton, world, local)
    assert max(error[limb] for limb in mocap.DIRECTED) < 1e-5
    # The same pose points the same way on a body of other proportions.
    offsets = mocap.MEAN_OFFSETS + random.normal(0, 0.02, (24, 3))
    error = mocap.direction_error(skeleton, world, mocap.retarget(skeleton, world, offsets), offsets)
    assert max(error[limb] for limb in mocap.DIRECTED) < 1e-5


def test_known_poses_come_out_in_anatomical_terms():
    index = {name: number for number, name in enumerate(SMPL24)}
    rest = retargeted({})
    for side in ("left", "right"):  # CMU's rest pose has the legs 20 degrees apart
        torch.testing.assert_close(rest[index[f"{side}_hip"]], torch.tensor([0.0, 20, 0]).double(), atol=0.1, rtol=0)
    bent = retargeted({"ltibia": (70, 0, 0), "rradius": (50, 0, 0), "lhand": (40, 0, 0), "head": (0, 25, 0)})
    assert bent[index["left_knee"], 0] == pytest.approx(70, abs=0.01)
    assert bent[index["right_elbow"], 0] == pytest.approx(50, abs=0.01)
    assert bent[index["left_wrist"], 1] == pytest.approx(-40, abs=0.1)  # the palm folds down
    assert bent[index["head"], 2] == pytest.approx(25, abs=0.01)
    # The recordings' clavicles never move: hanging arms leave the collars, raised arms move them.
    assert bent[index["left_collar"], 1] == pytest.approx(12, abs=0.5)


def test_bad_frames_are_those_beside_a_jump():
    local = np.broadcast_to(np.eye(3), (10, 24, 3, 3)).copy()
    local[6:, 4] = acclaim.euler_matrix(np.radians([40.0, 0, 0]))
    local[2, 0, 0, 0] = np.nan
    assert np.flatnonzero(mocap.bad_frames(local)).tolist() == [2, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(not RECORDINGS.exists(), reason="the motion capture recordings are not on this machine")
def test_a_recording_keeps_its_directions():
    name, skeleton, angles = next(acclaim.read_recordings(RECORDINGS))
    angles = {bone: values[::100] for bone, values in angles.items()}
    world = acclaim.world_rotations(skeleton, angles)
    error = mocap.direction_error(skeleton, world, mocap.retarget(skeleton, world))
    assert name == "01_01"
    assert max(error[limb] for limb in mocap.DIRECTED) < 1e-5
    assert error["trunk"] < 8
