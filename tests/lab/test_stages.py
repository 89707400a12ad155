"""`hmdiff bench`: every stage has a row, and the reference regressor has the published size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hmdiff.cli.main import main
from hmdiff.lab.direct_regressor import direct_regressor
from hmdiff.lab.stages import Bench, Options, counted_flops


@pytest.mark.slow
def test_the_peer_has_the_size_of_its_paper() -> None:
    """FastMETRO-L: 24.9 million parameters without the backbone, HRNet-W64 128 million."""
    model = direct_regressor("meta")
    with torch.device("meta"), torch.no_grad():
        vertices, camera = model(torch.zeros(2, 3, 224, 224))
        flops = counted_flops(lambda: model(torch.zeros(1, 3, 224, 224)))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    fixed = model.upsampling[1].weight.numel()
    transformers = sum(sizes.values()) - sizes["backbone"] - fixed
    assert transformers == pytest.approx(24.9e6, rel=0.03)
    assert sizes["backbone"] == pytest.approx(128e6, rel=0.03)
    assert vertices.shape == (2, 6890, 3) and camera.shape == (2, 3)
    assert 58e9 < flops < 90e9  # HRNet-W64's 29 billion products, counted as two FLOPs each, and the transformers


def test_flops_and_the_share_of_the_peak() -> None:
    bench = Bench(Options(repeats=2), torch.device("cpu"))
    side = torch.randn(256, 256)
    row = bench.row("a product", lambda: side @ side, count=True)
    assert row.flops == 2 * 256**3 and row.of_peak is not None and row.of_peak > 0
    assert row.of_peak == pytest.approx(row.flops / row.seconds / bench.peak)


@pytest.mark.slow
def test_bench_prints_every_stage_and_saves_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [
        "--repeats",
        "1",
        "--num-hypotheses",
        "2",
        "--steps",
        "2",
        "--counts",
        "1,2",
        "--lengths",
        "1",
        "--batches",
        "2",
    ]
    assert main(["bench", "--checkpoint", "hmdiff_small", "--quick", *few, "--output", f"{tmp_path}/bench.json"]) == 0
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "bench.json").read_text())
    stages = [row["stage"] for row in saved["rows"]]
    for stage in (
        "load the checkpoint",
        "encode",
        "one denoising step of 1 x 2",
        "upsampling of 1 x 2",
        "all of it, N = 2, with DAT",
        "curve: N = 1, with DAT",
        "curve: K = 1, with DAT",
        "curve: B = 2, a person, with DAT",
        "curve: one denoising step, tokens body parts",
        "curve: one denoising step, tokens vertices",
    ):
        assert stage in stages and stage in out
    assert all(row["seconds"] > 0 for row in saved["rows"]) and saved["peak_flops_per_second"] > 0
    assert "of peak" in out and "memory" in out


def test_bad_numbers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--counts", "1,x"])
    assert "whole numbers above 0 are expected" in capsys.readouterr().err
    assert main(["bench", "--checkpoint", "no_such"]) == 2
