"""What a training step gives to the network and to the objective: noise levels, masks, frames, detached positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small import free_body, people_block, small_config
from torch import Tensor

from hmdiff.build import build_model, build_scheduler
from hmdiff.config import Config
from hmdiff.data.sample import Sample
from hmdiff.geometry import crop_rotation
from hmdiff.models.lifting import sample_volume, volume_coordinates
from hmdiff.models.prediction import Prediction
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.train import step
from hmdiff.train.step import Draws, keypoint_map, training_losses

LEVELS = torch.tensor([20, 199, 60])
LIFTED = ("model.backbone=conv", "model.lifting=true", "model.volume_width=16", "model.volume_size=4", "model.depth=2")


@dataclasses.dataclass
class Seen:
    """Arguments of the network's forward pass and of the objective."""

    points: Tensor
    step: Tensor
    inputs: tuple[Any, ...]
    more: dict[str, Any]
    objective: tuple[Any, ...]
    keypoints: tuple[Any, ...]
    terms: dict[str, Tensor]
    found: Prediction


def people() -> Sample:
    return people_block().map(lambda tensor: tensor[:4])


def run(
    patch: pytest.MonkeyPatch,
    values: Config,
    sample: Sample,
    found: Prediction | None = None,
    mask: Tensor | None = None,
) -> Seen:
    """One training step whose network answers `found`, or a prediction of noise."""
    body, mesh = free_body()
    model, given = build_model(values, body, mesh), dict[str, Any]()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, model.num_points, 3, generator=generator)

    def forward(points: Tensor, at: Tensor, *inputs: Any, **more: Any) -> Prediction:
        given.update(points=points, step=at, inputs=inputs, more=more)
        random = torch.randn(points.shape, generator=generator)
        given["found"] = found or Prediction(random, torch.tensor([[1.0, 0.1, 0.0]]).expand(4, -1))
        return given["found"]

    patch.setattr(model, "forward", forward)
    real, real_terms = step.objective, step.keypoint_terms
    patch.setattr(step, "objective", lambda *all_of: given.update(objective=all_of) or real(*all_of))
    patch.setattr(step, "keypoint_terms", lambda *all_of: given.update(keypoints=all_of) or real_terms(*all_of))
    draws = Draws(LEVELS.expand(4, -1), noise, mask, 11)
    terms = training_losses(
        model, build_scheduler(values), values.loss, sample, draws, None, keypoint_map(values.loss, model, body)
    )
    return Seen(**{"keypoints": (), **given}, terms=terms)


def test_people_with_a_part_of_the_labels_are_shown_as_pure_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_k would need all of x_0: without vertices, or without joints, every level is the terminal one."""
    sample = dataclasses.replace(
        people(),
        has_vertices=torch.tensor([True, False, True, True]),
        has_joints_3d=torch.tensor([True, True, False, True]),
    )
    seen = run(monkeypatch, small_config(), sample)
    expected = (LEVELS + 1) / 200
    torch.testing.assert_close(seen.step, torch.stack([expected, torch.ones(3), torch.ones(3), expected]))


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_the_point_loss_has_the_weight_of_its_noise_level(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from hmdiff.diffusion.noising import loss_weight, training_target

    values = small_config(
        "unused", "loss.weighting=truncated_snr", "loss.gamma=1.5", f"diffusion.prediction_type={kind}", "loss.camera=0"
    )
    seen = run(monkeypatch, values, people())
    share = build_scheduler(values).alphas_cumprod[LEVELS].expand(4, -1)
    _, _, prediction, target, weight, *_ = seen.objective
    torch.testing.assert_close(weight, loss_weight(share, kind, "truncated_snr", 1.5))
    assert not torch.allclose(weight, loss_weight(share, kind, "truncated_snr"))  # gamma counts
    assert weight.std() > 1e-3 and prediction is seen.found.points
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(seen.points.shape, generator=generator)
    truth = (seen.points - (1 - share).sqrt()[..., None, None] * noise)[:, :1] / share[:, :1].sqrt()[..., None, None]
    torch.testing.assert_close(
        target, training_target(truth.expand_as(noise), noise, share, kind), atol=1e-3, rtol=1e-3
    )


def test_in_the_crops_frame_labels_are_turned_once_and_keypoints_told(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("model.frame=crop", "loss.keypoints_3d=0.5", "loss.keypoints_2d=0.5")
    values, sample = small_config("unused", *options), people()
    seen = run(monkeypatch, values, sample)
    assert sample.coarse_vertices is not None and sample.principal_point is not None and sample.focal is not None
    scale = build_model(values, *free_body()).config.mesh_scale
    truth = seen.objective[6][:, 0, :432] * scale
    turned = sample.coarse_vertices @ crop_rotation(sample.principal_point, sample.focal)
    torch.testing.assert_close(truth, turned, atol=1e-5, rtol=1e-5)
    assert (turned - sample.coarse_vertices).abs().max() > 1e-3
    assert seen.keypoints[7] == "crop" and seen.keypoints[8] == scale != 1


def test_the_direct_baseline_is_asked_at_the_last_step_from_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run(monkeypatch, small_config("unused", "model.mode=direct"), people())
    assert seen.points.shape[:2] == (4, 1) and not seen.points.any() and (seen.step == 1).all()
    assert seen.objective[11].regressed is None


def test_masks_depth_and_peaks_reach_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(4, 3, 51) < 0.4
    values = small_config("unused", "model.masked=0.5", "model.depth_map=true")
    sample = dataclasses.replace(people(), peaks=torch.rand(4, 26, 2, 4), depth_input=torch.rand(4, 64, 64))
    seen = run(monkeypatch, values, sample, mask=mask)
    image, heatmaps, valid, depth, hidden = seen.inputs
    assert image is None and torch.equal(valid, sample.heatmap_valid) and hidden is mask and heatmaps is not None
    assert (
        depth is not None and torch.equal(depth, sample.depth_input) and torch.equal(seen.more["peaks"], sample.peaks)
    )
    direct = run(monkeypatch, small_config("unused", "model.masked=0.5", "model.mode=direct"), people(), mask=mask)
    assert direct.inputs[3] is None and torch.equal(direct.inputs[4], mask[:, :1])


def test_rle_knows_the_terminal_step_and_the_steps_vertices(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = run(monkeypatch, small_config(), people()).objective[11]
    assert paths.regressed.tolist() == [[False, True, False]] * 4
    generator = torch.Generator().manual_seed(11)  # the draws' own, the same in every process
    assert torch.equal(paths.vertices, torch.randperm(432, generator=generator)[:48])


def test_contrast_reads_the_volume_at_the_noisiest_estimate_and_moves_no_joints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions are of x̂_0 at the highest noise level, and detached; the true ones by the labelled camera if known."""
    values = small_config("unused", *LIFTED, "loss.joint_contrast=0.1", "loss.non_joint_contrast=0.2", "loss.camera=0")
    has = torch.tensor([True, False, True, True])
    sample = dataclasses.replace(people(), has_camera=has)
    model: MeshRecoveryModel = build_model(values, *free_body())
    points = torch.randn(4, 3, model.num_points, 3).requires_grad_()
    camera = (torch.rand(4, 3) + 0.5).requires_grad_()
    volume, exponent = torch.randn(4, 16, 4, 4, 4).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    given: dict[str, tuple[Any, ...]] = {}

    def watch(name: str) -> Any:
        def loss(*all_of: Any, valid: Tensor) -> Tensor:
            given[name] = all_of
            return sum(part.sum() for part in all_of[:2])  # type: ignore[return-value]

        return loss

    monkeypatch.setattr(step, "joint_to_joint", watch("joints"))
    monkeypatch.setattr(step, "joint_to_non_joint", watch("voxels"))
    found = Prediction(points, camera, volume=volume, exponent=exponent)
    seen = run(monkeypatch, values, sample, found)
    places = volume_coordinates(model.to_joints(points[:, 1]), camera, 2.0)  # level 199
    predicted, true, labelled, _ = given["joints"]
    torch.testing.assert_close(predicted, sample_volume(volume, places))
    assert sample.camera is not None and sample.joints_3d is not None and labelled is sample.has_joints_3d
    own = torch.where(has[:, None], sample.camera, camera)
    torch.testing.assert_close(true, sample_volume(volume, volume_coordinates(sample.joints_3d, own, 2.0)))
    torch.testing.assert_close(given["voxels"][1].unflatten(1, (4, 4, 4)), volume.permute(0, 2, 3, 4, 1))
    contrast = seen.terms["joint_contrast"] + seen.terms["non_joint_contrast"]
    pulls = torch.autograd.grad(contrast, (points, camera, exponent, volume), allow_unused=True)
    assert pulls[:3] == (None, None, None) and pulls[3].abs().max() > 0
