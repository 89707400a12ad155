"""The aggregation MLP: invariances, training, and its use in the pipeline and in reports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import awaken, free_body, people, people_block, small_pipeline
from torch import Tensor

from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps, evaluate
from hmdiff.evaluate.ground_truth import protocol_regressors
from hmdiff.evaluate.hypothesis_rows import score_hypotheses
from hmdiff.evaluate.protocols import get_protocol
from hmdiff.evaluate.scored_people import PipelinePredictions, SampleTargets
from hmdiff.evaluate.split_tables import split_tables
from hmdiff.geometry import crop_rotation
from hmdiff.models.aggregation import AggregatorSizes, HypothesisAggregator
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train.aggregator import Drawn, draw_hypotheses, train_aggregator, true_points


def head(pipe: HMDiffPipeline, awake: bool = True) -> HypothesisAggregator:
    found = HypothesisAggregator(AggregatorSizes(pipe.model.num_points, 24, 16))
    found.set_basis(lbs_basis(free_body()[0], pipe.model.coarse_ids).points)
    if awake:
        awaken(found, 3)
    return found


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def call(pipe: HMDiffPipeline, number: int = 3, **more: Any) -> Any:
    heatmaps = as_heatmaps(people_block("test"))
    assert heatmaps is not None
    return pipe(heatmaps=heatmaps[:2], num_hypotheses=number, num_inference_steps=1, upright=False, **more)


def test_untrained_it_is_the_mean(pipe: HMDiffPipeline) -> None:
    points = torch.randn(2, 5, pipe.model.num_points, 3)
    assert torch.equal(head(pipe, awake=False)(points), points.mean(1))
    assert not torch.allclose(head(pipe)(points), points.mean(1), atol=1e-2)


def test_the_order_of_the_hypotheses_does_not_matter_and_their_spread_does(pipe: HMDiffPipeline) -> None:
    points, found = torch.randn(2, 5, pipe.model.num_points, 3), head(pipe)
    torch.testing.assert_close(found(points), found(points[:, [3, 1, 4, 0, 2]]), atol=1e-5, rtol=1e-5)
    wider = points.mean(1, keepdim=True) + 2 * (points - points.mean(1, keepdim=True))
    assert (found(points) - found(wider)).norm(dim=-1).mean() > 1e-3


def test_it_is_its_formula_and_takes_any_number(pipe: HMDiffPipeline) -> None:
    """h = mean_i f(c_i - mean, mean), then basis g(h, mean): twice the same hypotheses change nothing."""
    points, found = torch.randn(2, 3, pipe.model.num_points, 3), head(pipe)
    c = (found.basis.mT @ points).flatten(2)
    mean = c.mean(1)
    each = [found.each(torch.cat([c[:, i] - mean, mean], -1)) for i in range(3)]
    added = found.together(torch.cat([torch.stack(each).mean(0), mean], -1)).unflatten(-1, (-1, 3))
    torch.testing.assert_close(found(points), points.mean(1) + found.basis @ added, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found(points.repeat(1, 2, 1, 1)), found(points), atol=1e-4, rtol=1e-4)


def test_what_it_adds_is_a_shape_of_affine_bones(pipe: HMDiffPipeline) -> None:
    points, found = torch.randn(2, 4, pipe.model.num_points, 3), head(pipe)
    added = found(points) - points.mean(1)
    torch.testing.assert_close(found.basis @ (found.basis.mT @ added), added, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_learns_what_the_hypotheses_share(pipe: HMDiffPipeline) -> None:
    """All hypotheses share a bias: the mean keeps it, the MLP learns to remove it."""
    generator = torch.Generator().manual_seed(0)
    basis = head(pipe).basis
    shared = basis @ (0.01 * torch.randn(basis.shape[1], 3, generator=generator).sign())

    def drawn(count: int) -> Drawn:
        truth = basis @ torch.randn(count, basis.shape[1], 3, generator=generator) * 0.5
        return Drawn((truth + shared)[:, None].expand(-1, 3, -1, -1).half(), truth)

    try:
        found = train_aggregator(pipe, drawn(128), drawn(32), epochs=20, hidden=16)
        assert found["best_epoch"] > 0 and found["val_aggregated_mm"] < 0.6 * found["val_mean_mm"]
        # The reported error is that of the kept weights.
        assert pipe.aggregator is not None and pipe.aggregator.fitted_on["val_people"] == 32
        found = train_aggregator(pipe, drawn(8), drawn(32), epochs=1, hidden=64)
        assert found["val_aggregated_mm"] <= found["val_mean_mm"]
    finally:
        pipe.aggregator = None


def test_a_head_that_does_worse_on_val_is_not_kept(pipe: HMDiffPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, pipe.model.num_points, 3, generator=generator)
    right = Drawn(truth[:, None].expand(-1, 3, -1, -1).half(), truth)
    misled = Drawn(right.points, truth + 1)
    try:
        found = train_aggregator(pipe, misled, right, epochs=2, hidden=16)
        assert found["best_epoch"] == 0 and pipe.aggregator is not None
        points = right.points.float()
        assert torch.equal(pipe.aggregator(points), points.mean(1))
    finally:
        pipe.aggregator = None


def test_hypotheses_to_learn_from_are_the_pipelines(pipe: HMDiffPipeline) -> None:
    drawn = draw_hypotheses(pipe, people(False), "train", 10, 2, 1)
    assert drawn.points.shape[:2] == (10, 2) and len(drawn.truth) == 10
    sample = people(False).block("train", 0)
    assert sample.coarse_vertices is not None
    torch.testing.assert_close(pipe.model.to_coarse(drawn.truth[:8]), sample.coarse_vertices)
    conditioning, _ = pipe.model.encode(None, sample.heatmaps, sample.heatmap_valid, None, sample.peaks)
    expected, _ = pipe.denoised(conditioning, range(8), SamplingConfig(2, 1))
    torch.testing.assert_close(drawn.points[:8].float(), expected, atol=2e-3, rtol=2e-3)


def test_ground_truth_is_turned_to_the_models_frame() -> None:
    sample = people_block()
    assert sample.coarse_vertices is not None and sample.joints_3d is not None
    assert sample.principal_point is not None and sample.focal is not None
    turn = crop_rotation(sample.principal_point, sample.focal)
    for frame, rotation in (("camera", torch.eye(3)), ("crop", turn)):
        pipe = small_pipeline(f"model.frame={frame}")
        expected = pipe.model.to_points(sample.coarse_vertices @ rotation, sample.joints_3d @ rotation)
        torch.testing.assert_close(true_points(pipe, sample), expected)
    assert (turn - torch.eye(3)).abs().max() > 1e-2


def test_a_pipeline_gives_the_mesh_beside_the_hypotheses_and_saves_the_head(tmp_path: Path) -> None:
    pipe = small_pipeline()
    plain = call(pipe)
    assert plain.aggregated_vertices is None
    pipe.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "aggregator").exists()
    pipe.aggregator = head(pipe)
    for surface in ("body", "vertices"):
        found = call(pipe, surface=surface)
        assert found.aggregated_vertices.shape == found.vertices[:, 0].shape
        if surface == "body":
            assert torch.equal(found.vertices, plain.vertices)
    untrained = head(pipe, awake=False)
    pipe.aggregator, kept = untrained, pipe.aggregator
    found = call(pipe, surface="vertices")
    torch.testing.assert_close(found.aggregated_vertices, found.mean_vertices, atol=1e-5, rtol=1e-4)
    pipe.aggregator = kept
    kept.fitted_on = {"people": 3}
    pipe.save_pretrained(tmp_path / "with")
    again = HMDiffPipeline.from_pretrained(tmp_path / "with")
    assert again.aggregator is not None and again.aggregator.fitted_on == {"people": 3}
    assert torch.equal(call(again).aggregated_vertices, call(pipe).aggregated_vertices)


def test_evaluate_reports_it_as_a_row(pipe: HMDiffPipeline) -> None:
    options: dict[str, Any] = {"num_hypotheses": 3, "num_inference_steps": 1, "surface": "vertices", "upright": False}
    plain = evaluate(pipe, people(True), "test", 4, SamplingConfig(**options))
    assert "aggregated" not in plain["errors"]["pve"]
    pipe.aggregator = head(pipe, awake=False)
    try:
        report = evaluate(pipe, people(True), "test", 4, SamplingConfig(**options))
        for metric, kinds in report["errors"].items():
            assert kinds["aggregated"]["value"] == pytest.approx(kinds["mean"]["value"], rel=1e-4), metric
        awaken(pipe.aggregator, 3)
        report = evaluate(pipe, people(True), "test", 4, SamplingConfig(**options))
        value = report["errors"]["pve"]["aggregated"]["value"]
        assert abs(value - report["errors"]["pve"]["mean"]["value"]) > 1
    finally:
        pipe.aggregator = None
    names = [row[1] for table, _ in split_tables([{**report, "checkpoint": "a"}]) for row in table.rows]
    assert names == ["first", "mean of 3", "oracle of 3", "weighted of 3", "aggregated of 3"]
    assert len(next(split_tables([{**plain, "checkpoint": "a"}]))[0].rows) == 4


def test_a_protocol_reports_it_as_a_row(pipe: HMDiffPipeline) -> None:
    """Untrained, the head gives the mean; with non-zero weights, its own mesh is scored."""
    protocol, sampling = get_protocol("synthetic"), SamplingConfig(3, 1, surface="vertices", upright=False)
    regressors = protocol_regressors(protocol, pipe.body)

    def rows() -> dict[str, Any]:
        scored = PipelinePredictions(pipe, people(True), "test", SampleTargets(people(True), "test", 4), 4, sampling)
        (part,) = scored.batches(0)
        return score_hypotheses(protocol, part.predicted, part.target, regressors, part.choose, part.aggregated).rows

    assert "aggregated of 3" not in rows()
    pipe.aggregator = head(pipe, awake=False)
    try:
        found = rows()
        for metric, values in found["aggregated of 3"].items():
            torch.testing.assert_close(values, found["mean of 3"][metric], rtol=1e-3, atol=0.1)
        awaken(pipe.aggregator, 3)
        awake = rows()
        moved = (awake["aggregated of 3"]["mpjpe"] - awake["mean of 3"]["mpjpe"]).abs()
        assert moved.max() > 1 and torch.equal(awake["mean of 3"]["mpjpe"], found["mean of 3"]["mpjpe"])
    finally:
        pipe.aggregator = None


def spoil(folder: Path, change: Any) -> None:
    about = json.loads((folder / "hmdiff.json").read_text())
    about.pop("checksums")
    (folder / "hmdiff.json").write_text(json.dumps(about))
    change(folder / "aggregator")


def short_weight(place: Path) -> None:
    state: dict[str, Tensor] = load_file(place / "aggregator.safetensors")
    save_file({name: value[:-1].clone() for name, value in state.items()}, place / "aggregator.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "config.json").write_text("[1]"), "config.json: a list"),
        (lambda place: (place / "config.json").write_text('{"num_points": 3}'), "num_points is 3, 456 expected"),
        (lambda place: (place / "aggregator.safetensors").unlink(), "aggregator.safetensors: missing"),
        (lambda place: (place / "aggregator.safetensors").write_bytes(b"x"), "cannot be read"),
        (short_weight, "expected"),
    ],
)
def test_a_damaged_head_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    pipe = small_pipeline()
    pipe.aggregator = head(pipe)
    pipe.save_pretrained(tmp_path / "a")
    spoil(tmp_path / "a", change)
    with pytest.raises(UserError, match=message) as error:
        HMDiffPipeline.from_pretrained(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_a_direct_model_has_nothing_to_put_together() -> None:
    from hmdiff.cli import aggregator_fit

    pipe = small_pipeline("model.mode=direct")
    nothing = Drawn(torch.zeros(1, 1, pipe.model.num_points, 3).half(), torch.zeros(1, pipe.model.num_points, 3))
    with pytest.raises(UserError, match="a direct baseline gives one mesh"):
        train_aggregator(pipe, nothing, nothing)
    options = argparse.Namespace(source="hmdiff_small", output=None, device="cpu")
    with pytest.raises(UserError, match="give --output FOLDER"):
        aggregator_fit._aggregator(options)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hmdiff.cli.main import main

    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    words = [
        "prepare",
        "aggregator",
        str(tmp_path / "a"),
        "--steps",
        "1",
        "--people",
        "32",
        "--val-people",
        "8",
        "--num-hypotheses",
        "2",
        "--epochs",
        "1",
        "--hidden",
        "8",
        "--device",
        "cpu",
    ]
    assert main([*words, "--output", str(tmp_path / "b")]) == 0
    assert "val, by the MLP, mm" in capsys.readouterr().out
    found = HMDiffPipeline.from_pretrained(tmp_path / "b").aggregator
    assert found is not None and found.fitted_on["num_inference_steps"] == 1
