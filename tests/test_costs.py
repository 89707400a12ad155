"""What a result costs, in counts that no machine changes: evaluations, projections, products, modules, files read."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import people_block

from hmdiff.body.body_fitter import BodyFitter
from hmdiff.body.fitting import ROUNDS, fit_coarse
from hmdiff.diffusion.guidance import Guidance
from hmdiff.estimators.people import PhotoPeople
from hmdiff.heatmaps import Crop, Heatmaps
from hmdiff.lab.stages import counted_flops
from hmdiff.models.denoiser import MeshDenoiser
from hmdiff.models.layers import Attention
from hmdiff.pipeline import HMDiffPipeline

STEPS = 3


@functools.cache
def pipe() -> HMDiffPipeline:
    return HMDiffPipeline.from_pretrained("hmdiff_small")


def heatmaps(count: int = 1) -> Heatmaps:
    sample = people_block("val", 0)
    values, valid = sample.heatmaps[:count], sample.heatmap_valid[:count]
    side = torch.full((count,), 100.0)
    return Heatmaps(values, valid, Crop.of(torch.full((count, 2), 50.0), side))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first arguments of every call of a method or function, from now on."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("hypotheses", [1, 6])
def test_the_image_is_encoded_once_and_its_keys_and_values_are_too(
    monkeypatch: pytest.MonkeyPatch, hypotheses: int
) -> None:
    encoded = counted(monkeypatch, pipe().model, "encode")
    projected = counted(monkeypatch, Attention, "keys_values")
    evaluated = counted(monkeypatch, MeshDenoiser, "forward")
    regressors = counted(monkeypatch, pipe().model, "keypoint_regressor")
    off = Guidance(fall_back=False)
    pipe()(heatmaps=heatmaps(2), num_hypotheses=hypotheses, num_inference_steps=STEPS, guidance=off)
    denoiser = pipe().model.denoisers[0]
    crossing = {id(block.cross_attention) for block in denoiser.blocks}  # type: ignore[union-attr]
    assert len(encoded) == 1 and len(evaluated) == STEPS
    assert len(regressors) <= 3  # DAT's, that of the step in the picture's plane, and the fitted bodies'
    assert sum(id(attention) in crossing for attention, *_ in projected) == len(crossing)


def test_all_hypotheses_share_one_embedding_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    hook = (
        pipe()
        .model.denoisers[0]
        .embed_step.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda module, inputs, output: rows.append(len(output))
        )
    )
    pipe()(heatmaps=heatmaps(2), num_hypotheses=4, num_inference_steps=STEPS, guidance=Guidance())
    hook.remove()
    assert rows == [2, *[1] * (STEPS - 1)]  # the first evaluation, of two people, serves all hypotheses


def test_a_shared_step_is_the_step_of_every_hypothesis() -> None:
    model = pipe().model
    with torch.no_grad():
        conditioning, _ = model.encode(None, heatmaps(2).values, heatmaps(2).valid)
        points = torch.randn(2, 3, model.num_points, 3, generator=torch.Generator().manual_seed(0))
        apart = model.denoise(points, torch.full((2, 3), 0.4), conditioning)
        together = model.denoise(points, torch.full((1, 1), 0.4), conditioning)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_products_grow_with_the_hypotheses_alone() -> None:
    """Of a hypothesis and step at most 17 million multiplications and additions, on 24 tokens of 128 channels."""
    model = pipe().model
    with torch.no_grad():
        conditioning, _ = model.encode(None, heatmaps().values, heatmaps().valid)

        def flops(count: int) -> int:
            points, step = torch.zeros(1, count, model.num_points, 3), torch.ones(1, 1)
            return counted_flops(lambda: model.denoise(points, step, conditioning))

        one, two, nine = (flops(count) for count in (1, 2, 9))
    assert nine - two == 7 * (two - one)
    assert two - one < 34e6  # counted as two each
    assert one - (two - one) < 0.1 * one  # what is not of a hypothesis: the step's modulation


def test_a_body_is_fitted_by_one_linearisation_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = counted(monkeypatch, BodyFitter, "_normal_equations")
    ids = torch.arange(0, pipe().body.num_vertices, 29)
    fit_coarse(pipe().body, ids, pipe().body.v_template[ids].expand(3, -1, -1))
    assert len(solved) == 1 < ROUNDS


def test_a_photo_is_read_once_for_the_files_of_everybody_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hmdiff.viz import canvas

    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "photo.png")
    read = counted(monkeypatch, canvas, "read_picture")
    maps = heatmaps(2)
    people = PhotoPeople(tmp_path / "photo.png", (100, 100), maps, [(None, ()), (None, ())], "a test")  # type: ignore[arg-type]
    first = people.pixels()
    assert people.pixels() is first and len(read) == 1
    assert not first.flags.writeable


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom hmdiff.cli.main import build_parser\nbuild_parser().format_help()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "scipy", "cv2", "PIL", "diffusers", "trimesh", "yaml", "omegaconf", "tqdm"}
    assert "hmdiff" in found and not heavy & set(found)


def test_bfloat16_is_near_float32() -> None:
    """Within millimetres in a step: what its rounding is worth, and that no mixture of dtypes fails."""
    model = pipe().model
    with torch.no_grad():
        conditioning, _ = model.encode(None, heatmaps().values, heatmaps().valid)
        points = torch.randn(1, 3, model.num_points, 3, generator=torch.Generator().manual_seed(0))
        exact = model.denoise(points, torch.full((1, 1), 0.5), conditioning)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.denoise(points, torch.full((1, 1), 0.5), conditioning)
    assert (model.to_coarse(rounded.float()) - model.to_coarse(exact)).norm(dim=-1).mean() < 0.02
