"""Fusion: an identity at initialisation; then each joint samples the volume at its location, with gradients."""

from __future__ import annotations

import pytest
import torch
from small import awaken
from torch import Tensor

from hmdiff.models.fusion import JointFusion
from hmdiff.models.layers import sinusoidal_position_1d
from hmdiff.models.lifting import sample_volume, volume_coordinates

JOINTS, WIDTH, VOLUME = 5, 12, 6


def fusion() -> JointFusion:
    model = JointFusion(WIDTH, VOLUME, JOINTS)
    awaken(model)
    return model.eval()


def given(images: int, hypotheses: int, kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {
        "tokens": torch.randn(images * hypotheses, JOINTS, WIDTH),
        "previous": torch.randn(images * hypotheses, JOINTS, 3) * 0.8,
        "volume": torch.randn(images, VOLUME, 3, 4, 5),
        "camera": torch.cat([torch.rand(images, 1) + 0.5, torch.randn(images, 2) * 0.1], -1),
    }
    return {name: tensor.to(kind) for name, tensor in tensors.items()}


def test_a_new_one_changes_nothing() -> None:
    inputs = given(2, 3)
    tokens, joints = JointFusion(WIDTH, VOLUME, JOINTS)(**inputs, scale=0.3, exponent=3.0)
    assert torch.equal(tokens, inputs["tokens"]) and torch.equal(joints, inputs["previous"])
    _, joints = JointFusion(WIDTH, VOLUME, JOINTS)(**(inputs | {"previous": None}), scale=0.3, exponent=3.0)
    assert torch.equal(joints, torch.zeros_like(joints))


def test_equals_its_formula() -> None:
    model, inputs = fusion(), given(2, 3)
    tokens, joints = model(**inputs, scale=0.3, exponent=2.0)
    for row in range(6):
        image, h, before = row // 3, inputs["tokens"][row], inputs["previous"][row]
        refined = before + model.refine(torch.cat([model.norm(h), before], -1))
        place = volume_coordinates(refined * 0.3, inputs["camera"][image], 2.0)
        sampled = sample_volume(inputs["volume"][image, None], place[None])[0]
        torch.testing.assert_close(joints[row], refined)
        sampled = sampled + sinusoidal_position_1d(JOINTS, VOLUME)  # JOTR's code of the sampled joints
        torch.testing.assert_close(tokens[row], h + model.add(sampled))
    first, joints = model(**(inputs | {"previous": None}), scale=0.3, exponent=2.0)
    pelvis, same = model(**(inputs | {"previous": torch.zeros(6, JOINTS, 3)}), scale=0.3, exponent=2.0)
    assert torch.equal(first, pelvis) and torch.equal(joints, same) and joints.std() > 0.1


@pytest.mark.parametrize("images", [1, 3, 4])
def test_hypotheses_and_images_are_independent(images: int) -> None:
    model, inputs = fusion(), given(images, 2)
    tokens, joints = model(**inputs, scale=0.3, exponent=3.0)
    for row in range(2 * images):
        image = slice(row // 2, row // 2 + 1)
        one = {name: inputs[name][row : row + 1] for name in ("tokens", "previous")}
        one |= {name: inputs[name][image] for name in ("volume", "camera")}
        alone = model(**one, scale=0.3, exponent=3.0)
        torch.testing.assert_close(alone[0][0], tokens[row])
        torch.testing.assert_close(alone[1][0], joints[row])


def test_the_volume_is_not_copied_for_the_hypotheses(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmdiff.models.fusion as module

    seen = []

    def watched(volume: Tensor, places: Tensor) -> Tensor:
        seen.append((volume, places.shape))
        return sample_volume(volume, places)

    monkeypatch.setattr(module, "sample_volume", watched)
    inputs = given(2, 7)
    fusion()(**inputs, scale=0.3, exponent=3.0)
    ((volume, shape),) = seen
    assert volume is inputs["volume"] and shape == (2, 7 * JOINTS, 3)


def test_a_joint_reads_its_own_place_alone() -> None:
    model, inputs = fusion(), given(1, 1)
    tokens, joints = model(**inputs, scale=0.3, exponent=1.0)
    moved = inputs["previous"].clone()
    moved[0, 2] += 0.5
    after, later = model(**(inputs | {"previous": moved}), scale=0.3, exponent=1.0)
    change = (after - tokens).norm(dim=-1)[0]
    assert change[2] > 1e-3 and (change[[0, 1, 3, 4]] == 0).all()
    assert (later - joints).norm(dim=-1)[0].nonzero().flatten().tolist() == [2]
    # A voxel far from all joints affects none, one next to a joint affects that joint.
    place = volume_coordinates(joints * 0.3, inputs["camera"], 1.0)
    volume = inputs["volume"].clone().requires_grad_()
    (pull,) = torch.autograd.grad(sample_volume(volume, place[:, 3:4]).sum(), volume)
    changed = torch.where(pull > 0.05, inputs["volume"] + 1, inputs["volume"])
    after, _ = model(**(inputs | {"volume": changed}), scale=0.3, exponent=1.0)
    assert (after - tokens).norm(dim=-1)[0, 3] > 1e-3


def test_gradients_pass_through_the_places() -> None:
    """DAT needs the gradient of the tokens in the estimate, through grid_sample and `volume_coordinates`."""
    model, inputs = fusion().double(), given(2, 2, torch.float64)
    names = ("tokens", "previous", "volume", "camera")
    leaves = [inputs[name].requires_grad_(name != "volume") for name in names]
    exponent = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inner, k = tensors
        return model(**dict(zip(names, inner, strict=True)), scale=0.3, exponent=k)

    assert torch.autograd.gradcheck(run, (*leaves, exponent))
    tokens, _ = run(*leaves, exponent)
    gradients = torch.autograd.grad(tokens.sum(), [leaves[1], leaves[3], exponent])  # reached by the places alone
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


def test_every_parameter_learns_after_the_first_step() -> None:
    model, inputs = JointFusion(WIDTH, VOLUME, JOINTS), given(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    goal, target = torch.randn(4, JOINTS, WIDTH), torch.randn(4, JOINTS, 3)
    losses = []
    for _ in range(8):
        tokens, joints = model(**inputs, scale=0.3, exponent=3.0)
        loss = (tokens - goal).square().mean() + (joints - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_joints_keep_their_precision_in_half_precision() -> None:
    model, inputs = fusion(), given(2, 2)
    exact = model(**inputs, scale=0.3, exponent=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, joints = model(**inputs, scale=0.3, exponent=3.0)
    assert tokens.dtype == joints.dtype == torch.float32
    torch.testing.assert_close(joints, exact[1], rtol=0.03, atol=0.03)
    torch.testing.assert_close(tokens, exact[0], rtol=0.1, atol=0.2)


def test_rows_that_fit_no_image_are_named() -> None:
    inputs = given(2, 2)
    inputs["tokens"], inputs["previous"] = inputs["tokens"][:3], inputs["previous"][:3]
    with pytest.raises(ValueError, match="3 rows of tokens are not as many hypotheses of each of 2 volumes"):
        fusion()(**inputs, scale=0.3, exponent=3.0)
