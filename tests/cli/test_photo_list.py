"""Folders and patterns of photos, results.jsonl, output names and protection of existing files."""

from __future__ import annotations

import errno
import json
import os
from argparse import Namespace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from hmdiff.cli.main import main
from hmdiff.cli.photo_list import Results, photos_of
from hmdiff.cli.sample import Run, one_photo_s, settings_of
from hmdiff.errors import UserError
from hmdiff.files.outputs import output_names, photo_names, protect_inputs
from hmdiff.files.resources import asset_path
from hmdiff.heatmaps.cameras import PhotoCamera


def pictures(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    return [folder / name for name in names]


def test_folders_and_patterns(tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "in", "b.png", "a.jpg")
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert photos_of([tmp_path / "in"]) == ([b, a], True)
    assert photos_of([Path(f"{tmp_path}/*/*.png")]) == ([a], True)
    assert photos_of([tmp_path / "in", a]) == ([b, a], True)  # once
    assert photos_of([a, tmp_path / "gone.jpg"]) == ([a, tmp_path / "gone.jpg"], False)  # refused on reading
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures or videos in it"):
        photos_of([tmp_path / "empty"])
    with pytest.raises(UserError, match="no file fits this pattern"):
        photos_of([tmp_path / "*.jpg"])


def test_pictures_of_an_earlier_result_are_no_photos(tmp_path: Path) -> None:
    (photo,) = pictures(tmp_path, "a.jpg")
    pictures(tmp_path, "a.png", "a_spread.png")
    np.savez(tmp_path / "a.npz", spread_mm=np.zeros(2))
    assert photos_of([tmp_path]) == ([photo], True)


def test_videos_of_a_folder_and_their_overlays(tmp_path: Path) -> None:
    pictures(tmp_path, "b.jpg")
    for name in ("a.MOV", "c.mp4", "c_overlay.mp4", "d_overlay.mp4"):
        (tmp_path / name).write_bytes(b"x")
    np.savez(tmp_path / "c_track_0.npz", spread_mm=np.zeros(2))  # marks c_overlay.mp4 as an earlier result
    found = ["a.MOV", "b.jpg", "c.mp4", "d_overlay.mp4"]
    assert photos_of([tmp_path]) == ([tmp_path / name for name in found], True)


def test_other_sources_are_other_settings() -> None:
    """Results of one estimator or keypoint file do not count as done for another."""
    given = {"pose": "embedded", "keypoints": [], "intrinsics": None}
    usual = settings_of(Namespace(**given))
    assert "keypoints" not in usual and json.loads(json.dumps(usual)) == usual
    for other in ({"pose": "human"}, {"keypoints": [Path("all.json")]}, {"intrinsics": Path("K.json")}):
        found = settings_of(Namespace(**(given | other)))
        assert found != usual and json.loads(json.dumps(found)) == found


def test_photos_of_two_sizes_and_one_focal_length_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The centre of a photo that was cut out of another is not where the optical axis meets it."""

    def said(**given: object) -> str:
        options = Namespace(**{"focal": 768.0, "principal_point": None, "intrinsics": None, **given})
        run = Run(options, None, lambda photo: PhotoCamera(), None)  # type: ignore[arg-type]
        for name, size in (("whole", (640, 425)), ("upright", (425, 640)), ("crop", (390, 425)), ("other", (9, 9))):
            run._compare_sizes(Namespace(photo=Path(f"{name}.jpg"), size=size))  # type: ignore[arg-type]
        return capsys.readouterr().err

    found = said()
    assert found.count("with one --focal") == 1 and "--principal-point" in found
    assert "whole.jpg has 640 x 425 pixels, crop.jpg has 390 x 425 pixels" in found
    assert not said(principal_point=(70.0, 212.0)) and not said(focal=None) and not said(intrinsics=Path("k.json"))


def test_names_of_photos_that_share_one(tmp_path: Path) -> None:
    photos = [Path("/x/seq_a/0.jpg"), Path("/x/seq_b/0.jpg"), Path("/x/c.jpg")]
    assert photo_names(photos) == ["seq_a_0", "seq_b_0", "c"]
    assert photo_names([Path("/a/x/0.jpg"), Path("/b/x/0.jpg")]) == ["a_x_0", "b_x_0"]
    assert photo_names([Path("/a/0.jpg"), Path("/a/0.png"), Path("/a/0.jpg")]) == ["a_0", "a_0-2", "a_0-3"]
    found = output_names([Path("/a.jpg"), Path("/a_1.jpg")], [2, 1], taken=["a_0"])
    assert list(found.values()) == ["a_0-2", "a_1", "a_1-2"]


@pytest.mark.parametrize("photo", ["photo.png", "photo_spread.png", "photo_0.png"])
def test_an_output_that_is_an_input_is_refused(tmp_path: Path, photo: str) -> None:
    pictures(tmp_path, "photo.jpg", photo)
    with pytest.raises(UserError, match=f"{photo}: is read, and would be replaced"):
        protect_inputs(tmp_path, [tmp_path / "photo.jpg"], [tmp_path / "photo.jpg", tmp_path / photo])
    protect_inputs(tmp_path / "elsewhere", [tmp_path / "photo.jpg"], [tmp_path / photo])


def test_files_of_others_are_not_replaced_and_ours_are(tmp_path: Path) -> None:
    (photo,) = pictures(tmp_path, "photo.jpg")
    for suffix in (".obj", ".glb", ".npz", "_scene.glb"):
        (tmp_path / f"photo{suffix}").write_bytes(b"of another program")
        with pytest.raises(UserError, match="was not written by hmdiff"):
            protect_inputs(tmp_path, [photo], [photo])
        (tmp_path / f"photo{suffix}").unlink()
    (tmp_path / "photography.obj").write_bytes(b"another name")
    np.savez(tmp_path / "photo.npz", spread_mm=np.zeros(2))
    (tmp_path / "photo.obj").write_bytes(b"ours")
    (tmp_path / "photo_scene.glb").write_bytes(b"ours")
    protect_inputs(tmp_path, [photo], [photo])


def test_a_scene_is_ours_where_its_first_person_could_not_be_written(tmp_path: Path) -> None:
    (photo,) = pictures(tmp_path, "photo[1].jpg")
    (tmp_path / "photo[1]_scene.glb").write_bytes(b"ours")
    with pytest.raises(UserError, match="was not written by hmdiff"):
        protect_inputs(tmp_path, [photo], [photo])
    np.savez(tmp_path / "photo[1]_1.npz", spread_mm=np.zeros(2))
    protect_inputs(tmp_path, [photo], [photo])


def test_an_error_of_the_system_is_one_photo_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk affects all photos; an unreadable photo only itself."""

    def read(photo: Path, *rest: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(photo))

    monkeypatch.setattr("hmdiff.cli.sample._read", read)
    options = Namespace(photos=[Path("a.jpg"), Path("b.jpg")], box=None)
    run = Run(options, None, lambda photo: PhotoCamera(), Results.open(tmp_path, {}))
    done: list[int] = []
    run.everything([(photo, None, None, photo.stem) for photo in options.photos], done.append)
    assert sum(done) == 2
    assert [line.split(":")[0] for line in run.failures] == ["a.jpg", "b.jpg"]
    assert "may not be read" in run.failures[0]
    with pytest.raises(OSError, match="No space"):
        one_photo_s(OSError(errno.ENOSPC, "No space left on device", "out/a.npz"))


def test_the_next_photos_are_read_while_these_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = {name: Event() for name in "abc"}
    sampled: list[str] = []

    def read(photo: Path, *rest: object) -> None:
        reading[photo.stem].set()
        raise UserError("nobody")

    def photos(run: Run, read: list[tuple[Path, str, object]]) -> None:
        ((photo, name, _),) = read
        assert name == "c" or reading[chr(ord(name) + 1)].wait(10)
        sampled.append(photo.stem)

    monkeypatch.setattr("hmdiff.cli.sample._read", read)
    monkeypatch.setattr("hmdiff.cli.sample.PHOTOS_AT_ONCE", 1)
    monkeypatch.setattr(Run, "photos", photos)
    options = Namespace(photos=[Path(f"{name}.jpg") for name in "abc"], box=None)
    run = Run(options, None, lambda photo: PhotoCamera(), Results.open(tmp_path, {}))
    run.everything([(photo, None, None, photo.stem) for photo in options.photos], lambda count: None)
    assert sampled == ["a", "b", "c"]


@pytest.mark.slow
def test_a_folder_of_several_parts_ends_with_a_line_about_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hmdiff.cli.sample.PHOTOS_AT_ONCE", 1)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        for suffix in (".jpg", ".json"):
            (folder / f"{name}{suffix}").write_bytes(asset_path(f"sample{suffix}").read_bytes())
    (folder / "c.jpg").write_bytes(b"no picture")
    options = ["--num-hypotheses", "2", "--steps", "1", "--guidance", "none", "--save", "npz"]
    assert main(["sample", str(folder), "--output", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().out
    assert said.count("1 of 1 people") == 2
    assert "in all 2 people in 3 photos" in said and "; 1 of them could not be done" in said


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    settings = {"seed": 0}
    results = Results.open(tmp_path, settings)
    a, b, c = Path("a.jpg"), Path("b.jpg"), Path("c.jpg")
    for name in ("a", "b_0"):
        (tmp_path / f"{name}.npz").write_bytes(b"")
    results.add(a, person=0, people=1, npz="a.npz")
    results.add(b, person=0, people=2, npz="b_0.npz")  # killed before the second person
    results.add(c, error="no person was found")
    with open(results.path, "a") as handle:
        handle.write('{"photo": "d.jpg", "per')
    again = Results.open(tmp_path, settings)
    assert [again.done(photo) for photo in (a, b, c, Path("d.jpg"))] == [True, False, False, False]
    assert not Results.open(tmp_path, {"seed": 1}).done(a)
    again.restart([b, c])
    left = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [line["photo"] for line in left] == ["a.jpg"] and again.names == {"a"}
    (tmp_path / "a.npz").unlink()
    assert not again.done(a)


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path: Path) -> None:
    (a, b, c), settings = pictures(tmp_path, "a.png", "b.png", "c.png"), {"seed": 0}
    results = Results.open(tmp_path, settings)
    results.add(a, person=0, people=1, npz="a.npz")
    results.add(b, person=0, people=1, npz="b.npz")
    results.path.write_bytes(results.path.read_bytes()[:-20])  # killed while writing b's line
    again = Results.open(tmp_path, settings)
    again.restart([b, c])
    again.add(b, person=0, people=1, npz="b.npz")
    assert [line["photo"] for line in map(json.loads, results.path.read_text().splitlines())] == [str(a), str(b)]


def test_a_name_that_is_not_utf8_is_written_and_found(tmp_path: Path) -> None:
    photo = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    results = Results.open(tmp_path, {})
    results.add(photo, person=0, people=1, npz="a.npz")
    (tmp_path / "a.npz").touch()
    again = Results.open(tmp_path, {})
    assert again.whole and again.done(photo)
