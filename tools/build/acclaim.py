"""Acclaim motion capture: ASF skeletons, AMC motions, and their forward kinematics.

An ASF bone b has a rest direction, a length and an axis frame C_b; an AMC frame gives its rotation L_b in that frame,
so W_b = W_parent · C_b · L_b · C_b⁻¹ maps the rest pose to the posed world (J. Lander, Game Developer, January 1998).
World: y up; a performer without rotation faces +z, with the left side at +x, as in SMPL's canonical frame.
"""

from __future__ import annotations

import dataclasses
import itertools
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hmdiff.errors import UserError

Array = NDArray[np.float64]
_AXES = {"rx": 0, "ry": 1, "rz": 2}


@dataclasses.dataclass(frozen=True)
class Bone:
    parent: str | None  # None: the root
    offset: Array  # (3,) from the bone's start to its end at rest, in the file's unit
    frame: Array  # (3, 3) C: the bone's rotation axes at rest, as columns
    dofs: tuple[str, ...]  # degrees of freedom in the order of an AMC line's values


@dataclasses.dataclass(frozen=True)
class AcclaimSkeleton:
    bones: dict[str, Bone]  # parents before children; the first is "root"
    radians_per_unit: float


def euler_matrix(
    angles: Array,  # (..., 3) radians about x, y, z
) -> Array:  # (..., 3, 3) Rz · Ry · Rx: rotation about x first, the 'XYZ' order of Acclaim
    """Rotation about fixed axes: x, then y, then z."""
    (sx, sy, sz), (cx, cy, cz) = np.moveaxis(np.sin(angles), -1, 0), np.moveaxis(np.cos(angles), -1, 0)
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def parse_asf(text: str, name: str = "ASF") -> AcclaimSkeleton:
    """Parse an ASF skeleton. Raises `UserError` naming the file if it is malformed."""
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
    """Parse an AMC motion: rotations of every bone. Raises `UserError` for missing lines or another skeleton."""
    lines = [line.split() for line in text.splitlines()]
    lines = [words for words in lines if words and words[0][0] not in "#:"]
    starts = [index for index, words in enumerate(lines) if len(words) == 1 and words[0].isdigit()]
    if not starts:
        raise UserError(f"{name}: no numbered frame, so not an AMC motion; give a file of mocap.cs.cmu.edu")
    height = (starts[1] if len(starts) > 1 else len(lines)) - starts[0]
    if len(lines) != height * len(starts) or any(b - a != height for a, b in itertools.pairwise(starts)):
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
            raise UserError(f"{name}: bone {bone!r} has {values.shape[1]} numbers, its skeleton expects {len(dofs)}")
        full = np.zeros((len(values), 3))
        for index, dof in enumerate(dofs):
            if dof in _AXES:
                full[:, _AXES[dof]] = values[:, index] * skeleton.radians_per_unit
        angles[bone] = full
    return angles


def world_rotations(
    skeleton: AcclaimSkeleton,
    angles: dict[str, Array],  # bone -> (F, 3) radians; missing bones stay at rest
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
    world: dict[str, Array],  # from `world_rotations`
) -> dict[str, Array]:  # bone -> (F, 3) end position, in the file's unit, relative to the root
    """Forward kinematics of the positions."""
    ends: dict[str, Array] = {}
    for name, bone in skeleton.bones.items():
        start = ends[bone.parent] if bone.parent is not None else 0.0
        ends[name] = start + world[name] @ bone.offset
    return ends


def read_recordings(
    source: str | Path,  # folder or tar archive with NN.asf and NN_MM.amc files, anywhere inside
) -> Iterator[tuple[str, AcclaimSkeleton, dict[str, Array]]]:  # name 'NN_MM', skeleton, angles of `parse_amc`
    """Every recording of a folder or archive, with the skeleton of its subject, ordered by name.

    Raises:
        UserError: the source is missing, damaged or without recordings, or a recording has no skeleton.
    """
    texts = _texts(Path(source))
    skeletons = {Path(name).stem: parse_asf(texts[name], name) for name in texts if name.lower().endswith(".asf")}
    motions = sorted((Path(name).stem, name) for name in texts if name.lower().endswith(".amc"))
    if not motions:
        raise UserError(f"{source}: no .amc recording inside; give a folder or archive of mocap.cs.cmu.edu")
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
            streams = {member.name: archive.extractfile(member) for member in members}
            return {name: stream.read().decode(errors="replace") for name, stream in streams.items() if stream}
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(f"{source}: not a readable tar archive ({error}); download it again") from None
