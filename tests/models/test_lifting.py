"""Lifting: the map from metres to the volume, its axes, sampling, and the network."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from hmdiff.geometry import weak_perspective_projection
from hmdiff.models.layers import sinusoidal_position_1d
from hmdiff.models.lifting import (
    DEPTH_RANGE,
    Lifting,
    relative_places,
    sample_volume,
    volume_coordinates,
    voxels_away_from,
)

SIZE = (3, 4, 5)  # D, H, W: different, so that a mixed-up axis shows


def body(*shape: int) -> Tensor:
    """Points within the range of the volume."""
    return (torch.rand(*shape, 3, dtype=torch.float64) - 0.5) * 2.3


def some_camera(*shape: int) -> Tensor:
    return torch.cat([torch.rand(*shape, 1) + 0.4, torch.randn(*shape, 2) * 0.1], -1).double()


def centres(size: tuple[int, int, int]) -> Tensor:  # (D, H, W, 3) x, y, z in -1..1
    axes = [2 * relative_places(count).double() - 1 for count in size]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z], -1)


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("exponent", [1.0, 3.0, 7.5])
def test_places_by_loops(batch: int, exponent: float) -> None:
    points, camera = body(batch, 6), some_camera(batch)
    places = volume_coordinates(points, camera, exponent)
    assert torch.equal(places[..., :2], weak_perspective_projection(points, camera))
    for person in range(batch):
        for joint in range(6):
            z = (points[person, joint, 2].item() + 1.2) / 2.4
            assert places[person, joint, 2].item() == pytest.approx(2 * z**exponent - 1)


def test_depth_by_hand() -> None:
    """JOTR's decoder samples at z^k: at k = 3 a joint at mid-depth is read at r = 1/8; k = 1 is linear."""
    depth = torch.tensor([-1.2, -0.9, -0.6, 0.0, 0.6, 1.2], dtype=torch.float64)
    assert DEPTH_RANGE == 1.2
    points = torch.stack([torch.zeros(6), torch.zeros(6), depth], -1).double()
    camera = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    linear = volume_coordinates(points, camera, 1.0)[:, 2]
    torch.testing.assert_close(linear[1:], depth[1:] / 1.2)
    assert linear[0].item() == pytest.approx(-1, abs=2.1e-4)
    r = (volume_coordinates(points, camera, 3.0)[:, 2] + 1) / 2
    torch.testing.assert_close(r, torch.tensor([1e-12, 1 / 512, 1 / 64, 1 / 8, 27 / 64, 1], dtype=torch.float64))


@pytest.mark.parametrize("exponent", [1.0, 3.0, 20.0])
def test_depth_is_monotone_and_its_gradients_are_finite(exponent: float) -> None:
    near = torch.tensor([-DEPTH_RANGE, -DEPTH_RANGE + 1e-7], dtype=torch.float64)
    depth = torch.cat([torch.linspace(-3, 3, 2001, dtype=torch.float64), near]).sort().values.requires_grad_()
    k = torch.tensor(exponent, dtype=torch.float64, requires_grad=True)
    points = torch.stack([torch.zeros_like(depth), torch.zeros_like(depth), depth], -1)
    camera = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    place = volume_coordinates(points, camera, k)[:, 2]
    middle = depth.detach().abs() < 0.9 * DEPTH_RANGE
    assert (place.diff()[middle[1:]] >= 0).all() and place.isfinite().all()
    (by_depth,) = torch.autograd.grad(place.sum(), depth, retain_graph=True)
    (by_k,) = torch.autograd.grad(place[middle].sum(), k, retain_graph=True)
    (everywhere,) = torch.autograd.grad(place.sum(), k)
    assert by_depth.isfinite().all() and everywhere.isfinite()
    assert by_k < 0  # a larger k moves every depth to the near face
    assert (by_depth >= 0).all() and (by_depth[depth < -DEPTH_RANGE] == 0).all()


def test_the_map_is_differentiable_in_everything() -> None:
    points, camera = body(2, 4).requires_grad_(), some_camera(2).requires_grad_()
    k = torch.tensor(2.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(volume_coordinates, (points, camera, k))


def test_a_camera_belongs_to_its_image() -> None:
    """Also with as many points as images, where broadcasting over the wrong axis would go unnoticed."""
    points, camera = body(3, 3), some_camera(3)
    together = volume_coordinates(points, camera, 3.0)
    for image in range(3):
        torch.testing.assert_close(volume_coordinates(points[image], camera[image], 3.0), together[image])


def test_a_linear_volume_gives_its_coordinates() -> None:
    volume = centres(SIZE).permute(3, 0, 1, 2)[None]
    reach = torch.tensor([1 - 1 / count for count in reversed(SIZE)], dtype=torch.float64)  # the outermost centres
    places = (torch.rand(1, 50, 3, dtype=torch.float64) * 2 - 1) * reach
    torch.testing.assert_close(sample_volume(volume, places), places)
    torch.testing.assert_close(sample_volume(volume, centres(SIZE).reshape(1, -1, 3)).reshape(*SIZE, 3), centres(SIZE))
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    torch.testing.assert_close(sample_volume(volume, corners[None])[0], corners * reach)
    torch.testing.assert_close(sample_volume(volume, 9 * corners[None])[0], corners * reach)  # and all beyond


def by_hand(volume: Tensor, place: Tensor) -> Tensor:  # (V, D, H, W), (3,) x, y, z -> (V,)
    value = torch.zeros(len(volume), dtype=volume.dtype)
    cells = []
    for coordinate, count in zip(place.flip(0).tolist(), volume.shape[1:], strict=True):  # z, y, x
        at = min(max((coordinate + 1) / 2 * count - 0.5, 0.0), count - 1.0)
        low = min(math.floor(at), count - 2)
        cells.append(((low, 1 - (at - low)), (low + 1, at - low)))
    for (z, a), (y, b), (x, c) in itertools.product(*cells):
        value += a * b * c * volume[:, z, y, x]
    return value


def test_trilinear_equals_a_loop() -> None:
    volume = torch.randn(2, 6, *SIZE, dtype=torch.float64)
    places = torch.rand(2, 20, 3, dtype=torch.float64) * 2.4 - 1.2
    sampled = sample_volume(volume, places)
    assert sampled.shape == (2, 20, 6)
    for image, number in itertools.product(range(2), range(20)):
        torch.testing.assert_close(sampled[image, number], by_hand(volume[image], places[image, number]))


def test_sampling_has_gradients_in_both() -> None:
    volume = torch.randn(2, 2, *SIZE, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(2, 5, 3, dtype=torch.float64) * 1.2 - 0.6).requires_grad_()
    assert torch.autograd.gradcheck(sample_volume, (volume, places))
    half = sample_volume(volume.detach().bfloat16(), places.detach().float())
    assert half.dtype == torch.float32  # a place in half precision would be a hundredth of the crop off
    torch.testing.assert_close(half.double(), sample_volume(volume, places), rtol=0.02, atol=0.02)


def test_corner_voxels_are_those_that_are_sampled() -> None:
    """A voxel is near if and only if the sampled value depends on it, tested by gradients."""
    places = torch.rand(6, 2, 3, dtype=torch.float64) * 1.8 - 0.9
    away = voxels_away_from(places, SIZE)
    assert away.shape == (6, *SIZE) and away.dtype == torch.bool
    volume = torch.zeros(6, 1, *SIZE, dtype=torch.float64, requires_grad=True)
    (pull,) = torch.autograd.grad(sample_volume(volume, places).sum(), volume)
    assert ((pull[:, 0] != 0) & away).sum() == 0
    # Beyond the outermost centres fewer corners are interpolated; no others may be marked.
    inside = (places.abs() < 1 - 1 / torch.tensor([5, 4, 3])).all(-1).all(-1)
    assert 0 < inside.sum() < 6
    assert torch.equal(pull[inside, 0] != 0, ~away[inside])
    alone = voxels_away_from(torch.tensor([[[0.9, -0.9, 0.1]]]), SIZE)  # x in the last column, y in the first row
    assert (~alone).nonzero().tolist() == [[0, 1, 0, 4], [0, 2, 0, 4]]
    assert voxels_away_from(torch.tensor([[[-7.0, 7.0, 7.0]]]), SIZE).sum() == 3 * 4 * 5 - 1


def tiny(**changes: float) -> Lifting:
    return Lifting(12, 16, size=4, layers=1, heads=2, **changes).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 4), (7, 7), (8, 12), (3, 2)])
def test_a_volume_for_every_image(shape: tuple[int, int]) -> None:
    model, features = tiny(), torch.randn(3, 12, *shape)
    volume = model(features)
    assert volume.shape == (3, 16, 4, 4, 4)
    for image in range(3):
        torch.testing.assert_close(model(features[image : image + 1])[0], volume[image])


def without_encoder(model: Lifting) -> Lifting:
    model.encoder, model.norm = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]
    return model


def test_lifting_equals_a_convolution_by_hand() -> None:
    model, features = without_encoder(tiny()), torch.randn(2, 12, 4, 4)
    expected = torch.zeros(2, 16, 4, 4, 4)
    for z, y, x in itertools.product(range(4), repeat=3):
        channels = torch.arange(16) * 4 + z  # V·D channels, D inside
        lifted = features[:, :, y, x] @ model.lift.weight[channels, :, 0, 0].T + model.lift.bias[channels]
        r = [(i + 0.5) / 4 for i in (z, y, x)]
        place = torch.tensor([r[0] ** 3, r[1], r[2]]).expand(2, 3)
        expected[:, :, z, y, x] = model.join(torch.cat([lifted, place], -1))
    code = sinusoidal_position_1d(64, expected.shape[1]).mT.unflatten(1, (4, 4, 4))
    torch.testing.assert_close(model(features), expected + code)


def test_rescaled_coordinates_are_sampled_by_their_own_warp() -> None:
    """Coordinates r^k sampled at z^k: RRC's Z gives (z^k)^k, as in JOTR; X and Y are those of the crop."""
    for exponent in (1.0, 2.0):
        model = Lifting(12, 16, size=128, layers=0, heads=2, exponent=exponent)
        grid = model.voxel_coordinates().detach().double()
        points, camera = body(1, 30) * 0.8, torch.tensor([[0.8, 0.05, -0.05]], dtype=torch.float64)
        found = sample_volume(grid.permute(3, 0, 1, 2)[None], volume_coordinates(points, camera, exponent))
        z = points[..., 2] / 2.4 + 0.5
        torch.testing.assert_close(found[..., 0], z ** (exponent * exponent), rtol=0, atol=4e-3)
        place = weak_perspective_projection(points, camera)
        torch.testing.assert_close(found[..., 1:], (place.flip(-1) + 1) / 2, rtol=0, atol=1e-5)  # Y, X
    assert torch.equal(Lifting(4, 8, 5, 0, 2, 1.0).voxel_coordinates()[:, 0, 0, 0].detach(), relative_places(5))


def test_every_voxel_token_has_a_code_of_its_own() -> None:
    """With JOTR's 1D encoding of the 512 voxel tokens, constant features give different tokens."""
    model = without_encoder(tiny())
    with torch.no_grad():
        model.join.weight[:, -3:] = 0  # the relative coordinates, which would tell voxels apart too
        model.lift.weight.zero_()
        model.lift.bias.zero_()
    tokens = model(torch.randn(1, 12, 4, 4)).flatten(2)[0].mT
    distance = torch.cdist(tokens, tokens) + 10 * torch.eye(len(tokens))
    assert len(tokens) == 64 and distance.min() > 0.01
    code = sinusoidal_position_1d(64, 16)
    for place, channel in ((0, 0), (5, 3), (63, 7)):
        angle = place * math.exp(-9.21 * channel / 7)
        assert code[place, channel].item() == pytest.approx(math.sin(angle), abs=1e-4)
        assert code[place, 8 + channel].item() == pytest.approx(math.cos(angle), abs=1e-4)
    with pytest.raises(ValueError, match="divisible by 2, not 7"):
        sinusoidal_position_1d(4, 7)


def test_features_stay_at_their_place_in_the_crop() -> None:
    """A feature-map cell is sampled at its location in the crop, for all map sizes."""
    model = without_encoder(tiny())
    with torch.no_grad():
        model.lift.weight.zero_()
        model.lift.bias.zero_()
        model.lift.weight[:8] = torch.eye(12)[torch.arange(8) // 4][..., None, None]  # channels 0 and 1, every layer
        model.join.weight.zero_()
        model.join.bias.zero_()
        model.join.weight[:2, :2] = torch.eye(2)
        model.position.zero_()
    for size in (4, 8, 16):
        r = 2 * relative_places(size) - 1
        features = torch.zeros(1, 12, size, size)
        features[0, 0], features[0, 1] = r.expand(size, size), r[:, None].expand(size, size)  # x, y
        place = torch.tensor([[[0.3, -0.6, 0.1], [-0.7, 0.2, 0.5]]])
        torch.testing.assert_close(sample_volume(model(features), place)[0, :, :2], place[0, :, :2])


def test_exponent_is_learned_and_kept_in_its_bounds() -> None:
    model = tiny()
    assert model.exponent.item() == 3
    for wanted, found in ((0.2, 1.0), (1.0, 1.0), (5.5, 5.5), (40.0, 20.0)):
        with torch.no_grad():
            model.free_exponent.fill_(wanted)
        assert model.exponent.item() == pytest.approx(found, abs=1e-6)
        (pull,) = torch.autograd.grad(model.exponent * 2, model.free_exponent)
        assert pull == 2  # also outside the bounds, so that it can return
    model = tiny()
    model(torch.randn(2, 12, 4, 4)).square().mul(torch.randn(16, 4, 4, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    for wrong in (0.5, 21.0):
        with pytest.raises(ValueError, match=r"exponent .* is not in 1\.\.20"):
            tiny(exponent=wrong)


def test_saved_weights_give_the_same_volume() -> None:
    model, features = tiny(), torch.randn(1, 12, 4, 4)
    other = tiny(exponent=5.0)
    assert not torch.equal(other(features), model(features))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(features), model(features)) and other.exponent == 3


def test_every_layer_of_the_encoder_is_run() -> None:
    model, features = Lifting(12, 16, size=4, layers=2, heads=2).eval(), torch.randn(1, 12, 4, 4)
    before = model(features)
    for number in range(2):
        last = model.encoder[number].feed_forward[-1].bias  # type: ignore[union-attr,index,operator]
        with torch.no_grad():
            last[3] += 1.0
            assert (model(features) - before).abs().max() > 1e-2
            last[3] -= 1.0
