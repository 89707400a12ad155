"""`hmdiff sample --save`: only the requested files and the npz; a folder can be extended with more kinds."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hmdiff.cli.main import main
from hmdiff.cli.sample import kinds_of_files
from hmdiff.files.resources import asset_path
from hmdiff.names import SAVED


def test_kinds_of_files() -> None:
    assert kinds_of_files("png, obj") == ("npz", "obj", "png")
    assert kinds_of_files(",".join(reversed(SAVED))) == SAVED
    for text, named in (("fbx,obj", "fbx"), ("", "nothing"), (",", "nothing")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{named}: choose of npz,glb,obj,png,html"):
            kinds_of_files(text)


@pytest.mark.slow
def test_only_what_was_asked_for_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for suffix in (".jpg", ".json"):
        shutil.copy(asset_path(f"sample{suffix}"), photos / f"one{suffix}")
    few = ["--checkpoint", "hmdiff_small", "--num-hypotheses", "1", "--steps", "1", "--guidance", "none"]
    command = ["sample", str(photos), *few, "--output", str(tmp_path / "out")]

    def files() -> set[str]:
        return {path.suffix for path in (tmp_path / "out").iterdir()} - {".lock"}

    assert main([*command, "--save", "obj"]) == 0
    assert files() == {".npz", ".obj", ".jsonl"}
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert line["settings"]["save"] == "npz,obj"
    assert main([*command, "--save", "obj"]) == 0
    assert "1 of 1 photos are done" in capsys.readouterr().out
    assert main([*command, "--save", "glb"]) == 0  # another choice is another run
    assert files() == {".npz", ".obj", ".jsonl", ".glb"}


@pytest.mark.slow
def test_the_line_of_a_person_has_the_confidence_of_the_npz(tmp_path: Path) -> None:
    photo = tmp_path / "one.jpg"
    for suffix in (".jpg", ".json"):
        shutil.copy(asset_path(f"sample{suffix}"), photo.with_suffix(suffix))
    command = ["sample", str(photo), "--checkpoint", "hmdiff_small", "--num-hypotheses", "4", "--save", "npz"]
    found = {}
    for steps in ("2", "3"):  # no calibration was fitted for two steps
        folder = tmp_path / steps
        assert main([*command, "--steps", steps, "--output", str(folder)]) == 0
        line = json.loads((folder / "results.jsonl").read_text())
        with np.load(folder / "one.npz") as arrays:
            found[steps] = line["confidence"], float(arrays["confidence"]) if "confidence" in arrays else None
    assert found["2"] == (None, None)
    assert found["3"][0] == round(found["3"][1], 3) and 0 < found["3"][0] < 1
