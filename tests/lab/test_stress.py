"""Stress maps: what a patch covers, that only the patch matters, the command on photos and synthetic people."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import free_body, people, small_pipeline

from hmdiff.body.skeletons import HALPE26
from hmdiff.cli.main import main
from hmdiff.cli.stress import crop_camera
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments, evaluate
from hmdiff.heatmaps import Crop, Heatmaps, gaussian_heatmaps
from hmdiff.lab.stress import (
    Subject,
    cover_depth,
    cover_heatmaps,
    cover_image,
    patch_grid,
    recover_covered,
    stress,
)
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.viz.overlays import overlay, overlay_all
from hmdiff.viz.stress import cut_out, draw_patch, hidden_sheet, map_over, stress_sheet

# Raw predicted meshes: those of an untrained model are no bodies, and which body is nearest depends on rounding. The
# commands below fit bodies.
QUICK = SamplingConfig(num_hypotheses=3, num_inference_steps=2, seed=1, surface="vertices")


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def subject_of(row: int = 2) -> Subject:
    sample = people(True).block("test", 0).map(lambda tensor: tensor[row : row + 1])
    photo = camera_arguments(sample)
    return Subject(
        as_heatmaps(sample), None, None, row, photo["photo_sizes"], photo["focal"], sample.vertices, sample.keypoints_3d
    )


def test_the_patch_goes_from_edge_to_edge() -> None:
    centres = patch_grid(3, 0.25)
    assert centres.tolist() == [[x, y] for y in (-0.75, 0.0, 0.75) for x in (-0.75, 0.0, 0.75)]
    assert patch_grid(1, 0.5).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0.2), "0 places of the patch a side"), ((3, 1.0), "patch: 1 of the crop's side; a share above 0 and below")],
)
def test_a_bad_grid_is_told(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        patch_grid(*arguments)


def test_the_patch_on_an_image_is_grey_and_covers_its_share() -> None:
    image = torch.rand(1, 3, 64, 64)
    covered = cover_image(image, torch.tensor([[0.0, 0.0], [-0.75, 0.75]]), 0.25)
    changed = (covered != image).any(1)
    assert changed.float().mean((1, 2)).tolist() == pytest.approx([1 / 16, 1 / 16])
    assert (covered.permute(0, 2, 3, 1)[changed] == 0.5).all()
    assert changed[0, 24:40, 24:40].all() and changed[1, 48:, :16].all()  # x to the left, y downwards


def test_joints_under_the_patch_are_gone_and_the_others_untouched() -> None:
    points = torch.zeros(1, 26, 2)
    points[0, :, 0] = torch.linspace(-0.9, 0.9, 26)
    confidence = torch.full((1, 26), 0.8)
    confidence[0, 3] = 0.0
    values = gaussian_heatmaps(points, confidence, 2.0)
    maps = Heatmaps(values, torch.ones(1, 26, dtype=torch.bool), Crop.of(torch.zeros(1, 2), torch.ones(1)))
    covered, taken = cover_heatmaps(maps, torch.tensor([[-0.7, 0.0], [0.0, 0.9], [0.0, 0.0]]), 0.3)
    expected = (points[0, :, 0] + 0.7).abs() <= 0.3
    expected[3] = False  # a joint that was not detected cannot be removed
    assert torch.equal(taken[0], expected) and not taken[1].any()
    assert (covered.values[0][expected] == 0).all() and torch.equal(covered.values[0][~expected], values[0][~expected])
    assert torch.equal(covered.values[1], values[0]) and covered.valid.all()
    whole, taken = cover_heatmaps(maps, torch.zeros(1, 2), 0.99)
    assert taken.sum() == 25 and 0 < whole.values.sum() < 1e-5  # nothing is left, but the heatmaps are valid


def test_a_patch_that_hides_nothing_moves_nothing(pipe: HMDiffPipeline) -> None:
    subject = subject_of()
    centres = torch.tensor([[-0.99, -0.99], [0.0, 0.0]])
    found = stress(pipe, subject, centres, 0.008, QUICK)
    assert not found.removed_joints[0].any()
    assert found.displacement[0] < 1e-2 and found.spread[0] == pytest.approx(found.unoccluded_spread, rel=1e-4)
    assert found.error is not None and found.error[0] == pytest.approx(found.unoccluded_error, rel=1e-4)


@pytest.mark.slow
def test_maps_do_not_depend_on_the_chunks_and_are_those_of_single_calls(pipe: HMDiffPipeline) -> None:
    subject, centres = subject_of(), patch_grid(3, 0.35)
    told: list[int] = []
    whole = stress(pipe, subject, centres, 0.35, QUICK, told.append)
    parts = stress(pipe, subject, centres, 0.35, QUICK, batch_size=2)
    assert sum(told) == 9
    for name in ("displacement", "spread", "error"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-3, atol=1e-2)
    taken = whole.removed_joints.any(1)
    assert taken.any() and not taken.all() and whole.displacement[taken].min() > 10 * whole.displacement[~taken].max()
    assert whole.map(whole.displacement)[2, 1] == whole.displacement[7]
    one, taken = recover_covered(pipe, subject, centres[4:5], 0.35, QUICK)
    assert torch.equal(taken[0], whole.removed_joints[4])
    moved = (one.mean_vertices - whole.unoccluded.mean_vertices).norm(dim=-1).mean() * 1000
    assert float(moved) == pytest.approx(float(whole.displacement[4]), rel=1e-3)
    assert float(one.spread.mean()) == pytest.approx(float(whole.spread[4]), rel=1e-3)


def test_the_error_is_that_of_the_evaluation(pipe: HMDiffPipeline) -> None:
    sample = people(True).block("test", 0).map(lambda tensor: tensor[:2])
    alone = [stress(pipe, subject_of(row), patch_grid(1, 0.1), 0.1, QUICK).unoccluded_error for row in range(2)]
    report = evaluate(pipe, people(True), "test", 2, QUICK)
    assert len(sample) == 2
    assert np.mean(alone) == pytest.approx(report["errors"]["pve"]["mean"]["value"], rel=1e-3)


@pytest.mark.slow
def test_an_image_model_sees_the_grey_patch() -> None:
    pipe = small_pipeline("model.inputs=image", "model.backbone=resnet18", "model.image_size=64")
    subject = dataclasses.replace(subject_of(), image=torch.rand(1, 3, 64, 64))
    # Away from every joint, so that the heatmaps, and so the camera, are unchanged.
    found = stress(pipe, subject, torch.tensor([[-0.9, -0.9]]), 0.1, QUICK)
    assert not found.removed_joints.any() and found.displacement[0] > 1e-3
    blind = stress(small_pipeline(), subject, torch.tensor([[-0.9, -0.9]]), 0.1, QUICK)
    assert blind.displacement[0] < 1e-2  # this model reads only heatmaps and ignores the image


def test_a_depth_model_does_not_know_the_depth_under_the_patch() -> None:
    covered = cover_depth(torch.ones(1, 32, 32), torch.tensor([[0.0, 0.0], [0.9, 0.9]]), 0.25)
    assert covered.isnan().float().mean((1, 2)).tolist() == pytest.approx([1 / 16, (0.35 / 2) ** 2], abs=0.006)
    pipe = small_pipeline("model.depth_map=true")
    depth = torch.rand(1, 32, 32) + 2
    place = torch.tensor([[-0.9, -0.9]])  # away from every joint
    found = stress(pipe, dataclasses.replace(subject_of(), depth=depth), place, 0.1, QUICK)
    assert not found.removed_joints.any() and found.displacement[0] > 1e-3
    unknown = stress(pipe, subject_of(), place, 0.1, QUICK)  # unknown everywhere: nothing to cover
    assert unknown.displacement[0] < 1e-2 < (unknown.unoccluded.vertices - found.unoccluded.vertices).abs().max() * 1000


def test_the_map_is_drawn_where_the_patch_was() -> None:
    crop = np.full((100, 100, 3), 128, np.uint8)
    values = torch.zeros(9, 9)
    values[2, 6] = 100.0
    drawn = map_over(crop, values, 0.2, 0, 100).astype(float)
    x, y = ((np.array([0.4, -0.4]) + 1) * 50).astype(int)
    dark = drawn.sum(-1)
    assert np.unravel_index(dark.argmin(), dark.shape) == pytest.approx((y, x), abs=1)
    assert (drawn[0] == 128).all()  # no patch is centred at the very edge
    with pytest.raises(UserError, match=r"map: shape \(3, 4\) found"):
        map_over(crop, torch.zeros(3, 4), 0.2, 0, 1)
    patched = draw_patch(np.zeros((100, 100, 3), np.uint8), (0.5, 0.0), 0.25)
    assert (patched[38:62, 63:87] == 128).all() and (patched == 128).all(-1).mean() == pytest.approx(1 / 16, abs=0.005)
    sheet = stress_sheet(crop, [("moves", values), ("spreads", values + 50)], 0.2, (0.4, -0.4))
    assert sheet.shape[1] > 300 and sheet.dtype == np.uint8


def test_the_cut_out_shows_the_crop() -> None:
    photo = np.zeros((60, 80, 3), np.uint8)
    photo[20:40, 30:50] = 200
    side = torch.tensor([20.0])
    assert (cut_out(photo, Crop.of(torch.tensor([[40.0, 30.0]]), side), 40)[8:-8, 8:-8] == 200).all()
    corner = cut_out(photo, Crop.of(torch.zeros(1, 2), side), 40)
    assert (corner[:18, :18] > 200).all()  # light outside the photo
    turned = Crop.of(torch.tensor([[40.0, 20.0]]), side, torch.tensor([torch.pi / 2]))
    shown = cut_out(photo, turned, 40)  # its x axis points down the photo: horizontal edges become vertical
    assert (shown[4:-4, 24:-4] == 200).all() and (shown[4:-4, 4:16] == 0).all()


def test_bodies_are_drawn_where_a_turned_crop_shows_them() -> None:
    """Oracle: project with the photo's camera, then convert the pixel to the crop."""
    where = torch.tensor([[40.0, 30.0]]), torch.tensor([20.0]), torch.tensor([0.7])
    crop = Crop.of(*where, (80, 60), 90.0, (35.0, 33.0))
    points = torch.tensor([[0.1, -0.2, 3.0], [-0.3, 0.4, 2.5]])
    pixels = points[:, :2] / points[:, 2:] * 90 + torch.tensor([35.0, 33.0])
    expected = (crop.from_photo(pixels[None])[0] + 1) * 20
    turn, focal, principal = crop_camera(crop, 40)
    seen = points @ turn
    assert torch.allclose(seen[:, :2] / seen[:, 2:] * focal + torch.tensor(principal), expected, atol=1e-3)


@pytest.mark.slow
def test_translucent_bodies_agree_where_they_are_the_same() -> None:
    body, mesh = free_body()
    vertices, faces = body.v_template[mesh.coarse_ids], mesh.coarse_faces
    photo, shift = np.full((60, 60, 3), 90, np.uint8), torch.tensor([0.0, 0.0, 4.0])
    far = torch.tensor([0.6, 0.0, 4.0])
    colours = [(1.0, 0.2, 0.2), (0.2, 0.2, 1.0)]
    both = [torch.stack([vertices, vertices]), faces, torch.stack([shift, far]), 60.0, (30.0, 30.0)]
    one = overlay_all(photo, *both, colours)
    turned = overlay_all(photo, both[0], faces, torch.stack([far, shift]), 60.0, (30.0, 30.0), colours[::-1])
    assert np.abs(one.astype(int) - turned).max() <= 1  # independent of the order
    alone = overlay_all(photo, vertices[None], faces, shift[None], 60.0, (30.0, 30.0), colours[:1], opacity=1.0)
    solid = overlay(photo, vertices, faces, shift, 60.0, (30.0, 30.0), colours[0], opacity=1.0)
    inside = (alone != 90).any(-1) & (solid != 90).any(-1)
    assert inside.sum() > 100 and np.abs(alone[inside].astype(int) - solid[inside]).mean() < 25
    sheet = hidden_sheet(
        [(photo, both[0], both[2], torch.full((len(vertices),), 40.0))], faces, 60.0, (30.0, 30.0), ["seen"], shown=2
    )
    assert sheet.shape[1] > 3 * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, pipe: HMDiffPipeline) -> str:
    folder = tmp_path_factory.mktemp("stress") / "tiny"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "two.png")
    people = [[[x + 3 * (j % 4), 10 + 4 * j, 2] for j in range(17)] for x in (20, 80)]
    (tmp_path / "two.json").write_text(json.dumps({"keypoints": people}))
    return tmp_path / "two.png"


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hmdiff.cli.stress.SHOWN", 96)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pictures")
def test_the_command_on_a_photo_of_two(checkpoint: str, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photo.parent / "out"
    options = ["--places", "2", "--num-hypotheses", "2", "--steps", "1", "--checkpoint", checkpoint]
    picture = out / "p.jpg"
    assert main(["stress", str(photo), "--output", str(out), "--picture", str(picture), *options]) == 0
    assert {path.name for path in out.iterdir()} == {
        "two_0_stress.npz",
        "two_0_stress.png",
        "two_1_stress.npz",
        "two_1_stress.png",
        "p.jpg",
    }
    arrays = dict(np.load(out / "two_1_stress.npz"))
    assert arrays["moved_mm"].shape == arrays["spread_mm"].shape == (2, 2) and arrays["hidden"].shape == (4, 26)
    assert arrays["joints"].tolist() == list(HALPE26) and "error_mm" not in arrays
    text = capsys.readouterr().out
    assert "two_1 ->" in text and "p.jpg: two_0, spread" in text


@pytest.mark.slow
@pytest.mark.usefixtures("small_pictures")
def test_the_command_on_synthetic_people(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--places", "2", "--num-hypotheses", "2", "--steps", "1", "--checkpoint", checkpoint]
    arguments = ["stress", "--synthetic", "2", "--first", "3", "--output", str(tmp_path), *options]
    assert main([*arguments, "--guidance", "dat"]) == 0
    assert {path.name for path in tmp_path.glob("*.npz")} == {"test_0003_stress.npz", "test_0004_stress.npz"}
    arrays = dict(np.load(tmp_path / "test_0004_stress.npz"))
    assert arrays["error_mm"].shape == (2, 2) and arrays["clear_error_mm"] > 0
    assert "rank correlation of spread and error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither was given, a photo and --synthetic"),
        (["PHOTO", "--synthetic", "2"], "both were given"),
        (["--synthetic", "2", "--box", "1,2,3,4"], "--box is about a photo"),
        (["--synthetic", "2", "--pose", "human"], "--pose is about a photo"),
        (["PHOTO", "--picture", "p.gif"], "p.gif: pictures are saved as .png or .jpg"),
        (["PHOTO", "--patch", "1.5"], "patch: 1.5 of the crop's side; a share above 0 and below 1"),
        (["nowhere.jpg"], "nowhere.jpg: no such picture"),
        (["PHOTO", "--pose-checkpoint", "x.pth"], "weights without a model"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: str, photo: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(photo) if text == "PHOTO" else text for text in arguments]
    assert main(["stress", *arguments, "--checkpoint", checkpoint, "--output", str(photo.parent / "out")]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
