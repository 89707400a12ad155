"""The residual MLP over joint tokens: its formula, its identity at the start, and masked tokens."""

from __future__ import annotations

import torch
from small import awaken
from torch import Tensor

from hmdiff.models.encoder import MLPEncoder, ResidualBlock
from hmdiff.models.layers import Attention, EncoderBlock


def encoder() -> MLPEncoder:
    model = MLPEncoder(num_tokens=4, width=6, num_parts=3, hidden=16, depth=3)
    awaken(model)
    return model


def given() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = False
    return torch.randn(2, 4, 6), mask


def test_a_residual_block_is_its_formula_and_starts_as_the_identity() -> None:
    features = torch.randn(5, 8)
    assert torch.equal(ResidualBlock(8, 12)(features), features)
    block = ResidualBlock(8, 12)
    awaken(block)
    hidden = torch.relu(block.norm(features) @ block.to_hidden.weight.T + block.to_hidden.bias)
    torch.testing.assert_close(block(features), features + hidden**2 @ block.to_out.weight.T + block.to_out.bias)


def test_a_masked_token_is_not_read_and_is_not_a_zero_token() -> None:
    model, (tokens, mask) = encoder(), given()
    found = model(tokens, mask)
    assert found.shape == (2, 4, 6)  # the camera's and those of three parts
    other = tokens.clone()
    other[0, 2] = 50.0
    assert torch.equal(model(other, mask), found)
    tokens[0, 2] = 0.0
    assert (model(tokens, torch.ones_like(mask)) - found)[0].abs().max() > 1e-3


def test_every_block_of_the_mlp_is_run() -> None:
    model, (tokens, mask) = encoder(), given()
    before = model(tokens, mask)
    for block in model.blocks:
        kept = block.to_out.weight.detach().clone()  # type: ignore[union-attr,operator]
        with torch.no_grad():
            block.to_out.weight.zero_()  # type: ignore[union-attr,operator]
            assert (model(tokens, mask) - before).abs().max() > 1e-3
            block.to_out.weight.copy_(kept)  # type: ignore[union-attr,operator]


def test_an_encoder_block_is_its_formula_and_can_be_made_an_identity() -> None:
    block = EncoderBlock(16, 2)
    awaken(block)
    tokens = torch.randn(2, 5, 16)
    attended = tokens + block.attention(block.norm_attention(tokens))
    expected = attended + block.feed_forward(block.norm_feed_forward(attended))
    torch.testing.assert_close(block(tokens), expected)
    assert (expected - attended).abs().max() > 1e-2
    block.make_identity()
    assert torch.equal(block(tokens), tokens)


def test_normalised_queries_and_keys_have_no_length_but_the_learned_sharpness() -> None:
    attention = Attention(16, 2, qk_norm=True)
    awaken(attention)
    for layer in (attention.to_query, attention.to_keys_values):
        torch.nn.init.zeros_(layer.bias)
    tokens = torch.randn(2, 5, 16)
    before = attention(tokens)
    assert attention.sharpness is not None
    for weight in (attention.to_query.weight, attention.to_keys_values.weight[:16]):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(5)
            torch.testing.assert_close(attention(tokens), before, rtol=1e-4, atol=1e-4)
            weight.copy_(kept)
    with torch.no_grad():
        attention.sharpness[1] *= 3
        assert (attention(tokens) - before).abs().max() > 1e-2
