"""One call of the pipeline: every frame turned back, every hypothesis with its own camera, draws and fall-back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import free_body, people_block, small_pipeline
from torch import Tensor

from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.diffusion.dat import GuidanceReport
from hmdiff.diffusion.gap import make_target
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Crop, Heatmaps, gaussian_heatmaps
from hmdiff.models.aggregation import AggregatorSizes, HypothesisAggregator
from hmdiff.output import log_likelihood
from hmdiff.pipeline import HMDiffPipeline, reverse
from hmdiff.pipeline.cameras import CropCamera

RAW: dict[str, Any] = {"num_inference_steps": 2, "surface": "vertices", "upright": False}


def heatmaps(crop: Crop) -> Heatmaps:
    sample = people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    return Heatmaps(sample.heatmaps[: len(crop)], sample.heatmap_valid[: len(crop)], crop)


def crops(rotation: float = 0.0) -> Crop:
    center, side = torch.tensor([[900.0, 120.0], [200.0, 500.0]]), torch.tensor([350.0, 440.0])
    return Crop.of(center, side, torch.full((2,), rotation), (1280.0, 720.0), 1100.0)


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


@pytest.mark.parametrize("surface", ["vertices", "body"])
def test_a_rolled_photo_gives_the_rolled_people(pipe: HMDiffPipeline, surface: str) -> None:
    """The same heatmaps in a crop that is turned by 0.7 rad: all of the output turns about the camera's axis."""
    rolled = crops(0.7)
    options = {**RAW, "surface": surface, "num_hypotheses": 2}
    found, level = pipe(heatmaps=heatmaps(rolled), **options), pipe(heatmaps=heatmaps(rolled.upright()), **options)
    turn = rolled.turn_3d()[:, None].mT
    for name in ("vertices", "joints", "keypoints"):
        torch.testing.assert_close(getattr(found, name), getattr(level, name) @ turn, atol=1e-4, rtol=1e-4)
        assert (getattr(found, name) - getattr(level, name)).abs().max() > 0.1
    torch.testing.assert_close(
        found.translation[:, :, None], level.translation[:, :, None] @ turn, atol=1e-3, rtol=1e-3
    )
    assert found.keypoints is not None
    torch.testing.assert_close(found.keypoints, free_body()[0].keypoints(found.vertices), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.joints[:, :, 0] if surface == "body" else torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    )


@pytest.mark.parametrize("rotation", [0.0, 0.7])
def test_a_translation_is_fitted_to_the_peaks_that_are_there(rotation: float) -> None:
    """To projected keypoints; a joint without a peak does not pull; without any, the prior stands."""
    frames = CropCamera.of(crops(rotation), crop_frame=False)
    generator = torch.Generator().manual_seed(0)
    keypoints = 0.3 * torch.randn(2, 1, 26, 3, generator=generator)
    camera = torch.tensor([[1.0, 0.05, -0.1], [0.8, 0.1, 0.0]])
    place = frames.translation(camera, 1)
    seen = perspective_projection(
        keypoints + place[:, :, None], frames.turned.focal[:, None], frames.turned.principal_point[:, None]
    )
    peaks = frames.turned.from_photo(seen[:, 0])
    height = (peaks.abs() < 0.9).all(-1).float()
    assert height.sum(1).min() > 12
    maps = gaussian_heatmaps(peaks.clamp(-0.95, 0.95), height, 2.0)
    prior = place + torch.tensor([0.1, -0.1, 0.5])
    found = frames.fitted_translation(keypoints, maps, prior)
    torch.testing.assert_close(found, place, atol=0.3, rtol=0)
    missing = maps.clone()
    missing[:, 8:] = 0
    wrong = keypoints.clone()
    wrong[:, :, 8:] += 5.0
    torch.testing.assert_close(frames.fitted_translation(wrong, missing, prior), place, atol=0.3, rtol=0)
    torch.testing.assert_close(frames.fitted_translation(keypoints, 0 * maps, prior), prior)


def test_the_camera_heads_translation_is_kept_where_that_is_asked_for(pipe: HMDiffPipeline) -> None:
    given = heatmaps(crops())
    fitted, plain = (pipe(heatmaps=given, num_hypotheses=2, fit_camera=fit, **RAW) for fit in (True, False))
    expected = CropCamera.of(given.crop, False).translation(plain.camera, 2)
    torch.testing.assert_close(plain.translation, expected)
    assert (fitted.translation - expected).abs().max() > 1e-3
    assert fitted.log_likelihood is not None and fitted.keypoints is not None
    again = log_likelihood(fitted.keypoints, fitted.translation, fitted.focal, fitted.principal_point, given)
    torch.testing.assert_close(fitted.log_likelihood, again, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("frame", ["camera", "crop"])
@pytest.mark.parametrize("guidance", [None, Guidance(gradient="estimate")])
def test_an_untrained_aggregator_of_one_hypothesis_is_that_hypothesis(frame: str, guidance: Guidance | None) -> None:
    """It passes the same frames and the same last step of guidance."""
    pipe = small_pipeline(f"model.frame={frame}")
    head = HypothesisAggregator(AggregatorSizes(pipe.model.num_points, 24, 16))
    head.set_basis(lbs_basis(free_body()[0], pipe.model.coarse_ids).points)
    pipe.aggregator = head
    found = pipe(heatmaps=heatmaps(crops(0.7)), num_hypotheses=1, guidance=guidance, **RAW)
    assert found.aggregated_vertices is not None
    torch.testing.assert_close(found.aggregated_vertices, found.vertices[:, 0], atol=1e-4, rtol=1e-4)


def test_what_is_not_asked_for_is_the_pipelines(pipe: HMDiffPipeline) -> None:
    other = small_pipeline("diffusion.eta=0.5", "diffusion.num_inference_steps=7")
    other.eta, other.num_inference_steps = 0.5, 7
    found = other.resolved(SamplingConfig())
    assert (found.eta, found.num_inference_steps, found.scheduler, found.guidance) == (0.5, 7, "ddim", None)
    assert other.resolved(SamplingConfig(eta=0.0, num_inference_steps=3)).eta == 0.0
    given = heatmaps(crops())
    plain, heun = (pipe(heatmaps=given, num_hypotheses=1, scheduler=name, **RAW).vertices for name in ("ddim", "heun"))
    assert torch.equal(plain, pipe(heatmaps=given, num_hypotheses=1, **RAW).vertices)
    assert (heun - plain).abs().max() > 1e-4


def test_sigma_is_returned_in_metres() -> None:
    pipe, given = small_pipeline("model.rle=[joints]"), heatmaps(crops())
    found = pipe(heatmaps=given, num_hypotheses=2, **RAW)
    conditioning, _ = pipe.model.encode(None, given.values, given.valid)
    scale = pipe.model.at_last_step(conditioning).scale["joints"][:, 0]
    assert found.joint_scale is not None and found.confidence is not None
    torch.testing.assert_close(found.joint_scale, scale * pipe.model.config.mesh_scale)
    torch.testing.assert_close(found.confidence, (1 - scale).mean(-1))


def test_guidance_has_the_photos_principal_point_and_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draws differ from the noise and do not depend on the chunks; keypoints are in the camera's frame."""
    pipe, given = small_pipeline("model.frame=crop"), heatmaps(crops())
    frames = CropCamera.of(given.crop, True)
    seen: list[dict[str, Any]] = []

    def watched(guidance: Guidance, maps: Tensor, camera: Tensor, draws: list, principal: Tensor | None = None) -> Any:
        target = make_target(guidance, maps, camera, draws, principal)
        seen.append({"target": target, "seeds": [generator.initial_seed() for generator in draws]})
        return target

    monkeypatch.setattr(reverse, "make_target", watched)
    noise: list[int] = []
    real = reverse.initial_noise
    monkeypatch.setattr(
        reverse, "initial_noise", lambda made, *rest: noise.extend(g.initial_seed() for g in made) or real(made, *rest)
    )
    guidance = Guidance(pairing="paired", gradient="estimate", fall_back=False, peaks=0.0)
    whole = pipe(heatmaps=given, num_hypotheses=3, guidance=guidance, **RAW)
    (call,) = seen
    assert not set(call["seeds"]) & set(noise) and len(set(call["seeds"])) == 6
    torch.testing.assert_close(call["target"].principal_point, frames.principal_in_crop.repeat_interleave(3, 0))
    monkeypatch.setattr(reverse, "ROWS_AT_ONCE", 2)
    parts = pipe(heatmaps=given, num_hypotheses=3, guidance=guidance, **RAW)
    torch.testing.assert_close(parts.vertices, whole.vertices, atol=1e-4, rtol=1e-4)
    assert [seed for number in range(2) for part in seen[1:] for seed in [part["seeds"][number]]] == call["seeds"]
    plan = reverse.guidance_plan(pipe.model, pipe.body, guidance, given, whole.camera, frames)
    assert plan is not None
    points = torch.randn(6, pipe.model.num_points, 3)
    regressed = pipe.model.keypoint_regressor(pipe.body) @ pipe.model.to_coarse(points)
    torch.testing.assert_close(plan.keypoints(points), frames.to_camera(regressed.unflatten(0, (2, 3))).flatten(0, 1))


def test_a_decision_by_image_needs_all_its_hypotheses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, given = small_pipeline(), heatmaps(crops())
    guidance = Guidance(decision="image", gradient="estimate", threshold=0.5)
    whole = pipe(heatmaps=given, num_hypotheses=4, guidance=guidance, **RAW)
    monkeypatch.setattr(reverse, "ROWS_AT_ONCE", 2)
    calls: list[int] = []
    real = reverse.aligned_sample
    monkeypatch.setattr(reverse, "aligned_sample", lambda *given: calls.append(len(given[2][1])) or real(*given))
    parts = pipe(heatmaps=given, num_hypotheses=4, guidance=guidance, **RAW)
    assert calls == [8]
    torch.testing.assert_close(parts.vertices, whole.vertices, atol=1e-5, rtol=1e-5)


def test_a_fall_back_is_the_same_persons_same_hypothesis(pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without guidance start from the same noise and see the same person as a call without guidance."""
    given, rows = heatmaps(crops()), torch.tensor([1, 3, 4])
    plain = pipe(heatmaps=given, num_hypotheses=3, **RAW)
    nothing = torch.zeros(6, pipe.model.num_points, 3)

    def fallen(*all_of: Any) -> tuple[Tensor, GuidanceReport]:
        gap = torch.zeros(2, 3)
        report = GuidanceReport(gap, gap, torch.zeros(2, 2), gap > 0)
        return nothing.index_copy(0, rows, all_of[9](rows)), report

    monkeypatch.setattr(reverse, "aligned_sample", fallen)
    found = pipe(heatmaps=given, num_hypotheses=3, guidance=Guidance(peaks=0.0), **RAW).vertices.flatten(0, 1)
    torch.testing.assert_close(found[rows], plain.vertices.flatten(0, 1)[rows], atol=1e-4, rtol=1e-4)
    assert (plain.vertices.flatten(0, 1)[rows].diff(dim=0)).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("guidance", [None, Guidance(threshold=0.0, peaks=0.0)])
def test_pure_noise_is_evaluated_once_a_person(monkeypatch: pytest.MonkeyPatch, guidance: Guidance | None) -> None:
    """x_K says nothing: all hypotheses share the first x̂_0, the regressor's; noise prediction has none to share."""
    for prediction_type, shared in (("sample", True), ("epsilon", False)):
        pipe = small_pipeline(f"diffusion.prediction_type={prediction_type}")
        maps, estimates, rows = heatmaps(crops()), [], []
        denoise = type(pipe.model).denoise

        def watched(model: Any, points: Tensor, *rest: Any, to: Any = denoise, seen: list[int] = rows) -> Tensor:
            seen.append(points.shape[1])
            return to(model, points, *rest)  # type: ignore[no-any-return]

        def keep(*step: Any, to: list[Tensor] = estimates) -> None:
            to.append(step[-1]["prediction"].unflatten(0, (2, 3)))

        monkeypatch.setattr(type(pipe.model), "denoise", watched)
        options = {**RAW, "num_inference_steps": 3, "num_hypotheses": 3, "guidance": guidance}
        whole = pipe(heatmaps=maps, callback_on_step_end=keep, **options)
        assert len([width for width in rows if width == 3]) == (2 if shared else 3)
        assert bool((estimates[0] == estimates[0][:, :1]).all()) == shared
        assert (estimates[1] != estimates[1][:, :1]).any()
        if shared:
            conditioning, _ = pipe.model.encode(None, maps.values, maps.valid)
            torch.testing.assert_close(estimates[0][:, :1], pipe.model.regress(conditioning))
        monkeypatch.setattr(reverse, "ROWS_AT_ONCE", 2)
        torch.testing.assert_close(pipe(heatmaps=maps, **options).vertices, whole.vertices, atol=1e-5, rtol=1e-4)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("last", "kind", "shared"), [(1e-9, "sample", True), (1e-9, "epsilon", False), (0.01, "sample", False)]
)
def test_one_evaluation_serves_all_where_the_prediction_is_a_mesh_from_nothing(
    last: float, kind: str, shared: bool
) -> None:
    scheduler: Any = SimpleNamespace(
        alphas_cumprod=torch.tensor([0.9, last]), config=SimpleNamespace(prediction_type=kind)
    )
    assert reverse._starts_from_nothing(scheduler) == shared
