"""Modules loaded by importing the pipeline, in a separate process: their number does not depend on the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "scipy.stats",
    "scipy.optimize",
    "matplotlib",
    "timm",
    "trimesh",
    "mmpose",
    "mmengine",
    "smplx",
    "pandas",
    "cv2",
)


def loaded(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*[n for n in {SLOW!r} if sys.modules.get(n)])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


@pytest.mark.slow
def test_the_pipeline_loads_nothing_slow() -> None:
    assert loaded("import hmdiff.pipeline") == set()


@pytest.mark.slow
def test_a_sampling_loads_nothing_slow_either() -> None:
    code = """
import torch
from hmdiff.diffusion.guidance import Guidance
from hmdiff.heatmaps import Heatmaps, gaussian_heatmaps
from hmdiff.heatmaps.crop import Crop
from hmdiff.pipeline import HMDiffPipeline

maps = gaussian_heatmaps(torch.rand(1, 26, 2) - 0.5, torch.ones(1, 26), 2.0)
crop = Crop.of(torch.full((1, 2), 50.0), torch.full((1,), 100.0))
pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
pipe(heatmaps=Heatmaps(maps, torch.ones(1, 26).bool(), crop), num_hypotheses=2, guidance=Guidance())
"""
    assert loaded(code) == set()


def test_the_command_loads_neither_torch_nor_numpy() -> None:
    program = "import hmdiff.cli.main, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


@pytest.mark.parametrize("name", ["ddpm", "dpm++", "unipc", "euler", "heun"])
def test_other_samplers_are_fetched_when_asked_for(name: str) -> None:
    from hmdiff.diffusion.schedule import make_scheduler, sampler_name

    assert sampler_name(make_scheduler(name)) == name


@pytest.mark.slow
def test_the_compiler_is_there_afterwards() -> None:
    program = "import hmdiff.pipeline, torch, torch._dynamo; print(torch._dynamo.is_compiling())"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False"]
