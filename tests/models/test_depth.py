"""Depth tokens: scale and shift invariance, identity without known depth, errors for invalid maps."""

import functools
import statistics

import pytest
import torch
import torch.nn.functional as F
from small import awaken, free_body

from hmdiff.build import build_data
from hmdiff.config import load_config
from hmdiff.models.backbone import JointHeatmapBackbone
from hmdiff.models.depth import DepthAtTokens, DepthFusion, near_relief, normalise_depth, resize_depth

WIDTH, PEOPLE, TOKENS, SIZE = 32, 4, 7, 32


@pytest.fixture
def fusion() -> DepthFusion:
    module = DepthFusion(WIDTH, 2, layers=2, map_size=SIZE, patch=8)
    awaken(module)
    return module


@pytest.fixture
def depth(generator: torch.Generator) -> torch.Tensor:
    """A slope with a nearer box on it, and an unknown corner."""
    ramp = torch.linspace(3, 6, SIZE).expand(PEOPLE, SIZE, SIZE).clone()
    ramp = ramp + 0.3 * torch.rand(PEOPLE, SIZE, SIZE, generator=generator)
    ramp[:, 10:20, 8:14] -= 1.5
    ramp[:, :9, :11] = torch.nan
    return ramp


@pytest.fixture
def tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(PEOPLE, TOKENS, WIDTH, generator=generator)


MASK = torch.tensor([[True] * TOKENS, [True] * 5 + [False] * 2, [True] * TOKENS, [True] + [False] * (TOKENS - 1)])


def test_depth_changes_the_tokens_and_other_depth_changes_them_otherwise(fusion, tokens, depth):
    fused = fusion(tokens, MASK, depth)
    assert fused.shape == tokens.shape and fused.isfinite().all()
    assert (fused - tokens).abs().amax((1, 2)).min() > 0.1
    other = fusion(tokens, MASK, depth.flip(1))
    assert (fused - other).abs().amax((1, 2)).min() > 1e-3


def test_new_ones_add_nothing(tokens, depth):
    """So that depth can be added to a trained model."""
    assert torch.equal(DepthFusion(WIDTH, 2, layers=2, map_size=SIZE, patch=8)(tokens, MASK, depth), tokens)
    read = DepthAtTokens(WIDTH, map_size=SIZE)(depth, lambda maps: maps.flatten(2)[..., -TOKENS:].mT)
    assert read.shape == tokens.shape and not read.any()


@pytest.mark.parametrize(("scale", "shift"), [(1000.0, 0.0), (0.001, 0.0), (1.0, 20.0), (0.2, -3.0), (3e30, 0.0)])
def test_unit_and_origin_do_not_matter(fusion, tokens, depth, scale, shift):
    expected = fusion(tokens, MASK, depth)
    torch.testing.assert_close(fusion(tokens, MASK, scale * depth + shift), expected, rtol=1e-3, atol=1e-3)


def test_the_sign_matters(fusion, tokens, depth):
    assert (fusion(tokens, MASK, -depth) - fusion(tokens, MASK, depth)).abs().max() > 1e-2


def test_normalisation_is_the_median_and_mean_deviation(depth):
    values, known = resize_depth(depth, SIZE)
    found = normalise_depth(values, known)
    for person in range(PEOPLE):
        there = depth[person][depth[person].isfinite()].double()
        centred = there - there.median()
        torch.testing.assert_close(
            found[person][known[person]].double(), centred / centred.abs().mean(), rtol=1e-4, atol=1e-4
        )
    assert (found[~known] == 0).all()


def test_relief_of_the_person_survives_a_far_wall():
    """Two limbs 20 cm apart in front of a wall at 40 m remain distinguishable."""
    values = torch.full((1, SIZE, SIZE), 40.0)
    values[:, 6:28, 8:24], values[:, 6:28, 12:16] = 4.0, 3.8
    known = torch.ones_like(values, dtype=torch.bool)
    normalised = normalise_depth(values, known)
    relief = near_relief(normalised, known)
    plain = (normalised[0, 10, 20] - normalised[0, 10, 13]).abs()
    assert (relief[0, 10, 20] - relief[0, 10, 13]) > 3 * plain
    assert relief[0, 0, 0] > 0.95 and relief.abs().max() <= 1
    assert (near_relief(normalised, ~known) == 0).all()


def test_nobody_known_gets_the_very_tokens_and_finite_gradients(fusion, tokens, depth):
    """Half of the batch has no depth map."""
    depth[::2] = torch.nan
    tokens.requires_grad_()
    fused = fusion(tokens, MASK, depth)
    assert torch.equal(fused[::2], tokens[::2])
    assert (fused[1::2] - tokens[1::2]).abs().amax((1, 2)).min() > 0.1
    fused.square().sum().backward()
    gradients = [tokens.grad, *(parameter.grad for parameter in fusion.parameters())]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    assert torch.equal(tokens.grad[::2], 2 * tokens[::2])


def test_no_depth_for_anybody_gives_finite_zero_gradients(fusion, tokens):
    fused = fusion(tokens, MASK, torch.full((PEOPLE, SIZE, SIZE), torch.nan))
    assert torch.equal(fused, tokens)
    (fused.sum() + 0 * sum(parameter.sum() for parameter in fusion.parameters())).backward()
    assert all((parameter.grad == 0).all() for parameter in fusion.parameters())


def test_the_others_of_a_batch_do_not_matter(fusion, tokens, depth):
    depth[1] = torch.nan
    together = fusion(tokens, MASK, depth)
    for person in range(PEOPLE):
        rows = slice(person, person + 1)
        torch.testing.assert_close(fusion(tokens[rows], MASK[rows], depth[rows])[0], together[person])


def test_masked_image_tokens_tell_the_others_nothing(fusion, tokens, depth):
    before = fusion(tokens, MASK, depth)
    changed = torch.where(MASK[..., None], tokens, tokens + 5)
    after = fusion(changed, MASK, depth)
    assert torch.equal(before[MASK], after[MASK])
    assert not torch.equal(before[~MASK], after[~MASK])
    nobody = torch.zeros_like(MASK)
    assert fusion(tokens, nobody, depth).isfinite().all()


def test_infinite_is_not_known(fusion, tokens, depth):
    expected = fusion(tokens, MASK, depth)
    for value in (torch.inf, -torch.inf):
        assert torch.equal(fusion(tokens, MASK, depth.nan_to_num(value, value, value)), expected)


def test_where_it_is_unknown_matters(fusion, tokens, depth):
    """Unknown depth is neither 0 nor the mean."""
    _, there = fusion.tokens(depth)
    assert there.sum(1).tolist() == [15] * PEOPLE and not there[:, 0].any()  # the first patch of 16 is unknown
    assert not torch.allclose(fusion(tokens, MASK, depth), fusion(tokens, MASK, depth.nan_to_num(0.0)))


def test_a_constant_map_says_nothing_of_shape_and_all_constants_are_the_same(fusion, tokens):
    maps = torch.full((PEOPLE, SIZE, SIZE), 3.7)
    fused = fusion(tokens, MASK, maps)
    assert fused.isfinite().all()
    for constant in (0.0, -2.0, 1e20):
        torch.testing.assert_close(fusion(tokens, MASK, torch.full_like(maps, constant)), fused)
    noisy = maps * (1 + 1e-7 * torch.randn_like(maps))  # rounding is not relief
    torch.testing.assert_close(fusion(tokens, MASK, noisy), fused)
    values, known = resize_depth(maps, SIZE)
    assert (normalise_depth(values, known) == 0).all()


def test_one_known_pixel_is_enough(fusion, tokens):
    maps = torch.full((PEOPLE, SIZE, SIZE), torch.nan)
    maps[:, 20, 20] = 2.0
    fused = fusion(tokens, MASK, maps)
    assert fused.isfinite().all() and (fused - tokens).abs().amax((1, 2)).min() > 0.01


def test_maps_of_another_size(fusion, tokens, depth):
    expected = fusion(tokens, MASK, depth)
    twice = depth.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(fusion(tokens, MASK, twice), expected, rtol=1e-3, atol=1e-3)
    smaller = fusion(tokens, MASK, F.avg_pool2d(depth[:, None], 2)[:, 0])
    assert smaller.isfinite().all() and (smaller - expected).abs().max() < (expected - tokens).abs().max()
    assert fusion(tokens, MASK, torch.rand(PEOPLE, 45, 45)).isfinite().all()


def test_resizing_averages_what_is_known():
    maps = torch.tensor(
        [
            [
                [1.0, 3.0, torch.nan, torch.nan],
                [5.0, 7.0, torch.nan, 2.0],
                [1.0, torch.nan, 4.0, 4.0],
                [3.0, torch.nan, 4.0, torch.inf],
            ]
        ]
    )
    values, known = resize_depth(maps, 2)
    assert known.tolist() == [[[True, False], [True, True]]]  # known for less than half of the pixel: unknown
    torch.testing.assert_close(values, torch.tensor([[[4.0, 0.0], [2.0, 4.0]]]))
    values, known = resize_depth(torch.tensor([[[1.0, torch.nan], [2.0, 3.0]]]), 4)
    assert values[0, 3].tolist() == [2.0, 2.0, 3.0, 3.0] and known[0, 0].tolist() == [True, True, False, False]


def test_places_have_both_codes(fusion, depth):
    """Equal patches give different tokens, by the sinusoidal and by the learned encoding."""
    maps = torch.full((1, SIZE, SIZE), 2.0)
    read, _ = fusion.tokens(maps)
    assert torch.cdist(read, read)[0].add(10 * torch.eye(16)).min() > 0.01
    with torch.no_grad():
        fusion.place.zero_()
    fixed, _ = fusion.tokens(maps)
    assert torch.cdist(fixed, fixed)[0].add(10 * torch.eye(16)).min() > 0.01 and not torch.allclose(read, fixed)
    assert "place" in fusion.state_dict() and "position" not in fusion.state_dict()


def test_half_precision_of_the_tokens(fusion, tokens, depth):
    with torch.autocast("cpu", torch.bfloat16):
        fused = fusion(tokens, MASK, depth)
    torch.testing.assert_close(fused.float(), fusion(tokens, MASK, depth), rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((PEOPLE - 1, SIZE, SIZE), r"depth: shape \(3, 32, 32\) found, \(4, 32, 32\) expected"),
        ((PEOPLE, 1, SIZE, SIZE), "a map of each person's crop"),
        ((PEOPLE, 0, 0), "shape"),
        ((PEOPLE, SIZE, 2 * SIZE), "maps of 32 x 64 pixels; a square crop's are expected"),
    ],
)
def test_other_shapes_are_refused(fusion, tokens, shape, message):
    with pytest.raises(ValueError, match=message):
        fusion(tokens, MASK, torch.rand(shape))


def test_other_kinds_are_refused(fusion, tokens):
    with pytest.raises(ValueError, match="int64 found; floating-point numbers are expected"):
        fusion(tokens, MASK, torch.ones(PEOPLE, SIZE, SIZE, dtype=torch.long))
    with pytest.raises(ValueError, match="30 pixels a side does not fall into patches of 8"):
        DepthFusion(WIDTH, 2, map_size=30)
    with pytest.raises(ValueError, match="0 layers; at least 1 is needed"):
        DepthFusion(WIDTH, 2, layers=0)


def test_what_is_read_at_the_joints_goes_with_their_depth():
    """Rendered people in front of a wall, corrupted heatmaps: median correlation over people."""
    values = load_config(None, ["model.depth_map=true", "data.depth_faults.none=true", "data.map_size=64"])
    body, mesh = free_body()
    sample = build_data(values, body, mesh).block("val", 0)
    assert sample.depth_input is not None and sample.keypoints_3d is not None
    look = functools.partial(
        JointHeatmapBackbone(26, 64, WIDTH).look, heatmaps=sample.heatmaps, heatmap_valid=sample.heatmap_valid
    )

    def correlation(nearness: float) -> float:
        seen = DepthAtTokens(WIDTH, 64, nearness).profile(sample.depth_input, look)
        found = []
        for profile, joints in zip(seen, sample.keypoints_3d, strict=True):
            there = profile[:, 2] > 0.1
            if there.sum() > 5:
                found.append(torch.corrcoef(torch.stack([profile[there, 0], joints[there, 2]]))[0, 1].item())
        return statistics.median(found)

    assert correlation(5.0) > 0.65 > 0.4 > correlation(0.0)


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_unit_and_origin_do_not_matter_at_the_joints_either(depth, scale):
    heatmaps, valid = torch.rand(PEOPLE, 5, SIZE, SIZE) ** 20, torch.tensor([True] * 4 + [False]).expand(PEOPLE, -1)
    look = functools.partial(JointHeatmapBackbone(5, SIZE, WIDTH).look, heatmaps=heatmaps, heatmap_valid=valid)
    reading = DepthAtTokens(WIDTH, SIZE)
    assert not reading(depth, look).any()  # zero-initialised
    awaken(reading)
    read = reading(depth, look)
    assert read[:, :4].abs().amax(-1).min() > 0 and not read[:, 4].any()  # a missing joint reads nothing
    torch.testing.assert_close(reading(scale * depth + 7, look), read, rtol=1e-2, atol=1e-2)
    assert not reading(torch.full_like(depth, torch.nan), look).any()


def test_a_depth_token_holds_depth_relief_and_validity_of_its_patch(fusion, depth):
    seen = []
    fusion.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fusion.tokens(depth)
    values, known = resize_depth(depth, SIZE)
    normalised = normalise_depth(values, known)
    maps = torch.stack([normalised, near_relief(normalised, known), known.float()], 1)
    for row in range(4):
        for column in range(4):
            patch = maps[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            torch.testing.assert_close(seen[0][:, 4 * row + column], patch.flatten(1))


def test_patches_without_known_depth_are_not_attended_to(fusion, tokens, depth):
    before = fusion(tokens, MASK, depth)
    with torch.no_grad():
        fusion.place[0] += 5.0 * torch.randn(WIDTH)  # the one that is unknown
    torch.testing.assert_close(fusion(tokens, MASK, depth), before)
    with torch.no_grad():
        fusion.place[5] += 5.0 * torch.randn(WIDTH)
    assert (fusion(tokens, MASK, depth) - before).abs().max() > 1e-2


def test_relief_is_of_the_nearer_quartile_of_the_middle():
    """Sixteen known values in the middle of the map, an extreme border, and one unknown pixel."""
    values = torch.full((1, 8, 8), 50.0)
    values[0, :2] = -50.0
    values[0, 2:6, 2:6] = torch.arange(16.0).reshape(4, 4)[torch.tensor([2, 0, 3, 1])] / 10
    known = torch.ones_like(values, dtype=torch.bool)
    known[0, 7, 7] = False
    expected = torch.tanh(4 * (values - 0.375))  # the quartile of 0, 0.1, ..., 1.5
    expected[0, 7, 7] = 0
    torch.testing.assert_close(near_relief(values, known), expected)


def test_the_profile_of_tokens_that_are_pixels():
    """Pooled over one pixel, the weights cancel: depth over the tokens, relief, and what is known."""
    depth = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) + 2.0
    depth[0, 0, 0], depth[0, 4, 4] = torch.nan, 60.0  # not known, and a wall seen past the person
    found = DepthAtTokens(WIDTH, map_size=8).profile(depth, lambda maps: maps.flatten(2).mT)[0]
    values, known = resize_depth(depth, 8)
    normalised = normalise_depth(values, known)
    assert found[:, 2].tolist() == known.flatten().float().tolist()
    torch.testing.assert_close(found[:, 1], near_relief(normalised, known).flatten(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 0], normalised.flatten().clamp(-4, 4), atol=1e-3, rtol=1e-3)
    assert normalised.max() > 10 and found[36, 0] == 4
    # Normalised over the tokens, not over the map: a wall that no token looks at does not count.
    near = DepthAtTokens(WIDTH, map_size=8).profile(depth, lambda maps: maps.flatten(2).mT[:, :30])[0, 1:, 0]
    own = depth.flatten()[1:30]
    own = (own - own.median()) / (own - own.median()).abs().mean()
    torch.testing.assert_close(near, own, atol=1e-2, rtol=1e-2)
    half = DepthAtTokens(WIDTH, map_size=8).profile(depth, lambda maps: F.avg_pool2d(maps, 2).flatten(2).mT)[0]
    assert half[:, 2].tolist() == [0.75] + [1.0] * 15
