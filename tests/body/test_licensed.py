"""Licensed bodies, on stand-ins: found by any published name, converted once, decimated, trained on, never saved."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import standin_bodies as s
import torch
from small import SMALL

from hmdiff.body import mesh_cache
from hmdiff.body.body import Body, load_body
from hmdiff.body.files import find_body_file, licensed_kind, own_name, read_body_file
from hmdiff.body.keypoints import LANDMARKS
from hmdiff.body.licensed import convert_body, prepare_licensed
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.body.skeletons import HALPE26, HAND21, SMPL24
from hmdiff.cli.main import main
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.pipeline import HMDiffPipeline

BUFFERS = ("v_template", "shapedirs", "posedirs", "lbs_weights", "J_regressor", "faces", "keypoint_regressor")
PUBLISHED = {
    ("smpl", "neutral"): (
        "SMPL_NEUTRAL.pkl",
        "SMPL_NEUTRAL.npz",
        "basicModel_neutral_lbs_10_207_0_v1.0.0.pkl",
        "basicmodel_neutral_lbs_10_207_0_v1.1.0.pkl",
    ),
    ("smpl", "female"): (
        "SMPL_FEMALE.pkl",
        "basicModel_f_lbs_10_207_0_v1.0.0.pkl",
        "basicmodel_f_lbs_10_207_0_v1.1.0.pkl",
    ),
    ("smpl", "male"): ("SMPL_MALE.pkl", "basicmodel_m_lbs_10_207_0_v1.0.0.pkl", "basicmodel_m_lbs_10_207_0_v1.1.0.pkl"),
    ("smplx", "neutral"): ("SMPLX_NEUTRAL.npz", "SMPLX_NEUTRAL.pkl", "SMPLX_NEUTRAL_2020.npz"),
    ("smplx", "male"): ("SMPLX_MALE.npz", "SMPLX_MALE.pkl"),
    ("mano", "right"): ("MANO_RIGHT.pkl",),
    ("mano", "left"): ("MANO_LEFT.pkl",),
}


@pytest.fixture(scope="module")
def smpl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6890 vertices, converted, with the coarse mesh in a cache."""
    folder = tmp_path_factory.mktemp("licensed")
    s.write_pickle(folder / "source" / "SMPL_NEUTRAL.pkl", s.smpl_arrays())
    patch = pytest.MonkeyPatch()
    patch.setenv("HMDIFF_CACHE_DIR", str(folder / "cache"))
    prepare_licensed(folder / "source", folder / "bodies", lambda line: None)
    patch.undo()
    return folder / "bodies" / "SMPL_NEUTRAL.npz"


@pytest.fixture
def folder(smpl_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(smpl_file.parent))
    monkeypatch.setenv("HMDIFF_CACHE_DIR", str(smpl_file.parent.parent / "cache"))
    monkeypatch.setattr(mesh_cache, "FITTED_ON", 24)
    return smpl_file.parent


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path / "bodies"))
    monkeypatch.setenv("HMDIFF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def equal(first: Body, second: Body) -> None:
    for name in BUFFERS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
    assert first.parents == second.parents and first.keypoint_names == second.keypoint_names


def tree(joints: int, vertices: int = 12, shapes: int = 10) -> dict[str, Any]:
    random = np.random.default_rng(joints)
    return {
        "v_template": random.normal(size=(vertices, 3)),
        "shapedirs": random.normal(size=(vertices, 3, shapes)),
        "posedirs": random.normal(size=(vertices, 3, 9 * (joints - 1))),
        "weights": np.full((vertices, joints), 1 / joints),
        "J_regressor": np.full((joints, vertices), 1 / vertices),
        "kintree_table": np.stack([np.maximum(np.arange(joints) - 1, 0), np.arange(joints)]),
        "f": random.integers(0, vertices, (5, 3)),
    }


# Names.


@pytest.mark.parametrize(("kind", "gender", "file"), [(*key, file) for key in PUBLISHED for file in PUBLISHED[key]])
def test_every_published_name_is_found(kind: str, gender: str, file: str, fresh: Path) -> None:
    """Anywhere below the folder, in any case, next to unrelated files."""
    place = fresh / "bodies" / "archive" / "smpl" / "models" / file.swapcase()
    arrays = tree({"smpl": 24, "smplx": 55, "mano": 16}[kind])
    place.parent.mkdir(parents=True)
    (place.parent / "readme.txt").write_text("licence")
    (place.parent / "shape_statistics.pkl").write_bytes(b"none of these")
    place = place.with_suffix(place.suffix.lower())
    if place.suffix == ".pkl":
        s.write_pickle(place, arrays)
    else:
        np.savez(place, **arrays)
    assert find_body_file(kind, gender) == place and licensed_kind(file) == (kind, gender)
    body = load_body(kind, gender)
    assert body.num_vertices == 12 and body.name == (kind if gender == "neutral" else f"{kind}_{gender}")
    equal(load_body(body.name), body)  # the name stored in a checkpoint


def test_a_converted_file_wins_and_others_are_not_mixed_up(fresh: Path) -> None:
    s.write_pickle(fresh / "bodies" / "SMPL_FEMALE.pkl", tree(24))
    with pytest.raises(UserError, match=r"SMPL_NEUTRAL\.pkl not found"):
        find_body_file("smpl", "neutral")
    np.savez(fresh / "bodies" / "smpl_female.npz", **tree(24, 13))
    assert load_body("smpl", "female").num_vertices == 13
    assert own_name("mano", "left") == "MANO_LEFT.npz" and licensed_kind("SMPLX_NEUTRAL_2021.npz") is None


# Conversion.


class _Chumpy:
    def __init__(self, **state: object) -> None:
        self.__dict__.update(state)


@pytest.fixture
def chumpy() -> Iterator[type]:
    """Provides `chumpy.ch.Ch` while a file is written with it."""
    made = type("Ch", (_Chumpy,), {"__module__": "chumpy.ch"})
    module = types.ModuleType("chumpy.ch")
    module.Ch = made  # type: ignore[attr-defined]
    sys.modules |= {"chumpy": types.ModuleType("chumpy"), "chumpy.ch": module}
    yield made
    for name in ("chumpy", "chumpy.ch"):
        sys.modules.pop(name, None)


def test_a_zip_of_chumpy_pickles_is_converted_once(
    fresh: Path, chumpy: type, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(s.mano_arrays())
    arrays["J_regressor"] = scipy.sparse.csc_matrix(arrays["J_regressor"])
    arrays["shapedirs"] = chumpy(x=arrays["shapedirs"])
    source = s.write_pickle(fresh / "MANO_RIGHT.pkl", arrays)
    for name in ("chumpy", "chumpy.ch"):
        del sys.modules[name]
    with zipfile.ZipFile(fresh / "mano_v1_2.zip", "w") as archive:
        archive.write(source, "mano_v1_2/models/MANO_RIGHT.pkl")
        archive.writestr("mano_v1_2/../../LICENSE.txt", "text")
        archive.writestr("mano_v1_2/models/J_regressor_extra.npy", npy(np.ones((9, 6890)) / 6890))

    assert main(["prepare", "licensed", str(fresh / "mano_v1_2.zip")]) == 0
    words = capsys.readouterr().out
    assert "MANO_RIGHT.pkl -> " in words and "778 -> 195 vertices" in words
    assert {path.name for path in (fresh / "bodies").iterdir()} == {"MANO_RIGHT.npz", "J_regressor_extra.npy"}
    hand, pickled = load_body("mano"), load_body(source)
    equal(hand, pickled)
    torch.testing.assert_close(hand.mean_pose, pickled.mean_pose, rtol=0, atol=0)
    assert hand.mean_pose is not None and hand.mean_pose[1:].abs().max() > 0 and hand.mean_pose[0].abs().max() == 0
    with np.load(fresh / "bodies" / "MANO_RIGHT.npz", allow_pickle=False) as archive:
        assert str(archive["converted_from"]) == "MANO_RIGHT.pkl" and archive["v_template"].dtype == np.float32

    assert main(["prepare", "licensed", str(fresh / "mano_v1_2.zip")]) == 0  # repeating it is harmless
    equal(load_body("mano"), pickled)


def npy(values: np.ndarray) -> bytes:
    import io

    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def test_the_users_own_npz_is_never_overwritten(fresh: Path) -> None:
    s.write_pickle(fresh / "source" / "SMPL_MALE.pkl", tree(24))
    (fresh / "bodies").mkdir()
    mine = fresh / "bodies" / "SMPL_MALE.npz"
    np.savez(mine, **tree(24, 14))
    before, told = mine.read_bytes(), list[str]()
    assert prepare_licensed(fresh / "source", None, told.append) == {}
    assert mine.read_bytes() == before and told == [f"{mine}: is an npz already, left as it is"]


@pytest.mark.parametrize(("shapes", "kept"), [(10, 10), (20, 10), (400, 11), (11, 11)])
def test_smplx_keeps_the_eleven_shapes_of_bedlam(shapes: int, kept: int, tmp_path: Path) -> None:
    """v1.0 has ten shapes before its expressions, v1.1 three hundred; a converted file keeps eleven."""
    arrays = tree(55, shapes=shapes)
    np.savez(tmp_path / "SMPLX_NEUTRAL.npz", **arrays)
    found = read_body_file(tmp_path / "SMPLX_NEUTRAL.npz")["shapedirs"]
    np.testing.assert_array_equal(found, arrays["shapedirs"][:, :, :kept].astype(np.float32))
    np.savez(tmp_path / "SMPL_NEUTRAL.npz", **tree(24, shapes=300))
    assert read_body_file(tmp_path / "SMPL_NEUTRAL.npz")["shapedirs"].shape[2] == 10


@pytest.mark.parametrize(("shapes", "first"), [(20, 10), (400, 300), (10, None), (11, None)])
def test_smplx_keeps_ten_expressions(shapes: int, first: int | None, tmp_path: Path) -> None:
    """After ten shapes in v1.0, after three hundred in v1.1; the converted file gives the same body."""
    lbs = pytest.importorskip("smplx.lbs")
    arrays = tree(55, shapes=shapes)
    path = tmp_path / "SMPLX_NEUTRAL.npz"
    np.savez(path, **arrays)
    body, converted = load_body(path), convert_body(path, tmp_path / "SMPLX_MALE.npz")
    generator = torch.Generator().manual_seed(0)
    betas = torch.randn(2, body.num_betas, generator=generator)
    rotations = axis_angle_to_matrix(torch.randn(2, 55, 3, generator=generator))
    face = torch.randn(2, 10, generator=generator)
    if first is None:
        assert body.num_expressions == converted.num_expressions == 0
        with pytest.raises(UserError, match=r"expression \(2, 10\), expected \(..., 0\): only SMPL-X has"):
            body(betas, rotations, expression=face)
        return
    shapedirs = torch.from_numpy(arrays["shapedirs"]).float()
    assert body.posedirs is not None and body.J_regressor is not None
    vertices, joints = lbs.lbs(
        torch.cat([betas, face], -1),
        rotations,
        body.v_template,
        torch.cat([shapedirs[:, :, : body.num_betas], shapedirs[:, :, first : first + 10]], -1),
        body.posedirs.flatten(0, 1).mT,
        body.J_regressor,
        torch.tensor(body.parents),
        body.lbs_weights,
        pose2rot=False,
    )
    for each in (body, converted):
        found = each(betas, rotations, expression=face)
        torch.testing.assert_close(found.vertices, vertices, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.joints, joints, rtol=1e-4, atol=1e-4)
        plain = each(betas, rotations)
        assert (plain.vertices - found.vertices).abs().max() > 0.1  # the expression has an effect
        none = each(betas, rotations, expression=torch.zeros(10)).vertices
        torch.testing.assert_close(none, plain.vertices, rtol=1e-5, atol=1e-5)
    some = body.select([3, 1])(betas, rotations, expression=face)
    torch.testing.assert_close(some.vertices, vertices[:, [3, 1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some.joints, joints, rtol=1e-4, atol=1e-4)


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return print, ("run",)


def _bad(name: str) -> bytes:
    good = tree(24)
    if name == "truncated":
        return pickle.dumps(good, protocol=2)[:-400]
    if name == "shape":
        return pickle.dumps(good | {"weights": good["weights"][:, :7]})
    if name == "malicious":
        return pickle.dumps(good | {"v_template": _Malicious()})
    if name == "without":
        return pickle.dumps({key: value for key, value in good.items() if key != "shapedirs"})
    if name == "list":
        return pickle.dumps([1, 2])
    return pickle.dumps(good | {"f": np.array(["x"])})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", "not a pickle of plain arrays"),
        ("shape", "lbs_weights is (12, 7), expected (12, 24)"),
        ("malicious", "is not allowed"),
        ("without", "it has no shapedirs"),
        ("list", "a list where a dictionary"),
        ("faces", "not laid out as a body file"),
    ],
)
def test_a_bad_file_ends_in_one_line(name: str, words: str, fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fresh / "SMPL_NEUTRAL.pkl"
    path.write_bytes(_bad(name))
    assert main(["prepare", "licensed", str(path)]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and words in error and "run\n" not in out
    assert not list((fresh / "bodies").glob("*"))
    assert main(["train", f"body={path}", f"output={fresh / 'run'}"]) == 2
    assert words in capsys.readouterr().err


def test_sources_without_a_body_are_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        prepare_licensed(fresh / "absent")
    (fresh / "empty").mkdir()
    with pytest.raises(UserError, match="no body and no regressor under a published name"):
        prepare_licensed(fresh / "empty")
    (fresh / "broken.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="not a readable zip archive"):
        prepare_licensed(fresh / "broken.zip")
    monkeypatch.delenv("HMDIFF_BODY_DIR")
    with pytest.raises(UserError, match="give --output FOLDER, or set HMDIFF_BODY_DIR"):
        prepare_licensed(fresh / "empty")


# Keypoints.


@pytest.mark.slow
def test_keypoints_of_smpl_follow_its_joints(folder: Path) -> None:
    body = load_body("smpl")
    assert body.keypoint_names == HALPE26 and body.keypoint_regressor is not None
    assert (body.keypoint_regressor >= 0).all()
    torch.testing.assert_close(body.keypoint_regressor.sum(1), torch.ones(26), rtol=0, atol=1e-5)
    axis_angle = 0.3 * torch.randn(16, 24, 3, generator=torch.Generator().manual_seed(0))
    axis_angle[:, SMPL24.index("left_knee"), 0] += 1.5
    output = body(torch.randn(16, 10), axis_angle_to_matrix(axis_angle))
    found = body.keypoints(output.vertices)
    for side in ("left_", "right_"):
        for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
            gap = found[:, HALPE26.index(side + name)] - output.joints[:, SMPL24.index(side + name)]
            assert gap.norm(dim=-1).mean() < 0.02, side + name
    for name, vertex in LANDMARKS[s.SMPL].items():
        torch.testing.assert_close(found[:, HALPE26.index(name)], output.vertices[:, vertex], rtol=0, atol=1e-6)


def test_fingertips_end_the_fingers_they_are_named_after(tmp_path: Path) -> None:
    """MANO's finger order is index, middle, pinky, ring, thumb, HAND21's another: a tip belongs to its own chain."""
    hand = load_body(s.write_pickle(tmp_path / "MANO_RIGHT.pkl", s.mano_arrays()))
    assert hand.keypoint_names == HAND21
    output = hand(torch.zeros(10), axis_angle_to_matrix(0.2 * torch.randn(16, 3)))
    found = dict(zip(HAND21, hand.keypoints(output.vertices), strict=True))
    joints = dict(zip(hand.joint_names, hand.J_regressor @ output.vertices, strict=True))  # type: ignore[operator]
    fingers = ("thumb", "index", "middle", "ring", "pinky")
    for finger in fingers:
        last = {other: (found[f"{finger}4"] - joints[f"{other}3"]).norm() for other in fingers}
        assert min(last, key=last.__getitem__) == finger  # type: ignore[arg-type]
        for number in (1, 2, 3):
            torch.testing.assert_close(found[f"{finger}{number}"], joints[f"{finger}{number}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["ring4"], output.vertices[555], rtol=0, atol=1e-6)  # FreiHAND's, not smplx's 554
    torch.testing.assert_close(found["pinky4"], output.vertices[672], rtol=0, atol=1e-6)


# Coarse meshes.


@pytest.mark.slow
def test_meshes_of_smpls_size_are_decimated_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = load_body("smpl")
    cache = mesh_cache.cache_folder()
    assert [path.name for path in cache.glob("hierarchy_*")] == [f"hierarchy_{mesh_cache.mesh_digest(body)}.npz"]
    monkeypatch.setattr(mesh_cache, "decimate", lambda *args: pytest.fail("decimated again"))
    for count in mesh_cache.LEVELS[s.SMPL]:
        mesh = load_mesh(body, count, fitted=False)
        vertices = body.v_template[None]
        coarse = vertices[:, mesh.coarse_ids]
        assert coarse.shape == (1, count, 3) and len(mesh.coarse_ids.unique()) == count
        back = mesh.upsample(coarse)
        torch.testing.assert_close(back[:, mesh.coarse_ids], coarse, rtol=0, atol=1e-6)
        assert (back - vertices).norm(dim=-1).mean() < 0.01 * (431 / count) ** 0.5


def test_a_hand_has_its_195_vertices_and_a_damaged_cache_is_made_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mesh_cache, "FITTED_ON", 24)
    hand = load_body(s.write_pickle(fresh / "bodies" / "MANO_RIGHT.pkl", s.mano_arrays()))
    first = load_mesh(hand, 195)
    assert first.num_coarse == 195 and "fitting the coarse mesh" in capsys.readouterr().err
    files = {path: path.read_bytes() for path in (fresh / "cache").iterdir()}
    assert len(files) == 2
    second = load_mesh(hand, 195)
    assert not capsys.readouterr().err
    for name in ("coarse_ids", "fitted_index", "fitted_weight"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
    for path, content in files.items():
        path.write_bytes(content[:100])
    third = load_mesh(hand, 195)
    assert "damaged" in capsys.readouterr().err
    torch.testing.assert_close(third.fitted_weight, first.fitted_weight, rtol=0, atol=0)
    with pytest.raises(UserError, match="another number of coarse vertices"):
        load_mesh(hand, 1)


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HMDIFF_CACHE_DIR", str(tmp_path / "file"))
    hand = load_body(s.write_pickle(tmp_path / "MANO_RIGHT.pkl", s.mano_arrays()))
    assert load_mesh(hand, 195, fitted=False).num_coarse == 195
    assert "made again the next time" in capsys.readouterr().err


# Training.


@pytest.mark.slow
def test_a_model_of_smpl_is_saved_without_the_body(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main(["train", "body=smpl", f"output={run}", *SMALL, "training.steps=2"]) == 0
    rows = (run / "log.csv").read_text().splitlines()
    assert len(rows) > 1
    saved = [path for path in (run / "pipeline").rglob("*") if path.is_file()]
    template = load_body("smpl").v_template.numpy()
    for path in saved:
        assert path.suffix in (".json", ".safetensors")
        assert template[100:110].tobytes() not in path.read_bytes()
    assert sum(path.stat().st_size for path in saved) < 2_000_000  # the body alone has twenty
    names = {json.loads(path.read_text()).get("body") for path in saved if path.suffix == ".json"}
    assert "smpl" in names

    pipeline = HMDiffPipeline.from_pretrained(run / "pipeline")
    assert pipeline.body.num_vertices == s.SMPL and pipeline.body.posedirs is not None
    monkeypatch.setenv("HMDIFF_BODY_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"SMPL_NEUTRAL\.pkl not found: not in .*register at https://smpl\.is\.tue"):
        HMDiffPipeline.from_pretrained(run / "pipeline")
    monkeypatch.delenv("HMDIFF_BODY_DIR")
    with pytest.raises(UserError, match=r"SMPL_NEUTRAL\.pkl not found: HMDIFF_BODY_DIR is not set"):
        HMDiffPipeline.from_pretrained(run / "pipeline")
