"""The command line: its outputs, independence of the batch, and reuse of finished results."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL, small_pipeline

import hmdiff
from hmdiff.body.body import load_body
from hmdiff.cli import arguments
from hmdiff.cli import main as cli
from hmdiff.cli.main import COMMANDS, build_parser, main
from hmdiff.errors import UserError
from hmdiff.estimators.people import crops, read_people
from hmdiff.files.outputs import output_names
from hmdiff.heatmaps import Crop, Heatmaps, crop_from_box, heatmaps_from_keypoints, read_keypoints, save_heatmaps

REPOSITORY = Path(__file__).resolve().parents[2]
POSE = np.array(
    [  # COCO-17, x and y in pixels of a 120 x 200 photo
        [60, 30],
        [64, 26],
        [56, 26],
        [69, 29],
        [51, 29],
        [80, 55],
        [40, 55],
        [90, 85],
        [30, 85],
        [92, 112],
        [28, 112],
        [72, 110],
        [48, 110],
        [74, 145],
        [46, 145],
        [76, 180],
        [44, 180],
    ]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    small_pipeline().save_pretrained(folder)
    return folder


def make_photo(folder: Path, name: str, shifts: tuple[int, ...] = (0,), width: int = 120) -> Path:
    """A grey photo with the JSON of one person per shift beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 200), (120, 130, 140)).save(folder / f"{name}.png")
    people = [np.column_stack([POSE + np.array([shift, 0]), np.ones(17)]).tolist() for shift in shifts]
    (folder / f"{name}.json").write_text(json.dumps({"keypoints_coco17": people}))
    return folder / f"{name}.png"


@pytest.fixture
def quick_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the slow drawing, which the viz tests and the demo test cover."""
    for name in ("hmdiff.viz.sheets.hypotheses_sheet", "hmdiff.viz.spread.spread_sheet"):
        monkeypatch.setattr(name, lambda *args, **kwargs: np.zeros((4, 4, 3), np.uint8))


def sample(checkpoint: Path, output: Path, *words: Any) -> int:
    quick = ["--num-hypotheses", "2", "--steps", "2", "--device", "cpu"]
    return main(["sample", *map(str, words), "--checkpoint", str(checkpoint), "--output", str(output), *quick])


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_help_is_quick_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from hmdiff.cli.main import build_parser; build_parser(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert not {"torch", "numpy", "omegaconf", "rich", "tqdm"} & set(run.stdout.split())

    parts = ("licensed", "checkpoint", "estimator")
    for words in [[name] for name in COMMANDS] + [["prepare", part] for part in parts]:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert f"example:\n  hmdiff {' '.join(words)}" in text, words


def test_every_option_says_its_default() -> None:
    def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        return [parser, *(p for action in below for child in action.choices.values() for p in parsers(child))]

    for parser in parsers(build_parser()):
        parser.format_help()  # adds the defaults to the help texts
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and not action.required:
                assert "default:" in (action.help or ""), (parser.prog, action.dest)


def test_the_names_of_samplers_are_the_schedulers() -> None:
    from hmdiff.diffusion.schedule import SCHEDULER_NAMES
    from hmdiff.names import SAMPLERS

    assert set(SAMPLERS) == set(SCHEDULER_NAMES)


def test_the_package_gives_its_names_when_asked() -> None:
    from hmdiff.pipeline import HMDiffPipeline, MeshOutput

    assert hmdiff.HMDiffPipeline is HMDiffPipeline and hmdiff.MeshOutput is MeshOutput and hmdiff.Heatmaps is Heatmaps
    assert set(hmdiff.__all__) <= set(dir(hmdiff))
    with pytest.raises(AttributeError, match="Pipelines"):
        _ = hmdiff.Pipelines


@pytest.mark.parametrize("tool", ["train", "sample", "evaluate", "demo", "prepare", "sweep", "ablate"])
def test_tools_are_the_commands(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(cli, "main", lambda words: words)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", "--x"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "tools" / f"{tool}.py"), run_name="__main__")
    assert stop.value.code == [tool, "--x"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_sheet")
def test_sample_writes_everyone_the_same_whoever_is_asked_for_with_them(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_photo(tmp_path, "one")
    two = make_photo(tmp_path, "two.people", (0, 70), width=200)
    assert sample(checkpoint, tmp_path / "all", one, two) == 0
    assert "3 of 3 people" in capsys.readouterr().out
    names = ("one", "two.people_0", "two.people_1")
    expected = {f"{name}{kind}" for name in names for kind in (".npz", ".html", ".obj", ".glb", ".png", "_spread.png")}
    expected |= {"one_scene.glb", "two.people_scene.glb", "results.jsonl"}
    assert {path.name for path in (tmp_path / "all").iterdir()} == expected
    lines = [json.loads(line) for line in (tmp_path / "all" / "results.jsonl").read_text().splitlines()]
    assert [line["npz"] for line in lines] == ["one.npz", "two.people_0.npz", "two.people_1.npz"]
    assert [line["people"] for line in lines] == [1, 2, 2]

    assert sample(checkpoint, tmp_path / "alone", two) == 0
    together, alone = (arrays(tmp_path / folder / "two.people_1.npz") for folder in ("all", "alone"))
    assert together.keys() == alone.keys()
    assert together.pop("body") == alone.pop("body") == "free"
    assert together.pop("photo") == alone.pop("photo") == str(two)
    assert together.pop("joint_names").tolist() == alone.pop("joint_names").tolist() == list(load_body().joint_names)
    assert together["seed"] == 0 and together["photo_size"].tolist() == [200, 200] and together["person"] == 1
    for name, value in together.items():
        if value.dtype.kind == "U":
            assert np.array_equal(value, alone[name]), name
        else:
            np.testing.assert_allclose(value, alone[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert sample(checkpoint, tmp_path / "other", two, "--seed", 1) == 0
    other = arrays(tmp_path / "other" / "two.people_1.npz")
    assert np.abs(other["vertices"] - alone["vertices"]).max() > 1e-3

    people, faces = len(alone["spread_mm"]), alone["faces"]
    assert alone["vertices"].shape == (2, people, 3) and alone["joints"].shape == (2, 24, 3)
    assert alone["keypoints"].shape == (2, 26, 3) and faces.max() == people - 1
    assert alone["camera"].shape == (3,) and alone["translation"].shape == (2, 3)
    assert alone["selected"] in (0, 1) and alone["modes"].shape == (2,)
    np.testing.assert_allclose(alone["mode_weights"], [0.5, 0.5])
    np.testing.assert_allclose(alone["focal"], np.hypot(200, 200), rtol=1e-6)
    np.testing.assert_allclose(alone["principal_point"], [100, 100])
    spread = np.linalg.norm(alone["vertices"] - alone["vertices"].mean(0), axis=-1).mean(0) * 1000
    np.testing.assert_allclose(alone["spread_mm"], spread, rtol=1e-3)

    import trimesh

    scene = trimesh.load_scene(tmp_path / "alone" / "two.people_1.glb")
    assert set(scene.geometry) == {"mean", "hypothesis_00", "hypothesis_01"}
    everybody = trimesh.load_scene(tmp_path / "alone" / "two.people_scene.glb")
    assert set(everybody.geometry) == {"person_0", "person_1"}
    placed = alone["vertices"].mean(0) + alone["translation"].mean(0)
    np.testing.assert_allclose(everybody.geometry["person_1"].vertices * [1, -1, -1], placed, atol=1e-4)
    assert everybody.geometry["person_1"].visual.material.metallicFactor == 0
    mean = trimesh.load_mesh(tmp_path / "alone" / "two.people_1.obj", process=False)
    np.testing.assert_allclose(mean.vertices * [1, -1, -1], alone["vertices"].mean(0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_sheet")
def test_focal_and_sampler_reach_the_pipeline(checkpoint: Path, tmp_path: Path) -> None:
    photo = make_photo(tmp_path, "one")
    found = {}
    options: dict[str, list[Any]] = {"a": [], "b": ["--focal", 600], "c": ["--sampler", "ddpm"], "d": ["--eta", 1]}
    for name, words in options.items():
        assert sample(checkpoint, tmp_path / name, photo, *words) == 0
        found[name] = arrays(tmp_path / name / "one.npz")
    assert found["a"]["focal"] == pytest.approx(np.hypot(120, 200)) and found["b"]["focal"] == 600
    for name in ("b", "c", "d"):  # another focal length rotates the lines of sight, along which the fit is free
        assert np.abs(found[name]["vertices"] - found["a"]["vertices"]).max() > 1e-4, name


@pytest.mark.slow
@pytest.mark.usefixtures("quick_sheet")
def test_one_bad_photo_does_not_keep_the_others(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, again = make_photo(tmp_path, "good"), make_photo(tmp_path / "b", "good")
    bad = make_photo(tmp_path, "bad")
    bad.write_bytes(b"not a picture")
    bare = make_photo(tmp_path, "bare")
    bare.with_suffix(".json").unlink()
    assert sample(checkpoint, tmp_path / "out", bad, good, bare, again) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert [line.split(":")[2].strip() for line in lines] == [str(bad), str(bare)]
    assert {path.stem for path in (tmp_path / "out").glob("*.npz")} == {f"{tmp_path.name}_good", "b_good"}


def test_heatmaps_win_and_keypoints_are_drawn(tmp_path: Path) -> None:
    photo = make_photo(tmp_path, "one")
    shifted = make_photo(tmp_path / "other", "one", (15,))
    maps = heatmaps_from_keypoints(read_keypoints(shifted.with_suffix(".json")))
    save_heatmaps(tmp_path / "one_heatmaps.npz", maps)

    found = read_people(photo)
    assert torch.equal(found.heatmaps.center, maps.center)
    np.testing.assert_allclose(found.points[0][0][:, :2], POSE, atol=1e-4)
    assert not torch.equal(read_people(photo, photo.with_suffix(".json")).heatmaps.center, maps.center)

    photo.with_suffix(".json").unlink()
    points, names = read_people(photo).points[0]
    places = {name: point for name, point in zip(names, points.tolist(), strict=True) if point[2] > 0}
    assert len(places) == 17
    x, y, confidence = places["left_wrist"]
    # One heatmap pixel is three photo pixels; the refined peak is within a small fraction of it.
    assert abs(x - 107) < 0.5 and abs(y - 112) < 0.5 and confidence > 0.9


def test_a_box_sets_the_crop(tmp_path: Path) -> None:
    photo = make_photo(tmp_path, "one")
    center, side = crop_from_box(torch.tensor([[10.0, 20.0, 100.0, 190.0]]))
    found = read_people(photo, box=(10, 20, 100, 190)).heatmaps
    assert torch.equal(found.center, center) and torch.equal(found.side, side)


def test_crops_follow_the_photo() -> None:
    rows, columns = np.mgrid[0:90, 0:120]
    ramp = np.stack([2 * columns, 2 * rows, 0 * rows], -1).astype(np.uint8)
    crop_of = Crop.of(torch.tensor([[50.0, 40.0]]), torch.tensor([40.0]))
    maps = Heatmaps(torch.ones(1, 26, 64, 64), torch.ones(1, 26, dtype=torch.bool), crop_of)
    crop = crops(ramp, maps, 20)[0]
    # Pixel j of the crop covers photo pixels 30 + 2j and 31 + 2j, with mean 30.5 + 2j.
    expected = 2 * (30.5 + 2 * torch.arange(20.0))
    assert (crop[0] * 255 - expected).abs().max() < 1.5
    assert (crop[1] * 255 - (expected - 2 * 10)[:, None]).abs().max() < 1.5


def test_output_names_are_their_own(tmp_path: Path) -> None:
    photos = [make_photo(tmp_path, "a_1"), make_photo(tmp_path, "a", (0, 70), 200), make_photo(tmp_path / "b", "a_1")]
    people = [read_people(photo) for photo in photos]
    names = output_names(photos, [len(photo.heatmaps) for photo in people])
    here = tmp_path.name
    assert names == {(0, 0): f"{here}_a_1", (1, 0): "a_0", (1, 1): "a_1", (2, 0): "b_a_1"}


@pytest.mark.slow
def test_demo(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hmdiff.viz.sheets as pictures
    import hmdiff.viz.spread as spread_picture

    monkeypatch.setattr(pictures, "hypotheses_sheet", functools.partial(pictures.hypotheses_sheet, height=80))
    monkeypatch.setattr(spread_picture, "spread_sheet", functools.partial(spread_picture.spread_sheet, height=80))
    words = ["--checkpoint", str(checkpoint), "--num-hypotheses", "1", "--steps", "1", "--output", str(tmp_path)]
    assert main(["demo", *words]) == 0
    text = capsys.readouterr().out
    assert "hmdiff sample photo.jpg" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".html", ".obj", ".glb", ".png"}
    from hmdiff.cli.demo import demo_photo

    with Image.open(tmp_path / f"{demo_photo()[0].stem}.png") as picture:
        assert min(picture.size) > 100  # two rows


@pytest.mark.slow
def test_evaluate_is_not_done_twice(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import hmdiff.evaluate.evaluation as module
    import hmdiff.evaluate.mean_mesh as mean_mesh

    # The data's smallest block is 32 people; a mean over one block suffices here.
    few = functools.partial(mean_mesh.mean_mesh_errors, training_people=32)
    monkeypatch.setattr(mean_mesh, "mean_mesh_errors", few)
    calls = []
    real = module.evaluate

    def counted(*words: Any, **options: Any) -> Any:
        calls.append(words[2])
        return real(*words, **options)

    monkeypatch.setattr(module, "evaluate", counted)
    own = tmp_path / "own"
    small_pipeline().save_pretrained(own)
    few = ["--people", "4", "--num-hypotheses", "2", "--steps", "1"]
    words = ["evaluate", "--checkpoint", str(checkpoint), str(own), *few, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert calls == ["test", "test"]
    report = json.loads((tmp_path / "out" / "small_test.json").read_text())
    for kind in ("first", "mean", "oracle"):
        value = report["errors"]["pve"][kind]
        assert value["low"] <= value["value"] <= value["high"]
        assert f"{value['value']:.1f} (" in table
    assert "mean mesh" in table and "oracle of 2" in table

    assert main(words) == 0
    assert calls == ["test", "test"]
    small_pipeline("model.depth=2").save_pretrained(own)  # another model with the same name
    assert main(words) == 0 and len(calls) == 3
    assert main([*words, "--seed", "5"]) == 0 and len(calls) == 5


def test_labels_tell_checkpoints_apart() -> None:
    assert arguments.labels(["runs/a/pipeline", "b", "runs/b"]) == ["a", "b", "b-2"]


def test_train_takes_values_before_and_after_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmdiff.train.loop

    seen = []

    class Stop(UserError): ...

    def trainer(config: Any) -> None:
        seen.append(config)
        raise Stop("enough")

    monkeypatch.setattr(hmdiff.train.loop, "Trainer", trainer)
    assert main(["train", "seed=3", "--config", "quickstart", "training.steps=7", f"output={tmp_path}"]) == 2
    assert (seen[0].seed, seen[0].training.steps, seen[0].name) == (3, 7, "quickstart")


@pytest.mark.slow
def test_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", *SMALL, "output=here"]) == 0
    text = capsys.readouterr().out
    assert "parameters" in text and "memory" in text and "would write to here/" in text
    assert not list(tmp_path.iterdir())


def test_info_and_bench(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hmdiff.pipeline import HMDiffPipeline

    assert main(["info", str(checkpoint)]) == 0
    count = sum(p.numel() for p in HMDiffPipeline.from_pretrained(checkpoint).model.parameters())
    text = capsys.readouterr().out
    assert f"parameters   {count:,}" in text and "27 patches of 16" in text
    few = ["--repeats", "1", "--num-hypotheses", "1", "--steps", "1"]
    assert main(["bench", "--config", "quickstart", *SMALL, *few]) == 0
    text = capsys.readouterr().out
    assert f"{count:,} parameters" in text and "ms an image" in text and "GB" in text
    assert re.search(r"[\d.]+ GFLOP of products and convolutions, at \d+% of a matrix product's rate", text)


def test_a_training_folder_is_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pipeline").symlink_to(checkpoint)
    assert arguments.checkpoint_folder(str(tmp_path / "run")) == tmp_path / "run" / "pipeline"
    assert arguments.checkpoint_folder(str(checkpoint)) == checkpoint


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hmdiff.cli import doctor

    monkeypatch.setattr(doctor, "ASSETS", ("body.npz",))
    assert main(["doctor"]) == 0
    assert "body.npz" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "ASSETS", ("nothing.npz",))
    assert main(["doctor"]) == 2
    assert "MISSING  nothing.npz" in capsys.readouterr().out


@pytest.mark.slow
def test_the_sample_is_a_rendered_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.build import sample as maker

    monkeypatch.setattr(maker, "SIZE", (96, 72))
    maker.main(["--output", str(tmp_path)])
    people = read_people(tmp_path / "sample.jpg")
    assert people.size == (72, 96) and len(people.heatmaps) == 1
    picture, points, share = maker.render_person(maker.SEED)
    assert 0.05 < share < 0.5 and picture.shape == (3, 96, 72)
    assert ((points[:, :2] > 0) & (points[:, :2] < torch.tensor([72, 96]))).all()
    assert points[0, 1] < points[11, 1] < points[15, 1]  # upright: nose above hip above ankle


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hmdiff.cli import doctor

    def stop(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "hmdiff: interrupted\n"


def test_traceback_when_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", "nowhere/x.yaml"]
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("hmdiff: error: nowhere/x.yaml")
