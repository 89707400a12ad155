"""`hmdiff evaluate --guidance`: equals the call from Python, kept beside unguided reports, works with all samplers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import people, small_pipeline

import hmdiff.evaluate.evaluation as evaluation
import hmdiff.evaluate.mean_mesh as mean_mesh
from hmdiff.cli.main import main
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.schedule import SCHEDULER_NAMES
from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments
from hmdiff.pipeline import HMDiffPipeline

FEW = ["--people", "3", "--num-hypotheses", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def checkpoint(pipe: HMDiffPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr("hmdiff.cli.splits.test_people", lambda *_: people(True))
    mean = functools.partial(mean_mesh.mean_mesh_errors, training_people=8)
    monkeypatch.setattr(mean_mesh, "mean_mesh_errors", mean)

    def words(*more: str) -> int:
        return main(["evaluate", "--checkpoint", str(checkpoint), *FEW, *more, "--output", str(tmp_path)])

    return words


@pytest.mark.slow
def test_guided_numbers(
    run: Callable[..., int], pipe: HMDiffPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0 and run("--guidance", "dat", "--strength", "0.5") == 0
    assert "small with dat" in capsys.readouterr().out
    plain, guided = (json.loads((tmp_path / name).read_text()) for name in ("small_test.json", "small_test_dat.json"))
    expected = evaluation.evaluate(pipe, people(True), "test", 3, SamplingConfig(2, 2, guidance=Guidance(strength=0.5)))
    assert guided["errors"] == json.loads(json.dumps(expected["errors"]))
    assert guided["errors"] != plain["errors"] and "guidance" not in plain
    assert guided["guided_by"]["strength"] == 0.5 and plain["guided_by"] is None


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **b: calls.append(a[4].guidance.strength) or real(*a, **b))
    for strength in ("0.5", "0.5", "1"):
        assert run("--guidance", "dat", "--strength", strength) == 0
    assert calls == [0.5, 1.0]
    # Reports from before guidance existed count as unguided.
    path = tmp_path / "small_test.json"
    assert run() == 0
    old = json.loads(path.read_text())
    del old["guided_by"]
    path.write_text(json.dumps(old))
    assert run() == 0 and len(calls) == 3


@pytest.mark.slow
def test_strength_zero_is_none(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--guidance", "dat", "--strength", "0") == 0
    assert json.loads((tmp_path / "small_test.json").read_text())["guided_by"] is None


@pytest.mark.slow
def test_by_a_protocol(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--protocol", "emdb", "--data", "test", "--device", "cpu"]
    assert run(*words) == 0 and run(*words, "--guidance", "dat") == 0
    assert "steered by those heatmaps: dat, strength 1" in capsys.readouterr().out
    plain, guided = (json.loads((tmp_path / f"small_emdb_test{end}.json").read_text()) for end in ("", "_dat"))
    assert plain["errors"].keys() == guided["errors"].keys() and plain["errors"] != guided["errors"]
    assert "guided_by" not in plain and guided["guided_by"]["mode"] == "dat"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", "1"], "--strength is of a guidance: add --guidance dat (or disrupted)"),
        (["--guidance", "dta"], "invalid choice: 'dta'"),
        (["--guidance", "dat", "--strength", "-1"], "'-1': a number of at least 0 is expected"),
        (
            ["--guidance", "dat", "--protocol", "emdb", "--data", "test", "--predictions", "nowhere"],
            "--guidance steers a checkpoint's sampling, and --predictions are there already",
        ),
    ],
)
def test_bad_words(run: Callable[..., int], words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = run(*words)
    except SystemExit as stop:  # of argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_every_sampler_can_be_guided(pipe: HMDiffPipeline, name: str) -> None:
    """None has to be refused: each tells the denoiser's step as a share of the process, which is all that DAT asks."""
    sample = people(True).block("val", 0).map(lambda tensor: tensor[:2])
    output = pipe(
        None, as_heatmaps(sample), SamplingConfig(2, 3, 0, name, guidance=Guidance()), **camera_arguments(sample)
    )
    assert output.guidance is not None and output.vertices.isfinite().all()
    assert output.guidance.gap_after.isfinite().all()
    assert output.guidance.active.max() > 0 and not torch.equal(output.vertices[0], output.vertices[1])
