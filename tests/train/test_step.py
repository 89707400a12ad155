"""The training step as a module: its arguments, moving draws to a device, and parameters without a gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import free_body, people_block, small_config, small_pipeline

from hmdiff.build import build_model, build_scheduler
from hmdiff.config import LossConfig
from hmdiff.errors import UserError
from hmdiff.geometry import crop_rotation
from hmdiff.models.prediction import Prediction
from hmdiff.train import step
from hmdiff.train.step import Draws, TrainingStep, keypoint_map, training_losses, used_by_no_loss

PLAIN = {"inputs": "heatmaps", "silhouette": False, "rle": (), "depth_map": False, "masked": 0.0, "lifting": False}


@pytest.mark.parametrize(
    ("model", "loss", "expected"),
    [
        ({}, {}, False),
        ({}, {"camera": 0.0}, True),
        ({"inputs": "image"}, {}, True),
        ({"inputs": "both"}, {}, True),
        ({"silhouette": True}, {}, True),
        ({"silhouette": True}, {"silhouette": 0.1}, False),
        ({"rle": ("joints",)}, {}, True),
        ({"rle": ("joints",)}, {"rle": 0.1}, False),
        ({"depth_map": True}, {}, True),
        ({"masked": 0.3}, {}, True),
        ({"lifting": True}, {}, True),
    ],
)
def test_what_no_loss_uses(model: dict[str, Any], loss: dict[str, float], expected: bool) -> None:
    """DDP hangs if unused parameters are not announced, and is slower if they are."""
    built: Any = SimpleNamespace(config=SimpleNamespace(**{**PLAIN, **model}))
    assert used_by_no_loss(built, LossConfig(**loss)) is expected


def test_the_module_gives_all_that_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_pipeline().model
    held: tuple[Any, ...] = (object(), LossConfig(), torch.zeros(2, 2), object())  # schedule, weights, edges, keypoints
    monkeypatch.setattr(step, "training_losses", lambda *given: given)
    found = TrainingStep(model, *held)("people", "draws")  # type: ignore[arg-type]
    for value, expected in zip(found, (model, *held[:2], "people", "draws", *held[2:]), strict=True):
        assert value is expected


def test_labels_keep_their_precision_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bfloat16 rotation into the crop's frame moves labels by millimetres; a perfect prediction has no loss."""
    values = small_config("unused", "model.frame=crop", "loss.keypoints_3d=0.5", "loss.keypoints_2d=0.5")
    (body, mesh), people = free_body(), people_block()
    model = build_model(values, body, mesh)
    assert people.coarse_vertices is not None and people.joints_3d is not None and people.camera is not None
    assert people.principal_point is not None and people.focal is not None
    truth = model.to_points(people.coarse_vertices, people.joints_3d) @ crop_rotation(
        people.principal_point, people.focal
    )
    known = Prediction(truth[:, None].expand(-1, 2, -1, -1), people.camera)
    monkeypatch.setattr(model, "forward", lambda *_, **__: known)
    draws = Draws(torch.tensor([[20, 199]] * len(people)), torch.randn(len(people), 2, model.num_points, 3))
    exact: list[bool] = []
    real = step.keypoint_terms

    def watched(*given: Any) -> Any:
        exact.append(not torch.is_autocast_enabled("cpu"))
        return real(*given)

    monkeypatch.setattr(step, "keypoint_terms", watched)
    keypoints = keypoint_map(values.loss, model, body)
    with torch.autocast("cpu", torch.bfloat16):
        terms = training_losses(model, build_scheduler(values), values.loss, people, draws, None, keypoints)
    assert terms["points"] < 1e-10 and exact == [True]


@pytest.mark.parametrize("hidden", [None, torch.ones(2, 3, 5, dtype=torch.bool)])
def test_draws_move_together(hidden: torch.Tensor | None) -> None:
    draws = Draws(torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 7, 3), hidden, 9)
    moved = draws.to("meta")
    assert moved.shared_seed == 9 and (moved.token_mask is None) == (hidden is None)
    for before, after in zip(draws[:3], moved[:3], strict=True):
        assert before is None or (after.is_meta and after.shape == before.shape and after.dtype == before.dtype)


def test_the_keypoint_terms_need_a_body_with_keypoints() -> None:
    model, (body, _) = small_pipeline().model, free_body()
    assert keypoint_map(LossConfig(), model, body) is None
    for name in ("keypoints_2d", "keypoints_3d"):
        found = keypoint_map(LossConfig(**{name: 0.1}), model, body)
        assert found is not None and found.regressor.device == model.coarse_ids.device
        bare = body.select([0])  # without the vertices of its keypoint regressor
        with pytest.raises(UserError, match=r"body 'free' has no keypoints: .* give 0"):
            keypoint_map(LossConfig(**{name: 0.1}), model, bare)
