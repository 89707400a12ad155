"""The notebook in examples/ does what it shows: its cells run in their order, in a folder of their own."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path

import pytest
import trimesh

from hmdiff.cli.main import main

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "photo_to_animation.ipynb"


@pytest.mark.slow
def test_the_notebook_goes_from_a_picture_to_an_animated_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    display = types.ModuleType("IPython.display")
    display.IFrame = lambda source, width, height: Path(source).stat()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and text.startswith("!hmdiff "):
            # Fewer hypotheses than the reader sees: the same files.
            words = text.replace("--num-hypotheses 8", "--num-hypotheses 2").format(**names)
            assert main(shlex.split(words)[1:]) == 0
        elif cell["cell_type"] == "code":
            exec(compile(text, str(NOTEBOOK), "exec"), names)
    stem = names["RESULT"].stem
    scene = trimesh.load(tmp_path / "outputs" / "demo" / f"{stem}_animated.glb")
    assert "left_wrist" in scene.graph.nodes
    assert (tmp_path / "outputs" / "demo" / f"{stem}.bvh").exists()
