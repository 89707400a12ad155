"""The silhouette decoder and its losses: known values, masks, and discs decoded from tokens that encode them."""

from __future__ import annotations

import math

import pytest
import torch
from small import awaken
from torch import Tensor

from hmdiff.losses.silhouette import silhouette_error, silhouette_iou
from hmdiff.models.silhouette import SilhouetteDecoder


def test_known_values() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, -2.0], [2.0, -2.0]]])
    target = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    expected = torch.tensor([math.log(2), (3 * right + wrong) / 4])
    torch.testing.assert_close(silhouette_error(logits, target), expected)
    torch.testing.assert_close(silhouette_error(logits, target.bool()), expected)
    assert silhouette_iou(logits, target).tolist() == [0, 0.5]  # a logit of 0 is not yet a person
    assert silhouette_iou(logits[1:], logits[1:] > 0).tolist() == [1]
    empty = torch.full((1, 4, 4), -1.0)
    assert silhouette_iou(empty, torch.zeros(1, 4, 4)).tolist() == [1]
    assert silhouette_iou(empty, torch.ones(1, 4, 4)).tolist() == [0]


def test_the_least_error_is_at_the_covered_share() -> None:
    """Soft edges without class balancing: a pixel is a calibrated probability."""
    share = torch.tensor([[[0.1, 0.3], [0.5, 0.9]]])
    best = silhouette_error(share.logit(), share)
    for shift in (-0.2, 0.2):
        assert silhouette_error(share.logit() + shift, share) > best


def test_certain_and_wrong_is_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    error = silhouette_error(logits, torch.tensor([[[0.0, 1.0]]]))
    assert error.item() == pytest.approx(1e4)
    error.sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [[[0.5, -0.5]]]
    half = silhouette_error(torch.randn(2, 4, 4).bfloat16(), torch.ones(2, 4, 4))
    assert half.dtype == torch.float32


def test_gradients() -> None:
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: silhouette_error(values, target), logits)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_any_tokens_give_a_map(size: int) -> None:
    decoder = SilhouetteDecoder(24, 2, size).double()
    awaken(decoder)
    tokens = torch.randn(3, 7, 24, dtype=torch.float64)
    found = decoder(tokens)
    assert found.shape == (3, size, size) and found.std() > 1e-3
    each = torch.cat([decoder(tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(found, each)
    order = torch.randperm(7)
    torch.testing.assert_close(decoder(tokens[:, order]), found)  # tokens need be no grid


def test_hidden_tokens_have_no_influence() -> None:
    decoder = SilhouetteDecoder(24, 2, 16)
    awaken(decoder)
    tokens, mask = torch.randn(2, 7, 24), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    before = decoder(tokens, mask)
    torch.testing.assert_close(before[:1], decoder(tokens[:1, :4]), rtol=1e-4, atol=1e-5)
    tokens[0, 4:] += 5
    assert torch.equal(decoder(tokens, mask), before)
    tokens[1, 4:] += 5
    assert not torch.allclose(decoder(tokens, mask)[1], before[1])


@torch.no_grad()
def test_a_query_draws_its_own_place_and_every_layer_is_run() -> None:
    """Queries are a grid, row by row: a changed one changes the map around its cell alone."""
    decoder, tokens = SilhouetteDecoder(24, 2, 8), torch.randn(1, 7, 24)
    awaken(decoder)
    before = decoder(tokens)
    decoder.queries[8 * 2 + 5] += torch.randn(24)
    rows, columns = (decoder(tokens) - before)[0].abs().gt(1e-5).nonzero().unbind(1)
    assert rows.unique().tolist() == [1, 2, 3] and columns.unique().tolist() == [4, 5, 6]  # a convolution of 3 x 3
    decoder.queries[8 * 2 + 5] = decoder.queries[0]
    before = decoder(tokens)
    for part in (decoder.attention, decoder.feed_forward):
        kept = {name: value.clone() for name, value in part.state_dict().items()}
        for parameter in part.parameters():
            parameter.zero_()
        assert (decoder(tokens) - before).abs().max() > 1e-3
        part.load_state_dict(kept)


@pytest.mark.parametrize("size", [0, 4, 12, 60])
def test_impossible_sizes_are_named(size: int) -> None:
    with pytest.raises(ValueError, match=f"silhouette size {size} must be 8 times a power of two"):
        SilhouetteDecoder(24, 2, size)


def discs(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Tokens that encode a disc's position and radius, one each, and the disc's silhouette."""
    place, radius = torch.rand(count, 2) - 0.5, torch.rand(count, 1) * 0.2 + 0.25
    values = torch.cat([place, radius], 1)
    frequency = torch.arange(1, 5) * 1.5
    waves = values[..., None] * frequency
    code = torch.cat([waves.sin(), waves.cos()], -1)  # (B, 3, 8)
    kind = torch.eye(3).expand(count, -1, -1)
    tokens = torch.nn.functional.pad(torch.cat([code, kind], -1), (0, 21))
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    away = (x - place[:, 0, None, None]).square() + (y - place[:, 1, None, None]).square()
    return tokens, away < radius[..., None].square()


@pytest.mark.slow
def test_it_learns_a_disc_from_tokens_that_say_where_it_is() -> None:
    size, steps = 32, 120
    decoder = SilhouetteDecoder(32, 4, size)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        tokens, target = discs(24, size)
        loss = silhouette_error(decoder(tokens), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tokens, target = discs(200, size)
    with torch.no_grad():
        found = silhouette_iou(decoder(tokens), target).mean()
        others = silhouette_iou(decoder(tokens.roll(1, 0)), target).mean()
    print(f"\nIoU of its own disc {found:.3f}, of another's {others:.3f}")
    assert found > 0.8 and found > others + 0.3
