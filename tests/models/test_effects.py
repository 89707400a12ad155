"""Every component has an effect: removing it from a model with non-zero weights changes the mesh."""

from __future__ import annotations

import pytest
import torch
from small import awaken, free_body, people_block, small_config
from torch import Tensor, nn

from hmdiff.build import build_model
from hmdiff.models.recovery import MeshRecoveryModel

LIFTING = ("model.backbone=conv", "model.lifting=true", "model.volume_width=16", "model.depth=3")
DEPTH = ("model.depth_map=true", "model.depth_layers=3")


def built(*overrides: str) -> MeshRecoveryModel:
    model = build_model(small_config("unused", *overrides), *free_body())
    awaken(model)
    return model.eval()


def mesh(model: MeshRecoveryModel) -> Tensor:
    sample = people_block().map(lambda tensor: tensor[:2])
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(2, 64, 64, generator=generator) if model.config.depth_map else None
    points, step = torch.randn(2, 1, 456, 3, generator=generator), torch.full((2, 1), 0.5)
    return model(points, step, None, sample.heatmaps, sample.heatmap_valid, depth).points


def without(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("tokens", ["patches", "parts"])
def test_what_joints_find_in_the_volume_reaches_the_mesh(tokens: str) -> None:
    model = built(*LIFTING, f"model.tokens={tokens}")
    before = mesh(model)
    assert model.volume_lifting is not None
    hooks = [f.register_forward_hook(lambda _m, given, out: (given[0], out[1])) for f in model.denoisers[0].fusions]  # type: ignore[union-attr]
    blind = mesh(model)  # joints are refined, but the sampled features are discarded
    for hook in hooks:
        hook.remove()
    assert (blind - before).abs().max() > 1e-3
    torch.testing.assert_close(mesh(model), before)
    for number in range(2):  # each fusion alone
        model = built(*LIFTING, f"model.tokens={tokens}")
        without(model.denoisers[0].fusions[number])  # type: ignore[index,union-attr]
        assert (mesh(model) - before).abs().max() > 1e-3, number


@pytest.mark.parametrize("part", ["depth_fusion", "depth_at_tokens"])
def test_every_layer_that_reads_depth_changes_the_mesh(part: str) -> None:
    before = mesh(built(*DEPTH))
    model = built(*DEPTH)
    module = getattr(model, part)
    layers = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for number in range(len(layers[0]) if layers else 1):
        model = built(*DEPTH)
        module = getattr(model, part)
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
        without(lists[0][number] if lists else module)
        assert (mesh(model) - before).abs().max() > 1e-4, f"{part} {number}"


@pytest.mark.parametrize("tokens", ["patches", "parts"])
def test_every_block_and_branch_of_the_denoiser_changes_the_mesh(tokens: str) -> None:
    overrides = ("model.depth=2", f"model.tokens={tokens}")
    before = mesh(built(*overrides))
    for number in range(2):
        for branch in ("self_attention", "cross_attention", "feed_forward", "modulation"):
            model = built(*overrides)
            without(getattr(model.denoisers[0].blocks[number], branch))  # type: ignore[union-attr,index]
            assert (mesh(model) - before).abs().max() > 1e-4, (number, branch)
    for number in range(1):
        model = built(*overrides)
        without(model.encoder[number])  # type: ignore[index]
        assert (mesh(model) - before).abs().max() > 1e-4, f"encoder {number}"


def test_the_heatmaps_are_lifted_where_tokens_are_joints() -> None:
    """Heatmaps that differ only where joint tokens ignore them (outside any peak) give a different volume."""
    model = built("model.lifting=true", "model.volume_width=16", "model.volume_size=4", "model.depth=3")
    sample = people_block().map(lambda tensor: tensor[:2])
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    conditioning, _ = model.encode(None, sample.heatmaps, sample.heatmap_valid)
    assert conditioning.volume is not None and conditioning.volume.features.shape == (2, 16, 4, 4, 4)
    moved, _ = model.encode(None, sample.heatmaps.flip(-1), sample.heatmap_valid)
    assert moved.volume is not None
    mirrored = (moved.volume.features - conditioning.volume.features).abs().mean()
    assert mirrored > 1e-3
    # An invalid joint is not lifted, whatever its channel holds.
    unseen = sample.heatmap_valid.clone()
    unseen[:, 3] = False
    first, _ = model.encode(None, sample.heatmaps, unseen)
    other = sample.heatmaps.clone()
    other[:, 3] = 1.0
    second, _ = model.encode(None, other, unseen)
    assert first.volume is not None and second.volume is not None
    torch.testing.assert_close(first.volume.features, second.volume.features)
