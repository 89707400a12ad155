"""NaN, infinity and huge numbers in a pipeline call: a one-line error, never a body of NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small import people_block, small_pipeline

from hmdiff.diffusion.dat import Guidance
from hmdiff.errors import UserError
from hmdiff.heatmaps import Heatmaps
from hmdiff.heatmaps.crop import Crop
from hmdiff.models.inputs import MAX_HYPOTHESES, check_depth, check_pictures, check_result, check_weights
from hmdiff.pipeline import HMDiffPipeline, reverse

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def heatmaps(count: int = 1) -> Heatmaps:
    sample = people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    crop = Crop.of(torch.full((count, 2), 100.0), torch.full((count,), 99.0))
    return Heatmaps(sample.heatmaps[:count], sample.heatmap_valid[:count], crop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hypotheses": 0}, "num_hypotheses 0: at least 1"),
        ({"num_hypotheses": 2**31}, "at most 10,000"),
        ({"num_hypotheses": 2.5}, "num_hypotheses 2.5: a whole number"),
        ({"num_hypotheses": True}, "a whole number"),
        ({"seed": -1}, "seed -1: a whole number from 0 on"),
        ({"seed": 2**64}, "seed 18446744073709551616: at most"),
        ({"seed": 1.0}, "seed 1.0: a whole number"),
        ({"seed": None}, "seed None: a whole number"),
        ({"eta": NAN}, "eta nan"),
        ({"eta": -0.1}, "eta -0.1"),
        ({"eta": INF}, "eta inf"),
        ({"eta": "1"}, "eta '1'"),
        ({"eta": 2}, "eta 2"),
        ({"num_inference_steps": 1.5}, "num_inference_steps 1.5: a whole number"),
        ({"focal": torch.tensor([0.0])}, "focal: 0 found"),
        ({"focal": torch.tensor([NAN])}, "focal: nan found"),
        ({"focal": torch.tensor([-5.0])}, "focal: -5"),
        ({"focal": torch.tensor([1e30])}, "focal: 1e"),
        ({"focal": torch.ones(2)}, r"focal: shape \(2,\) found, \(1,\)"),
        ({"photo_sizes": torch.zeros(1, 2)}, "photo_sizes: 0 found"),
        ({"photo_sizes": torch.tensor([[640, NAN]])}, "photo_sizes: nan found"),
        ({"photo_sizes": torch.tensor([640.0, 480])}, r"photo_sizes: shape \(2,\) found, \(1, 2\)"),
        ({"people": [-3]}, "people -3"),
        ({"people": ["a"]}, "people 'a'"),
        ({"people": [0.5]}, "people 0.5"),
    ],
)
def test_calls_that_cannot_be_meant(pipe: HMDiffPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(heatmaps=heatmaps(), **{"num_hypotheses": 1, "num_inference_steps": 1, **arguments})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("values", 1e30),
        ("values", NAN),
        ("center", 1e30),
        ("center", NAN),
        ("side", 1e30),
        ("side", 1e-30),
        ("side", 0.0),
        ("side", INF),
        ("focal", 1e30),
        ("focal", NAN),
        ("photo_size", 1e30),
        ("rotation", INF),
    ],
)
def test_heatmaps_that_overflow(field: str, value: float) -> None:
    maps = heatmaps()
    whole = maps if field == "values" else maps.crop
    changed = getattr(whole, field).clone()
    changed[(0,) * changed.dim()] = value
    with pytest.raises(UserError, match=r"(heatmaps|crop): "):
        dataclasses.replace(whole, **{field: changed})


def test_the_largest_numbers_that_are_taken_give_a_finite_body(pipe: HMDiffPipeline) -> None:
    maps = heatmaps()
    for factor in (1e6, 1e-3):
        scaled = dataclasses.replace(maps, values=maps.values / maps.values.max() * factor)
        output = pipe(heatmaps=scaled, num_hypotheses=1, num_inference_steps=2)
        assert output.vertices.isfinite().all() and output.translation.isfinite().all()
    for center, side, focal in (
        (9.99e5, 1.001e-3, 1e8),
        (-9.99e5, 9.99e5, 0.1),
        (0.0, 9.99e5, 1e8),
        (0.0, 1.001e-3, 0.1),
    ):
        crop = dataclasses.replace(maps, crop=Crop.of(torch.full((1, 2), center), torch.tensor([side])))
        for size in (1.0, 1e6):
            try:
                output = pipe(
                    heatmaps=crop,
                    num_hypotheses=1,
                    num_inference_steps=1,
                    focal=torch.tensor([focal]),
                    photo_sizes=torch.full((1, 2), size),
                )
            except UserError as error:
                assert "the result is not finite" in str(error)
            else:
                assert output.vertices.isfinite().all() and output.translation.isfinite().all()


def test_pictures_and_depths() -> None:
    check_pictures(torch.rand(1, 3, 4, 4))
    for value in (NAN, INF, 255.0, -1.0):
        with pytest.raises(UserError, match=r"images: .* found, RGB of 0..1 expected"):
            check_pictures(torch.full((1, 3, 4, 4), value))
    check_depth(torch.tensor([[[1.0, NAN]]]))
    for value in (INF, -1e30):
        with pytest.raises(UserError, match=r"depth: .* found; put NaN"):
            check_depth(torch.tensor([[[1.0, value]]]))
    check_weights(torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(UserError, match=r"computes in float32: load it again"):
            check_weights(dtype)


def test_a_result_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match="the result is not finite"):
        check_result([torch.zeros(2), torch.tensor([NAN])])
    pipe = small_pipeline()
    with torch.no_grad():
        pipe.model.to_camera.weight.fill_(NAN)
    with pytest.raises(UserError, match="the result is not finite"):
        pipe(heatmaps=heatmaps(), num_hypotheses=1, num_inference_steps=1)


def test_half_precision_is_named(pipe: HMDiffPipeline) -> None:
    half = small_pipeline()
    half.model.half()
    with pytest.raises(UserError, match=r"float16, and it computes in float32"):
        half(heatmaps=heatmaps(), num_hypotheses=1)


def test_guided_chunks_are_smaller_and_change_nothing(pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reverse.GUIDED_ROWS_AT_ONCE < reverse.ROWS_AT_ONCE <= MAX_HYPOTHESES
    rows: list[int] = []
    denoise = pipe.model.denoise

    def counted(points: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(points) * points.shape[1])
        return denoise(points, *rest)

    def run(guided: int, guidance: Guidance | None) -> torch.Tensor:
        monkeypatch.setattr(reverse, "GUIDED_ROWS_AT_ONCE", guided)
        rows.clear()
        return pipe(heatmaps=heatmaps(2), num_hypotheses=6, num_inference_steps=2, guidance=guidance).vertices

    monkeypatch.setattr(pipe.model, "denoise", counted)
    whole = run(100, Guidance())
    assert max(rows) == 12
    torch.testing.assert_close(run(4, Guidance()), whole, rtol=0, atol=1e-4)
    assert max(rows) == 4
    run(4, None)
    assert max(rows) == 12
