"""Acclaim motion capture (ASF skeleton, AMC motion) and its retargeting to the 24 SMPL-named joints.

Format: an ASF bone b has a rest direction, a length and an axis frame C_b; an AMC frame gives its rotation L_b in that
frame, so W_b = W_parent · C_b · L_b · C_b⁻¹ takes the rest pose to the posed world (J. Lander, Game Developer, January
1998). World: y up, the performer facing +z with the left at +x when nothing is rotated, as SMPL's canonical frame.

Retargeting is our choice: the ASF rest pose (legs spread by 20 degrees, elbows' hinge turned by 30) is not a T-pose, so
each SMPL joint takes a bone's W_b · A_b, where A_b turns the T-pose's (bone direction, hinge axis) to the bone's.
"""

from __future__ import annotations

import dataclasses
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hmdiff.data.anatomy import angles_to_rotations, scapular_rhythm
from hmdiff.data.collision import OFFSETS
from hmdiff.errors import UserError
from hmdiff.skeletons import SMPL24, SMPL24_PARENTS

Array = NDArray[np.float64]
_AXES = {"rx": 0, "ry": 1, "rz": 2}
MAX_SPEED = 25.0  # degrees per recorded frame (120 Hz): no joint of a person turns at 3,000 degrees a second


@dataclasses.dataclass(frozen=True)
class Bone:
    parent: str | None  # None: the root
    offset: Array  # (3,) from the bone's start to its end at rest, in the file's unit
    frame: Array  # (3, 3) C: the bone's rotation axes at rest, as columns
    dofs: tuple[str, ...]  # names of the numbers an AMC line carries, in order


@dataclasses.dataclass(frozen=True)
class AcclaimSkeleton:
    bones: dict[str, Bone]  # parents before children; the first is "root"
    radians_per_unit: float


def euler_matrix(
    angles: Array,  # (..., 3) radians about x, y, z
) -> Array:  # (..., 3, 3) Rz · Ry · Rx: turned about x first, the 'XYZ' of Acclaim
    """Rotation about fixed axes, x then y then z."""
    (sx, sy, sz), (cx, cy, cz) = np.moveaxis(np.sin(angles), -1, 0), np.moveaxis(np.cos(angles), -1, 0)
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def parse_asf(text: str, name: str = "ASF") -> AcclaimSkeleton:
    """Read an ASF skeleton. Raises `UserError`, naming the file, when it is not one that can be read."""
    sections: dict[str, list[list[str]]] = {}
    current: list[list[str]] = []
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if words and words[0].startswith(":"):
            current = sections.setdefault(words[0][1:].lower(), [])
            words = []
        if words:
            current.append(words)
    missing = [key for key in ("root", "bonedata", "hierarchy") if key not in sections]
    if missing:
        raise UserError(f"{name}: no section ':{missing[0]}', so not an ASF skeleton; give a file of mocap.cs.cmu.edu")

    degrees = not any(words[0] == "angle" and words[1:] == ["rad"] for words in sections.get("units", []))
    unit = np.pi / 180 if degrees else 1.0
    try:
        read = _read_bones(sections["bonedata"], unit, name)
        root = {words[0].lower(): words[1:] for words in sections["root"]}
        _require_xyz(root.get("axis", ["XYZ"])[-1], "root", name)
        order = tuple(word.lower() for word in root["order"])
        orientation = euler_matrix(np.array([float(word) for word in root.get("orientation", ["0"] * 3)]) * unit)
        bones = {"root": Bone(None, np.zeros(3), orientation, order)}
        links = [words for words in sections["hierarchy"] if words[0] not in ("begin", "end")]
        for parent, *children in links:
            if parent not in bones:
                raise UserError(f"{name}: bone {parent!r} has children before it has a parent; sort ':hierarchy'")
            bones |= {child: dataclasses.replace(read[child], parent=parent) for child in children}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{name}: broken ASF skeleton near {error}; download it again") from None
    return AcclaimSkeleton(bones, unit)


def _read_bones(lines: list[list[str]], unit: float, name: str) -> dict[str, Bone]:
    bones: dict[str, Bone] = {}
    block: dict[str, list[str]] = {}
    for words in lines:
        if words[0] == "begin":
            block = {}
        elif words[0] == "end":
            _require_xyz(block["axis"][3], block["name"][0], name)
            direction = np.array([float(word) for word in block["direction"]])
            frame = euler_matrix(np.array([float(word) for word in block["axis"][:3]]) * unit)
            dofs = tuple(word.lower() for word in block.get("dof", []))
            bones[block["name"][0]] = Bone("root", direction * float(block["length"][0]), frame, dofs)
        else:
            block[words[0]] = words[1:]
    return bones


def _require_xyz(order: str, bone: str, name: str) -> None:
    if order.upper() != "XYZ":
        raise UserError(f"{name}: bone {bone!r} has axis order {order}, expected XYZ; only that of CMU's files is read")


def parse_amc(
    text: str, skeleton: AcclaimSkeleton, name: str = "AMC"
) -> dict[str, Array]:  # bone -> (F, 3) radians about x, y, z
    """Read an AMC motion: rotations of every bone. Raises `UserError` when lines are missing or not of this skeleton."""
    lines = [line.split() for line in text.splitlines()]
    lines = [words for words in lines if words and words[0][0] not in "#:"]
    starts = [index for index, words in enumerate(lines) if len(words) == 1 and words[0].isdigit()]
    if not starts:
        raise UserError(f"{name}: no numbered frame, so not an AMC motion; give a file of mocap.cs.cmu.edu")
    height = (starts[1] if len(starts) > 1 else len(lines)) - starts[0]
    if len(lines) != height * len(starts) or any(b - a != height for a, b in zip(starts, starts[1:], strict=False)):
        raise UserError(f"{name}: frames of different length, the file is cut or damaged; download it again")

    names = [words[0] for words in lines[1:height]]
    angles = {}
    for position, bone in enumerate(names, start=1):
        if bone not in skeleton.bones:
            raise UserError(f"{name}: bone {bone!r} is not in the skeleton; pair it with the ASF of its own subject")
        column = [words[1:] for words in lines[position::height]]
        try:
            values = np.array(column, dtype=np.float64)
        except ValueError:
            raise UserError(f"{name}: bone {bone!r} has a frame with broken numbers; download it again") from None
        dofs = skeleton.bones[bone].dofs
        if values.shape[1] != len(dofs):
            raise UserError(f"{name}: bone {bone!r} has {values.shape[1]} numbers, expected {len(dofs)} by the skeleton")
        full = np.zeros((len(values), 3))
        for index, dof in enumerate(dofs):
            if dof in _AXES:
                full[:, _AXES[dof]] = values[:, index] * skeleton.radians_per_unit
        angles[bone] = full
    return angles


def world_rotations(
    skeleton: AcclaimSkeleton,
    angles: dict[str, Array],  # bone -> (F, 3) radians; a bone that is absent stays at rest
) -> dict[str, Array]:  # bone -> (F, 3, 3) W: from the rest pose to the posed world
    """Forward kinematics of the orientations."""
    frames = len(next(iter(angles.values())))
    world: dict[str, Array] = {}
    for name, bone in skeleton.bones.items():
        local = bone.frame @ euler_matrix(angles.get(name, np.zeros((frames, 3)))) @ bone.frame.T
        world[name] = local if bone.parent is None else world[bone.parent] @ local
    return world


def bone_ends(
    skeleton: AcclaimSkeleton,
    world: dict[str, Array],  # of `world_rotations`
) -> dict[str, Array]:  # bone -> (F, 3) where it ends, the file's unit, relative to the root
    """Forward kinematics of the positions."""
    ends: dict[str, Array] = {}
    for name, bone in skeleton.bones.items():
        start = ends[bone.parent] if bone.parent is not None else 0.0
        ends[name] = start + world[name] @ bone.offset
    return ends


# ----------------------------------------------------------------------------------------------- retargeting

MEAN_OFFSETS: Array = OFFSETS.double().numpy()  # (24, 3) metres, from parent to joint in the T-pose

# SMPL joint -> ASF bone whose orientation it takes. The wrist takes the hand's, hands and the neck are made below.
_SOURCE = {
    "pelvis": "root", "spine1": "lowerback", "spine2": "upperback", "spine3": "thorax", "head": "head",
    "left_hip": "lfemur", "left_knee": "ltibia", "left_ankle": "lfoot", "left_foot": "ltoes", "left_collar": "lclavicle",
    "left_shoulder": "lhumerus", "left_elbow": "lradius", "left_wrist": "lhand", "right_hip": "rfemur",
    "right_knee": "rtibia", "right_ankle": "rfoot", "right_foot": "rtoes", "right_collar": "rclavicle",
    "right_shoulder": "rhumerus", "right_elbow": "rradius", "right_wrist": "rhand",
}  # fmt: skip
# Joints whose bone (joint -> child) must point as the ASF bone does. The others (pelvis, spine, neck, collars, feet)
# correspond at rest instead: there the two rest poses are the same posture, but the joints are not the same points.
DIRECTED = {
    "left_hip": "left_knee", "right_hip": "right_knee", "left_knee": "left_ankle", "right_knee": "right_ankle",
    "left_shoulder": "left_elbow", "right_shoulder": "right_elbow", "left_elbow": "left_wrist",
    "right_elbow": "right_wrist", "left_wrist": "left_hand", "right_wrist": "right_hand",
}  # fmt: skip


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
    """The constant turn of every joint between the two rest poses."""
    alignment = {}
    for joint, source in _SOURCE.items():
        bone = skeleton.bones[source]
        if joint in DIRECTED:
            hinge = bone.frame[:, 0]
            child = offsets[SMPL24.index(DIRECTED[joint])]
            alignment[joint] = _frame(bone.offset, hinge) @ _frame(child, tpose_hinge(joint)).T
        elif joint.endswith(("ankle", "foot")):
            # Soles are flat in both rest poses: only the spread of the leg above is taken along, which is the frame's
            # turn about z, whatever the slope of the line from the ankle to the ball of the foot.
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
    """Local rotations that give a T-pose body the pose of the recording."""
    alignment = rest_alignment(skeleton, offsets)
    glob = {joint: world[bone] @ alignment[joint] for joint, bone in _SOURCE.items()}
    # Three ASF neck bones, one SMPL neck: the middle of the lower two.
    glob["neck"] = halfway(world["lowerneck"], world["upperneck"])
    for side in ("left", "right"):
        # The ASF forearm twists at its lower half alone. Skin does not: half of the twist is the elbow's, half the wrist's.
        elbow, wrist = f"{side}_elbow", f"{side}_wrist"
        axis = offsets[SMPL24.index(wrist)]
        twist = _twist_angle(np.swapaxes(glob[elbow], -1, -2) @ glob[wrist], axis)
        glob[elbow] = glob[elbow] @ _axis_rotation(axis, twist / 2)
        glob[f"{side}_hand"] = glob[wrist]
        # The recordings at hand hold the clavicles still; a raised arm without its shoulder blade tears the skin.
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
    # The twist part of the quaternion (w, v): 2 atan2(v · axis, w), both over the same positive factor.
    axis = axis / np.linalg.norm(axis)
    sine = np.stack([rotation[:, 2, 1] - rotation[:, 1, 2], rotation[:, 0, 2] - rotation[:, 2, 0],
                     rotation[:, 1, 0] - rotation[:, 0, 1]], -1) @ axis  # fmt: skip
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
    glob, joints = local.copy(), np.zeros(local.shape[:2] + (3,))
    for joint, parent in enumerate(SMPL24_PARENTS):
        if parent >= 0:
            glob[:, joint] = glob[:, parent] @ local[:, joint]
            joints[:, joint] = joints[:, parent] + glob[:, parent] @ offsets[joint]
    return joints, glob


def direction_error(
    skeleton: AcclaimSkeleton,
    world: dict[str, Array],
    local: Array,  # (F, 24, 3, 3) of `retarget`
    offsets: Array = MEAN_OFFSETS,
) -> dict[str, float]:  # degrees, mean over frames; by limb, and 'trunk' for the line from pelvis to neck
    """How far the retargeted bones point from the recorded ones."""
    joints, _ = joint_positions(local, offsets)
    ends = bone_ends(skeleton, world)
    pairs = {joint: (world[_SOURCE[joint]] @ skeleton.bones[_SOURCE[joint]].offset,
                     joints[:, SMPL24.index(child)] - joints[:, SMPL24.index(joint)])
             for joint, child in DIRECTED.items()}  # fmt: skip
    pairs["trunk"] = (ends["thorax"], joints[:, SMPL24.index("neck")])
    pairs["neck"] = (ends["upperneck"] - ends["thorax"], joints[:, SMPL24.index("head")] - joints[:, SMPL24.index("neck")])
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
) -> NDArray[np.bool_]:  # (F,)
    """Frames beside a jump that no body makes, or with a number that is not finite."""
    bad = ~np.isfinite(local).all((1, 2, 3))
    step = np.swapaxes(local[:-1], -1, -2) @ local[1:]
    cosine = (np.trace(step, axis1=-2, axis2=-1) - 1) / 2
    jump = (np.degrees(np.arccos(np.clip(cosine, -1, 1))) > MAX_SPEED).any(-1)
    bad[1:] |= jump
    bad[:-1] |= jump
    return bad


def read_recordings(
    source: str | Path,  # folder or tar archive with NN.asf and NN_MM.amc files, anywhere inside
) -> Iterator[tuple[str, AcclaimSkeleton, dict[str, Array]]]:  # name 'NN_MM', skeleton, angles of `parse_amc`
    """Every recording of a folder or archive, with the skeleton of its subject, in the order of the names.

    Raises:
        UserError: the source is missing, damaged or holds no recording, or a recording lacks its skeleton.
    """
    texts = _texts(Path(source))
    skeletons = {Path(name).stem: parse_asf(text, name) for name, text in texts.items() if name.lower().endswith(".asf")}
    motions = sorted((Path(name).stem, name) for name in texts if name.lower().endswith(".amc"))
    if not motions:
        raise UserError(f"{source}: no .amc recording inside; give the folder or archive of mocap.cs.cmu.edu's subjects")
    for stem, name in motions:
        subject = stem.split("_")[0]
        if subject not in skeletons:
            raise UserError(f"{name}: its skeleton {subject}.asf is not in {source}; put it beside the recording")
        yield stem, skeletons[subject], parse_amc(texts[name], skeletons[subject], name)


def _texts(source: Path) -> dict[str, str]:
    if source.is_dir():
        paths = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in (".asf", ".amc")]
        return {str(path): path.read_text(errors="replace") for path in paths}
    if not source.exists():
        raise UserError(f"{source}: not there; give the folder or tar archive of ASF and AMC files")
    try:
        with tarfile.open(source) as archive:
            members = [m for m in archive if m.isfile() and m.name.lower().endswith((".asf", ".amc"))]
            return {m.name: io.TextIOWrapper(archive.extractfile(m), errors="replace").read() for m in members}  # type: ignore[arg-type]
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(f"{source}: not a readable tar archive ({error}); download it again") from None
