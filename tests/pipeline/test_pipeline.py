"""The pipeline: bit-equal after save and load, independent of the batch, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import free_body, people_block, small_pipeline
from torch import Tensor

from hmdiff.diffusion.hypotheses import Reprojection, select
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.schedule import SCHEDULER_NAMES
from hmdiff.errors import UserError
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Crop, Heatmaps
from hmdiff.pipeline import HMDiffPipeline, MeshOutput, reverse


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def heatmaps(count: int = 4) -> Heatmaps:
    sample = people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    center = torch.tensor([[300.0, 250], [640, 360], [100, 500], [700, 100]])
    side = torch.tensor([200.0, 400, 150, 320])
    return Heatmaps(sample.heatmaps[:count], sample.heatmap_valid[:count], Crop.of(center[:count], side[:count]))


def same(first: MeshOutput, second: MeshOutput) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return all(map(equal, a, b))
        if isinstance(a, Reprojection) and isinstance(b, Reprojection):
            return all(map(equal, vars(a).values(), vars(b).values()))
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    pairs = zip(vars(first).items(), vars(second).values(), strict=True)
    return all(name == "body" or equal(a, b) for (name, a), b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.mode=direct",),
        ("diffusion.sampler=sde-dpm++", "diffusion.eta=0.5"),
        ("diffusion.prediction_type=v_prediction", "model.stack=2", "model.neighbour_mask=true"),
    ],
)
def test_saved_and_loaded_is_bit_equal(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    first = small_pipeline(*overrides)
    first.save_pretrained(tmp_path / "saved")
    second = HMDiffPipeline.from_pretrained(tmp_path / "saved")
    assert same(first(heatmaps=heatmaps(2), num_hypotheses=2), second(heatmaps=heatmaps(2), num_hypotheses=2))
    assert (second.num_inference_steps, second.eta) == (first.num_inference_steps, first.eta)
    assert type(second.scheduler) is type(first.scheduler)
    configs = [{k: v for k, v in p.scheduler.config.items() if not k.startswith("_")} for p in (first, second)]
    assert configs[0] == configs[1]
    assert not any(path.suffix in (".pkl", ".pt", ".bin", ".npz") for path in (tmp_path / "saved").rglob("*"))
    second.save_pretrained(tmp_path / "saved")  # overwrites the older one
    assert same(
        HMDiffPipeline.from_pretrained(tmp_path / "saved")(heatmaps=heatmaps(1), num_hypotheses=1),
        first(heatmaps=heatmaps(1), num_hypotheses=1),
    )


def test_shapes_and_means(pipe: HMDiffPipeline) -> None:
    body, _ = free_body()
    output = pipe(heatmaps=heatmaps(3), num_hypotheses=4)
    assert output.vertices.shape == (3, 4, body.num_vertices, 3) and output.joints.shape == (3, 4, 24, 3)
    assert output.keypoints is not None and output.keypoints.shape == (3, 4, 26, 3)
    torch.testing.assert_close(output.keypoints, body.keypoints(output.vertices))
    torch.testing.assert_close(output.mean_vertices, output.vertices.mean(1))
    torch.testing.assert_close(output.mean_joints, output.joints.mean(1))
    centre = output.vertices[1].mean(0)
    expected = (output.vertices[1] - centre).norm(dim=-1).mean(0) * 1000
    torch.testing.assert_close(output.spread[1], expected, rtol=1e-4, atol=1e-3)
    assert output.spread.min() > 0 and (output.camera[:, 0] > 0).all()
    assert torch.equal(output.faces, body.faces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("sde-dpm++", 0.0), ("heun", 0.0)]
)
def test_results_do_not_depend_on_the_batch(
    pipe: HMDiffPipeline, scheduler: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(given: Heatmaps, hypotheses: int, people: list[int], surface: str = "vertices") -> Tensor:
        return pipe(
            heatmaps=given,
            num_hypotheses=hypotheses,
            num_inference_steps=4,
            seed=9,
            scheduler=scheduler,
            eta=eta,
            people=people,
            surface=surface,
        ).joints

    close = {"rtol": 1e-4, "atol": 1e-5}
    everyone = heatmaps()
    whole = run(everyone, 7, [0, 1, 2, 3])
    for person in (0, 3):
        torch.testing.assert_close(run(everyone[person], 7, [person])[0], whole[person], **close)
    torch.testing.assert_close(run(everyone[[2, 1]], 3, [2, 1]), whole[[2, 1], :3], **close)  # the first 3 of 7
    # Fitting bodies to an untrained network's meshes is badly conditioned.
    fitted = [run(given, 7, people, "body") for given, people in ((everyone, [0, 1, 2, 3]), (everyone[3], [3]))]
    torch.testing.assert_close(fitted[1][0], fitted[0][3], rtol=0, atol=1e-3)
    monkeypatch.setattr(reverse, "ROWS_AT_ONCE", 9)  # 2 hypotheses at a time
    torch.testing.assert_close(run(everyone, 7, [0, 1, 2, 3]), whole, **close)
    assert (run(everyone[[0, 0]], 1, [0, 1]).diff(dim=0)).abs().max() > 1e-4  # the same heatmaps, another person


def test_seeds_people_and_hypotheses_differ(pipe: HMDiffPipeline) -> None:
    runs = [pipe(heatmaps=heatmaps(1), num_hypotheses=2, seed=seed).joints[0] for seed in (0, 1, 2**32, 2**40 + 1)]
    flat = torch.cat(runs).flatten(1)
    assert torch.cdist(flat, flat).add(torch.eye(8)).min() > 1e-3
    assert torch.equal(pipe(heatmaps=heatmaps(1), num_hypotheses=2, seed=2**32).joints[0], runs[2])


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_sampler_runs(pipe: HMDiffPipeline, scheduler: str, steps: int) -> None:
    output = pipe(heatmaps=heatmaps(1), num_hypotheses=2, num_inference_steps=steps, scheduler=scheduler)
    assert output.vertices.isfinite().all() and output.translation.isfinite().all()


def test_one_step_is_the_direct_estimate_at_every_noise(pipe: HMDiffPipeline) -> None:
    """One DDIM step returns x̂_0 at t = T."""
    given = heatmaps(2)
    conditioning, _ = pipe.model.encode(None, given.values, given.valid)
    seen: list[Tensor] = []
    asked = SamplingConfig(3, 1)
    result, _ = pipe.denoised(conditioning, [0, 1], asked, callback=lambda *seen_now: seen.append(seen_now[3]))
    assert len(seen) == 1 and torch.equal(result.flatten(0, 1), seen[0])


def test_the_direct_baseline_gives_copies() -> None:
    direct = small_pipeline("model.mode=direct")
    output = direct(heatmaps=heatmaps(2), num_hypotheses=3, num_inference_steps=7, seed=1)
    assert (output.vertices == output.vertices[:, :1]).all() and output.spread.max() < 1e-3
    assert torch.equal(output.vertices[:, :1], direct(heatmaps=heatmaps(2), num_hypotheses=1, seed=5).vertices)
    assert (output.vertices[0] - output.vertices[1]).abs().max() > 1e-3


def test_the_translation_shows_the_pelvis_where_the_crop_camera_does(pipe: HMDiffPipeline) -> None:
    given, sizes = heatmaps(), torch.tensor([[800.0, 600], [1280, 720], [640, 640], [1000, 500]])
    for focal in (None, torch.full((4,), 1500.0)):
        output = pipe(heatmaps=given, num_hypotheses=1, photo_sizes=sizes, focal=focal, fit_camera=False)
        torch.testing.assert_close(output.principal_point, sizes / 2)
        torch.testing.assert_close(output.focal, sizes.norm(dim=-1) if focal is None else focal)
        pixel = perspective_projection(output.translation, output.focal, output.principal_point)[:, 0]
        expected = given.center + output.camera[:, 1:] * given.side[:, None] / 2
        torch.testing.assert_close(pixel, expected, rtol=1e-4, atol=1e-2)
        size = output.focal / output.translation[:, 0, 2]  # pixels per metre at the pelvis
        torch.testing.assert_close(size, output.camera[:, 0] * given.side / 2, rtol=1e-4, atol=1e-3)


def test_crops_that_are_the_photo_have_a_finite_translation(pipe: HMDiffPipeline) -> None:
    output = pipe(heatmaps=heatmaps(), num_hypotheses=2)
    assert output.translation.isfinite().all() and (output.translation[..., 2] > 0).all()


def test_bad_calls_are_named(pipe: HMDiffPipeline) -> None:
    with pytest.raises(UserError, match="this model reads heatmaps"):
        pipe()
    for steps in (0, 201):
        with pytest.raises(UserError, match=f"num_inference_steps {steps}: the model was trained with 200 steps"):
            pipe(heatmaps=heatmaps(1), num_inference_steps=steps)
    with pytest.raises(UserError, match="num_hypotheses 0"):
        pipe(heatmaps=heatmaps(1), num_hypotheses=0)
    with pytest.raises(UserError, match="scheduler 'lms' is not known; choose one of ddim"):
        pipe(heatmaps=heatmaps(1), scheduler="lms")
    with pytest.raises(UserError, match="seed -1"):
        pipe(heatmaps=heatmaps(1), seed=-1)
    with pytest.raises(UserError, match="people: 3 numbers for 1 people"):
        pipe(heatmaps=heatmaps(1), people=[0, 1, 2])
    body, mesh = free_body()
    with pytest.raises(UserError, match=r"predicts 12410 vertices, but body 'free' has 40; load the body .*'free'"):
        HMDiffPipeline(pipe.model, pipe.scheduler, body.select(mesh.coarse_ids[:40]))
    with pytest.raises(UserError, match="has no faces"):
        HMDiffPipeline(pipe.model, pipe.scheduler, body.select(torch.arange(body.num_vertices)))


def test_models_that_read_pictures() -> None:
    both = small_pipeline("model.inputs=both", "model.backbone=resnet18", "data.image_size=64")
    image = torch.rand(2, 3, 80, 80)
    output = both(image, heatmaps(2), num_hypotheses=1, num_inference_steps=1)
    assert output.vertices.isfinite().all()
    with pytest.raises(UserError, match="this model reads pictures"):
        both(None, heatmaps(2))
    with pytest.raises(UserError, match="reads heatmaps"):
        both(image)
    with pytest.raises(UserError, match=r"images: shape \(2, 80, 80\) found"):
        both(image[:, 0], heatmaps(2))
    with pytest.raises(UserError, match=r"uint8 found.* divide 8-bit pictures by 255"):
        both((image * 255).byte(), heatmaps(2))
    with pytest.raises(UserError, match="2 images but heatmaps of 1 people"):
        both(image, heatmaps(1))
    alone = small_pipeline("model.inputs=image", "model.backbone=resnet18", "data.image_size=64")
    output = alone(image, num_hypotheses=3, num_inference_steps=1)
    torch.testing.assert_close(output.principal_point, torch.full((2, 2), 32.0))
    assert output.log_likelihood is None
    assert torch.equal(output.selected, select(output.vertices, output.joints[:, :, 0]))


def test_folders_that_are_no_pipeline(tmp_path: Path, pipe: HMDiffPipeline) -> None:
    with pytest.raises(UserError, match="nonsense: neither a folder nor a shipped checkpoint"):
        HMDiffPipeline.from_pretrained("nonsense")
    with pytest.raises(UserError, match="not a saved hmdiff pipeline"):
        HMDiffPipeline.from_pretrained(tmp_path)
    folder = tmp_path / "saved"

    def spoil(name: str, text: str, message: str) -> None:
        pipe.save_pretrained(folder)
        if text:
            (folder / name).write_text(text)
        else:
            (folder / name).unlink()
        with pytest.raises(UserError, match=message) as caught:
            HMDiffPipeline.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    about = json.loads((pipe.save_pretrained(folder) or folder / "hmdiff.json").read_text())
    spoil("hmdiff.json", "{", "not JSON, or cut short")
    spoil("hmdiff.json", "[]", "damaged")
    spoil("hmdiff.json", json.dumps({**about, "format": 9}), "format 9, .* reads 1; update hmdiff")
    spoil("hmdiff.json", json.dumps({**about, "sampler": "x"}), "sampler 'x'")
    spoil("model/config.json", "", "config.json: missing")
    spoil("model/config.json", '{"_class_name": "UNet2DModel"}', "config.json: not what was written, by its checksum")
    spoil("model/diffusion_pytorch_model.safetensors", "", "missing; save or copy")
    spoil("model/diffusion_pytorch_model.safetensors", "rubbish", "not what was written, by its checksum")
    spoil("scheduler/scheduler_config.json", "{}", "not what was written, by its checksum")


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path, pipe: HMDiffPipeline) -> None:
    pipe.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "width": 16}))
    about = json.loads((tmp_path / "a" / "hmdiff.json").read_text())
    (tmp_path / "a" / "hmdiff.json").write_text(json.dumps({k: v for k, v in about.items() if k != "checksums"}))
    with pytest.raises(UserError, match=r"is \(32,\), \(16,\) expected|is \(.*\) expected"):
        HMDiffPipeline.from_pretrained(tmp_path / "a")


@pytest.mark.slow
def test_compiled_is_the_same(tmp_path: Path) -> None:
    """Encoder and denoiser are compiled, with dynamo's tracing only, since code generation takes minutes."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    plain, compiled = small_pipeline(), small_pipeline().compile(backend=backend)
    assert not graphs
    options = {"num_hypotheses": 2, "num_inference_steps": 2, "seed": 1}
    before, after = plain(heatmaps=heatmaps(1), **options), compiled(heatmaps=heatmaps(1), **options)
    assert len(graphs) >= 2
    torch.testing.assert_close(after.vertices, before.vertices, rtol=0, atol=1e-5)
    compiled.save_pretrained(tmp_path / "saved")
    again = HMDiffPipeline.from_pretrained(tmp_path / "saved")(heatmaps=heatmaps(1), **options)
    assert torch.equal(again.vertices, before.vertices)


def test_a_callback_and_a_progress_bar_as_diffusers_has_them(
    pipe: HMDiffPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, bool]] = []

    def frozen(caller: HMDiffPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, timestep, caller is pipe and tensors["latents"].shape == tensors["prediction"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    options = {"num_hypotheses": 2, "num_inference_steps": 3, "seed": 1}
    plain = pipe(heatmaps=heatmaps(1), **options)
    watched = pipe(heatmaps=heatmaps(1), callback_on_step_end=lambda *_: None, **options)
    assert torch.equal(plain.vertices, watched.vertices)
    replaced = pipe(heatmaps=heatmaps(1), callback_on_step_end=frozen, surface="vertices", **options)
    assert [step for step, _, _ in seen] == [0, 1, 2] and all(fine for *_, fine in seen)
    timesteps = [timestep for _, timestep, _ in seen]
    assert timesteps[0] == 199 and timesteps == sorted(timesteps, reverse=True)
    assert replaced.vertices.eq(0).all()  # the points that the callback gave
    assert capsys.readouterr().err == ""
    try:
        pipe.set_progress_bar_config(desc="bodies")
        pipe(heatmaps=heatmaps(1), **options)
        assert "bodies: 100%" in capsys.readouterr().err
        pipe.set_progress_bar_config(disable=True)
        pipe(heatmaps=heatmaps(1), **options)
        assert capsys.readouterr().err == ""
    finally:
        pipe._progress_bar_config = None
