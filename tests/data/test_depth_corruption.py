"""The depth of synthetic people: a scene around the body and a network's corruptions; people are unchanged."""

import dataclasses

import pytest
import torch
from small import free_body, people, small_config

from hmdiff.build import build_data
from hmdiff.config import DepthCorruption
from hmdiff.data.sample import Sample, concatenate
from hmdiff.data.synthetic.depth_corruption import estimate_depth
from hmdiff.data.synthetic.depth_scene import FARTHEST, compose_depth
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.data.synthetic.rendering import MapRenderer
from hmdiff.errors import UserError
from hmdiff.models.depth import normalise_depth

SIZE = 48
NO_CORRUPTION = {
    "disparity": 0.0,
    "bend": 0.0,
    "edges": 0.0,
    "blur": 0.0,
    "grain": 0.0,
    "missing": 0.0,
    "missing_map": 0.0,
    "affine": False,
}
MAPS = ("silhouette", "depth", "visible_fraction", "occlusion", "depth_input")


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int = 8, **options) -> SyntheticHumans:
    body, mesh = free_body()
    return SyntheticHumans(body, people().poses, mesh.coarse_ids, n, seed=1, **options)


@pytest.fixture(scope="module")
def clean() -> Sample:
    torch.set_num_threads(1)
    return drawn(16, map_size=SIZE, depth_corruption=DepthCorruption(none=True)).block("test_occluded", 0)


@pytest.fixture
def scene(generator: torch.Generator) -> torch.Tensor:
    """A step between two slopes."""
    ramp = torch.linspace(2, 3, SIZE).expand(16, SIZE, SIZE).clone()
    ramp[:, 12:36, 18:30] = 1.5
    return ramp


# -- people -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_people_are_the_same_with_maps_as_without():
    plain, mapped = drawn(), drawn(map_size=32)
    worse = drawn(map_size=32, depth_corruption=DepthCorruption(missing_map=1.0))
    for stream in ("train", "test_occluded", "test_ood"):
        one, two, three = (data.block(stream, 3) for data in (plain, mapped, worse))
        for field in dataclasses.fields(Sample):
            values = [getattr(sample, field.name) for sample in (one, two, three)]
            if field.name in MAPS:
                assert values[0] is None and values[1] is not None
                assert field.name == "depth_input" or torch.equal(values[1], values[2])
            else:
                assert all(v is None for v in values) or torch.equal(values[0], values[1]), field.name
        assert three.depth_input.isnan().all()


@pytest.mark.slow
def test_a_block_s_maps_are_a_function_of_seed_stream_and_number():
    data = drawn(map_size=32)
    first = data.block("train", 2)
    data.block("val", 0)
    torch.manual_seed(7)
    again = data.block("train", 2)
    assert torch.equal(first.depth_input.nan_to_num(-9), again.depth_input.nan_to_num(-9))
    assert not torch.equal(first.depth_input.nan_to_num(-9), data.block("train", 3).depth_input.nan_to_num(-9))


@pytest.mark.slow
def test_labels_are_those_of_the_pictures():
    """The same rasteriser, with and without the image."""
    pictured, mapped = drawn(4, image_size=32).block("train", 1), drawn(4, map_size=32).block("train", 1)
    for name in ("silhouette", "depth", "visible_fraction"):
        assert torch.equal(getattr(pictured, name), getattr(mapped, name)), name
    assert pictured.depth_input is None and mapped.image is None
    both = drawn(4, image_size=24, map_size=32).block("train", 1)
    assert both.image.shape[-1] == 24 and torch.equal(both.depth, mapped.depth)


@pytest.mark.slow
def test_the_config_asks_for_maps():
    body, mesh = free_body()
    assert build_data(small_config(), body, mesh).block("train", 0).depth is None
    block = build_data(small_config("x", "data.map_size=24", "data.depth_faults.none=true"), body, mesh).block("val", 0)
    assert block.image is None and block.depth_input.shape == (4, 24, 24) and block.depth_input.isfinite().all()
    with pytest.raises(UserError, match=r"data.depth_faults.*no key 'blurr'; did you mean 'blur'"):
        build_data(small_config("x", "data.depth_faults.blurr=1"), body, mesh)
    with pytest.raises(UserError, match=r"data.map_size 8: 0, or at least 16 pixels, is expected"):
        build_data(small_config("x", "data.map_size=8"), body, mesh)
    with pytest.raises(UserError, match="no faces, so no depth can be drawn"):
        MapRenderer(body.select(torch.arange(100)), 64)


def test_a_mixture_without_depth_gets_unknown_maps(clean):
    few = Sample(joints_3d=torch.zeros(2, 24, 3), index=torch.arange(2))
    joined = concatenate([clean, few])
    assert torch.equal(joined.depth_input[:16], clean.depth_input) and joined.depth_input[16:].isnan().all()
    assert len(joined.depth_input) == 18


# -- the scene ----------------------------------------------------------------------------------------------------


def test_the_body_stands_before_everything_and_behind_its_box(clean):
    body, covered = clean.depth > 0, clean.occlusion
    seen = body & ~covered
    assert torch.equal(clean.depth_input[seen], clean.depth[seen])
    hidden = body & covered
    assert hidden.any() and (clean.depth_input[hidden] < clean.depth[hidden]).all()
    fraction = seen.sum((1, 2)) / body.sum((1, 2))
    torch.testing.assert_close(fraction, clean.visible_fraction)
    assert clean.depth_input.isfinite().all() and clean.depth_input.max() <= FARTHEST and clean.depth_input.min() > 0


def test_a_map_has_no_silhouette_for_free(clean):
    """The background's depth is known too, and no single threshold separates it from the body."""
    around = ~(clean.depth > 0) & ~clean.occlusion
    farthest = clean.depth.flatten(1).amax(1)[:, None, None]
    assert ((clean.depth_input < farthest) & around).float().sum() > 0.1 * around.sum()  # a floor in front of the body
    assert ((clean.depth_input > farthest) & around).float().sum() > 0.1 * around.sum()  # a wall behind it


def test_walls_and_floors_leave_the_body_on_their_near_side():
    """Planes where no body is drawn: none of their points is nearer than the body along their normal."""
    gen = torch.Generator().manual_seed(0)
    vertices = torch.randn(6, 50, 3, generator=gen) * 0.4 + torch.tensor([0.3, 0.0, 4.0])
    focal, principal = torch.full((6,), 3.0), torch.zeros(6, 2)
    nothing = torch.zeros(6, SIZE, SIZE)
    depth = compose_depth(nothing, nothing > 1, vertices, focal, principal, gen)
    for person in range(6):
        pixels = (vertices[person, :, :2] / vertices[person, :, 2:] * 3 + 1) * (SIZE / 2)
        inside = ((pixels >= 0) & (pixels < SIZE)).all(-1)
        column, row = pixels[inside].long().unbind(-1)
        assert inside.any() and (depth[person, row, column] > vertices[person, inside, 2] - 0.08).all()


def test_without_a_scene_the_body_is_all_that_is_known(clean):
    bare = drawn(16, map_size=SIZE, depth_corruption=DepthCorruption(none=True, scene=False)).block("test_occluded", 0)
    seen = (clean.depth > 0) & ~clean.occlusion
    assert torch.equal(bare.depth_input.isfinite(), seen)
    assert torch.equal(bare.depth_input[seen], clean.depth[seen]) and torch.equal(bare.depth, clean.depth)


# -- the faults ---------------------------------------------------------------------------------------------------


def test_no_faults_change_nothing(scene):
    assert estimate_depth(scene, DepthCorruption(none=True), generator()) is scene
    found = estimate_depth(scene, DepthCorruption(**NO_CORRUPTION), generator())
    torch.testing.assert_close(found, scene, rtol=1e-5, atol=1e-5)


def test_affine_is_another_unit_and_origin_alone(scene):
    found = estimate_depth(scene, DepthCorruption(**{**NO_CORRUPTION, "affine": True}), generator())
    known = torch.ones_like(scene, dtype=torch.bool)
    torch.testing.assert_close(normalise_depth(found, known), normalise_depth(scene, known), rtol=1e-3, atol=1e-3)
    spread = found.flatten(1).std(1)
    assert spread.max() / spread.min() > 50  # units from millimetres to kilometres


def test_disparity_is_known_by_its_inverse(scene):
    found = estimate_depth(scene, DepthCorruption(**{**NO_CORRUPTION, "disparity": 1.0}), generator())
    torch.testing.assert_close(-1 / found, scene, rtol=1e-4, atol=1e-4)
    half = estimate_depth(scene, DepthCorruption(**{**NO_CORRUPTION, "disparity": 0.5}), generator())
    turned = half.flatten(1).amax(1) < 0
    assert 0 < turned.sum() < len(scene)


def test_order_survives_every_fault(scene):
    """Larger remains farther: the estimate correlates with the ground truth for every person."""
    found = estimate_depth(scene, DepthCorruption(missing=0.0, missing_map=0.0), generator())
    for person in range(len(scene)):
        # Disparity is nonlinear in depth: compare ranks.
        rank = [values[person].flatten().argsort().argsort().double() for values in (found, scene)]
        assert torch.corrcoef(torch.stack(rank))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("name", "value", "least", "most"),
    [("bend", 0.3, 0.05, 0.6), ("grain", 0.3, 0.02, 0.3), ("blur", 0.08, 0.02, 0.3), ("edges", 0.06, 0.02, 0.5)],
)
def test_each_fault_alone_is_of_its_size(scene, name, value, least, most):
    found = estimate_depth(scene, DepthCorruption(**{**NO_CORRUPTION, name: value}), generator())
    error = (found - scene).square().mean().sqrt() / scene.std()
    assert least < error < most
    at_edge = (found - scene)[:, 8:40, 14:34].abs().mean()
    away = (found - scene)[:, :6].abs().mean()
    if name in ("blur", "edges"):
        assert at_edge > 3 * away  # only at depth discontinuities
    else:
        assert at_edge < 2 * away


def test_missing_regions_and_maps():
    depth = torch.full((400, 16, 16), 2.0) + torch.linspace(0, 1, 16)
    found = estimate_depth(depth, DepthCorruption(**{**NO_CORRUPTION, "missing": 0.3, "missing_map": 0.2}), generator())
    share = found.isnan().float().mean((1, 2))
    assert 0.14 < (share == 1).float().mean() < 0.26
    assert 0.12 < ((share > 0) & (share < 1)).float().mean() < 0.30
    known = found.isfinite()
    torch.testing.assert_close(found[known], depth[known])


def test_unknown_pixels_stay_unknown(scene):
    scene[:, :, :10] = torch.nan
    found = estimate_depth(scene, DepthCorruption(missing_map=0.0, missing=0.0), generator())
    assert found[:, :, :4].isnan().all() and found[:, :, 16:].isfinite().all()
    empty = estimate_depth(torch.full_like(scene, torch.nan), DepthCorruption(), generator())
    assert empty.isnan().all()


def test_one_option_does_not_change_what_another_gives(scene):
    with_grain = estimate_depth(scene, DepthCorruption(**{**NO_CORRUPTION, "grain": 0.1}), generator())
    both = estimate_depth(scene, DepthCorruption(**{**NO_CORRUPTION, "grain": 0.1, "missing": 0.9}), generator())
    known = both.isfinite()
    assert not known.all() and torch.equal(both[known], with_grain[known])
