"""Evaluation: known errors, order of first, mean and oracle, and independence of block size."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from small import free_body, people, people_block, small_pipeline
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, J14, LSP14, joint_indices
from hmdiff.data.sample import Sample
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.hypotheses import select
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate import evaluation
from hmdiff.evaluate.evaluation import (
    as_heatmaps,
    camera_arguments,
    evaluate,
    measure,
    split_batches,
    with_estimated_heatmaps,
)
from hmdiff.evaluate.mean_mesh import mean_mesh_error, mean_mesh_errors
from hmdiff.evaluate.measured import calibration_interval
from hmdiff.evaluate.metrics import coverage, expected_calibration_error, mesh_errors
from hmdiff.evaluate.store import save_report
from hmdiff.pipeline import HMDiffPipeline, MeshOutput


@pytest.fixture(scope="module")
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def test_oracle_and_first(pipe: HMDiffPipeline) -> None:
    report = evaluate(pipe, people(True), "val", 5, SamplingConfig(5, 2))
    for kinds in report["errors"].values():
        assert kinds["oracle"]["value"] <= kinds["first"]["value"]
        for value in kinds.values():
            assert value["low"] <= value["value"] <= value["high"]
    assert report["people"] == 5 and report["num_inference_steps"] == 2 and "expected_calibration_error" in report
    single = evaluate(pipe, people(True), "val", 5, SamplingConfig(1, 2))
    for metric, kinds in single["errors"].items():
        values = [kinds[kind]["value"] for kind in ("first", "mean", "oracle")]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4)
        assert values[0] == pytest.approx(report["errors"][metric]["first"]["value"], rel=1e-4)  # the first of 5
    assert "expected_calibration_error" not in single


@pytest.mark.slow
def test_the_report_does_not_depend_on_the_blocks(pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_hypotheses": 2, "num_inference_steps": 2, "seed": 4}
    whole = evaluate(pipe, people(True), "test", 7, SamplingConfig(**options))

    def in_threes(data: SyntheticHumans, split: str, count: int):  # type: ignore[no-untyped-def]
        sample = data.block(split, 0)
        for first in range(0, count, 3):
            yield sample.map(lambda tensor, first=first: tensor[first : min(first + 3, count)])

    monkeypatch.setattr(evaluation, "split_batches", in_threes)
    parts = evaluate(pipe, people(True), "test", 7, SamplingConfig(**options))
    for metric, kinds in whole["errors"].items():
        for kind, value in kinds.items():
            assert parts["errors"][metric][kind]["value"] == pytest.approx(value["value"], rel=1e-3)
    other = evaluate(pipe, people(True), "test", 7, SamplingConfig(**{**options, "seed": 5}))
    assert other["errors"]["pve"]["first"]["value"] != pytest.approx(whole["errors"]["pve"]["first"]["value"], rel=1e-6)


class Perfect:
    """A pipeline that returns the ground truth plus a known displacement of each hypothesis."""

    def __init__(self, sample: Sample, offsets: Tensor) -> None:  # (N, 3) metres, applied to the left hand's side only
        self.sample, self.offsets = sample, offsets
        self.model = small_pipeline("model.mode=direct").model
        self.num_inference_steps, self.body = 1, free_body()[0]

    def __call__(
        self, images: object, heatmaps: object, sampling: SamplingConfig, people: list[int], **_: object
    ) -> MeshOutput:
        body, _mesh = free_body()
        assert self.sample.vertices is not None
        vertices = self.sample.vertices[people][:, None].repeat(1, sampling.num_hypotheses, 1, 1)
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
    report = evaluate(Perfect(sample, offsets), people(True), "test", 8, SamplingConfig(2))  # type: ignore[arg-type]
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
    monkeypatch.setattr(mean_mesh_errors, "__defaults__", (16,))
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
    assert not maps[2].any()  # the sample itself is unchanged
    output = pipe(heatmaps=given, num_hypotheses=1, num_inference_steps=1)
    assert output.vertices.isfinite().all() and output.translation.isfinite().all()
    assert as_heatmaps(dataclasses.replace(sample, heatmaps=None)) is None


def test_bad_calls_and_saved_reports(pipe: HMDiffPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="full_mesh=True"):
        evaluate(pipe, people(False), "val", 2, SamplingConfig())
    with pytest.raises(UserError, match="split 'vall'"):
        evaluate(pipe, people(True), "vall", 2, SamplingConfig())
    save_report({"errors": {"pve": 1.5}}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"errors": {"pve": 1.5}}


class Chatty:
    """A pipeline that records its calls, and returns likelihoods and guidance reports like the real one."""

    def __init__(self, pipe: HMDiffPipeline) -> None:
        self.pipe, self.asked = pipe, []
        self.model, self.num_inference_steps, self.body = pipe.model, pipe.num_inference_steps, pipe.body

    def __call__(self, images: object, heatmaps: object, sampling: SamplingConfig, **options: object) -> object:
        guidance = sampling.guidance
        self.asked.append({"sampling": sampling, "people": len(options["people"])})  # type: ignore[arg-type]
        output = self.pipe(images, heatmaps, sampling.but(guidance=None), **options)  # type: ignore[arg-type]
        count, hypotheses = output.vertices.shape[:2]
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        told = types.SimpleNamespace(
            gap_before=torch.full((count, hypotheses), 4.0),
            gap_after=torch.full((count, hypotheses), 3.0),
            active=torch.tensor([[True], [False]]).expand(2, count),
            fell_back=torch.zeros(count, hypotheses).bool(),
        )
        likely = torch.arange(float(hypotheses)).expand(count, -1) * 1000  # the last is the most likely one
        fields |= {"log_likelihood": likely, "guidance": told if guidance else None}
        return types.SimpleNamespace(**fields)


@pytest.mark.slow
def test_one_run_serves_several_counts(pipe: HMDiffPipeline) -> None:
    samples = list(split_batches(people(True), "val", 5))
    found = measure(pipe, samples, SamplingConfig(6, 2, 3), (6, 1, 2))
    assert list(found) == [1, 2, 6]
    for count, measured in found.items():
        alone = measure(pipe, samples, SamplingConfig(count, 2, 3))[count]
        assert measured.joints.shape == (5, count, 14, 3)
        torch.testing.assert_close(measured.joints, alone.joints, rtol=1e-4, atol=1e-5)
        for metric, kinds in alone.errors.items():
            for kind, values in kinds.items():
                torch.testing.assert_close(measured.errors[metric][kind], values, rtol=1e-3, atol=1e-2)
    # The oracle's curve over counts is the oracle of the smaller runs.
    for count, values in found[6].best_of["pve"].items():
        if count in found:
            torch.testing.assert_close(values, found[count].errors["pve"]["oracle"])
    assert set(found[6].best_of["pve"]) == {1, 5, 6}


def test_meshes_at_once_bound_the_calls_and_nothing_else(pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = Chatty(pipe)
    whole = evaluate(chatty, people(True), "val", 7, SamplingConfig(4, 2))  # type: ignore[arg-type]
    assert [asked["people"] for asked in chatty.asked] == [7]
    monkeypatch.setattr(evaluation, "MESHES_AT_ONCE", 13)
    parts = evaluate(chatty, people(True), "val", 7, SamplingConfig(4, 2))  # type: ignore[arg-type]
    assert [asked["people"] for asked in chatty.asked[1:]] == [3, 3, 1]
    for kind, value in whole["errors"]["pve"].items():
        assert parts["errors"]["pve"][kind]["value"] == pytest.approx(value["value"], rel=1e-3)


def test_all_settings_reach_the_pipeline(pipe: HMDiffPipeline) -> None:
    chatty = Chatty(pipe)
    plain = SamplingConfig(2, 2)
    report = evaluate(chatty, people(True), "val", 3, plain)  # type: ignore[arg-type]
    assert chatty.asked[0]["sampling"] == plain and "guidance" not in report
    other = SamplingConfig(2, 3, 4, "ddpm", 0.5, Guidance(), "vertices", False)
    report = evaluate(chatty, people(True), "val", 3, other)  # type: ignore[arg-type]
    assert chatty.asked[1]["sampling"] == other
    assert {name: report[name] for name in ("num_inference_steps", "seed", "sampler", "surface", "upright")} == {
        "num_inference_steps": 3,
        "seed": 4,
        "sampler": "ddpm",
        "surface": "vertices",
        "upright": False,
    }
    means = {name: found["value"] for name, found in report["guidance"].items()}
    assert means == {"gap_before": 4.0, "gap_after": 3.0, "active": 0.5, "fell_back": 0.0}


def test_the_selected_hypothesis_is_reported(pipe: HMDiffPipeline) -> None:
    samples = list(split_batches(people(True), "val", 4))
    chatty = Chatty(pipe)
    found = measure(chatty, samples, SamplingConfig(5, 2), (5, 1, 2))  # type: ignore[arg-type]
    assert [asked["people"] for asked in chatty.asked] == [4]  # one run serves them all
    assert torch.equal(found[1].errors["pve"]["selected"], found[1].errors["pve"]["first"])
    maps = as_heatmaps(samples[0])
    for count in (2, 5):
        alone = pipe(heatmaps=maps, num_hypotheses=count, num_inference_steps=2, **camera_arguments(samples[0]))
        likely = torch.arange(float(count)).expand(4, -1) * 1000
        chosen = select(alone.vertices, alone.joints[:, :, 0], likely, seen=alone.reprojection)
        each = mesh_errors(
            alone.vertices,
            alone.keypoints[:, :, evaluation._J14],
            samples[0].vertices[:, None],  # type: ignore[index]
            samples[0].keypoints_3d[:, None, evaluation._J14],
            J14,
            evaluation.ROOT,  # type: ignore[index]
        )
        expected = each["pve"].gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(found[count].errors["pve"]["selected"], expected, rtol=1e-3, atol=1e-2)
        assert not torch.equal(chosen, torch.zeros_like(chosen))
    report = evaluate(pipe, people(True), "val", 4, SamplingConfig(5, 2))
    kinds = report["errors"]["pve"]
    assert kinds["oracle"]["value"] <= kinds["selected"]["value"]


@pytest.mark.slow
def test_calibration_in_a_report(pipe: HMDiffPipeline) -> None:
    report = evaluate(pipe, people(True), "val", 8, SamplingConfig(5, 2))
    measured = measure(pipe, split_batches(people(True), "val", 8), SamplingConfig(5, 2))[5]
    expected = expected_calibration_error(measured.joints, measured.true_joints)
    assert report["expected_calibration_error"] == pytest.approx(expected)
    assert report["coverage"]["level"] == 0.9
    share = coverage(measured.joints, measured.true_joints, 0.9).mean().item()
    assert report["coverage"]["value"] == pytest.approx(share)
    curve = [report["oracle_curve"]["pve"][count]["value"] for count in ("1", "5")]
    assert curve[0] >= curve[1] == report["errors"]["pve"]["oracle"]["value"]
    assert curve[0] == report["errors"]["pve"]["first"]["value"]


def test_calibration_interval_holds_the_known_error_of_a_gaussian() -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(300, 4, 3, generator=generator)
    samples = torch.randn(300, 200, 4, 3, generator=generator)
    value, low, high = calibration_interval(samples, target)
    assert value == pytest.approx(expected_calibration_error(samples, target), abs=1e-6)
    assert value < 0.03 and low < high < 0.06
    narrow = calibration_interval(samples * 0.5, target)
    assert narrow[1] < narrow[0] < narrow[2] and narrow[1] > high
    assert calibration_interval(samples, target) == (value, low, high)


def test_an_estimator_takes_the_place_of_the_heatmaps(pipe: HMDiffPipeline) -> None:
    sample = people_block("val").map(lambda tensor: tensor[:2])
    with pytest.raises(UserError, match="reads pictures, and these people have none"):
        with_estimated_heatmaps(sample, lambda images: images)
    pictured = dataclasses.replace(sample, image=torch.rand(2, 3, 32, 32))
    maps = torch.randn(2, 26, 64, 64)
    found = with_estimated_heatmaps(pictured, lambda images: maps * images.shape[0] / 2)
    assert found.heatmaps is not None and torch.equal(found.heatmaps, maps.clamp_min(0))
    assert found.heatmap_valid is not None and found.heatmap_valid.all() and found.heatmap_valid.shape == (2, 26)
    assert found.vertices is pictured.vertices
    with pytest.raises(UserError, match="reads pictures"):
        evaluate(pipe, people(True), "val", 2, SamplingConfig(2, 2), estimate=lambda images: maps)


def test_the_regressions_likelihood_counts_in_the_selected_one(
    pipe: HMDiffPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = next(iter(split_batches(people(True), "val", 4)))
    # Raw vertices: the fitted bodies of an untrained model hardly differ.
    options = {"num_hypotheses": 5, "num_inference_steps": 2, "surface": "vertices"}
    plain = pipe(heatmaps=as_heatmaps(sample), **options, **camera_arguments(sample))
    far = (plain.vertices - plain.mean_vertices[:, None]).norm(dim=-1).mean(-1)
    output = dataclasses.replace(plain, log_likelihood=None, rle_log_likelihood=100 * far**2, reprojection=None)
    assert not torch.equal(output.selected, dataclasses.replace(output, rle_log_likelihood=None).selected)
    monkeypatch.setattr(evaluation, "predict_batch", lambda *_: output)
    found = measure(pipe, [sample], SamplingConfig(5, 2))[5].errors["pve"]
    each = mesh_errors(
        output.vertices,
        output.keypoints[:, :, evaluation._J14],
        sample.vertices[:, None],  # type: ignore[index]
        sample.keypoints_3d[:, None, evaluation._J14],
        J14,
        evaluation.ROOT,  # type: ignore[index]
    )
    expected = each["pve"].gather(1, output.selected[:, None])[:, 0]
    torch.testing.assert_close(found["selected"], expected, rtol=1e-3, atol=1e-2)
