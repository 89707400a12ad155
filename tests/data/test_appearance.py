"""Synthetic appearance: exact occlusion, determinism by seed, independence of the batch, ranges."""

import pytest
import torch

from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.appearance import Clothing, random_lights, render_photo
from hmdiff.data.synthetic.backgrounds import random_backgrounds
from hmdiff.data.synthetic.camera_effects import _blur, _jpeg, camera_effects
from hmdiff.data.synthetic.draws import gaussian, hsv_to_rgb, uniform


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.fixture(scope="module")
def figure():
    """Two parallel sheets of points as a body: y up, each height belongs to that height's joint."""
    heights = torch.linspace(-0.9, 0.8, 60)
    across = torch.linspace(-0.3, 0.3, 10)
    y, x = torch.meshgrid(heights, across, indexing="ij")
    points = torch.stack([x, y, torch.zeros_like(x)], -1).view(-1, 3)
    first = torch.arange(59)[:, None] * 10 + torch.arange(9)[None]
    faces = torch.stack([first, first + 1, first + 10, first + 1, first + 11, first + 10], -1).view(-1, 3)
    order = ("left_foot", "left_ankle", "left_knee", "left_hip", "pelvis", "spine1", "spine2", "spine3", "neck", "head")
    owner = torch.tensor([SMPL24.index(order[min(9, int((h + 0.9) / 1.7 * 10))]) for h in points[:, 1]])
    weights = torch.nn.functional.one_hot(owner, 24).float()
    return Clothing(points, weights), points * torch.tensor([1.0, -1.0, -1.0]) + torch.tensor([0.0, 0.0, 4.0]), faces


def picture(figure, generators, occluder=None):
    wardrobe, points, faces = figure
    count = len(generators)
    return render_photo(
        generators,
        wardrobe,
        points.expand(count, -1, -1),
        faces,
        torch.full((count,), 3.5),
        torch.zeros(count, 2),
        48,
        occluder,
        cull=False,
    )


@pytest.mark.slow
def test_a_person_does_not_depend_on_the_batch(figure):
    front = torch.zeros(3, 48, 48)
    front[0, :20], front[2, 10:30, :30] = 1, 0.7
    batch = picture(figure, seeds(5, 6, 7), front)
    alone = picture(figure, seeds(7), front[2:])
    # A pixel at an edge may shade the other face, due to rounding in the projection.
    apart = (alone.image[0] - batch.image[2]).abs()
    assert (apart > 1e-4).float().mean() < 0.02 and apart.mean() < 1e-4
    assert torch.equal(batch.occlusion, front > 0.5) and torch.equal(alone.occlusion[0], batch.occlusion[2])
    assert (batch.image[0] - batch.image[1]).abs().mean() > 0.05
    assert batch.image.min() >= 0 and batch.image.max() <= 1


@pytest.mark.slow
def test_the_seed_decides(figure):
    one, same, other = (picture(figure, seeds(seed)).image for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_clothes_cover_their_parts_and_vary(figure):
    wardrobe, _, _ = figure
    colours = wardrobe.colours(torch.Generator().manual_seed(0), 64)
    assert colours.shape == (64, 600, 3) and colours.min() >= 0 and colours.max() <= 1
    head, torso = colours[:, wardrobe.head].mean(1), colours[:, wardrobe.torso].mean(1)
    assert (head[:, 0] >= head[:, 2] - 0.05).all()  # skin and hair are in warm colours
    assert torso.std(0).min() > 0.1  # shirts have any colour


def test_lights_come_from_above_and_the_viewers_side_mostly():
    lights = random_lights(torch.Generator().manual_seed(0), 200)
    assert (lights.direction[:, 0, 1] < 0).all()
    assert lights.colour.min() >= 0 and lights.ambient.min() > 0.1


def test_backgrounds_have_no_common_look():
    found = random_backgrounds(torch.Generator().manual_seed(0), 24, (32, 48))
    assert found.shape == (24, 3, 32, 48) and found.min() >= 0 and found.max() <= 1
    assert found.mean((2, 3)).std(0).min() > 0.1


def test_camera_effects_keep_shape_and_can_be_off():
    image = torch.rand(3, 3, 20, 27)
    assert camera_effects(torch.Generator(), image, 0.0) is image
    changed = camera_effects(torch.Generator().manual_seed(0), image)
    assert changed.shape == image.shape and changed.min() >= 0 and changed.max() <= 1


def test_jpeg_is_orthonormal_and_coarser_quantisation_costs_more():
    image = torch.rand(2, 3, 16, 24)
    error = (_jpeg(image, torch.tensor([0.0, 1.0])) - image).square().mean((1, 2, 3)).sqrt()
    assert error[0] < 0.012 and error[1] > 5 * error[0]
    flat = torch.full((1, 3, 8, 8), 0.5)
    torch.testing.assert_close(_jpeg(flat, torch.zeros(1)), flat, atol=0.001, rtol=0)


def test_blur_keeps_the_sum_and_spreads_by_sigma():
    image = torch.zeros(2, 3, 21, 21)
    image[..., 10, 10] = 1
    spread = _blur(image, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(spread[0], image[0])
    torch.testing.assert_close(spread.sum((2, 3)), torch.ones(2, 3))
    offset = torch.arange(21.0) - 10
    variance = (spread[1, 0].sum(0) * offset**2).sum()
    assert float(variance) == pytest.approx(1.5**2, rel=0.05)


def test_draws():
    values = gaussian(torch.Generator().manual_seed(0), 1000, 20)
    assert abs(float(values.mean())) < 0.02 and float(values.std()) == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="generators"):
        uniform(seeds(1, 2), 3)
    known = torch.tensor([[0.0, 1.0, 1.0], [1 / 3, 1.0, 1.0], [2 / 3, 0.5, 0.8], [0.1, 0.0, 0.3]])
    rgb = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.4, 0.4, 0.8], [0.3, 0.3, 0.3]])
    torch.testing.assert_close(hsv_to_rgb(known), rgb)
