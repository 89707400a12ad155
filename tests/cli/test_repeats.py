"""The same command twice on one machine: the demo's arrays and an evaluation's report are bit-identical.

Values that must not change across versions, within a tolerance for any processor, are in
`tests/test_recorded_numbers.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hmdiff.cli.demo import demo_photo
from hmdiff.cli.main import main

FEW = ("--checkpoint", "hmdiff_small", "--num-hypotheses", "3", "--steps", "2", "--guidance", "dat", "--device", "cpu")


@pytest.mark.slow
def test_the_demos_photo_and_an_evaluation_repeat_to_the_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        words = ["sample", str(demo_photo()[0]), *FEW, "--save", "npz", "--output", str(folder / "photo")]
        assert main(words) == 0
        assert main(["evaluate", *FEW, "--people", "4", "--output", str(folder / "split")]) == 0
    (one,), (two,) = (list((tmp_path / name / "photo").glob("*.npz")) for name in ("a", "b"))
    with np.load(one) as first, np.load(two) as second:
        assert first.files == second.files and len(first["vertices"]) == 3
        for name in first.files:
            assert first[name].tobytes() == second[name].tobytes(), name
    report, again = (
        json.loads((tmp_path / name / "split" / "hmdiff_small_test_dat.json").read_text()) for name in ("a", "b")
    )
    assert report == again and report["errors"]["pve"]["mean"]["value"] > 0
