"""Optional modules of the model: absent when off; when on, trained, saved, and independent of the batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small import free_body, small_config
from torch import Tensor

from hmdiff.build import build_model, build_pipeline, build_scheduler
from hmdiff.data.sample import Sample
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps, depth_argument, evaluate
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train import step
from hmdiff.train.step import Draws, TrainingStep, training_losses, used_by_no_loss

PATHS = {
    "depth": ("model.depth_map=true",),
    "rle": ("model.rle=[joints,vertices,joints_2d]", "loss.rle=0.1"),
    "rle composite": ("model.rle=[joints]", "model.rle_variant=composite", "loss.rle=0.1"),
    "silhouette": ("model.silhouette=true", "loss.silhouette=0.1"),
    "masked": ("model.masked=0.5",),
    "projection": ("loss.projection=0.1",),
    "lifting": (
        "model.backbone=conv",
        "model.lifting=true",
        "model.volume_width=16",
        "model.volume_size=4",
        "model.depth=2",
        "loss.estimates=0.5",
        "loss.joint_contrast=0.1",
        "loss.non_joint_contrast=0.1",
    ),
}
PATHS["hybrid position"] = ("model.backbone=conv", "model.hybrid_position=true")
PATHS["coarse to fine"] = (*PATHS["lifting"], "model.coarse_to_fine=true")
EVERYTHING = tuple(value for name, path in PATHS.items() for value in path if name != "rle composite")


def people_of(*overrides: str) -> Sample:
    from hmdiff.build import build_data

    values = small_config("unused", *overrides)
    body, mesh = free_body()
    return build_data(values, body, mesh).block("train", 0)


def draws_for(model: MeshRecoveryModel, people: int) -> Draws:
    hidden = torch.rand(people, 2, model.num_tokens) < 0.3 if model.config.masked else None
    return Draws(torch.tensor([[20, 199]] * people), torch.randn(people, 2, model.num_points, 3), hidden, 7)


@pytest.mark.parametrize(("name", "mode"), [*((name, "direct") for name in PATHS), ("all", "diffusion")])
def test_every_path_learns_with_and_without_diffusion(name: str, mode: str) -> None:
    """For single modules with diffusion, `test_recorded_numbers` has numbers and gradients."""
    overrides = (*(EVERYTHING if name == "all" else PATHS[name]), f"model.mode={mode}", "loss.points=l1")
    values = small_config("unused", *overrides)
    body, mesh = free_body()
    model, scheduler, people = build_model(values, body, mesh), build_scheduler(values), people_of(*overrides)
    model.upsample_weight.requires_grad_(False)
    module, draws = TrainingStep(model, scheduler, values.loss), draws_for(model, len(people))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        terms = module(people, draws)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
        assert all(value.isfinite() for value in terms.values())
    assert losses[-1] < losses[0]
    names = set(terms) - {"loss", "points", "camera"}
    wanted = {
        "depth": set(),
        "rle": {"rle_joints", "rle_vertices", "rle_joints_2d"},
        "rle composite": {"rle_joints"},
        "silhouette": {"silhouette"},
        "masked": set(),
        "projection": {"projection"},
        "lifting": {"estimates", "joint_contrast", "non_joint_contrast"},
        "hybrid position": set(),
        "coarse to fine": {"estimates", "mesh_estimates", "joint_contrast", "non_joint_contrast"},
    }
    assert names == (set().union(*wanted.values()) if name == "all" else wanted[name])
    idle = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not idle or used_by_no_loss(model, values.loss), idle


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
@torch.no_grad()
def test_a_path_that_is_not_used_changes_nothing(name: str) -> None:
    """Models with and without the module have equal common weights and equal outputs at initialisation."""
    shared = [text for text in PATHS[name] if text in ("model.backbone=conv", "model.depth=2")]
    body, mesh = free_body()
    without = build_model(small_config("unused", *shared), body, mesh).eval()
    model = build_model(small_config("unused", *PATHS[name]), body, mesh).eval()
    assert set(without.state_dict()) <= set(model.state_dict())
    for key, value in without.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    people = people_of("model.backbone=conv")
    points, steps = torch.randn(len(people), 2, model.num_points, 3), torch.rand(len(people), 2)
    # A lifting model at initialisation: the gate of its joints is zero.
    expected = without(points, steps, None, people.heatmaps, people.heatmap_valid)
    found = model(points, steps, None, people.heatmaps, people.heatmap_valid)
    assert torch.equal(found.points, expected.points) and torch.equal(found.camera, expected.camera)


@torch.no_grad()
def test_every_image_token_has_a_learned_place() -> None:
    """Changing the position embedding changes the tokens of all images; a model without an image grid has none."""
    model = build_pipeline(small_config("unused", *PATHS["hybrid position"])).model
    people = people_of("model.backbone=conv")
    assert model.image_place.shape == (64, 32)
    before, _ = model.encode(None, people.heatmaps, people.heatmap_valid)
    model.image_place[5, 3] += 1.0  # one channel: a change of all is removed by the layer norm
    after, _ = model.encode(None, people.heatmaps, people.heatmap_valid)
    assert (after.tokens - before.tokens).abs().amax((1, 2)).min() > 1e-3
    with pytest.raises(UserError, match="hybrid_position is of a grid of image tokens"):
        build_pipeline(small_config("unused", "model.hybrid_position=true"))


FINE = (*PATHS["coarse to fine"], "model.depth=4")


@torch.no_grad()
def test_joints_and_mesh_accumulate_from_block_to_block() -> None:
    """JOTR's heads: every block adds a correction to the previous estimate; the last sum is the result."""
    model, people = build_pipeline(small_config("unused", *FINE)).model, people_of("model.backbone=conv")
    wake(model)
    points, steps = torch.randn(len(people), 2, model.num_points, 3), torch.rand(len(people), 2)
    found = model(points, steps, None, people.heatmaps, people.heatmap_valid)
    assert found.meshes.shape == (len(people), 2, 3, 432, 3) and found.estimates.shape == (len(people), 2, 3, 24, 3)
    result = found.points.clone()
    (denoiser,) = model.denoisers
    denoiser.to_patch.weight.zero_()  # zero last block: the result is the previous estimate
    denoiser.to_joint.weight.zero_()
    before = model(points, steps, None, people.heatmaps, people.heatmap_valid)
    torch.testing.assert_close(before.points, torch.cat([before.meshes[:, :, -1], before.estimates[:, :, -1]], 2))
    assert (result - before.points).std() > 0.01
    for number in (2, 1, 0):
        denoiser.refinements[number].weight.zero_()
        less = model(points, steps, None, people.heatmaps, people.heatmap_valid).meshes
        steps_left = less.diff(dim=2).flatten(3).std(-1)  # (B, 2, 2): first to second, second to third
        moving = max(number - 1, 0)
        assert (steps_left[..., :moving] > 0.001).all() and (steps_left[..., moving:] == 0).all()
    bias = denoiser.patch_bias.reshape(-1, 3)[denoiser.place]
    torch.testing.assert_close(less, bias.expand_as(less))


def test_every_block_is_supervised() -> None:
    """A loss on one block's joints and mesh alone gives the other blocks' heads no gradient."""
    values = small_config("unused", *FINE, "loss.camera=0", "loss.joint_contrast=0", "loss.non_joint_contrast=0")
    body, mesh = free_body()
    model, people = build_model(values, body, mesh), people_of("model.backbone=conv")
    wake(model)
    losses = training_losses(model, build_scheduler(values), values.loss, people, draws_for(model, len(people)))
    assert losses["mesh_estimates"] > 0 and losses["estimates"] > 0
    (denoiser,) = model.denoisers
    for name in ("mesh_estimates", "estimates"):
        layers = denoiser.refinements if name == "mesh_estimates" else [f.refine for f in denoiser.fusions]
        heads = [layer.weight for layer in layers]
        gradients = torch.autograd.grad(losses[name], heads, retain_graph=True)
        assert len(heads) == 3 and all(gradient.abs().max() > 0 for gradient in gradients)


def test_contrast_knows_whose_joints_are_outside_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validity follows from the ground truth joints and camera, for both losses; draws depend on the step's seed."""
    values = small_config("unused", *PATHS["lifting"])
    body, mesh = free_body()
    model, people = build_model(values, body, mesh), people_of("model.backbone=conv")
    camera = people.camera.clone()
    camera[0, 1] += 0.8  # half of the first person is outside the right border
    people = dataclasses.replace(people, camera=camera)
    given: list[Tensor] = []
    seeds: list[int] = []

    def watch(*positional: Any, valid: Tensor, **_: Any) -> Tensor:
        given.append(valid)
        seeds.append(positional[-1].initial_seed())
        return torch.zeros(())

    monkeypatch.setattr(step, "joint_to_joint", watch)
    monkeypatch.setattr(step, "joint_to_non_joint", watch)
    training_losses(model, build_scheduler(values), values.loss, people, draws_for(model, len(people)))
    seen = people.joints_3d[..., :2] * camera[:, None, :1] + camera[:, None, 1:]
    inside = (seen.abs() <= 1).all(-1) & (people.joints_3d[..., 2].abs() <= 1.2)
    assert len(given) == 2 and all(torch.equal(mask, inside) for mask in given)
    assert 0 < int(inside[0].sum()) < 24
    assert seeds == [7, 7]  # of `draws_for`


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_mesh_is_refined_where_a_mesh_is_predicted(kind: str) -> None:
    with pytest.raises(UserError, match=f"refines a mesh, and diffusion.prediction_type is '{kind}'"):
        build_pipeline(small_config("unused", *FINE, f"diffusion.prediction_type={kind}"))
    build_pipeline(small_config("unused", *FINE, f"diffusion.prediction_type={kind}", "model.mode=direct"))
    with pytest.raises(UserError, match="it needs lifting"):
        build_pipeline(small_config("unused", "model.coarse_to_fine=true"))


def wake(model: MeshRecoveryModel) -> None:
    """Randomise zero-initialised weights, so that every module affects the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad and "upsample" not in key and "exponent" not in key:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))


def all_paths(*overrides: str) -> tuple[HMDiffPipeline, Sample]:
    pipeline = build_pipeline(small_config("unused", *EVERYTHING, *overrides))
    wake(pipeline.model)
    return pipeline, people_of(*EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["diffusion", "direct"])
def test_saved_and_loaded_with_every_path(tmp_path: Path, mode: str) -> None:
    pipeline, people = all_paths(f"model.mode={mode}", "model.rle_variant=official")
    given = dict(heatmaps=as_heatmaps(people), num_hypotheses=3, num_inference_steps=2, depth=people.depth_input)
    before = pipeline(**given)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = HMDiffPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.model.config.rle == ["joints", "vertices", "joints_2d"]
    after = loaded(**given)
    for name in ("vertices", "confidence", "joint_scale", "rle_log_likelihood"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert before.confidence.shape == (len(people), 24) and before.rle_log_likelihood.shape == (len(people), 3)
    assert ((before.confidence >= 0) & (before.confidence <= 1)).all() and (before.joint_scale > 0).all()
    assert before.confidence.std() > 0


def test_a_person_alone_and_in_a_batch() -> None:
    pipeline, people = all_paths()
    heatmaps = as_heatmaps(people)
    # Raw vertices: fitting a body to an untrained model's mesh amplifies rounding differences between batch sizes.
    raw = {"num_hypotheses": 3, "num_inference_steps": 2, "surface": "vertices"}
    whole = pipeline(heatmaps=heatmaps, depth=people.depth_input, **raw)
    for person in (0, 2):
        depth = people.depth_input[person : person + 1]
        one = pipeline(heatmaps=heatmaps[person], people=[person], depth=depth, **raw)
        torch.testing.assert_close(one.vertices[0], whole.vertices[person], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.confidence[0], whole.confidence[person], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.rle_log_likelihood[0], whole.rle_log_likelihood[person], rtol=1e-3, atol=1e-2)


def heard(model: MeshRecoveryModel, people: Sample, depth: Tensor | None) -> Tensor:
    conditioning, _ = model.encode(None, people.heatmaps, people.heatmap_valid, depth)
    return model.regress(conditioning)


@torch.no_grad()
def test_depth_is_read_and_missing_depth_is_not() -> None:
    pipeline, people = all_paths()
    depth = people.depth_input
    before = heard(pipeline.model, people, depth)
    assert not depth[:3].isnan().all() and depth[3].isnan().all()  # the fourth person has no map
    changed = (heard(pipeline.model, people, depth.flip(-1)) - before).abs().amax((1, 2, 3))
    assert changed[:3].min() > 1e-4 and changed[3] == 0
    half = depth.clone()
    half[::2] = torch.nan
    found, none = heard(pipeline.model, people, half), heard(pipeline.model, people, None)
    torch.testing.assert_close(found[1::2], before[1::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[::2], none[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heard(pipeline.model, people, 1000 * depth + 3), before, rtol=1e-3, atol=1e-3)


def test_depth_is_asked_for_and_refused_by_name() -> None:
    pipeline, people = all_paths()
    heatmaps = as_heatmaps(people)
    with pytest.raises(UserError, match="this model reads depth maps: give depth="):
        pipeline(heatmaps=heatmaps, num_hypotheses=1)
    with pytest.raises(UserError, match=r"depth: shape \(1, 64, 64\) found"):
        pipeline(heatmaps=heatmaps, num_hypotheses=1, depth=people.depth_input[:1])
    plain = build_pipeline(small_config("unused"))
    with pytest.raises(UserError, match="this model reads no depth maps"):
        plain(heatmaps=heatmaps, num_hypotheses=1, depth=people.depth_input)
    assert depth_argument(plain, people) == {} and depth_argument(pipeline, people)["depth"] is people.depth_input
    assert depth_argument(pipeline, people_of())["depth"].isnan().all()


def test_a_split_is_evaluated_with_every_path() -> None:
    pipeline, _ = all_paths()
    from hmdiff.build import build_data

    body, mesh = free_body()
    data = build_data(small_config("unused", *EVERYTHING), body, mesh, full_mesh=True)
    report = evaluate(pipeline, data, "val", 4, SamplingConfig(2, 2))
    assert report["errors"]["pve"]["mean"]["value"] > 0


def test_hypotheses_look_into_the_volume_at_their_own_places() -> None:
    pipeline, people = all_paths()
    model = pipeline.model
    conditioning, _ = model.encode(None, people.heatmaps, people.heatmap_valid)
    assert conditioning.volume is not None
    points = torch.randn(len(people), 3, model.num_points, 3)
    steps = torch.full((len(people), 3), 0.5)
    whole = model.predict(points, steps, conditioning)
    assert whole.estimates is not None and whole.estimates.shape == (len(people), 3, 1, 24, 3)
    one = model.predict(points[:, 1:2], steps[:, 1:2], conditioning)
    torch.testing.assert_close(one.points, whole.points[:, 1:2], rtol=1e-4, atol=1e-4)
    rows = torch.tensor([2, 0])
    part = model.predict(points[rows], steps[rows], conditioning.rows(rows))
    torch.testing.assert_close(part.points, whole.points[rows], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hidden_token_shows_neither_itself_nor_the_image() -> None:
    values = small_config("unused", "model.masked=0.5", "model.depth=1")
    body, mesh = free_body()
    model = build_model(values, body, mesh).eval()
    wake(model)
    people = people_of()
    conditioning, _ = model.encode(None, None, people.heatmap_valid, None, people.peaks)
    points, steps = torch.randn(len(people), 1, model.num_points, 3), torch.full((len(people), 1), 0.5)
    hidden = torch.ones(len(people), 1, model.num_tokens, dtype=torch.bool)
    first = model.predict(points, steps, conditioning, hidden).points
    torch.testing.assert_close(first, model.predict(points + 1, steps, conditioning, hidden).points)
    torch.testing.assert_close(first[1:], first[:1].expand_as(first[1:]))  # for all images
    hidden[..., 0] = False
    changed = model.predict(points, steps, conditioning, hidden).points
    assert (changed - first).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.rle=joints", "rle is 'joints', a list is expected"),
        ("model.rle=[hands]", r"must be a list of some of joints, vertices, joints_2d"),
        ("model.masked=1.5", "masked 1.5 is the largest share"),
    ],
)
def test_bad_values_are_named(override: str, text: str) -> None:
    body, mesh = free_body()
    with pytest.raises(UserError, match=text):
        build_model(small_config("unused", override), body, mesh)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    values = small_config("unused", *EVERYTHING)
    body, mesh = free_body()
    people = people_of(*EVERYTHING)
    found = []
    for again in (False, True):
        model = build_model(values, body, mesh).train()
        wake(model)
        if again:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        losses = training_losses(model, build_scheduler(values), values.loss, people, draws_for(model, len(people)))
        losses["loss"].backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)
