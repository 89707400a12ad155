"""The denoiser: independent hypotheses, patch round trip, masks, dependence on the timestep."""

from __future__ import annotations

import pytest
import torch
from small import awaken
from torch import Tensor, nn

from hmdiff.models.conditioning import Conditioning, LiftedVolume
from hmdiff.models.denoiser import MeshDenoiser

VERTICES, JOINTS, WIDTH = 24, 5, 32


def denoiser(neighbours: Tensor | None = None, patch_size: int = 4, depth: int = 2) -> MeshDenoiser:
    patches = torch.randperm(VERTICES).reshape(-1, patch_size)
    model = MeshDenoiser(patches, JOINTS, WIDTH, depth, 2, 16, neighbours=neighbours)
    awaken(model)
    return model.eval()


def context(images: int, length: int = 6) -> Conditioning:
    mask = torch.ones(images, length, dtype=torch.bool)
    mask[0, -2:] = False
    return Conditioning(torch.randn(images, length, 16), mask)


def run(model: MeshDenoiser, points: Tensor, step: Tensor, given: Conditioning) -> Tensor:
    return model(points, step, given, model.keys_values(given.tokens)).points


@pytest.mark.parametrize("images", [1, 3, 4])
def test_hypotheses_and_images_are_independent(images: int) -> None:
    model, given = denoiser(), context(images)
    points, step = torch.randn(images, 3, VERTICES + JOINTS, 3), torch.rand(images, 3)
    whole = run(model, points, step, given)
    assert whole.shape == points.shape and whole.std() > 0.05
    for image in range(images):
        part = given.rows(torch.tensor([image]))
        for number in range(3):
            one = run(model, points[image, number][None, None], step[image, number][None, None], part)
            torch.testing.assert_close(one[0, 0], whole[image, number], rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(run(model, points[:, order], step[:, order], given), whole[:, order])


def test_everything_given_has_an_influence() -> None:
    model, given = denoiser(), context(2)
    points, step = torch.randn(2, 2, VERTICES + JOINTS, 3), torch.rand(2, 2)
    before = run(model, points, step, given)
    assert (run(model, points + 0.5, step, given) - before).abs().amax((1, 2, 3)).min() > 1e-3
    assert (run(model, points, 1 - step, given) - before).abs().amax((1, 2, 3)).min() > 1e-3
    other = Conditioning(given.tokens + torch.randn_like(given.tokens), given.mask)
    assert (run(model, points, step, other) - before).abs().amax((1, 2, 3)).min() > 1e-3
    hidden = Conditioning(torch.where(given.mask[..., None], given.tokens, torch.tensor(50.0)), given.mask)
    assert torch.equal(run(model, points, step, hidden), before)


@pytest.mark.parametrize("patch_size", [1, 4])
def test_patches_come_back_in_their_own_order(patch_size: int) -> None:
    model = denoiser(patch_size=patch_size)
    for block in model.blocks:
        nn.init.zeros_(block.modulation.project.weight)
        nn.init.zeros_(block.modulation.project.bias)  # all gates shut: a token is what its patch was embedded as
    model.norm = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        model.identity.zero_()
        for embed, out in ((model.embed_patch, model.to_patch), (model.embed_joint, model.to_joint)):
            nn.init.orthogonal_(embed.weight)
            nn.init.zeros_(embed.bias)
            out.weight.copy_(embed.weight.T)
        model.patch_bias.zero_()
        model.joint_bias.zero_()
    points = torch.randn(2, 2, VERTICES + JOINTS, 3)
    assert not torch.equal(model.patches.flatten(), torch.arange(VERTICES))
    torch.testing.assert_close(run(model, points, torch.rand(2, 2), context(2)), points, rtol=1e-4, atol=1e-5)


def test_biases_belong_to_their_vertices() -> None:
    """A new denoiser outputs its bias for any input."""
    patches = torch.randperm(VERTICES).reshape(-1, 4)
    model = MeshDenoiser(patches, JOINTS, WIDTH, 1, 2, 16)
    with torch.no_grad():
        model.patch_bias.copy_(torch.arange(VERTICES).float()[patches].repeat_interleave(3, 1))
    out = run(model, torch.randn(1, 1, VERTICES + JOINTS, 3), torch.rand(1, 1), context(1))
    assert torch.equal(out[0, 0, :VERTICES, 1], torch.arange(VERTICES).float())


def test_neighbour_mask_hides_far_vertices_from_vertices_alone() -> None:
    count = VERTICES // 4
    ring = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    ring = torch.minimum(ring, count - ring) <= 1
    model = denoiser(ring, depth=1)
    given, step = context(1), torch.rand(1, 1)
    points = torch.randn(1, 1, VERTICES + JOINTS, 3)
    before = run(model, points, step, given)[0, 0]
    moved = points.clone()
    moved[..., model.patches[0], :] += 1.0
    change = (run(model, moved, step, given)[0, 0] - before).norm(dim=-1)
    by_patch = change[:VERTICES][model.patches].amax(1)
    assert (by_patch[ring[0]] > 1e-4).all() and (by_patch[~ring[0]] == 0).all()
    assert (~ring[0]).sum() == 3 and (change[VERTICES:] > 1e-4).all()
    moved = points.clone()
    moved[..., VERTICES, :] += 1.0  # all tokens attend to a joint
    change = (run(model, moved, step, given)[0, 0] - before).norm(dim=-1)
    assert (change > 1e-4).all()


def test_the_step_matters_after_a_few_optimisation_steps() -> None:
    patches = torch.arange(VERTICES).reshape(-1, 4)
    model, given = MeshDenoiser(patches, JOINTS, WIDTH, 1, 2, 16), context(2)
    points = torch.randn(2, 2, VERTICES + JOINTS, 3)
    step = torch.tensor([[0.1, 0.9], [0.1, 0.9]])
    same = points[:, :1].expand(-1, 2, -1, -1)
    assert torch.equal(*run(model, same, step, given).unbind(1))  # at its start a denoiser is a constant
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    target = points * step[..., None, None]
    losses = []
    for _ in range(12):
        loss = (run(model, points, step, given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    low, high = run(model, same, step, given).unbind(1)
    assert (low - high).abs().max() > 1e-2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_neighbouring_steps_have_different_waves() -> None:
    from hmdiff.models.denoiser import _step_waves

    waves = _step_waves((torch.arange(200) + 1) / 200)
    assert waves.shape == (200, 64) and (waves.diff(dim=0).norm(dim=1) > 0.1).all()
    assert torch.cdist(waves, waves).add(10 * torch.eye(200)).min() > 0.1


def test_wrong_number_of_points_is_named() -> None:
    model, given = denoiser(), context(1)
    with pytest.raises(ValueError, match="x has 7 points, not 24 vertices"):
        run(model, torch.randn(1, 1, 7, 3), torch.rand(1, 1), given)


def scaled() -> MeshDenoiser:
    patches = torch.randperm(VERTICES).reshape(-1, 4)
    model = MeshDenoiser(patches, JOINTS, WIDTH, 1, 2, 16, scaled=("vertices", "joints", "joints_2d"))
    given = context(1)
    points, step = torch.randn(1, 1, VERTICES + JOINTS, 3), torch.rand(1, 1)
    for value in model(points, step, given, model.keys_values(given.tokens)).scale.values():
        torch.testing.assert_close(value, torch.full_like(value, 0.27), atol=2e-3, rtol=0)  # initially
    awaken(model)
    for block in model.blocks:
        torch.nn.init.zeros_(block.modulation.project.weight)
        torch.nn.init.zeros_(block.modulation.project.bias)  # gates shut: tokens do not mix
    return model


@torch.no_grad()
def test_scales_belong_to_their_vertices_and_joints() -> None:
    """A change of one token is a change of the σ̂ of its vertices, or of its joint, and of no others."""
    model, given = scaled(), context(1)
    points, step = torch.randn(1, 1, VERTICES + JOINTS, 3), torch.rand(1, 1)

    def scales() -> dict[str, Tensor]:
        return dict(model(points, step, given, model.keys_values(given.tokens)).scale)

    before, count = scales(), len(model.patches)
    assert {name: tuple(value.shape[2:]) for name, value in before.items()} == {
        "vertices": (VERTICES, 3),
        "joints": (JOINTS, 3),
        "joints_2d": (JOINTS, 2),
    }
    for token in (1, count + 2):
        kept = model.identity[token].clone()
        model.identity[token] += torch.randn(WIDTH)
        changed = {name: (value != before[name]).any(-1)[0, 0].nonzero()[:, 0] for name, value in scales().items()}
        vertices = model.patches[token].sort().values.tolist() if token < count else []
        joints = [] if token < count else [token - count]
        assert {name: rows.tolist() for name, rows in changed.items()} == {
            "vertices": vertices,
            "joints": joints,
            "joints_2d": joints,
        }
        model.identity[token] = kept


@torch.no_grad()
def test_estimates_go_on_from_the_previous_block() -> None:
    patches = torch.arange(VERTICES).reshape(-1, 4)
    model = MeshDenoiser(patches, JOINTS, WIDTH, 3, 2, 16, volume_width=6)
    awaken(model)
    tokens = torch.randn(2, 5, 16)
    volume = LiftedVolume(torch.randn(2, 6, 3, 3, 3), torch.tensor([[1.0, 0, 0]] * 2), torch.tensor(1.0))
    given = Conditioning(tokens, torch.ones(2, 5, dtype=torch.bool), volume=volume)
    points, step = torch.randn(2, 1, VERTICES + JOINTS, 3), torch.rand(2, 1)
    refine = model.fusions[1].refine
    for parameter in refine.parameters():  # type: ignore[union-attr,operator]
        parameter.zero_()
    found = model(points, step, given, model.keys_values(tokens)).estimates
    assert found is not None and torch.equal(found[:, :, 1], found[:, :, 0]) and found.std() > 0.05


def test_checkpointed_blocks_are_run_by_the_checkpoint() -> None:
    model, given = denoiser(depth=2), context(1)
    calls = []
    model._gradient_checkpointing_func = lambda block, *rest: calls.append(block) or block(*rest)  # type: ignore[func-returns-value]
    points, step = torch.randn(1, 1, VERTICES + JOINTS, 3), torch.rand(1, 1)
    run(model, points, step, given)
    model.gradient_checkpointing = True
    with torch.no_grad():
        run(model, points, step, given)
    assert not calls
    run(model, points, step, given)
    assert calls == list(model.blocks)


def test_waves_are_geometric_from_one_to_a_thousand_radians() -> None:
    from hmdiff.models.denoiser import _step_waves

    frequency = 1000 ** (torch.arange(32, dtype=torch.float64) / 31)
    step = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    angle = step[:, None] * frequency
    torch.testing.assert_close(_step_waves(step).double(), torch.cat([angle.sin(), angle.cos()], -1), atol=2e-3, rtol=0)
