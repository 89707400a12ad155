"""Evaluation: known errors by hand, order of first, mean and oracle, and nothing depends on the blocks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small import free_body, people, people_block, small_pipeline
from torch import Tensor

from hmdiff import evaluation
from hmdiff.data.sample import Sample
from hmdiff.data.synthetic import SyntheticHumans
from hmdiff.errors import UserError
from hmdiff.evaluation import as_heatmaps, evaluate, mean_mesh_error, mean_mesh_errors, save_report, split_batches
from hmdiff.pipeline import HMDiffPipeline, MeshOutput
from hmdiff.skeletons import HALPE26, LSP14, joint_indices


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def test_oracle_and_first(pipe: HMDiffPipeline) -> None:
    report = evaluate(pipe, people(True), "val", 5, num_hypotheses=5, num_inference_steps=2)
    for kinds in report["errors"].values():
        assert kinds["oracle"]["value"] <= kinds["first"]["value"]
        for value in kinds.values():
            assert value["low"] <= value["value"] <= value["high"]
    assert report["people"] == 5 and report["num_inference_steps"] == 2 and "expected_calibration_error" in report
    single = evaluate(pipe, people(True), "val", 5, num_hypotheses=1, num_inference_steps=2)
    for metric, kinds in single["errors"].items():
        values = [kinds[kind]["value"] for kind in ("first", "mean", "oracle")]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4)
        assert values[0] == pytest.approx(report["errors"][metric]["first"]["value"], rel=1e-4)  # the first of 5
    assert "expected_calibration_error" not in single


def test_the_report_does_not_depend_on_the_blocks(pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_hypotheses": 2, "num_inference_steps": 2, "seed": 4}
    whole = evaluate(pipe, people(True), "test", 7, **options)

    def in_threes(data: SyntheticHumans, split: str, count: int):  # type: ignore[no-untyped-def]
        sample = data.block(split, 0)
        for first in range(0, count, 3):
            yield sample.map(lambda tensor, first=first: tensor[first : min(first + 3, count)])

    monkeypatch.setattr(evaluation, "split_batches", in_threes)
    parts = evaluate(pipe, people(True), "test", 7, **options)
    for metric, kinds in whole["errors"].items():
        for kind, value in kinds.items():
            assert parts["errors"][metric][kind]["value"] == pytest.approx(value["value"], rel=1e-3)
    other = evaluate(pipe, people(True), "test", 7, **{**options, "seed": 5})
    assert other["errors"]["pve"]["first"]["value"] != pytest.approx(whole["errors"]["pve"]["first"]["value"], rel=1e-6)


class Perfect:
    """A pipeline that knows the truth, off by a known displacement of each hypothesis."""

    def __init__(self, sample: Sample, offsets: Tensor) -> None:  # (N, 3) metres, of the left hand's side alone
        self.sample, self.offsets = sample, offsets
        self.model = small_pipeline("model.mode=direct").model
        self.num_inference_steps = 1

    def __call__(self, images: object, heatmaps: object, hypotheses: int, *_: object, people: list[int]) -> MeshOutput:
        body, _mesh = free_body()
        assert self.sample.vertices is not None
        vertices = self.sample.vertices[people][:, None].repeat(1, hypotheses, 1, 1)
        far = torch.ones(vertices.shape[-2])
        far[body.keypoint_support()] = 0  # the keypoints stay right, so that the root does
        vertices = vertices + far[:, None] * self.offsets[:, None]
        empty = torch.zeros(len(people), 3)
        return MeshOutput(
            vertices, vertices[:, :, :24], body.keypoints(vertices), empty, empty, empty[:, 0], empty[:, :2], body.faces
        )


def test_errors_of_a_known_displacement() -> None:
    sample = people_block("test")
    offsets = torch.tensor([[0.03, 0.0, 0.0], [-0.01, 0.0, 0.0]])
    report = evaluate(Perfect(sample, offsets), people(True), "test", 8, num_hypotheses=2)  # type: ignore[arg-type]
    body, _ = free_body()
    share = 1 - len(body.keypoint_support()) / body.num_vertices
    pve = report["errors"]["pve"]
    assert pve["first"]["value"] == pytest.approx(30 * share, rel=1e-3)
    assert pve["oracle"]["value"] == pytest.approx(10 * share, rel=1e-3)
    assert pve["mean"]["value"] == pytest.approx(10 * share, rel=1e-3)  # (30 - 10) / 2
    assert all(kind["value"] < 1e-2 for kind in report["errors"]["mpjpe"].values())
    assert report["errors"]["pa_pve"]["first"]["value"] < 30 * share


def test_mean_mesh_error_by_hand() -> None:
    data = people(True)
    train = torch.cat([data.block("train", number).vertices for number in range(2)])  # type: ignore[misc]
    body, _ = free_body()
    mean = train[:12].mean(0)
    target = data.block("test", 0).vertices
    assert target is not None
    hips = [HALPE26.index("left_hip"), HALPE26.index("right_hip")]

    def rooted(vertices: Tensor) -> Tensor:
        return vertices - body.keypoints(vertices)[..., hips, :].mean(-2, keepdim=True)

    expected = (rooted(mean) - rooted(target[:5])).norm(dim=-1).mean(-1) * 1000
    found = mean_mesh_errors(data, "test", 5, training_people=12)
    assert found["pve"]["value"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["pa_pve"]["value"] < found["pve"]["value"]


def test_mean_mesh_error_is_its_pve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.mean_mesh_errors, "__defaults__", (16,))
    data = people(True)
    assert mean_mesh_error(data, "val", 4) == mean_mesh_errors(data, "val", 4)["pve"]["value"] > 50


def test_splits_are_cut_to_the_people_asked_for() -> None:
    data = people(True)
    sizes = [len(sample) for sample in split_batches(data, "val", 19)]
    assert sizes == [8, 8, 3]
    last = list(split_batches(data, "val", 10))[-1]
    assert last.index is not None and last.index.tolist() == [8, 9]
    whole = data.block("val", 1)
    assert last.joints_3d is not None and whole.joints_3d is not None
    assert torch.equal(last.joints_3d, whole.joints_3d[:2])


def test_people_of_whom_nothing_was_seen_are_still_evaluated(pipe: HMDiffPipeline) -> None:
    sample = people_block("val")
    assert sample.heatmaps is not None and sample.heatmap_valid is not None
    valid = sample.heatmap_valid.clone()
    valid[2] = False
    valid[2, joint_indices(LSP14, HALPE26)] = True  # an estimator without a nose
    maps = sample.heatmaps * valid[..., None, None]
    maps[2] = 0
    given = as_heatmaps(dataclasses.replace(sample, heatmaps=maps, heatmap_valid=valid))
    assert given is not None and torch.equal(given.values[:2], maps[:2]) and given.values[2].sum() <= 1e-5
    assert not maps[2].any()  # the sample itself is not touched
    output = pipe(heatmaps=given, num_hypotheses=1, num_inference_steps=1)
    assert output.vertices.isfinite().all() and output.translation.isfinite().all()
    assert as_heatmaps(dataclasses.replace(sample, heatmaps=None)) is None


def test_bad_calls_and_saved_reports(pipe: HMDiffPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="full_mesh=True"):
        evaluate(pipe, people(False), "val", 2)
    with pytest.raises(UserError, match="split 'vall'"):
        evaluate(pipe, people(True), "vall", 2)
    save_report({"errors": {"pve": 1.5}}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"errors": {"pve": 1.5}}
