"""Checkpoint files, without a training: atomic, verified, swept; and folder locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmdiff.errors import UserError
from hmdiff.files.checksums import folder_checksums, verify_checksums
from hmdiff.files.locks import LOCK, claim, try_claim
from hmdiff.train import checkpoint
from hmdiff.train.checkpoint import Progress, begin, checkpoints_in, finish, read_progress, write_progress


def write(folder: Path, step: int, keep: int = 2) -> Path:
    place = folder / f"step_{step:08d}"
    part = begin(place)
    (part / "model.safetensors").write_bytes(b"weights" * 10)
    write_progress(part, Progress(step, step, {"loss": 0.1 + 0.2}, 3))
    finish(part, place, keep)
    return place


def test_written_and_read(tmp_path: Path) -> None:
    places = [write(tmp_path, step) for step in (1, 2, 10)]
    assert checkpoints_in(tmp_path) == places[1:] and sorted(os.listdir(tmp_path)) == [p.name for p in places[1:]]
    assert read_progress(places[2]) == Progress(10, 10, {"loss": 0.1 + 0.2}, 3)
    again = write(tmp_path, 10)  # at the same step, as when stopped right after a checkpoint
    assert read_progress(again).step == 10 and len(os.listdir(tmp_path)) == 2


def test_the_umask_decides_who_may_read_it(tmp_path: Path) -> None:
    """safetensors creates files with mode 0600; checkpoints must follow the umask."""
    before = os.umask(0o027)
    try:
        part = begin(tmp_path / "step_00000001")
        os.close(os.open(part / "ema.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
        write_progress(part, Progress(1, 1))
        finish(part, tmp_path / "step_00000001", keep=2)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step_00000001").iterdir()} == {0o640}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    place = write(tmp_path, 5)
    for path in sorted(place.iterdir()):
        whole = path.read_bytes()
        for number in range(0, len(whole), 7):
            path.write_bytes(whole[:number] + bytes([whole[number] ^ 4]) + whole[number + 1 :])
            with pytest.raises(UserError, match="remove it"):
                read_progress(place)
        path.write_bytes(whole)
    (place / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: missing"):
        read_progress(place)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 2.7}, "step is 2.7, a whole number"),
        ({"step": "5"}, "step is '5'"),
        ({"step": True}, "is True"),
        ({"step": 6}, "is of step 6"),
        ({"step": None}, "step is None"),
        ({"step": -5}, "step is -5"),
        ({"ema_steps": 10**400}, "ema_steps is inf"),
        ({"ema_steps": 1.0}, "ema_steps is 1.0"),
        ({"sums": {"loss": "x"}}, "sums"),
        ({"sums": {"loss": float("nan")}}, "sums"),
        ({"sums": 3}, "sums"),
    ],
)
def test_progress_of_other_types_is_refused(tmp_path: Path, changed: dict, message: str) -> None:
    """In old checkpoints without checksums."""
    place = tmp_path / "step_00000005"
    place.mkdir()
    good = {"step": 5, "ema_steps": 5}
    (place / "progress.json").write_text(json.dumps(good))
    assert read_progress(place) == Progress(5, 5)
    (place / "progress.json").write_text(json.dumps(good | changed))
    with pytest.raises(UserError, match=message):
        read_progress(place)
    (place / "progress.json").write_text("[]")
    with pytest.raises(UserError, match="a list where a mapping"):
        read_progress(place)


def test_what_kills_left_is_swept(tmp_path: Path) -> None:
    for name in (".step_00000001.part", ".step_00000001.gone", "step_00000002", "other", ".other.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    place = write(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == [".other.part", "other", place.name]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step_00000003.part").symlink_to(tmp_path / "target")
    place = write(folder, 3)
    assert os.listdir(tmp_path / "target") == ["mine"] and os.listdir(folder) == [place.name]


@pytest.mark.parametrize("expected", [{"../secret": "0" * 64}, {"/etc/passwd": "0" * 64}, {"a": 5}, [], {"": "x"}])
def test_checksums_name_files_of_the_folder(tmp_path: Path, expected: object) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match=r"checksums? "):
        verify_checksums(tmp_path, expected, "save it again")
    verify_checksums(tmp_path, folder_checksums(tmp_path), "save it again")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    checkpoint.check_finite(tmp_path, [torch.ones(3), torch.ones(3, dtype=torch.long)], "weights")
    with pytest.raises(UserError, match="weights that are not"):
        checkpoint.check_finite(tmp_path, [torch.tensor([1.0, float("inf")])], "weights")


@pytest.mark.parametrize("stored", [{}, {"0": torch.ones(2)}, {"0": torch.ones(3, dtype=torch.long)}])
def test_averaged_weights_of_another_model_are_refused(tmp_path: Path, stored: dict) -> None:
    with pytest.raises(UserError, match=r"ema\.safetensors"):
        checkpoint.check_like(tmp_path, [torch.ones(3)], stored)
    checkpoint.check_like(tmp_path, [torch.ones(3)], {"0": torch.zeros(3)})


HOLDS = """
import sys, time
from pathlib import Path
from hmdiff.files.locks import claim
with claim(Path(sys.argv[1]), "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_processs_until_that_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another process \(number {holder.pid}\) works in it; wait"):
        with claim(tmp_path, "wait"):
            pytest.fail("entered")
    with try_claim(tmp_path, "another") as mine:
        assert mine
    holder.kill()
    holder.wait()
    with claim(tmp_path, "wait"), try_claim(tmp_path) as mine:
        assert not mine
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="may not be written"):
        with claim(tmp_path, "wait"):
            pytest.fail("entered")
    assert not (tmp_path / "victim").exists()
