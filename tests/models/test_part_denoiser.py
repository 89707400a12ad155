"""Part tokens: the prediction lies in the basis, noise outside it is ignored, and all modules work on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small import awaken, free_body, people_block, small_config, small_pipeline

from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.build import build_data, build_model, build_scheduler
from hmdiff.models.part_denoiser import PartDenoiser, PartLinear
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train.step import Draws, training_losses

PARTS = "model.tokens=parts"
VARIANTS = [
    (PARTS,),
    (PARTS, "model.encoder_type=mlp", "model.encoder_hidden=64"),
    (PARTS, "model.qk_norm=true", "model.encoder_ratio=2"),
]


def built(*overrides: str) -> MeshRecoveryModel:
    model = build_model(small_config("unused", *overrides), *free_body())
    awaken(model)
    return model.eval()


def inputs(people: int = 3) -> dict[str, torch.Tensor]:
    sample = people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    return {"heatmaps": sample.heatmaps[:people], "heatmap_valid": sample.heatmap_valid[:people]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prediction_lies_in_the_basis(variant: tuple[str, ...]) -> None:
    model = built(*variant)
    basis = lbs_basis(free_body()[0], free_body()[1].coarse_ids).points
    found = model(torch.randn(3, 2, 456, 3), torch.rand(3, 2), **inputs()).points
    assert found.std() > 0.01
    torch.testing.assert_close(basis @ (basis.mT @ found), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_outside_the_basis_is_not_read_and_inside_it_is(variant: tuple[str, ...]) -> None:
    model = built(*variant)
    basis = lbs_basis(free_body()[0], free_body()[1].coarse_ids).points
    points, step, noise = torch.randn(3, 1, 456, 3), torch.full((3, 1), 0.5), torch.randn(3, 1, 456, 3)
    inside = basis @ (basis.mT @ noise)
    before = model(points, step, **inputs()).points
    torch.testing.assert_close(model(points + noise - inside, step, **inputs()).points, before, atol=1e-3, rtol=1e-3)
    assert (model(points + inside, step, **inputs()).points - before).abs().max() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_hypotheses_and_people_do_not_mix(variant: tuple[str, ...]) -> None:
    model = built(*variant)
    points, step = torch.randn(3, 2, 456, 3), torch.rand(3, 2)
    together = model(points, step, **inputs()).points
    alone = model(points[1:2, 1:], step[1:2, 1:], **{name: value[1:2] for name, value in inputs().items()}).points
    torch.testing.assert_close(together[1:2, 1:], alone, atol=1e-4, rtol=1e-4)


def test_peaks_teach_what_heatmaps_teach() -> None:
    """The closed form on peaks gives nearly the losses and gradients of the rendered heatmaps."""
    config = small_config("unused", PARTS, "data.block_size=16")
    body, mesh = free_body()
    data = build_data(config, body, mesh)
    assert data.peaks
    peaks = data.block("train", 0)
    data.peaks = False
    drawn = data.block("train", 0)
    assert peaks.heatmaps is None and drawn.peaks is None and peaks.peaks is not None
    model = build_model(config, body, mesh)
    awaken(model)
    draws = Draws(torch.full((16, 1), 150), torch.randn(16, 1, 456, 3))
    gradients = []
    for sample in (drawn, peaks):
        model.zero_grad()
        training_losses(model, build_scheduler(config), config.loss, sample, draws)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def test_every_optional_path_has_a_gradient_on_parts() -> None:
    config = small_config(
        "unused",
        PARTS,
        "model.backbone=conv",
        "model.rle=[joints,vertices,joints_2d]",
        "model.masked=0.3",
        "model.lifting=true",
        "model.volume_width=16",
        "model.depth=2",
        "loss.rle=0.1",
        "loss.estimates=0.1",
    )
    model = build_model(config, *free_body())
    awaken(model)
    sample = dataclasses.replace(people_block("train").map(lambda tensor: tensor[:4]), vertices=None)
    hidden = torch.rand(4, 2, model.num_tokens) < 0.3
    draws = Draws(torch.full((4, 2), 150), torch.randn(4, 2, 456, 3), hidden)
    training_losses(model, build_scheduler(config), config.loss, sample, draws)["loss"].backward()
    denoiser = model.denoisers[0]
    for name, parameter in denoiser.named_parameters():
        if not name.startswith("fusions"):  # the last estimate's head has its own test
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_saved_pipeline_of_parts_comes_back_without_the_body(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pipeline = small_pipeline(PARTS)
    pipeline.save_pretrained(tmp_path / "saved")
    names = set(pipeline.model.state_dict())
    assert not any("basis" in name or "upsample" in name for name in names)
    again = HMDiffPipeline.from_pretrained(tmp_path / "saved")
    points = torch.randn(1, 1, 456, 3)
    one = {name: value[:1] for name, value in inputs().items()}
    torch.testing.assert_close(
        again.model(points, torch.ones(1, 1), **one).points, pipeline.model(points, torch.ones(1, 1), **one).points
    )


def test_what_does_not_go_together_is_refused() -> None:
    for wrong in (
        ("model.encoder_type=mlp",),
        (PARTS, "model.encoder_type=mlp", "model.backbone=conv"),
        ("model.tokens=limbs",),
        ("model.encoder_type=lstm",),
    ):
        with pytest.raises(Exception, match="section 'model'"):
            build_model(small_config("unused", *wrong), *free_body())


def parts(**more: object) -> PartDenoiser:
    basis = lbs_basis(free_body()[0], free_body()[1].coarse_ids).points
    model = PartDenoiser(432, 24, 16, 1, 2, 8, aligned_context=True, scaled=("joints", "vertices"), **more)  # type: ignore[arg-type]
    model.set_basis(basis)
    return model


def test_a_new_one_gives_no_mesh_and_every_part_has_its_own_layer() -> None:
    model, tokens = parts(), torch.randn(3, 24, 16)
    assert not model.decode(tokens, None, None).any()
    layer = PartLinear(24, 16, 5)
    awaken(layer)
    expected = torch.stack([tokens[:, part] @ layer.weight[part] + layer.bias[part] for part in range(24)], 1)
    torch.testing.assert_close(layer(tokens), expected)


def test_context_is_added_to_the_part_that_it_is_of() -> None:
    """Token 0 of the context is the camera's; the hypotheses of an image share its context."""
    model = parts()
    awaken(model)
    tokens, context = torch.randn(4, 24, 16), torch.randn(2, 25, 8)
    found = model.with_context(tokens, context)
    assert model.from_context is not None
    torch.testing.assert_close(found - tokens, model.from_context(context[:, 1:])[[0, 0, 1, 1]])
    context[1, 6] += 1.0
    changed = (model.with_context(tokens, context) - found).abs().amax(-1) > 1e-3
    assert changed.nonzero().tolist() == [[2, 5], [3, 5]]


def test_the_vertices_of_a_part_share_its_scale() -> None:
    """A vertex belongs to the part with the most energy in its row of the basis."""
    model = parts()
    awaken(model)
    model.set_basis(model.basis.clone())
    energy = torch.stack([model.basis[:432, 4 * part : 4 * part + 4].square().sum(1) for part in range(24)])
    owner = energy.argmax(0)
    assert torch.equal(model.owner, owner) and len(owner.unique()) > 12
    tokens = torch.randn(2, 24, 16)
    before = model._scale(tokens)
    tokens[:, 4] += torch.randn(16)
    changed = {name: (value != before[name]).any(-1).any(0) for name, value in model._scale(tokens).items()}
    assert torch.equal(changed["vertices"], owner == 4) and changed["joints"].nonzero().flatten().tolist() == [4]


@torch.no_grad()
def test_half_precision_rounds_no_coordinates() -> None:
    model = parts()
    awaken(model)
    points, tokens, seen = torch.randn(2, 456, 3), torch.randn(2, 24, 16), []
    model.read.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.embed(points)
    written = model.decode(tokens, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        model.embed(points)
        torch.testing.assert_close(model.decode(tokens, None, None), written)
    torch.testing.assert_close(seen[1], seen[0])
    assert seen[1].dtype == torch.float32


@torch.no_grad()
def test_the_full_mesh_comes_from_the_coordinates_of_the_coarse_one() -> None:
    """Upsampling undoes taking the coarse vertices, moves with the mesh, and the keypoint regressor is of its mesh."""
    (body, mesh), model = free_body(), built(PARTS)
    basis = lbs_basis(body, mesh.coarse_ids)
    full = basis.full @ torch.randn(2, basis.full.shape[1], 3)
    coarse = full[:, mesh.coarse_ids]
    found = model.upsample(coarse)
    torch.testing.assert_close(found[:, mesh.coarse_ids], coarse, atol=1e-3, rtol=1e-3)
    shift = torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(model.upsample(coarse + shift), found + shift, atol=1e-3, rtol=1e-3)
    keypoints = model.keypoint_regressor(body) @ coarse
    torch.testing.assert_close(keypoints, body.keypoints(found), atol=1e-3, rtol=1e-3)
