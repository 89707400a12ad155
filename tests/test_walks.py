"""The two walks of docs/architecture.md are the calls that are made, in that order."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from small import small_config

from hmdiff.cli.main import main
from hmdiff.files.resources import asset_path
from hmdiff.losses import objective
from hmdiff.models.part_denoiser import PartDenoiser
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.train import step
from hmdiff.train.loop import Trainer

PACKAGE = Path(main.__code__.co_filename).resolve().parents[1]
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def documented(walk: int) -> list[str]:
    text = PAGE.read_text().split(f"## Walk {walk}")[1].split("\n## ")[0]
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)  # type: ignore[return-value]


def calls() -> list[tuple[str, str]]:
    """The calls of ours that led here, the outermost first; closures and what only passes on are left out."""
    frame, found = sys._getframe(1), list[tuple[str, str]]()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        name = frame.f_code.co_qualname
        if path.is_relative_to(PACKAGE) and "<" not in name:
            found.append((str(path.relative_to(PACKAGE)), name))
        frame = frame.f_back  # type: ignore[assignment]
    return found[::-1]


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[list[tuple[str, str]]]:
    """Where `name` was called from, each time."""
    seen: list[list[tuple[str, str]]] = []
    real = getattr(owner, name)

    def spying(*words: Any, **options: Any) -> Any:
        seen.append(calls())
        return real(*words, **options)

    monkeypatch.setattr(owner, name, spying)
    return seen


def in_order(made: list[tuple[str, str]], walk: int) -> None:
    """Each call stands in the walk's table, further down than the one before."""
    rows, place = documented(walk), 0
    for call in made:
        assert call in rows[place:], f"docs/architecture.md, walk {walk}: {call} is not there, or not in its place"
        place += rows[place:].index(call)  # type: ignore[arg-type]


def test_a_photo_to_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".jpg", ".json"):
        shutil.copy(asset_path(f"sample{suffix}"), tmp_path / f"one{suffix}")
    encoded = spy(monkeypatch, MeshRecoveryModel, "encode")
    denoised = spy(monkeypatch, PartDenoiser, "forward")
    words = ["--num-hypotheses", "1", "--steps", "2", "--guidance", "none", "--save", "npz"]
    assert main(["sample", str(tmp_path / "one.jpg"), *words, "--output", str(tmp_path / "out")]) == 0
    passing = ("cli/sample.py", "_sampled")  # the bar over the photos
    for made in (encoded[0], denoised[0], denoised[-1]):
        in_order([call for call in made if call != passing], 1)
    assert len(encoded[0]) + 1 == 9  # with encode itself: "nine calls deep"


def test_a_batch_to_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    encoded = spy(monkeypatch, MeshRecoveryModel, "encode")
    summed = spy(monkeypatch, step, "objective")
    assert step.objective is not objective.objective
    trainer = Trainer(small_config(tmp_path / "run", "training.steps=1", "training.checkpoint_every=9"))
    monkeypatch.setattr(trainer, "_save", lambda: None)
    monkeypatch.setattr(trainer, "_evaluate", lambda log: {})
    trainer.config.evaluation.test_people = 0
    trainer.run()
    for made in (encoded[0], summed[0]):
        in_order([call for call in made if call != ("train/loop.py", "Trainer._run")], 2)
    assert len(encoded[0]) + 1 == 7  # with encode itself, from Trainer.run: "seven calls deep"
