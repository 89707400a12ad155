"""Exported animations: an independent reader of glTF and BVH recovers the body's vertices and joints."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from pygltflib import GLTF2
from scipy.spatial.transform import Rotation
from standin_bodies import smpl_arrays, write_pickle

from hmdiff.body.body import Body, load_body
from hmdiff.body.retarget import retarget
from hmdiff.cli.main import main
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.viz.animation import Clip, save_animated_glb, save_bvh, save_smpl_npz, shared_shape
from hmdiff.viz.export import HALF_TURN, save_npz

BETAS = torch.tensor([1.0, -0.5, 0.3, 0, 0, 0.8, 0, 0, 0, -1.0])


@pytest.fixture(scope="module")
def body() -> Body:
    return load_body()


def motion(body: Body, frames: int = 4, seed: int = 0) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    pose = 0.4 * torch.randn(frames, body.num_joints, 3, generator=generator)
    pose[:, 0] = torch.tensor([2.8, 0.2, 0.1])  # upright in a camera with y down
    return Clip(pose, torch.tensor([0.1, 0.3, 4.0]) + 0.1 * torch.randn(frames, 3, generator=generator), 25.0)


def expected(body: Body, clip: Clip, betas: torch.Tensor = BETAS) -> tuple[np.ndarray, np.ndarray]:
    output = body(betas, axis_angle_to_matrix(clip.pose), clip.translation)
    return output.vertices.numpy() * HALF_TURN, output.joints.numpy() * HALF_TURN


class Glb:
    """A minimal player: node matrices at a key frame, and skinned vertices by the rules of glTF 2.0."""

    def __init__(self, path: Path) -> None:
        self.gltf = GLTF2().load_binary(str(path))
        self.blob = self.gltf.binary_blob()

    def array(self, number: int) -> np.ndarray:
        accessor = self.gltf.accessors[number]
        view = self.gltf.bufferViews[accessor.bufferView]
        dtype = {5126: np.float32, 5121: np.uint8, 5125: np.uint32}[accessor.componentType]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}[accessor.type]
        values = np.frombuffer(self.blob, dtype, accessor.count * width, view.byteOffset)
        return values.reshape(accessor.count, width)

    def worlds(self, name: str, frame: int) -> np.ndarray:  # (nodes, 4, 4)
        animation = next(each for each in self.gltf.animations if each.name == name)
        local = [
            [np.array(node.translation or (0, 0, 0)), np.array(node.rotation or (0, 0, 0, 1))]
            for node in self.gltf.nodes
        ]
        for channel in animation.channels:
            value = self.array(animation.samplers[channel.sampler].output)[frame]
            local[channel.target.node][0 if channel.target.path == "translation" else 1] = value
        world = np.tile(np.eye(4), (len(local), 1, 1))

        def visit(node: int, above: np.ndarray) -> None:
            matrix = np.eye(4)
            matrix[:3, :3], matrix[:3, 3] = Rotation.from_quat(local[node][1]).as_matrix(), local[node][0]
            world[node] = above @ matrix
            for child in self.gltf.nodes[node].children or ():
                visit(child, world[node])

        for root in self.gltf.scenes[0].nodes:
            visit(root, np.eye(4))
        return world

    def vertices(self, name: str, frame: int) -> np.ndarray:
        attributes = self.gltf.meshes[0].primitives[0].attributes
        skin = self.gltf.skins[0]
        inverse = self.array(skin.inverseBindMatrices).reshape(-1, 4, 4).transpose(0, 2, 1)
        bones = self.worlds(name, frame)[skin.joints] @ inverse
        rest = np.pad(self.array(attributes.POSITION), ((0, 0), (0, 1)), constant_values=1)
        blended = np.einsum("vk,vkij->vij", self.array(attributes.WEIGHTS_0), bones[self.array(attributes.JOINTS_0)])
        return np.einsum("vij,vj->vi", blended, rest)[:, :3]


def test_a_player_of_the_glb_shows_the_body_of_every_frame(body: Body, tmp_path: Path) -> None:
    clips = {"walk": motion(body), "other": motion(body, 2, seed=1)}
    save_animated_glb(tmp_path / "a.glb", body, clips, BETAS)
    glb = Glb(tmp_path / "a.glb")
    assert [each.name for each in glb.gltf.animations] == ["walk", "other"]
    for name, clip in clips.items():
        vertices, joints = expected(body, clip)
        for frame in (0, len(clip.pose) - 1):
            assert np.abs(glb.vertices(name, frame) - vertices[frame]).max() < 2e-5
            assert np.abs(glb.worlds(name, frame)[:24, :3, 3] - joints[frame]).max() < 1e-5
    times = glb.array(glb.gltf.animations[0].samplers[0].input)[:, 0]
    np.testing.assert_allclose(times, np.arange(4) / 25, rtol=1e-6)
    faces = glb.array(glb.gltf.meshes[0].primitives[0].indices).reshape(-1, 3)
    assert np.array_equal(faces, body.faces.numpy())


def test_other_programs_open_the_glb(body: Body, tmp_path: Path) -> None:
    save_animated_glb(tmp_path / "a.glb", body, {"walk": motion(body)}, BETAS)
    scene = trimesh.load(tmp_path / "a.glb")
    assert len(scene.geometry) == 1 and next(iter(scene.geometry.values())).vertices.shape[1] == 3
    assert set(body.joint_names) <= set(scene.graph.nodes)


def test_a_rotation_never_turns_the_long_way(body: Body, tmp_path: Path) -> None:
    pose = torch.zeros(40, body.num_joints, 3)
    pose[:, 5, 0] = torch.linspace(0, 6.2, 40)  # past half a turn, where a quaternion changes sign
    save_animated_glb(tmp_path / "a.glb", body, {"spin": Clip(pose, torch.zeros(40, 3))}, BETAS)
    glb = Glb(tmp_path / "a.glb")
    turns = glb.array(glb.gltf.animations[0].samplers[6].output)
    assert (turns[1:] * turns[:-1]).sum(1).min() > 0.9


def read_bvh(path: Path) -> tuple[list[str], np.ndarray, float]:  # names, (F, J, 3) joints, seconds per frame
    text = path.read_text()
    hierarchy, rows = text.split("MOTION")
    names, parents, offsets, stack = [], [], [], []
    for line in hierarchy.splitlines():
        words = line.split()
        if words[:1] in (["ROOT"], ["JOINT"]):
            names.append(words[1])
            parents.append(stack[-1] if stack else -1)
            stack.append(len(names) - 1)
        elif words[:1] == ["End"]:
            stack.append(-2)
        elif words[:1] == ["}"]:
            stack.pop()
        elif words[:1] == ["OFFSET"] and stack[-1] >= 0:
            offsets.append([float(word) for word in words[1:]])
    seconds = float(re.search(r"Frame Time: (\S+)", rows)[1])
    values = np.array([[float(word) for word in line.split()] for line in rows.strip().splitlines()[2:]])
    joints = np.zeros((len(values), len(names), 3))
    turns = Rotation.from_euler("ZYX", values[:, 3:].reshape(-1, 3), degrees=True).as_matrix()
    turns = turns.reshape(len(values), len(names), 3, 3)
    world = turns.copy()
    for joint, parent in enumerate(parents):
        if parent < 0:
            joints[:, joint] = np.array(offsets[joint]) + values[:, :3]
        else:
            world[:, joint] = world[:, parent] @ turns[:, joint]
            joints[:, joint] = joints[:, parent] + world[:, parent] @ np.array(offsets[joint])
    return names, joints, seconds


def test_a_reader_of_the_bvh_has_the_joints_in_centimetres(body: Body, tmp_path: Path) -> None:
    clip = motion(body)
    save_bvh(tmp_path / "a.bvh", body, clip, BETAS)
    names, joints, seconds = read_bvh(tmp_path / "a.bvh")
    order = [body.joint_names.index(name) for name in names]
    assert sorted(order) == list(range(24)) and seconds == pytest.approx(1 / 25)
    assert np.abs(joints / 100 - expected(body, clip)[1][:, order]).max() < 1e-5


def test_smpl_parameters_give_the_body_in_both_layouts(body: Body, tmp_path: Path) -> None:
    clip = motion(body)
    clip.pose[:, 22:] = 0  # SMPL's two hand joints do not exist in SMPL-X
    save_smpl_npz(tmp_path / "a.npz", body, clip, BETAS)
    found = np.load(tmp_path / "a.npz")
    assert found["poses"].shape == (4, 165) and found["body_pose"].shape == (4, 63) and found["gender"] == "neutral"
    assert found["mocap_frame_rate"] == 25 and np.array_equal(found["trans"], found["transl"])
    for pose in (found["poses"][:, :66], np.concatenate([found["global_orient"], found["body_pose"]], 1)):
        full = torch.zeros(4, 24, 3)
        full[:, :22] = torch.from_numpy(pose).reshape(4, 22, 3)
        output = body(torch.from_numpy(found["betas"]), axis_angle_to_matrix(full), torch.from_numpy(found["transl"]))
        assert np.abs(output.vertices.numpy() - expected(body, clip)[0]).max() < 2e-5


def test_one_shape_for_all_frames_leaves_the_root_joint_in_its_place(body: Body) -> None:
    clip = motion(body, 3)
    betas = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    mean = betas.mean(0)
    shared = shared_shape(body, clip, betas, mean)
    before = body(betas, axis_angle_to_matrix(clip.pose), clip.translation).joints[:, 0]
    after = body(mean, axis_angle_to_matrix(shared.pose), shared.translation).joints[:, 0]
    assert (before - after).abs().max() < 1e-5


@pytest.mark.slow
def test_another_bodys_parameters_follow_the_motion(body: Body, tmp_path: Path) -> None:
    target = load_body(write_pickle(tmp_path / "taller.pkl", smpl_arrays(seed=1)))
    clip = motion(body)
    betas = 0.5 * BETAS
    found = retarget(body, target, clip.pose, betas, clip.translation)
    assert found.pose.shape == (4, 24, 3) and found.error_mm.max() < 20  # the stand-in is 3 % taller in every bone
    mean_shape = target(torch.zeros(10), axis_angle_to_matrix(found.pose), found.translation).joints
    wanted = body(betas, axis_angle_to_matrix(clip.pose), clip.translation).joints
    assert found.error_mm.mean() < 0.8 * 1000 * (mean_shape - wanted)[:, :22].norm(dim=-1).mean()
    itself = retarget(body, body, clip.pose, betas, clip.translation)
    again = body(itself.betas, axis_angle_to_matrix(itself.pose), itself.translation).vertices
    assert (again - torch.as_tensor(expected(body, clip, betas)[0] * HALF_TURN)).norm(dim=-1).mean() < 2e-3
    hand = Body(
        "hand",
        body.v_template,
        body.shapedirs,
        body.lbs_weights[:, :1] * 0 + 1,
        [-1],
        ["wrist"],
        joint_template=torch.zeros(1, 3),
        joint_shapedirs=torch.zeros(1, 3, 10),
    )
    with pytest.raises(UserError, match=r"has not the joints of 'free'"):
        retarget(body, hand, clip.pose, betas, clip.translation)


def test_clips_of_other_joints_are_refused(body: Body, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"poses \(2, 5, 3\), expected \(F, 24, 3\)"):
        save_animated_glb(tmp_path / "a.glb", body, {"x": Clip(torch.zeros(2, 5, 3), torch.zeros(2, 3))}, BETAS)
    with pytest.raises(UserError, match="no clip"):
        save_animated_glb(tmp_path / "a.glb", body, {}, BETAS)


def write_result(path: Path, body: Body, seed: int) -> np.ndarray:
    clip = motion(body, 3, seed)
    output = body(BETAS, axis_angle_to_matrix(clip.pose))
    pelvis = output.joints[:, :1]
    vertices, joints = (output.vertices - pelvis).numpy(), (output.joints - pelvis).numpy()
    save_npz(
        path,
        vertices=vertices,
        joints=joints,
        faces=body.faces,
        translation=clip.translation,
        focal=np.float32(900),
        principal_point=np.float32([300, 300]),
        spread_mm=np.ones(len(vertices[0])),
        selected=np.int64(0),
        modes=np.array([0]),
        mode_weights=np.float32([1]),
        joint_names=np.array(body.joint_names),
        joint_parents=np.array(body.parents),
        body=np.array("free"),
    )
    return (vertices + clip.translation[:, None].numpy()) * HALF_TURN


@pytest.mark.slow
def test_export_writes_a_clip_of_every_hypothesis_and_a_motion_of_several_results(
    body: Body, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = write_result(tmp_path / "one.npz", body, 0)
    write_result(tmp_path / "two.npz", body, 1)
    assert main(["export", str(tmp_path / "one.npz")]) == 0
    glb = Glb(tmp_path / "one_animated.glb")
    assert [each.name for each in glb.gltf.animations] == [f"hypothesis_0{number}" for number in (0, 1, 2)]
    for number in (0, 1, 2):
        found = glb.vertices(f"hypothesis_0{number}", 1)
        assert np.linalg.norm(found - bodies[number], axis=1).mean() < 5e-3
    assert len(read_bvh(tmp_path / "one.bvh")[1]) == 4  # the mean and three hypotheses
    assert "one_smpl.npz" in capsys.readouterr().out

    together = [str(tmp_path / name) for name in ("one.npz", "two.npz")]
    folder = tmp_path / "motion"
    assert main(["export", *together, "--to", "glb", "bvh", "--fps", "10", "--output", str(folder)]) == 0
    assert [each.name for each in Glb(folder / "one_animated.glb").gltf.animations] == ["motion"]
    _, joints, seconds = read_bvh(folder / "one.bvh")
    assert len(joints) == 2 and seconds == pytest.approx(0.1)


def test_parameters_in_the_result_are_not_fitted_again(
    body: Body, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the hypotheses' own parameters; a new fit would find others that are nearly as close."""
    path = tmp_path / "one.npz"
    write_result(path, body, 0)
    with np.load(path) as data:
        arrays = dict(data)
    generator = torch.Generator().manual_seed(3)
    pose, betas = 0.2 * torch.randn(3, body.num_joints, 3, generator=generator), torch.zeros(3, body.num_betas)
    known = {"pose": pose.numpy(), "betas": betas.numpy(), "pose_translation": np.full((3, 3), 0.01, np.float32)}
    means = {f"mean_{name}": values.mean(0) for name, values in known.items()}
    asked = []

    def fit(*arguments: object) -> None:
        asked.append(arguments)
        raise UserError("fitted again")

    monkeypatch.setattr("hmdiff.body.fitting.fit_parameters", fit)
    save_npz(path, **arrays, **known, **means)
    assert main(["export", str(path), "--to", "smpl"]) == 0 and not asked
    with np.load(tmp_path / "one_smpl.npz") as data:
        turned = Rotation.from_rotvec(data["body_pose"].reshape(-1, 3))
        wanted = np.concatenate([means["mean_pose"][None], known["pose"]])[:, 1:22].reshape(-1, 3)
        assert (turned * Rotation.from_rotvec(wanted).inv()).magnitude().max() < 1e-5
    save_npz(path, **arrays, **(known | {"pose": pose.numpy()[:, :5]}), **means)  # of another body
    assert main(["export", str(path), "--to", "smpl"]) == 2 and len(asked) == 1
