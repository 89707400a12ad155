"""Export of posed, skinned bodies for animation software: glTF (GLB), BVH, and npz of SMPL parameters.

Files are y up, the convention of animation software: the camera frame after half a turn about x, camera at the origin.
One set of betas shapes the mesh and skeleton of a file; a clip holds poses and positions of that body. glTF uses linear
blend skinning, so the free body is exported exactly; SMPL's pose blend shapes cannot be stored in a GLB or BVH.
Symbols: F frames, J joints, V vertices, B shape coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file
from hmdiff.viz.export import HALF_TURN, save_npz

CENTIMETRES = 100.0  # the usual unit of BVH files
_FLOAT, _BYTE, _INDEX = 5126, 5121, 5125  # glTF's component types
_SMPLX_JOINTS, _BODY_JOINTS = 55, 22  # pelvis and the 21 of SMPL-X's body_pose


class Clip(NamedTuple):
    """Poses of one body in the camera frame."""

    pose: Tensor  # (F, J, 3) axis-angles relative to the parent, the root's first
    translation: Tensor  # (F, 3) metres, for `Body.forward`
    frame_rate: float = 30.0  # frames per second


def shared_shape(
    body: Body,
    clip: Clip,
    betas: Tensor,  # (F, B) per frame
    shape: Tensor,  # (B,) e.g. their mean
) -> Clip:
    """Change a clip to a single shape, keeping each frame's root joint in place."""
    root = body.joint_shapedirs[0].to(betas)  # (3, B)
    return clip._replace(translation=clip.translation + (betas - shape) @ root.mT)


def save_animated_glb(
    path: str | Path,
    body: Body,
    clips: Mapping[str, Clip],  # one animation each, in order; nodes rest in the first's first frame
    betas: Tensor,  # (B,)
) -> None:
    """Mesh, skeleton, skin (four bones per vertex) and animations in one binary glTF 2.0.

    Raises:
        UserError: no clip, or a clip whose joints differ from the body's.
    """
    import pygltflib

    if not clips:
        raise UserError(f"{path}: no clip to animate; give at least one")
    for name, clip in clips.items():
        if clip.pose.dim() != 3 or clip.pose.shape[1:] != (body.num_joints, 3) or not len(clip.pose):
            raise UserError(f"clip {name!r}: poses {tuple(clip.pose.shape)}, expected (F, {body.num_joints}, 3)")
    vertices, joints = rest_pose(body, betas)
    assert body.faces is not None
    weights = body.lbs_weights.detach().cpu().numpy()
    chosen = np.argsort(-weights, axis=1, kind="stable")[:, :4]
    strongest = np.take_along_axis(weights, chosen, 1)
    inverse = np.tile(np.eye(4, dtype=np.float32), (body.num_joints, 1, 1))
    inverse[:, :3, 3] = -joints
    blob = _Blob()
    attributes = {
        "POSITION": blob.add(vertices, "VEC3", _FLOAT, target=34962),
        "NORMAL": blob.add(_normals(vertices, body.faces.cpu().numpy()), "VEC3", _FLOAT, target=34962),
        "JOINTS_0": blob.add(np.where(strongest > 0, chosen, 0).astype(np.uint8), "VEC4", _BYTE, target=34962),
        "WEIGHTS_0": blob.add(strongest / strongest.sum(1, keepdims=True), "VEC4", _FLOAT, target=34962),
    }
    faces = blob.add(body.faces.cpu().numpy().astype(np.uint32).reshape(-1), "SCALAR", _INDEX, target=34963)
    skin = blob.add(inverse.transpose(0, 2, 1).reshape(-1, 16), "MAT4", _FLOAT)  # glTF's matrices are column-major

    animations = [_animation(blob, name, clip, joints[0]) for name, clip in clips.items()]
    turns, places = _nodes_of(next(iter(clips.values())), joints[0])
    offsets = joints - joints[[max(parent, 0) for parent in body.parents]]
    nodes: list[dict[str, Any]] = [
        {
            "name": name,
            "translation": (places[0] if joint == 0 else offsets[joint]).tolist(),
            "rotation": turns[0, joint].tolist(),
            **({"children": below} if (below := [j for j, p in enumerate(body.parents) if p == joint]) else {}),
        }
        for joint, name in enumerate(body.joint_names)
    ]
    nodes.append({"name": "body", "mesh": 0, "skin": 0})
    material = {"baseColorFactor": [0.75, 0.75, 0.78, 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.75}
    document = {
        "asset": {"version": "2.0", "generator": "hmdiff"},
        "scene": 0,
        "scenes": [{"nodes": [0, len(nodes) - 1]}],
        "nodes": nodes,
        "meshes": [{"name": "body", "primitives": [{"attributes": attributes, "indices": faces, "material": 0}]}],
        "materials": [{"name": "skin", "pbrMetallicRoughness": material}],
        "skins": [{"joints": list(range(body.num_joints)), "skeleton": 0, "inverseBindMatrices": skin}],
        "animations": animations,
        "accessors": blob.accessors,
        "bufferViews": blob.views,
        "buffers": [{"byteLength": len(blob.data)}],
    }
    gltf = pygltflib.GLTF2.from_dict(document)
    gltf.set_binary_blob(bytes(blob.data))
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(gltf.save_to_bytes()))


def save_bvh(
    path: str | Path,
    body: Body,
    clip: Clip,
    betas: Tensor,  # (B,)
    scale: float = CENTIMETRES,  # file units per metre
) -> None:
    """Write skeleton and motion as BVH: root position, then Z, Y, X rotations of every joint, in degrees."""
    vertices, joints = rest_pose(body, betas)
    weights = body.lbs_weights.detach().cpu().numpy()
    turns, places = _nodes_of(clip, joints[0])
    lines, order = ["HIERARCHY"], []

    def numbers(values: np.ndarray) -> str:
        return " ".join(f"{value:.6f}" for value in values)

    def write(joint: int, depth: int) -> None:
        parent, indent = body.parents[joint], "  " * depth
        order.append(joint)
        offset = np.zeros(3) if parent < 0 else joints[joint] - joints[parent]
        lines.append(f"{indent}{'ROOT' if parent < 0 else 'JOINT'} {body.joint_names[joint]}")
        lines.append(f"{indent}{{")
        lines.append(f"{indent}  OFFSET {numbers(scale * offset)}")
        place = "6 Xposition Yposition Zposition" if parent < 0 else "3"
        lines.append(f"{indent}  CHANNELS {place} Zrotation Yrotation Xrotation")
        children = [child for child, above in enumerate(body.parents) if above == joint]
        for child in children:
            write(child, depth + 1)
        if not children:  # end site: the centre of the vertices that the joint moves
            end = (weights[:, joint] @ vertices) / max(weights[:, joint].sum(), 1e-9) - joints[joint]
            lines.append(f"{indent}  End Site\n{indent}  {{\n{indent}    OFFSET {numbers(scale * end)}\n{indent}  }}")
        lines.append(f"{indent}}}")

    write(0, 0)
    lines += ["MOTION", f"Frames: {len(places)}", f"Frame Time: {1 / clip.frame_rate:.8f}"]
    angles = Rotation.from_quat(turns[:, order].reshape(-1, 4)).as_euler("ZYX", degrees=True).reshape(len(places), -1)
    lines += [numbers(np.concatenate([scale * place, row])) for place, row in zip(places, angles, strict=True)]
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def save_smpl_npz(
    path: str | Path,
    body: Body,  # with SMPL's joints
    clip: Clip,
    betas: Tensor,  # (B,)
    gender: str = "neutral",
) -> None:
    """Write parameters with the keys of both AMASS (SMPL-X's 55 joints) and GVHMR.

    AMASS, also read by Blender's SMPL-X add-on: poses (F, 165), trans (F, 3), betas, gender, mocap_frame_rate,
    surface_model_type. GVHMR: global_orient (F, 3), body_pose (F, 63), transl (F, 3). Face and hands are at rest.

    Raises:
        UserError: a body without SMPL's joints, such as a hand.
    """
    if body.joint_names[:_BODY_JOINTS] != SMPL24[:_BODY_JOINTS]:
        raise UserError(f"body {body.name!r} has not SMPL's joints; its poses cannot be written as SMPL parameters")
    poses = _rotations(clip).as_rotvec().reshape(len(clip.pose), -1)
    whole = np.zeros((len(poses), 3 * _SMPLX_JOINTS), np.float32)
    whole[:, : 3 * _BODY_JOINTS] = poses[:, : 3 * _BODY_JOINTS]
    root = rest_pose(body, betas)[1][0]
    place = (_places(clip, root) - root).astype(np.float32)
    shape = betas.detach().cpu().numpy().astype(np.float32)
    save_npz(
        path,
        poses=whole,
        trans=place,
        betas=shape,
        gender=np.array(gender),
        mocap_frame_rate=np.array(clip.frame_rate),
        mocap_time_length=np.array(len(poses) / clip.frame_rate),
        surface_model_type=np.array("smplx"),
        global_orient=whole[:, :3],
        body_pose=whole[:, 3 : 3 * _BODY_JOINTS],
        transl=place,
        body=np.array(body.name),
    )


def rest_pose(body: Body, betas: Tensor) -> tuple[np.ndarray, np.ndarray]:  # (V, 3), (J, 3) metres, y up
    """The shaped body in its rest pose."""
    rest = torch.eye(3).expand(body.num_joints, 3, 3).to(body.v_template)
    with torch.no_grad():
        output = body(betas.to(body.v_template), rest)
    return output.vertices.cpu().numpy(), output.joints.cpu().numpy()


def _rotations(clip: Clip) -> Rotation:
    """All joints' rotations, flattened, with the root rotated to y up."""
    pose = clip.pose.detach().cpu().double().numpy()
    turned = Rotation.from_rotvec(pose.reshape(-1, 3)).as_matrix().reshape(*pose.shape, 3)
    turned[:, 0] = np.diag(HALF_TURN) @ turned[:, 0]
    return Rotation.from_matrix(turned.reshape(-1, 3, 3))


def _places(clip: Clip, root: np.ndarray) -> np.ndarray:  # (F, 3) root joint, y up
    return (root + clip.translation.detach().cpu().double().numpy()) * HALF_TURN


def _nodes_of(clip: Clip, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (F, J, 4) quaternions xyzw; (F, 3)
    turns = _rotations(clip).as_quat().reshape(*clip.pose.shape[:2], 4)
    for frame in range(1, len(turns)):  # q and -q are one rotation: keep the nearer, or players take the long way
        far = (turns[frame] * turns[frame - 1]).sum(-1) < 0
        turns[frame][far] *= -1
    return turns, _places(clip, root)


def _animation(blob: _Blob, name: str, clip: Clip, root: np.ndarray) -> dict[str, Any]:
    turns, places = _nodes_of(clip, root)
    times = (np.arange(len(turns)) / clip.frame_rate).astype(np.float32)
    time = blob.add(times, "SCALAR", _FLOAT, bounds=True)
    outputs = [blob.add(places, "VEC3", _FLOAT)]
    outputs += [blob.add(turns[:, joint], "VEC4", _FLOAT) for joint in range(turns.shape[1])]
    targets = [{"node": 0, "path": "translation"}]
    targets += [{"node": joint, "path": "rotation"} for joint in range(turns.shape[1])]
    return {
        "name": name,
        "samplers": [{"input": time, "output": output, "interpolation": "LINEAR"} for output in outputs],
        "channels": [{"sampler": number, "target": target} for number, target in enumerate(targets)],
    }


def _normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:  # (V, 3)
    import trimesh

    return np.asarray(trimesh.Trimesh(vertices, faces, process=False).vertex_normals)


class _Blob:
    """The binary part of a GLB, with its views and accessors."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, int]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(
        self, values: np.ndarray, kind: str, component: int, target: int | None = None, bounds: bool = False
    ) -> int:
        dtype = {_FLOAT: np.float32, _BYTE: np.uint8, _INDEX: np.uint32}[component]
        plain = np.ascontiguousarray(values, dtype)
        content = plain.tobytes()
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(content)}
        self.views.append(view if target is None else {**view, "target": target})
        self.data += content + b"\0" * (-len(content) % 4)
        accessor = {"bufferView": len(self.views) - 1, "componentType": component, "count": len(plain), "type": kind}
        if bounds or kind == "VEC3":
            flat = plain.reshape(len(plain), -1)
            accessor |= {"min": flat.min(0).tolist(), "max": flat.max(0).tolist()}
        self.accessors.append(accessor)
        return len(self.accessors) - 1
