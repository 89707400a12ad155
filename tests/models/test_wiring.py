"""What the network hands from one component to the next: places, masks, detached cameras, sizes."""

from __future__ import annotations

import math

import pytest
import torch
from small import awaken, free_body, people_block, small_config
from torch import Tensor

from hmdiff.build import build_model
from hmdiff.models.denoiser import MeshDenoiser
from hmdiff.models.layers import Attention
from hmdiff.models.recovery import MeshRecoveryModel


def built(*overrides: str) -> MeshRecoveryModel:
    model = build_model(small_config("unused", *overrides), *free_body())
    awaken(model)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor]:
    sample = people_block()
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    return sample.heatmaps[:2], sample.heatmap_valid[:2]


@torch.no_grad()
def test_the_cameras_scale_stays_within_a_factor_of_twenty() -> None:
    model = built()
    model.to_camera.weight.zero_()
    for bias, expected in ((0.0, 1.0), (10.0, math.exp(3)), (-10.0, math.exp(-3))):
        model.to_camera.bias.copy_(torch.tensor([bias, bias, 0.3]))
        _, camera = model.encode(None, *inputs())
        torch.testing.assert_close(camera, torch.tensor([[expected, bias, 0.3]] * 2))


def test_the_feature_map_is_lifted_where_it_is_in_the_crop_and_teaches_the_camera_nothing() -> None:
    model = built("model.backbone=conv", "model.lifting=true", "model.volume_width=16", "model.depth=2")
    lifted: list[Tensor] = []
    assert model.volume_lifting is not None
    model.volume_lifting.register_forward_pre_hook(lambda _, given: lifted.append(given[0]))
    conditioning, camera = model.encode(None, *inputs())
    tokens, _ = model.feature_backbone(*inputs())
    (features,) = lifted
    for row, column in ((0, 0), (2, 5), (7, 1)):
        torch.testing.assert_close(features[:, :, row, column], tokens[:, 8 * row + column])
    assert conditioning.volume is not None and torch.equal(conditioning.volume.camera, camera)
    assert camera.requires_grad and not conditioning.volume.camera.requires_grad


@torch.no_grad()
def test_the_silhouette_is_drawn_from_the_tokens_that_are_there() -> None:
    model, (heatmaps, valid) = built("model.silhouette=true"), inputs()
    points, step = torch.randn(2, 1, model.num_points, 3), torch.full((2, 1), 0.5)
    valid = valid.clone()
    valid[0, 5:] = False
    conditioning, _ = model.encode(None, heatmaps, valid)
    found = model(points, step, None, heatmaps, valid).silhouette
    assert model.silhouette_decoder is not None and found is not None and not conditioning.mask.all()
    tokens = torch.where(conditioning.mask[..., None], conditioning.tokens, 9.0)
    torch.testing.assert_close(found, model.silhouette_decoder(tokens, conditioning.mask))


@pytest.mark.parametrize("tokens", ["patches", "parts"])
def test_sizes_and_options_reach_every_block(tokens: str) -> None:
    config = (
        f"model.tokens={tokens}",
        "model.feed_forward_ratio=3",
        "model.encoder_ratio=5",
        "model.qk_norm=true",
        "model.stack=2",
    )
    model = built(*config, "model.rle=[joints]")
    denoisers = [each for each in model.denoisers if isinstance(each, MeshDenoiser)]
    assert [block.feed_forward[0].out_features for each in denoisers for block in each.blocks] == [96, 96]  # type: ignore[union-attr,index,operator]
    assert [block.feed_forward[0].out_features for block in model.encoder] == [160]  # type: ignore[union-attr,index,operator,attr-defined]
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 5 and all(attention.sharpness is not None for attention in attentions)
    assert [list(each.to_scale) for each in denoisers] == [[], ["joints"]]  # σ̂ is of the last denoiser's mean


@pytest.mark.parametrize("stack", [1, 2])
def test_the_last_denoisers_scale_is_returned(stack: int) -> None:
    model = built(f"model.stack={stack}", "model.rle=[joints, vertices]")
    found = model(torch.randn(2, 3, model.num_points, 3), torch.rand(2, 3), None, *inputs())
    assert {name: tuple(value.shape) for name, value in found.scale.items()} == {
        "joints": (2, 3, 24, 3),
        "vertices": (2, 3, 432, 3),
    }
