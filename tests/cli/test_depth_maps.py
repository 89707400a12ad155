"""`hmdiff sample --depth`: maps reach the model, cropped like the photo; invalid ones are refused by name."""

import argparse
import shutil

import numpy as np
import pytest
import torch
from small import small_pipeline

from hmdiff.cli.depth_maps import check_depth, depth_crops, with_depth
from hmdiff.cli.main import main
from hmdiff.errors import UserError
from hmdiff.estimators.depth_sources import crop_depth
from hmdiff.estimators.people import read_people
from hmdiff.files.resources import asset_path
from hmdiff.viz.canvas import read_picture
from hmdiff.viz.person_files import Report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A photo with keypoints, and checkpoints of a model with depth and of one without."""
    folder = tmp_path_factory.mktemp("depth")
    shutil.copy(asset_path("sample.jpg"), folder / "photo.jpg")
    shutil.copy(asset_path("sample.json"), folder / "photo.json")
    small_pipeline("model.depth_map=true").save_pretrained(folder / "reads")
    small_pipeline().save_pretrained(folder / "blind")
    return folder


@pytest.fixture
def scene(folders):
    height, width = read_picture(folders / "photo.jpg").shape[:2]
    y, x = np.mgrid[:height, :width]
    return (3 + x / width + np.where((x // 40 + y // 40) % 2, 0.5, 0.0)).astype(np.float32)


@pytest.fixture
def sampled(folders, monkeypatch):
    """Runs the command without slow images and fits; returns the exit code and the vertices that it would write."""
    written = []

    def write(output, row, photo, person, stem, *rest):
        written.append(output.vertices[row].numpy())
        np.savez(stem.with_name(stem.name + ".npz"), spread_mm=output.spread[row])  # marks hmdiff's own files
        return Report(f"{photo.photo} -> {stem}.npz (from {photo.source})", "", {})

    monkeypatch.setattr("hmdiff.viz.person_files.write_person", write)

    def run(*more):
        files = [str(folders / "photo.jpg"), "--checkpoint", str(folders / "reads"), "--output", str(folders / "out")]
        code = main(["sample", *files, "--num-hypotheses", "2", "--steps", "1", "--guidance", "none", *more])
        return code, written.pop() if code == 0 else None

    return run


@pytest.mark.slow
def test_depth_is_read_and_its_unit_does_not_matter(folders, sampled, scene, capsys):
    np.save(folders / "metres.npy", scene)
    np.savez(folders / "millimetres.npz", depth=1000 * scene.astype(np.float64))
    np.save(folders / "disparity.npy", -2 * scene + 9)
    _, without = sampled()
    assert "no depth" in capsys.readouterr().out
    results = [
        sampled("--depth", str(folders / file), *more)[1]
        for file, *more in (("metres.npy",), ("millimetres.npz",), ("disparity.npy", "--disparity"))
    ]
    assert np.abs(results[0] - without).max() > 1e-3
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=2e-4)
    assert "depth of" in capsys.readouterr().out
    shutil.copy(folders / "metres.npy", folders / "photo_depth.npy")
    try:
        _, found_beside = sampled()
    finally:
        (folders / "photo_depth.npy").unlink()
    assert np.array_equal(found_beside, results[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--disparity",), "--disparity says what the maps of --depth are, and none is given"),
        (("--depth", "estimator:"), "--depth estimator: names no model"),
        (("--depth", "a.npy", "b.npy"), "--depth: 2 files for 1 photos"),
        (("--depth", "estimator:x", "b.npy"), "give one estimator:MODEL for all photos"),
        (("--depth", "nothing.npy"), "nothing.npy: no such depth map"),
    ],
)
def test_what_cannot_be_is_refused(sampled, capsys, more, message):
    code, _ = sampled(*more)
    assert code == 2 and message in capsys.readouterr().err


def test_a_model_without_depth_refuses_it_by_name(folders, sampled, scene, capsys):
    np.save(folders / "metres.npy", scene)
    code, _ = sampled("--checkpoint", str(folders / "blind"), "--depth", str(folders / "metres.npy"))
    assert code == 2 and f"--depth: checkpoint {folders / 'blind'} reads no depth; leave" in capsys.readouterr().err
    assert sampled("--checkpoint", str(folders / "blind"))[0] == 0


def test_a_map_of_another_photo_is_refused(folders, sampled, scene, capsys):
    np.save(folders / "turned.npy", scene[: scene.shape[0] // 2])
    code, _ = sampled("--depth", str(folders / "turned.npy"))
    assert code == 2 and "give the map of this photo" in capsys.readouterr().err


def test_maps_of_a_batch_are_cut_by_each_person_s_crop(folders, scene, monkeypatch):
    known = read_people(folders / "photo.jpg")
    options = argparse.Namespace(
        depth=["estimator:x"], disparity=False, device="cpu", photos=[known.photo], checkpoint="c"
    )
    seen = []

    class Network:
        name = "x"

        def __init__(self, *arguments):
            seen.append(arguments)

        def __call__(self, images):
            seen.append(images)
            return torch.from_numpy(scene)[None]

    monkeypatch.setattr("hmdiff.estimators.depth_network.EstimatedDepth", Network)
    check_depth(options)
    (mapped,), failures = with_depth([known], small_pipeline("model.depth_map=true"), options)
    assert not failures and seen[0][0] == "x" and mapped.source.endswith("depth of x")
    assert seen[1].shape[1:] == (3, known.size[1], known.size[0]) and 0 <= seen[1].min() and seen[1].max() <= 1
    found = depth_crops([mapped, known], [(0, 0), (1, 0)])
    expected = crop_depth(torch.from_numpy(scene), known.size, known.heatmaps.crop, 64)
    assert torch.equal(found[:1].nan_to_num(-1), expected.nan_to_num(-1)) and found[1].isnan().all()
    with pytest.raises(UserError, match="checkpoint c reads no depth"):
        with_depth([known], small_pipeline(), options)
