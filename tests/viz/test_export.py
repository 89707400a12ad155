"""Files that viewers and programs read back unchanged."""

import numpy as np
import pytest
import torch
import trimesh

from hmdiff.viz.export import save_glb, save_npz, save_obj, save_ply

VERTICES = torch.tensor([[0.0, 0.1, 2.0], [0.3, -0.2, 2.5], [-0.4, 0.5, 1.5], [0.1, 0.2, 3.0], [0.0, 0.1, 2.0]])
FACES = torch.tensor([[0, 1, 2], [1, 3, 2], [4, 2, 3]])  # vertex 4 repeats vertex 0: it must not be merged
TURNED = VERTICES.numpy() * [1, -1, -1]


@pytest.mark.parametrize("suffix", ["obj", "ply", "glb"])
def test_trimesh_reads_equal_vertices_and_faces(tmp_path, suffix):
    path = tmp_path / f"mesh.{suffix}"
    for y_up, expected in ((True, TURNED), (False, VERTICES.numpy())):
        if suffix == "glb":
            save_glb(path, {"body": (VERTICES, FACES)}, y_up=y_up)
        else:
            {"obj": save_obj, "ply": save_ply}[suffix](path, VERTICES, FACES, y_up=y_up)
        options = {"maintain_order": True} if suffix == "obj" else {}
        mesh = trimesh.load(path, force="mesh", process=False, **options)
        np.testing.assert_allclose(mesh.vertices, expected, atol=1e-6)
        np.testing.assert_array_equal(mesh.faces, FACES)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_turn_keeps_orientation(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=1)
    save_ply(tmp_path / "ball.ply", ball.vertices, ball.faces)
    assert trimesh.load(tmp_path / "ball.ply").volume == pytest.approx(ball.volume, rel=1e-5)


def test_glb_holds_named_hypotheses_in_their_colours(tmp_path):
    meshes = {f"hypothesis_{k}": (VERTICES + k, FACES) for k in range(3)}
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), np.tile([0.0, 0.0, 1.0], (5, 1))]
    save_glb(tmp_path / "all.glb", meshes, colours)
    scene = trimesh.load(tmp_path / "all.glb", process=False)
    assert set(scene.graph.nodes_geometry) == set(meshes)
    for k, name in enumerate(meshes):
        mesh = scene.geometry[name]
        np.testing.assert_allclose(mesh.vertices, (VERTICES + k).numpy() * [1, -1, -1], atol=1e-5)
        if k < 2:  # a single colour is a matt material, vertex colours stay
            material = mesh.visual.material
            assert (material.baseColorFactor[:3] == np.eye(3)[k] * 255).all() and material.metallicFactor == 0
        else:
            assert (mesh.visual.vertex_colors[:, :3] == np.eye(3)[k] * 255).all()
    assert "camera after a half turn about x" in scene.metadata["frame"]
    save_glb(tmp_path / "by_name.glb", meshes, {name: (0.5, 0.5, 0.5) for name in meshes})
    grey = trimesh.load(tmp_path / "by_name.glb", process=False).geometry["hypothesis_1"]
    assert set(grey.visual.material.baseColorFactor[:3]) <= {127, 128}


def test_ply_keeps_colours(tmp_path):
    colours = torch.rand(5, 3)
    save_ply(tmp_path / "mesh.ply", VERTICES, FACES, colours)
    read = trimesh.load(tmp_path / "mesh.ply", process=False).visual.vertex_colors
    np.testing.assert_allclose(read[:, :3] / 255, colours, atol=0.5 / 255 + 1e-6)


def test_npz_round_trip(tmp_path):
    save_npz(tmp_path / "out.npz", vertices=VERTICES.requires_grad_(), faces=FACES, name=np.array("free"))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as data:
        assert np.array_equal(data["vertices"], VERTICES.detach()) and np.array_equal(data["faces"], FACES)
        assert str(data["name"]) == "free"
    VERTICES.requires_grad_(False)
    with pytest.raises(TypeError, match="objects"):
        save_npz(tmp_path / "bad.npz", thing=np.array([{}], dtype=object))
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
