"""The whole network: encode once, hypotheses as a batch dimension, the direct baseline, upsampling."""

from __future__ import annotations

import pytest
import torch
from small import awaken, free_body, people_block, small_config, small_pipeline
from torch import Tensor

from hmdiff.build import build_mesh, build_model
from hmdiff.errors import UserError
from hmdiff.models.conditioning import Conditioning
from hmdiff.models.recovery import MeshRecoveryModel


def inputs(count: int) -> tuple[Tensor, Tensor]:
    sample = people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    return sample.heatmaps[:count], sample.heatmap_valid[:count]


@pytest.mark.parametrize("stack", [1, 2])
@torch.no_grad()
def test_encoded_once_equals_encoded_every_time(stack: int) -> None:
    model = small_pipeline(f"model.stack={stack}", "model.depth=2").model
    heatmaps, valid = inputs(3)
    points, step = torch.randn(3, 4, model.num_points, 3), torch.rand(3, 4)
    conditioning, camera = model.encode(None, heatmaps, valid)
    assert len(conditioning.keys_values) == 2 * stack
    whole = model.denoise(points, step, conditioning)
    again, camera_again, *_ = model(points, step, None, heatmaps, valid)
    assert torch.equal(whole, again) and torch.equal(camera, camera_again)
    for number in range(4):  # one hypothesis at a time
        one = model.denoise(points[:, number : number + 1], step[:, number : number + 1], conditioning)
        torch.testing.assert_close(one, whole[:, number : number + 1], rtol=1e-4, atol=1e-5)
    for image in range(3):  # one image at a time
        part, one_camera = model.encode(None, heatmaps[image : image + 1], valid[image : image + 1])
        one = model.denoise(points[image : image + 1], step[image : image + 1], part)
        torch.testing.assert_close(one, whole[image : image + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one_camera, camera[image : image + 1], rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0])
    torch.testing.assert_close(
        model.denoise(points[order], step[order], conditioning.rows(order)), whole[order], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_stacked_denoisers_follow_each_other() -> None:
    model = small_pipeline("model.stack=2").model
    heatmaps, valid = inputs(2)
    conditioning, _ = model.encode(None, heatmaps, valid)
    points, step = torch.randn(2, 1, model.num_points, 3), torch.rand(2, 1)
    first, second = model.denoisers
    pairs = conditioning.keys_values
    expected = second(first(points, step, conditioning, pairs[:1]).points, step, conditioning, pairs[1:]).points
    assert torch.equal(model.denoise(points, step, conditioning), expected)


@torch.no_grad()
def test_the_image_decides_and_the_masked_does_not() -> None:
    model = small_pipeline().model
    heatmaps, valid = inputs(2)
    points, step = torch.randn(1, 1, model.num_points, 3).expand(2, 1, -1, -1), torch.full((2, 1), 0.5)
    prediction, camera, *_ = model(points, step, None, heatmaps, valid)
    assert (prediction[0] - prediction[1]).abs().max() > 1e-3 and (camera[0] - camera[1]).abs().max() > 1e-4
    rubbish = torch.where(valid[..., None, None], heatmaps, torch.rand_like(heatmaps))
    assert torch.equal(model(points, step, None, rubbish, valid)[0], prediction)
    assert (camera[:, 0] > 0).all()


@torch.no_grad()
def test_masked_tokens_are_masked_all_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked by attention, not only because the joint backbone zeroes them."""
    model = small_pipeline().model
    heatmaps, valid = inputs(2)
    assert not valid.all()
    tokens, mask = model.feature_backbone(heatmaps, valid)
    points, step = torch.randn(2, 1, model.num_points, 3), torch.full((2, 1), 0.5)
    before, camera, *_ = model(points, step, None, heatmaps, valid)
    tokens = torch.where(mask[..., None], tokens, torch.randn_like(tokens))
    monkeypatch.setattr(model.feature_backbone, "forward", lambda *_: (tokens, mask))
    after, camera_after, *_ = model(points, step, None, heatmaps, valid)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(camera_after, camera, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_more_tokens_join_the_image() -> None:
    model = small_pipeline().model
    heatmaps, valid = inputs(2)
    conditioning, _ = model.encode(None, heatmaps, valid)
    points, step = torch.randn(2, 1, model.num_points, 3), torch.rand(2, 1)
    before = model.denoise(points, step, conditioning)
    tokens = torch.randn(2, 3, 32)

    def with_more(counted: bool) -> Conditioning:
        mask = torch.cat([conditioning.mask, torch.full((2, 3), counted)], 1)
        return model.with_keys_values(Conditioning(torch.cat([conditioning.tokens, tokens], 1), mask))

    joined = with_more(True)
    assert joined.tokens.shape[1] == conditioning.tokens.shape[1] + 3 and joined.mask[:, -3:].all()
    assert (model.denoise(points, step, joined) - before).abs().max() > 1e-4
    torch.testing.assert_close(model.denoise(points, step, with_more(False)), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_regress_is_the_last_step_from_a_constant() -> None:
    model = small_pipeline("model.mode=direct").model
    conditioning, _ = model.encode(None, *inputs(2))
    constant = torch.zeros(2, 1, model.num_points, 3)
    expected = model.denoise(constant, torch.ones(2, 1), conditioning)
    assert torch.equal(model.regress(conditioning), expected) and expected.std() > 0.01
    assert (model.denoise(constant, torch.full((2, 1), 0.5), conditioning) - expected).abs().max() > 1e-4


def test_points_and_back() -> None:
    model = small_pipeline().model
    coarse, joints = torch.randn(2, model.config.num_coarse, 3), torch.randn(2, model.config.num_joints, 3)
    points = model.to_points(coarse, joints)
    assert points.shape == (2, model.num_points, 3)
    torch.testing.assert_close(points[:, :5] * model.config.mesh_scale, coarse[:, :5])
    torch.testing.assert_close(model.to_coarse(points), coarse)
    torch.testing.assert_close(model.to_joints(points), joints)


def test_upsampling_keeps_vertices_and_moves_with_the_mesh() -> None:
    _, mesh = free_body()
    model = small_pipeline().model
    sample = people_block()
    assert sample.vertices is not None and sample.coarse_vertices is not None
    coarse = sample.coarse_vertices
    full = model.upsample(coarse)
    assert torch.equal(full[:, mesh.coarse_ids], coarse)
    assert (full - sample.vertices).norm(dim=-1).mean() < 0.006  # metres, from a thirtieth of the vertices
    shift = torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(model.upsample(coarse + shift), full + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.upsample(coarse[:, None])[:, 0], full)
    full.sum().backward()
    assert model.upsample_weight.grad is not None


def test_the_neighbour_mask_is_the_mesh() -> None:
    body, mesh = free_body()
    model = build_model(small_config("unused", "model.neighbour_mask=true"), body, mesh)
    mask, patches = model.denoisers[0].neighbours, model.denoisers[0].patches
    count = len(patches)
    assert mask[count:].all() and mask[:, count:].all() and mask.diagonal().all() and torch.equal(mask, mask.T)
    inner = mask[:count, :count]
    assert 2 / count < inner.float().mean() < 0.5
    owner = torch.empty(mesh.num_coarse, dtype=torch.long)
    owner[patches.flatten()] = torch.arange(count).repeat_interleave(patches.shape[1])
    expected = torch.eye(count, dtype=torch.bool)
    for face in mesh.coarse_faces.tolist():
        for a in face:
            for b in face:
                expected[owner[a], owner[b]] = True
    assert torch.equal(inner, expected)
    assert small_pipeline().model.denoisers[0].neighbours is None


def test_same_seed_same_weights_and_switched_off_parts_change_nothing() -> None:
    body, mesh = free_body()
    first, again, other = (
        build_model(small_config("unused", f"seed={seed}"), body, mesh).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["camera_token"], other["camera_token"])
    direct = build_model(small_config("unused", "model.mode=direct"), body, mesh).state_dict()
    assert direct.keys() == first.keys() and all(torch.equal(first[name], direct[name]) for name in first)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mode=fast", "mode 'fast' must be one of"),
        ("model.inputs=video", "inputs 'video'"),
        ("model.backbone=resnet18", "'resnet18' reads images"),
        ("model.patch_size=7", "patches of 7"),
        ("model.heads=3", "not divisible by 3 heads"),
        ("model.widht=32", "no key 'widht'; did you mean 'width'"),
        ("model.num_coarse=99999", "choose another number"),
    ],
)
def test_bad_hyperparameters_are_named(override: str, message: str) -> None:
    body, _ = free_body()
    config = small_config("unused", override)
    with pytest.raises(UserError, match=message):
        build_model(config, body, build_mesh(config, body))


def test_conditioning_rows_pick_images() -> None:
    tokens, mask = torch.randn(3, 2, 4), torch.rand(3, 2) < 0.5
    pair = (torch.randn(3, 1, 2, 4), torch.randn(3, 1, 2, 4))
    picked = Conditioning(tokens, mask, (pair,)).rows(torch.tensor([2, 2, 0]))
    assert torch.equal(picked.tokens[1], tokens[2]) and torch.equal(picked.mask[2], mask[0])
    assert torch.equal(picked.keys_values[0][1], pair[1][[2, 2, 0]])


@torch.no_grad()
def test_both_inputs_reach_the_network() -> None:
    model = MeshRecoveryModel(
        inputs="both",
        backbone="resnet18",
        image_size=64,
        num_keypoints=26,
        encoder_width=32,
        encoder_depth=1,
        encoder_heads=2,
        width=32,
        heads=2,
        depth=1,
        num_coarse=16,
        patch_size=4,
        num_vertices=20,
    ).eval()
    awaken(model)
    heatmaps, valid = inputs(2)
    image = torch.rand(2, 3, 64, 64)
    camera = model.encode(image, heatmaps, valid)[1]
    assert (model.encode(1 - image, heatmaps, valid)[1] - camera).abs().max() > 1e-5
    assert (model.encode(image, heatmaps.flip(-1), valid)[1] - camera).abs().max() > 1e-5


@torch.no_grad()
def test_trained_interpolation_weights_are_normalised_and_coarse_vertices_copied() -> None:
    """With any weights: upsampling moves with the mesh, and the keypoint regressor is that of the full mesh."""
    (body, mesh), model = free_body(), small_pipeline().model
    model.upsample_weight.copy_(torch.rand(model.upsample_weight.shape) + 0.1)
    coarse, shift = torch.randn(2, model.config.num_coarse, 3), torch.tensor([1.0, -2.0, 3.0])
    full = model.upsample(coarse)
    assert torch.equal(full[:, mesh.coarse_ids], coarse)
    torch.testing.assert_close(model.upsample(coarse + shift), full + shift, rtol=1e-4, atol=1e-4)
    keypoints = model.keypoint_regressor(body) @ coarse
    torch.testing.assert_close(keypoints, body.keypoints(full), rtol=1e-4, atol=1e-4)
    support = torch.isin(body.keypoint_support(), mesh.coarse_ids)
    assert support.any() and not support.all()
