"""Bad input of every kind: one line on stderr that names the problem and the remedy, exit code 2, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small import small_pipeline

from hmdiff.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
KEYPOINTS = [[60 + 3 * index, 20 + 9 * index, 1] for index in range(17)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A valid photo with valid keypoints: each test breaks one thing."""
    Image.new("RGB", (160, 200), (120, 130, 140)).save(tmp_path / "photo.png")
    (tmp_path / "photo.json").write_text(json.dumps({"keypoints_coco17": KEYPOINTS}))
    return tmp_path / "photo.png"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail; returns its single line."""

    def run(*words: Any) -> str:
        try:
            code: Any = main([str(word) for word in words])
        except SystemExit as stop:  # of argparse
            code = stop.code
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.startswith("hmdiff: error: ") and error.endswith("\n") and error.count("\n") == 1, error
        return error

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- photos and keypoints


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"this is text", "not a picture"), (b"", "is empty"), (None, "no such picture"), ("half", "damaged picture")],
)
def test_photo(photo: Path, fails: Callable[..., str], content: Any, message: str, tmp_path: Path) -> None:
    if content is None:
        photo.unlink()
    elif content == "half":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photo)
        photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    else:
        photo.write_bytes(content)
    line = fails("sample", photo, "--output", tmp_path / "out")
    assert str(photo) in line and message in line
    assert not files_of(tmp_path / "out")  # a single bad photo writes nothing


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"keypoints_coco17": []}, "no person in it"),
        ({"people": []}, "no person in it"),
        ({"keypoints_coco17": [[float("nan"), 1, 1], *KEYPOINTS[1:]]}, "NaN or infinite value in keypoint 'nose'"),
        ({"keypoints_coco17": KEYPOINTS[:16]}, "51 values expected (17 x, y, confidence), got 48"),
        ({"people": [{"pose_keypoints_2d": [1, 2, 1] * 24}]}, "75 values (BODY_25) or 54 (COCO) expected"),
        ({"box_xyxy": [10, 10, 90, 150]}, "a box is not enough"),
        ({"keypoints_coco17": [[x + 5000, y, c] for x, y, c in KEYPOINTS]}, "outside the 160 x 200 photo"),
        ("{", "not JSON"),
        ("", "is empty"),
        (None, "--keypoints FILE"),
    ],
)
def test_keypoints(photo: Path, fails: Callable[..., str], content: Any, message: str, tmp_path: Path) -> None:
    path = photo.with_suffix(".json")
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    line = fails("sample", photo, "--pose", "none", "--output", tmp_path / "out")
    assert message in line and ("photo.json" in line)


def test_named_files_that_are_not_there(photo: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    for option in ("--keypoints", "--heatmaps"):
        line = fails("sample", photo, option, tmp_path / "gone.npz", "--output", tmp_path / "out")
        assert str(tmp_path / "gone.npz") in line and "check the " in line


def test_heatmaps_that_hold_nothing(photo: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    empty = {"heatmaps": np.zeros((17, 64, 64), np.float32), "center": np.array([80.0, 100]), "side": np.array(150.0)}
    np.savez(tmp_path / "zero.npz", **empty)  # type: ignore[arg-type]
    assert "all zero" in fails("sample", photo, "--heatmaps", tmp_path / "zero.npz", "--output", tmp_path / "out")
    np.savez(tmp_path / "pickled.npz", heatmaps=np.array([{}], dtype=object))  # type: ignore[arg-type]
    assert "pickled" in fails("sample", photo, "--heatmaps", tmp_path / "pickled.npz", "--output", tmp_path / "out")


def test_wrong_number_of_files(photo: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    file = photo.with_suffix(".json")
    # One person's keypoints must not be used for two photos.
    assert "1 files for 2 photos" in fails("sample", photo, photo, "--keypoints", file)
    assert "--box" in fails("sample", photo, photo, "--box", "1,2,3,4")


# -- checkpoints


def spoiled(checkpoint: Path, folder: Path, name: str, content: bytes | None, checksums: bool = False) -> Path:
    """A copy of the checkpoint with one file replaced, cut in half (b"half") or missing.

    Without checksums, like older checkpoints, so that the later checks must find the damage.
    """
    shutil.copytree(checkpoint, folder)
    if not checksums:
        about = json.loads((folder / "hmdiff.json").read_text())
        del about["checksums"]
        (folder / "hmdiff.json").write_text(json.dumps(about))
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == b"half" else content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model/diffusion_pytorch_model.safetensors", b"half", "cannot be read as a model"),
        ("model/diffusion_pytorch_model.safetensors", b"", "describes a larger model than"),
        ("model/diffusion_pytorch_model.safetensors", None, "missing"),
        ("model/config.json", b'{"_class_name": "UNet2DModel"}', "holds a 'UNet2DModel', not a MeshRecoveryModel"),
        ("model/config.json", b'{"width": 64}', "not a MeshRecoveryModel"),
        ("model/config.json", b"[]", "holds a 'list', not a MeshRecoveryModel"),
        ("hmdiff.json", b"{}", "damaged"),
        ("hmdiff.json", None, "no hmdiff.json"),
        ("hmdiff.json", b'{"format": 99, "body": "x", "sampler": "x", "num_inference_steps": 1, "eta": 0}', "update"),
        ("scheduler/scheduler_config.json", b"half", "scheduler_config.json: not JSON, or cut short"),
    ],
)
def test_checkpoint(
    checkpoint: Path, photo: Path, fails: Callable[..., str], tmp_path: Path, name: str, content: Any, message: str
) -> None:
    folder = spoiled(checkpoint, tmp_path / "copy", name, content)
    line = fails("sample", photo, "--checkpoint", folder, "--output", tmp_path / "out")
    assert str(folder) in line and message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model/diffusion_pytorch_model.safetensors", b"half", "not what was written, by its checksum"),
        ("scheduler/scheduler_config.json", b"{}", "not what was written, by its checksum"),
        ("model/config.json", None, "missing"),
    ],
)
def test_checksums_of_a_checkpoint(
    checkpoint: Path, photo: Path, fails: Callable[..., str], tmp_path: Path, name: str, content: Any, message: str
) -> None:
    folder = spoiled(checkpoint, tmp_path / "copy", name, content, checksums=True)
    line = fails("sample", photo, "--checkpoint", folder, "--output", tmp_path / "out")
    assert f"{folder / name}: {message}; save or copy the checkpoint again" in line


def test_what_is_no_checkpoint(photo: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "epoch=3.ckpt"
    other.write_bytes(b"\x80\x02}q\x00.")
    assert "save_pretrained" in fails("sample", photo, "--checkpoint", other, "--output", tmp_path / "o")
    assert "hmdiff_small" in fails("info", "hmdiff_smal")
    assert "no such folder" in fails("evaluate", "--checkpoint", tmp_path / "gone", "--output", tmp_path / "o")


# -- configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  stepz: 3\n", "did you mean 'steps'"),
        ("trainnig: {}\n", "did you mean 'training'"),
        ("training:\n  steps: many\n", "training.steps"),
        ("training: 3\n", "training"),
        ("seed: [\n", "not valid YAML"),
        ("just a sentence\n", "mapping"),
        ("model:\n  widht: 3\n", "did you mean 'width'"),
        ("body: smpk\n", "smpk"),
    ],
)
def test_config(fails: Callable[..., str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text + f"output: {tmp_path / 'run'}\n")
    line = fails("train", "--config", tmp_path / "c.yaml")
    assert message in line
    assert not list(tmp_path.rglob("checkpoints"))


def test_config_by_name_and_values(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "did you mean 'quickstart'" in fails("train", "--config", "quikstart")
    assert "no such config" in fails("train", "--config", tmp_path / "gone.yaml")
    assert "did you mean 'batch_size'" in fails("train", "training.batchsize=3")
    assert "key=value" in fails("train", "training.steps")
    assert "unrecognized arguments: --fast" in fails("train", "--fast")
    assert "not a multiple of" in fails("train", "--dry-run", "training.batch_size=3", "data.block_size=2")


# -- options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--box", "1,2,3"], "x1,y1,x2,y2"),
        (["--box", "50,20,10,90"], "x1 < x2"),
        (["--box", "a,b,c,d"], "x1,y1,x2,y2"),
        (["--box", "0,0,nan,9"], "x1,y1,x2,y2"),
        (["--num-hypotheses", "0"], "at least 1"),
        (["--num-hypotheses", "many"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "201"], "give 1 to 200"),
        (["--sampler", "ddmi"], "choose one of ddim"),
        (["--eta", "-1"], "at least 0"),
        (["--focal", "0"], "above 0"),
        (["--focal", "1e+300"], "0.1 to 100,000,000"),
        (["--principal-point", "1e+300,5"], "beyond any photo"),
        (["--device", "quantum"], "give auto, cpu"),
        (["--device", "cuda:99"], "give --device cpu"),
        (["--device", "meta"], "give --device cpu"),
        (["--seed", "-3"], "at least 0"),
    ],
)
def test_option(
    checkpoint: Path, photo: Path, fails: Callable[..., str], tmp_path: Path, words: list[str], message: str
) -> None:
    line = fails("sample", photo, "--checkpoint", checkpoint, "--output", tmp_path / "out", *words)
    assert words[0] in line or words[0] == "--sampler"
    assert message in line and words[1] in line
    assert not files_of(tmp_path / "out")


def test_commands_and_splits(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "invalid choice: 'smaple'" in fails("smaple")
    assert "--split" in fails("evaluate", "--split", "tets", "--output", tmp_path)
    assert "--people" in fails("evaluate", "--people", "1", "--output", tmp_path)
    assert "COMMAND" in fails()


# -- writing


def test_a_file_in_the_way_of_the_output(
    checkpoint: Path, photo: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("precious")
    for words in (["sample", photo, "--checkpoint", checkpoint], ["evaluate", "--checkpoint", checkpoint]):
        line = fails(*words, "--output", tmp_path / "out")
        assert str(tmp_path / "out") in line and "in the way" in line
    assert (tmp_path / "out").read_text() == "precious"


def test_full_disk_keeps_what_was_there(
    checkpoint: Path, photo: Path, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["sample", photo, "--checkpoint", checkpoint, "--num-hypotheses", 1, "--steps", 1, "--output", out]
    out.mkdir()
    np.savez(out / "photo.npz", spread_mm=np.zeros(3))  # from an earlier run
    for suffix in ("obj", "glb", "png"):
        (out / f"photo.{suffix}").write_bytes(b"of an earlier run")
    before = files_of(out)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hmdiff.files.storage.os.fsync", full)
    line = fails(*words)
    assert "no space left" in line and str(out / "photo.npz") in line and "free some" in line
    assert files_of(out) == before


def test_full_disk_anywhere_else(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hmdiff.cli import doctor

    def full(options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/where")

    monkeypatch.setattr(doctor, "run", full)
    assert "/some/where: no space left on the disk" in fails("doctor")


def test_out_of_memory(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hmdiff.cli import doctor

    def hungry(options: object) -> int:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(doctor, "run", hungry)
    assert "fewer hypotheses" in fails("doctor")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that the user can fix become one line; others keep their traceback."""
    from hmdiff.cli import doctor

    def wrong(options: object) -> int:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(doctor, "run", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["doctor"])


@pytest.mark.slow
def test_as_a_process(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    """Libraries loaded before the error print nothing."""
    folder = spoiled(checkpoint, tmp_path / "copy", "model/diffusion_pytorch_model.safetensors", b"half")
    words = ["sample", str(photo), "--checkpoint", str(folder), "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-m", "hmdiff", *words], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert run.returncode == 2 and run.stdout == f"loading {folder}\n"
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("hmdiff: error: ")
