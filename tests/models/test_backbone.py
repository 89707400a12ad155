"""Backbones: masking, linearity, and dependencies of the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hmdiff.data.synthetic.corruption import scaled_peaks, two_gaussians
from hmdiff.errors import UserError
from hmdiff.heatmaps import gaussian_heatmaps
from hmdiff.models.backbone import ConvHeatmapBackbone, ImageBackbone, JointHeatmapBackbone, _widened
from hmdiff.models.layers import sinusoidal_position_2d


def maps(points: Tensor, size: int = 64, sigma: float = 2.0) -> Tensor:  # (B, J, 2) -> (B, J, size, size)
    return gaussian_heatmaps(points, torch.ones(points.shape[:-1]), sigma, size)


def test_invalid_and_empty_joints_are_masked() -> None:
    backbone = JointHeatmapBackbone(5, 64, 32)
    heatmaps = maps(torch.rand(3, 5, 2) - 0.5)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[0, 1] = False
    heatmaps[1, 2] = 0
    tokens, mask = backbone(heatmaps, valid)
    assert tokens.shape == (3, 5, 32) and mask.dtype == torch.bool
    expected = torch.ones(3, 5, dtype=torch.bool)
    expected[0, 1] = expected[1, 2] = False
    assert torch.equal(mask, expected)
    assert (tokens[~mask] == 0).all() and (tokens[mask].norm(dim=-1) > 0.1).all()
    assert tokens.isfinite().all()


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_joint_tokens_batch_equals_single(batch: int) -> None:
    backbone = JointHeatmapBackbone(5, 64, 32)
    heatmaps, valid = maps(torch.rand(batch, 5, 2) - 0.5), torch.rand(batch, 5) < 0.7
    tokens, mask = backbone(heatmaps, valid)
    for i in range(batch):
        one, one_mask = backbone(heatmaps[i : i + 1], valid[i : i + 1])
        torch.testing.assert_close(one, tokens[i : i + 1])
        assert torch.equal(one_mask, mask[i : i + 1])


def features(backbone: JointHeatmapBackbone, heatmaps: Tensor) -> Tensor:
    """Input of the embedding: moments, peak and spread."""
    seen: list[Tensor] = []
    handle = backbone.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    backbone(heatmaps, torch.ones(heatmaps.shape[:2], dtype=torch.bool))
    handle.remove()
    return seen[0]


def test_feature_of_a_mixture_is_the_mixture() -> None:
    backbone = JointHeatmapBackbone(1, 64, 32)
    # Boxes, so that subtracting a tenth of the peak scales all pixels equally.
    first, second = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    first[..., 10:14, 20:26], second[..., 40:44, 50:56] = 0.8, 0.8
    both = features(backbone, first + second)[..., :-2]
    a, b = features(backbone, first)[..., :-2], features(backbone, second)[..., :-2]
    torch.testing.assert_close(both, (a + b) / 2, atol=1e-5, rtol=1e-4)
    assert (a - b).abs().max() > 0.5
    # The moments depend only on the normalised distribution, not on its height.
    torch.testing.assert_close(features(backbone, first / 2)[..., :-2], a, atol=1e-5, rtol=1e-4)
    assert features(backbone, first)[..., -2] == pytest.approx(0.8)


def test_feature_is_the_characteristic_function() -> None:
    backbone = JointHeatmapBackbone(1, 64, 32)
    place = torch.tensor([[[0.328125, -0.484375]]])  # centres of pixels
    moments = features(backbone, maps(place, sigma=0.1))[0, 0]
    omega = torch.pi / 2 * torch.logspace(0, 4, 8, base=2.0)
    x, y = place[0, 0]
    expected = torch.cat([(x * omega).sin(), (x * omega).cos(), x[None], x[None] ** 2])
    torch.testing.assert_close(moments[:18], expected, atol=1e-4, rtol=1e-4)
    expected = torch.cat([(y * omega).sin(), (y * omega).cos(), y[None], y[None] ** 2])
    torch.testing.assert_close(moments[18:36], expected, atol=1e-4, rtol=1e-4)


def test_a_faint_background_is_no_place() -> None:
    backbone = JointHeatmapBackbone(1, 64, 32)
    clean = maps(torch.tensor([[[0.4, 0.1]]]))
    torch.testing.assert_close(features(backbone, clean + 0.02), features(backbone, clean), atol=0.05, rtol=0.05)


def test_conv_backbone_sees_places_and_validity() -> None:
    backbone = ConvHeatmapBackbone(5, 64, 32)
    points = torch.rand(2, 5, 2) - 0.5
    valid = torch.ones(2, 5, dtype=torch.bool)
    tokens, mask = backbone(maps(points), valid)
    assert tokens.shape == (2, 64, 32) and mask.shape == (2, 64) and mask.all()
    one, _ = backbone(maps(points[1:]), valid[1:])
    torch.testing.assert_close(one, tokens[1:])
    moved, _ = backbone(maps(points + torch.tensor([0.2, 0.0])), valid)
    assert (moved - tokens).abs().max() > 1e-3
    invalid = valid.clone()
    invalid[0, 3] = False
    without, _ = backbone(maps(points), invalid)
    assert (without[0] - tokens[0]).abs().max() > 1e-3 and torch.equal(without[1], tokens[1])
    # An invalid channel is ignored; an empty valid channel differs from an invalid one.
    rubbish = maps(points)
    rubbish[0, 3] = 1.0
    assert torch.equal(backbone(rubbish, invalid)[0], without)
    with pytest.raises(ValueError, match="8 times a power of two"):
        ConvHeatmapBackbone(5, 48, 32)
    assert ConvHeatmapBackbone(5, 16, 32)(torch.rand(1, 5, 16, 16), valid[:1])[0].shape == (1, 64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [0, 3])
def test_image_backbone(channels: int) -> None:
    backbone = ImageBackbone("resnet18", 64, 32, heatmap_channels=channels, pretrained=False).eval()
    image, heatmaps, valid = torch.rand(2, 3, 64, 64), maps(torch.rand(2, 3, 2) - 0.5, 16), torch.ones(2, 3).bool()
    with torch.no_grad():
        tokens, mask = backbone(image, heatmaps, valid)
        assert tokens.shape == (2, backbone.num_tokens, 32) == (2, 4, 32) and mask.all()
        torch.testing.assert_close(backbone(image[1:], heatmaps[1:], valid[1:])[0], tokens[1:], rtol=1e-4, atol=1e-4)
        assert (backbone(1 - image, heatmaps, valid)[0] - tokens).abs().max() > 1e-4
        other = backbone(image, heatmaps.flip(-1), valid)[0]
        hidden = backbone(image, heatmaps, torch.zeros_like(valid))[0]
    if channels:
        assert (other - tokens).abs().max() > 1e-4 and (hidden - tokens).abs().max() > 1e-4
        with pytest.raises(ValueError, match="give both"):
            backbone(image)
    else:
        assert torch.equal(other, tokens) and torch.equal(hidden, tokens)


def test_denormal_tails_of_heatmaps_do_not_reach_the_convolutions() -> None:
    """CPU convolutions are three times slower with them."""
    tails = torch.full((1, 3, 16, 16), 1e-40)
    tails[0, :, 4, 4] = 1.0
    peaks = (tails == 1.0).float()
    valid, image = torch.ones(1, 3).bool(), torch.rand(1, 3, 64, 64)
    for backbone in (ImageBackbone("resnet18", 64, 32, heatmap_channels=3), ConvHeatmapBackbone(3, 16, 32)):
        seen: list[Tensor] = []
        first = next(layer for layer in backbone.network.modules() if isinstance(layer, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        pictures = (image,) if isinstance(backbone, ImageBackbone) else ()
        for maps in (tails, peaks):
            backbone.eval()(*pictures, maps, valid)
        assert torch.equal(seen[0], seen[1]) and not ((seen[0] != 0) & (seen[0].abs() < 1e-30)).any()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["", "backbone."])
def test_image_backbone_starts_from_a_file(start: str, tmp_path: Path) -> None:
    """A pose network's weights give its features, initially also with heatmap channels."""
    torch.manual_seed(0)
    first = ImageBackbone("resnet18", 64, 32).eval()
    stored = {start + name: value for name, value in first.network.state_dict().items()}
    save_file({**stored, "head.final_layer.weight": torch.ones(2)}, tmp_path / "pose.safetensors")
    torch.save({"state_dict": stored, "meta": {}}, tmp_path / "pose.pth")
    image, heatmaps, valid = torch.rand(2, 3, 64, 64), torch.rand(2, 5, 16, 16), torch.ones(2, 5).bool()
    for name in ("pose.safetensors", "pose.pth"):
        plain = ImageBackbone("resnet18", 64, 32, pretrained=str(tmp_path / name)).eval()
        fused = ImageBackbone("resnet18", 64, 32, heatmap_channels=5, pretrained=str(tmp_path / name)).eval()
        fused.project = plain.project
        with torch.no_grad():
            torch.testing.assert_close(plain.network(image)[-1], first.network(image)[-1], rtol=0, atol=0)
            torch.testing.assert_close(fused(image, heatmaps, valid)[0], plain(image)[0], rtol=1e-4, atol=1e-5)
        fused(image, heatmaps, valid)[0].square().sum().backward()
        assert fused.network.conv1.weight.grad[:, 3:].abs().max() > 0  # the heatmaps' channels learn
    with pytest.raises(UserError, match=r"not the weights of this backbone: \d+ of \d+ are missing"):
        ImageBackbone("resnet34", 64, 32, pretrained=str(tmp_path / "pose.pth"))
    stored.pop(start + "conv1.weight")
    save_file(stored, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"1 of \d+ are missing or of another size, such as conv1.weight"):
        ImageBackbone("resnet18", 64, 32, pretrained=str(tmp_path / "less.safetensors"))
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        ImageBackbone("resnet18", 64, 32, pretrained=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("kind", ["one peak", "two peaks", "wide", "at the border"])
def test_peaks_read_as_the_heatmaps_they_draw(kind: str) -> None:
    """The closed form against rendered heatmaps: features within 0.02, mass within a few percent."""
    generator = torch.Generator().manual_seed(0)
    n, joints = 16, 6
    place = 1.4 * torch.rand(n, joints, 2, 2, generator=generator) - 0.7
    share = torch.stack([torch.ones(n, joints), torch.zeros(n, joints)], -1)
    sigma = 1.4 + 1.8 * torch.rand(n, joints, generator=generator)
    if kind == "two peaks":
        share[..., 1] = 0.3 + 0.7 * torch.rand(n, joints, generator=generator)
        place[:, :, 1] = place[:, :, 0] + 0.5 * torch.where(torch.rand(n, joints, 2, generator=generator) < 0.5, -1, 1)
    if kind == "wide":
        sigma = sigma + 5
    if kind == "at the border":
        place = place.sign() * 0.97
    confidence = 0.2 + 0.8 * torch.rand(n, joints, generator=generator)
    peaks = torch.cat([place, share[..., None], sigma[..., None, None].expand(n, joints, 2, 1)], -1)
    drawn = two_gaussians(place, share, sigma)
    drawn = drawn * (confidence / drawn.amax((-2, -1)))[..., None, None]
    backbone = JointHeatmapBackbone(joints, 64, 32)
    seen: list[tuple[Tensor, ...]] = []
    tokens = backbone._tokens
    backbone._tokens = lambda *features: seen.append(features) or tokens(*features)  # type: ignore[method-assign,func-returns-value]
    valid = torch.ones(n, joints, dtype=torch.bool)
    backbone(drawn, valid)
    backbone.from_peaks(scaled_peaks(peaks, confidence), valid)
    (moments, peak, spread, there), (m, p, s, t) = seen
    assert torch.equal(there, t) and there.all()
    torch.testing.assert_close(p, peak, atol=0.01, rtol=0.02)
    difference = (m - moments).abs()
    assert difference.mean() < 0.02 and difference[..., [16, 17, 34, 35]].max() < 0.06  # x, x², y, y²
    assert ((s - spread).abs() / spread).mean() < 0.1


def test_no_peak_is_no_joint() -> None:
    backbone = JointHeatmapBackbone(2, 64, 32)
    peaks = torch.tensor([0.1, -0.2, 0.8, 2.0]).expand(1, 2, 2, 4).clone()
    peaks[:, 1, :, 2] = 0
    tokens, mask = backbone.from_peaks(peaks, torch.ones(1, 2, dtype=torch.bool))
    assert mask.tolist() == [[True, False]] and (tokens[0, 1] == 0).all() and tokens.isfinite().all()


def first_input(backbone: ImageBackbone, *given: Tensor) -> Tensor:
    """What the image network is given."""
    seen: list[Tensor] = []
    handle = backbone.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone(*given)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_an_image_is_normalised_and_heatmaps_of_missing_joints_are_empty() -> None:
    backbone = ImageBackbone("resnet18", 64, 32, heatmap_channels=3).eval()
    image, heatmaps, valid = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), torch.ones(2, 3).bool()
    valid[1, 2] = False
    seen = first_input(backbone, image, heatmaps, valid)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
    torch.testing.assert_close(seen[:, :3], (image - mean[:, None, None]) / deviation[:, None, None])
    torch.testing.assert_close(seen[0, 3:], heatmaps[0])
    assert (seen[1, 5] == 0).all() and torch.equal(seen[1, 3:5], heatmaps[1, :2])


@torch.no_grad()
def test_grid_tokens_have_the_code_of_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With features of 0 a token is the code alone: row by row, as the feature map is flattened."""
    image = ImageBackbone("resnet18", 64, 32)
    monkeypatch.setattr(image.network, "forward", lambda pixels: [torch.zeros(len(pixels), 512, 2, 2)])
    tokens, _ = image(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(tokens[0] - image.project.bias, sinusoidal_position_2d(2, 2, 32))
    conv = ConvHeatmapBackbone(3, 16, 32)
    monkeypatch.setattr(conv.network, "forward", lambda pixels: torch.zeros(len(pixels), 32, 8, 8))
    tokens, _ = conv(torch.rand(1, 3, 16, 16), torch.ones(1, 3).bool())
    torch.testing.assert_close(tokens[0], sinusoidal_position_2d(8, 8, 32))


def test_an_empty_joint_differs_from_a_missing_one_and_two_joints_from_each_other() -> None:
    conv, nothing = ConvHeatmapBackbone(3, 16, 32), torch.zeros(1, 3, 16, 16)
    empty, _ = conv(nothing, torch.ones(1, 3).bool())
    missing, _ = conv(nothing, torch.zeros(1, 3).bool())
    assert (empty - missing).abs().max() > 1e-3
    same = maps(torch.tensor([[[0.2, -0.1], [0.2, -0.1]]]))
    tokens, _ = JointHeatmapBackbone(2, 64, 32)(same, torch.ones(1, 2).bool())
    assert (tokens[0, 0] - tokens[0, 1]).abs().max() > 0.1


def test_a_missing_joint_has_no_peaks() -> None:
    backbone = JointHeatmapBackbone(2, 64, 32)
    peaks = torch.tensor([0.1, -0.2, 0.8, 2.0]).expand(1, 2, 2, 4)
    tokens, mask = backbone.from_peaks(peaks, torch.tensor([[True, False]]))
    assert mask.tolist() == [[True, False]] and (tokens[0, 1] == 0).all() and (tokens[0, 0] != 0).any()


def test_maps_are_pooled_in_the_order_of_the_tokens() -> None:
    line = torch.arange(16.0)
    ramps = torch.stack([line.expand(16, 16), line[:, None].expand(16, 16)])[None]  # x, y
    found = ConvHeatmapBackbone(3, 16, 32).look(ramps)[0].unflatten(0, (8, 8))  # rows, columns
    torch.testing.assert_close(found[3, :, 0], torch.arange(8) * 2 + 0.5)
    torch.testing.assert_close(found[:, 5, 1], torch.arange(8) * 2 + 0.5)


def test_new_input_channels_of_trained_weights_are_zero() -> None:
    stored, wanted = {"conv": torch.randn(4, 3, 2, 2)}, {"conv": torch.randn(4, 8, 2, 2)}
    found = _widened(stored, wanted)["conv"]
    assert torch.equal(found[:, :3], stored["conv"]) and found.shape == (4, 8, 2, 2) and (found[:, 3:] == 0).all()
