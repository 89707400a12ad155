"""`pipe(photo)`: paths, PIL images, arrays and lists of them; people with cameras, parameters and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pose_sources import Source
from small import small_pipeline

from hmdiff.body.surface import mesh_edges
from hmdiff.errors import UserError
from hmdiff.evidence import DISTANCE, doubts, torn_share
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.pipeline import HMDiffPipeline


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    pipe = small_pipeline()
    pipe.source = Source()
    return pipe


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)


def test_every_kind_of_photo_gives_the_same(pipe: HMDiffPipeline, photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    few = {"num_hypotheses": 2, "num_inference_steps": 2}
    first = pipe(photo, **few)
    assert len(first.people) == 2 and first.focal[0] == pytest.approx(np.hypot(160, 90))
    assert first.principal_point.tolist() == [[80, 45]] * 2  # the photo's, not the crop's
    for other in (Image.fromarray(photo), tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert torch.equal(pipe(other, **few).vertices, first.vertices)
    both = pipe([photo, tmp_path / "photo.png"], **few)
    assert len(both.people) == 4 and [number for _, number in both.photos] == [0, 1, 0, 1]
    torch.testing.assert_close(both.vertices[2:], first.vertices, rtol=1e-4, atol=2e-4)  # fits of an untrained mesh
    alone, both = (pipe(of, surface="vertices", **few) for of in (photo, [photo, photo]))
    torch.testing.assert_close(both.vertices[2:], alone.vertices, rtol=1e-4, atol=1e-5)
    assert first.guidance is not None  # DAT, as on the command line


def test_what_is_no_photo_is_said(pipe: HMDiffPipeline, photo: np.ndarray, tmp_path: Path) -> None:
    for wrong in (photo[..., 0], photo.astype(np.float32), photo[:0]):
        with pytest.raises(UserError, match=r"a path, a PIL image, or uint8 RGB of shape \(H, W, 3\)"):
            pipe(wrong)
    with pytest.raises(UserError, match="the list is empty"):
        pipe([])
    with pytest.raises(UserError, match="no such picture"):
        pipe(tmp_path / "gone.jpg")


def test_people_have_cameras_and_parameters(pipe: HMDiffPipeline, photo: np.ndarray) -> None:
    output = pipe(photo, num_hypotheses=2, num_inference_steps=1)
    person = output.people[1]
    homogeneous = person.camera_vertices @ person.intrinsics.mT
    before = homogeneous[..., 2] > 0.1  # an untrained model's body may reach behind the camera
    assert before.float().mean() > 0.2
    expected = homogeneous[..., :2] / homogeneous[..., 2:]
    torch.testing.assert_close(person.pixels[before], expected[before], rtol=1e-4, atol=1e-2)
    found = person.to_smpl()
    pose = torch.cat([found["global_orient"][:, None], found["body_pose"]], 1)
    bodies = pipe.body(found["betas"], axis_angle_to_matrix(pose), found["transl"])
    torch.testing.assert_close(bodies.vertices, person.camera_vertices, rtol=0, atol=1e-4)
    assert [len(each["betas"]) for each in output.to_smpl()] == [2, 2]
    raw = pipe(photo, num_hypotheses=1, num_inference_steps=1, surface="vertices")
    with pytest.raises(UserError, match="has no bodies"):
        raw.people[0].to_smpl()


@pytest.mark.slow
def test_saving_never_replaces_an_input(
    pipe: HMDiffPipeline, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hmdiff.viz.sheets.hypotheses_sheet", "hmdiff.viz.spread.spread_sheet"):
        monkeypatch.setattr(name, lambda *args, **kwargs: np.zeros((4, 4, 3), np.uint8))
    Image.fromarray(photo).save(tmp_path / "photo_0.png")
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    output = pipe(tmp_path / "photo.jpg", num_hypotheses=1, num_inference_steps=1)
    with pytest.raises(UserError, match=r"photo_0\.png: is there already and was not written by hmdiff"):
        output.save(tmp_path)
    written = output.save(tmp_path / "out")
    assert [path.name for path in written] == ["photo_0.npz", "photo_1.npz"]
    with np.load(written[1], allow_pickle=False) as arrays:
        assert arrays["source"] == "heatmaps of the test source" and arrays["person"] == 1
        np.testing.assert_allclose(arrays["intrinsics"], output.people[1].intrinsics, rtol=1e-6)
        keypoints = torch.from_numpy(arrays["keypoints"] + arrays["translation"][:, None])
        before = (keypoints[..., 2] > 0.1).numpy()
        seen = output.people[1].project(keypoints).numpy()
        np.testing.assert_allclose(arrays["keypoints_2d"][before], seen[before], rtol=1e-4)
    output.save(tmp_path / "out")  # replaces its own files
    with pytest.raises(UserError, match="save needs the photo"):
        pipe(heatmaps=Source().estimate(photo).heatmaps, num_hypotheses=1, num_inference_steps=1).people[0].save("x")


def test_keypoints_beside_a_photo_are_used(pipe: HMDiffPipeline, photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    points = [[60 + 2 * index, 20 + 3 * index, 1] for index in range(17)]
    (tmp_path / "photo_keypoints.json").write_text(json.dumps({"keypoints_coco17": points}))
    output = pipe(tmp_path / "photo.png", num_hypotheses=1, num_inference_steps=1)
    assert len(output.people) == 1 and "photo_keypoints.json" in output.photos[0][0].source


def test_bfloat16_computes_nearly_the_same(pipe: HMDiffPipeline, photo: np.ndarray, tmp_path: Path) -> None:
    few = {"num_hypotheses": 1, "num_inference_steps": 1}
    pipe.save_pretrained(tmp_path)
    loaded = HMDiffPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and pipe.dtype == torch.float32
    exact = pipe(photo, **few)
    try:
        rounded = pipe.to(torch.bfloat16)(photo, **few)
    finally:
        pipe.to(dtype=torch.float32)
    assert rounded.vertices.dtype == torch.float32 and not torch.equal(rounded.vertices, exact.vertices)
    assert (rounded.vertices - exact.vertices).norm(dim=-1).mean() < 0.1
    with pytest.raises(UserError, match=r"choose torch\.float32 or"):
        pipe.to(dtype=torch.int8)


def test_what_does_not_fit_its_evidence_is_said(pipe: HMDiffPipeline) -> None:
    assert doubts(DISTANCE * 90, 100.0, 20.0, 0.05, 0.001) == ""
    said = doubts(30.0, 100.0, 60.0, 0.3, 0.02)
    for words in ("30 px from the photo's (30 % of the crop)", "than 60 mm", "30 % of the mesh's edges", "gap of 20"):
        assert words in said
    template = pipe.body.v_template
    edges = mesh_edges(pipe.body.faces)
    assert torn_share(template[None], template, edges).item() == 0
    assert torn_share(template + 0.1 * torch.randn_like(template), template, edges) > 0.5
