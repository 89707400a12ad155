"""Attention against torch's, masks, and the timestep modulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import awaken

from hmdiff.models.layers import Attention, EncoderBlock, FeedForward, StepModulation, attend, sinusoidal_position_2d


@pytest.mark.parametrize("shape", [None, (5, 7), (3, 1, 1, 7), (3, 2, 5, 7)])
def test_attend_equals_torch(shape: tuple[int, ...] | None) -> None:
    mask = None
    if shape is not None:
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True  # attention over an empty set is undefined
    sizes = ((3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 4))
    ours = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    value = attend(ours[0], ours[1], ours[2], mask)
    expected = F.scaled_dot_product_attention(theirs[0], theirs[1], theirs[2], attn_mask=mask)
    torch.testing.assert_close(value, expected)
    weight = torch.randn_like(value)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and mine.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, other.grad)


def test_attend_keeps_the_values_type_in_bf16() -> None:
    queries, keys, values = (torch.randn(2, 2, 6, 8) for _ in range(3))
    half = attend(queries.bfloat16(), keys.bfloat16(), values.bfloat16(), torch.ones(6, 6, dtype=torch.bool).tril())
    exact = attend(queries, keys, values, torch.ones(6, 6, dtype=torch.bool).tril())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_keys_and_values_computed_ahead_are_the_same() -> None:
    attention = Attention(16, 4, context_width=12)
    tokens, context = torch.randn(3, 5, 16), torch.randn(3, 9, 12)
    pair = attention.keys_values(context)
    assert [tuple(part.shape) for part in pair] == [(3, 4, 9, 4)] * 2
    ahead = attention(tokens, pair)
    one_by_one = torch.cat([attention(tokens[i : i + 1], attention.keys_values(context[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(ahead, one_by_one)
    itself = Attention(16, 4)
    torch.testing.assert_close(itself(tokens), itself(tokens, itself.keys_values(tokens)))
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        Attention(16, 3)


def test_masked_context_has_no_influence() -> None:
    attention = Attention(16, 2, context_width=16)
    tokens, context = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[0, ..., 4:] = False
    before = attention(tokens, attention.keys_values(context), mask)
    changed = context.clone()
    changed[0, 4:] = 100.0
    assert torch.equal(attention(tokens, attention.keys_values(changed), mask), before)
    torch.testing.assert_close(before[:1], attention(tokens[:1], attention.keys_values(context[:1, :4])))
    changed[0, 3] = 100.0
    assert not torch.allclose(attention(tokens, attention.keys_values(changed), mask)[0], before[0])


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_encoder_block_batch_equals_single_and_ignores_the_masked(batch: int) -> None:
    block = EncoderBlock(16, 2)
    awaken(block)
    tokens = torch.randn(batch, 6, 16)
    mask = torch.rand(batch, 6) < 0.6
    mask[:, 0] = True
    whole = block(tokens, mask)
    for i in range(batch):
        torch.testing.assert_close(block(tokens[i : i + 1], mask[i : i + 1]), whole[i : i + 1])
    changed = torch.where(mask[..., None], tokens, torch.randn_like(tokens))
    torch.testing.assert_close(block(changed, mask)[mask], whole[mask])
    assert mask.all() or not torch.allclose(block(tokens)[mask], whole[mask])


def test_step_modulation_starts_at_the_identity() -> None:
    modulation = StepModulation(8, branches=3)
    parts = modulation(torch.randn(4, 8))
    assert len(parts) == 3
    for scale, shift, gate in parts:
        assert scale.shape == (4, 1, 8) and (scale == 1).all() and (shift == 0).all() and (gate == 0).all()
    awaken(modulation)
    step = torch.randn(4, 8)
    flat = modulation.project(F.silu(step))
    (_, _, first_gate), (second_scale, _, _), _ = modulation(step)
    torch.testing.assert_close(first_gate[:, 0], flat[:, 16:24])
    torch.testing.assert_close(second_scale[:, 0], 1 + flat[:, 24:32])


def test_feed_forward_acts_on_every_token_alone() -> None:
    layer = FeedForward(8, 2.0)
    assert layer[0].out_features == 16
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(tokens)[:, 2], layer(tokens[:, 2]))


def test_positions_differ_and_are_laid_out_in_rows() -> None:
    code = sinusoidal_position_2d(5, 7, 32)
    assert code.shape == (35, 32)
    assert torch.cdist(code, code).add(10 * torch.eye(35)).min() > 0.1
    grid = code.unflatten(0, (5, 7))
    assert torch.equal(grid[2, :, :16], grid[2, :1, :16].expand(7, -1))  # the first half tells the row alone
    assert torch.equal(grid[:, 3, 16:], grid[:1, 3, 16:].expand(5, -1))
    with pytest.raises(ValueError, match="divisible by 4"):
        sinusoidal_position_2d(2, 2, 6)
