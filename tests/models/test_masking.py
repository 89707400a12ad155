"""Token masks of masked modelling: the ratio's bound, uniformity, reproducibility."""

from __future__ import annotations

import math

import pytest
import torch

from hmdiff.models.masking import draw_token_mask


def drawn(*shape: int, most: float = 0.3, seed: int = 0) -> torch.Tensor:
    return draw_token_mask(shape, most, torch.Generator().manual_seed(seed))


def test_the_share_is_uniform_up_to_the_most() -> None:
    token_mask = drawn(40, 100, 50)
    assert token_mask.shape == (40, 100, 50) and token_mask.dtype == torch.bool
    count = token_mask.sum(-1)
    assert count.amax() == 14 and count.amin() == 0  # below 0.3 of 50, rounded down
    frequency = torch.bincount(count.flatten(), minlength=15) / count.numel()
    torch.testing.assert_close(frequency, torch.full((15,), 1 / 15), rtol=0, atol=4 * math.sqrt(1 / 15 / 4000))


def test_every_token_is_hidden_as_often() -> None:
    often = drawn(20000, 10, most=1.0).float().mean(0)
    torch.testing.assert_close(often, torch.full((10,), 0.45), rtol=0, atol=0.02)  # (0 + 1 + ... + 9) / 10 of 10


def test_rows_differ_and_repeat_with_their_seed() -> None:
    first = drawn(8, 4, 60)
    assert torch.equal(first, drawn(8, 4, 60))
    assert not torch.equal(first, drawn(8, 4, 60, seed=1))
    assert len(set(map(tuple, first.flatten(0, 1).tolist()))) > 25
    # People are drawn in order: the first ones do not depend on the batch size.
    assert torch.equal(drawn(3, 4, 60), first[:3])


def test_nothing_is_hidden_without_a_share() -> None:
    assert not drawn(5, 7, 30, most=0.0).any()
    assert drawn(4, 0).shape == (4, 0)
    for most in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"masked tokens is {most}: 0 to 1"):
            drawn(2, 3, most=most)
