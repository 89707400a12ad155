"""Visibility bins: edges, known means, hidden and visible vertices, and unchanged other results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from small import free_body, people, small_config, small_pipeline

from hmdiff.build import build_data
from hmdiff.cli.main import main
from hmdiff.data.sample import Sample
from hmdiff.data.synthetic.people import SyntheticHumans
from hmdiff.data.synthetic.rendering import OccluderBoxes
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps, evaluate, predict_batch
from hmdiff.evaluate.measured import Measured
from hmdiff.evaluate.split_tables import visibility_tables
from hmdiff.evaluate.visibility_bins import (
    COLUMNS,
    GROUPS,
    VISIBILITY_BINS,
    VisibilityCollector,
    group_means,
    ratio_interval,
    vertex_groups,
    visibility_bin,
    visibility_report,
    visibility_rows,
)
from hmdiff.geometry import perspective_projection


def test_edges_belong_to_the_band_below() -> None:
    fractions = torch.tensor([1.0, 0.81, 0.8, 0.61, 0.6, 0.41, 0.4, 0.0])
    assert [VISIBILITY_BINS[number] for number in visibility_bin(fractions)] == [
        "over 80 %",
        "over 80 %",
        "60-80 %",
        "60-80 %",
        "40-60 %",
        "40-60 %",
        "under 40 %",
        "under 40 %",
    ]


@pytest.mark.parametrize("value", [1.2, -0.1, float("nan")])
def test_a_fraction_is_a_share(value: float) -> None:
    with pytest.raises(UserError, match="a share from 0 to 1 is expected"):
        visibility_bin(torch.tensor([0.5, value]))


def by_hand() -> list[dict]:
    fraction = torch.tensor([0.9, 0.95, 0.5, 0.1])
    first, mean, oracle = (torch.tensor([10.0, 20.0, 30.0, 40.0]) * scale for scale in (1.0, 0.9, 0.6))
    errors = {name: {"first": first, "mean": mean, "oracle": oracle} for name in ("pve", "pa_mpjpe")}
    grouped = torch.tensor(
        [[10.0, 11.0, 30.0, 12.0], [10.0, 9.0, torch.nan, torch.nan], [20.0, 5.0, 30.0, 10.0], [30.0, 5.0, 90.0, 45.0]]
    )
    return visibility_report(
        errors, fraction, torch.tensor([10.0, 12.0, 20.0, 50.0]), grouped, 2 * grouped[:, [2, 1, 0, 3]]
    )


def test_a_report_by_hand() -> None:
    report = {entry["band"]: entry for entry in by_hand()}
    assert list(report) == [*VISIBILITY_BINS, "all"] and [entry["people"] for entry in report.values()] == [
        2,
        0,
        1,
        1,
        4,
    ]
    assert report["60-80 %"] == {"band": "60-80 %", "people": 0}
    clear = report["over 80 %"]
    assert clear["errors"]["pve"]["first"]["value"] == 15 and clear["errors"]["pve"]["first"]["low"] == 10
    assert clear["errors"]["pa_mpjpe"]["mean"]["value"] == pytest.approx(13.5)
    assert clear["spread"]["value"] == 11 and clear["visible_fraction"] == pytest.approx(0.925)
    assert clear["oracle_gain"]["value"] == pytest.approx(1 / 3)
    assert clear["spread_of"]["hidden"] == {"value": 30, "low": 30, "high": 30, "people": 1}
    assert clear["hidden_over_visible"]["value"] == 3 and clear["hidden_over_visible"]["people"] == 1
    assert clear["hidden_over_same_vertices_visible"]["value"] == 2.5
    assert clear["error_of"]["hidden"] == {"value": 20, "low": 20, "high": 20, "people": 2}
    assert clear["error_hidden_over_same_vertices_visible"]["value"] == pytest.approx(20 / 24)
    everybody = report["all"]
    assert everybody["hidden_over_visible"]["value"] == pytest.approx(150 / 60)
    assert everybody["hidden_over_same_vertices_visible"]["value"] == pytest.approx(150 / 67)


def test_no_ratio_is_taken_of_what_rounding_left_of_one_step_models() -> None:
    same = torch.full((2,), 20.0)
    errors = {name: {"first": same, "mean": same, "oracle": same} for name in ("pve", "pa_mpjpe")}
    for scale, there in ((1e-4, False), (1.0, True)):
        grouped = scale * torch.tensor([[1.0, 1.0, 2.0, 1.0], [1.0, 1.0, 2.0, 1.0]])
        entry = visibility_report(errors, torch.tensor([0.5, 0.9]), grouped[:, 0], grouped)[-1]
        assert ("hidden_over_visible" in entry) == there
        assert ("hidden_over_same_vertices_visible" in entry) == there
        assert entry["spread_of"]["hidden"]["value"] == pytest.approx(2 * scale)


def test_a_ratio_of_proportional_numbers_is_sure() -> None:
    values = torch.rand(50)
    found = ratio_interval(2 * values, values)
    assert found == pytest.approx({"value": 2, "low": 2, "high": 2})
    other = torch.rand(50)
    wide = ratio_interval(other, values)
    assert wide["low"] < wide["value"] < wide["high"]
    assert wide["value"] == pytest.approx((other.mean() / values.mean()).item(), rel=1e-5)
    nothing = ratio_interval(torch.zeros(5), torch.zeros(5))  # a direct baseline has no spread
    assert all(value != value for value in nothing.values())


def test_rows_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = visibility_rows(by_hand())
    assert all(len(row) == len(COLUMNS) for row in rows) and len(rows) == 3 * 4 + 1
    assert rows[0] == [
        "over 80 %",
        "2",
        "first",
        "15 (10-20)",
        "15 (10-20)",
        "11 (10-12)",
        "visible 10 (10-10)",
        "theirs 3.00 (3.00-3.00)",
        "theirs 0.33 (0.33-0.33)",
    ]
    assert rows[1][7:] == ["the same 2.50 (2.50-2.50)", "the same 0.83 (0.83-0.83)"]
    assert rows[2][5:7] == ["oracle gains 33 %", "hidden 30 (30-30)"] and rows[3][1:4] == ["0", "-", "-"]
    reports = [{"checkpoint": "a", "split": "test", "bands": by_hand()}, {"checkpoint": "b", "split": "test"}]
    for table in visibility_tables(reports):
        table.print()
    text = capsys.readouterr().out
    assert "a, test, by visible fraction" in text and "15 (10-20)" in text and "b, test" not in text


def test_the_spread_of_hidden_vertices_is_compared_with_the_same_vertices() -> None:
    visible, away, hidden = range(3)
    spread = torch.tensor([[1.0, 10.0, 2.0], [3.0, 20.0, 4.0], [5.0, 30.0, 6.0]])
    groups = torch.tensor([[visible, hidden, hidden], [visible, visible, hidden], [hidden, away, hidden]])
    found = group_means(spread, groups)
    assert found[0].tolist()[0] == 1 and found[0].tolist()[2] == 6
    assert torch.isnan(found[0, 1])
    # Vertex 1 is visible in person 1 alone (20), vertex 2 in nobody; vertex 0 in persons 0 and 1 (2 on average).
    assert found[0, 3] == 20 and torch.isnan(found[1, 3]) and found[2, 3] == 2


@pytest.fixture(scope="module")
def mapped() -> SyntheticHumans:
    return build_data(small_config("unused", "data.block_size=4", "data.map_size=64"), *free_body(), full_mesh=True)


def test_vertices_behind_a_box_are_hidden(mapped: SyntheticHumans) -> None:
    sample = mapped.block("test_occluded", 0)
    sample = dataclasses.replace(sample, principal_point=sample.principal_point + 0.5)  # half out of the crop
    faces = free_body()[0].faces
    groups = vertex_groups(sample, faces)
    assert groups.shape == sample.vertices.shape[:2]
    placed = sample.vertices + sample.pelvis[:, None]
    points = perspective_projection(placed, sample.focal, sample.principal_point)
    outside = (points.abs() > 1).any(-1)
    assert outside.any(1).all() and (groups[outside] == 2).float().mean() > 0.999
    # A box over the left half of the crop hides what projects there, and nothing else.
    left = torch.zeros_like(sample.occlusion)
    left[..., :32] = True
    halves = vertex_groups(dataclasses.replace(sample, occlusion=left), faces)
    clear = (points[..., 0].abs() > 0.05) & ~outside
    assert ((halves == 2) == (points[..., 0] < 0))[clear].float().mean() > 0.999
    # Without an occlusion map, everyone has visible vertices and vertices turned away.
    bare = vertex_groups(dataclasses.replace(sample, occlusion=None), faces)
    inside = ~outside
    assert (bare[inside] != 2).float().mean() > 0.999
    assert all(0.2 < (bare[row][inside[row]] == 0).float().mean() < 0.8 for row in range(4))
    with pytest.raises(UserError, match="no full mesh with a camera"):
        vertex_groups(dataclasses.replace(sample, vertices=None), faces)


@pytest.mark.slow
def test_the_maps_occlusion_is_that_of_the_keypoints(mapped: SyntheticHumans) -> None:
    sample = mapped.block("test_occluded", 0)
    inside = (sample.joints_2d.abs() < 0.98).all(-1)
    pixel = ((sample.joints_2d + 1) * 32).long().clamp(0, 63)
    at = sample.occlusion.flatten(1).gather(1, pixel[..., 1] * 64 + pixel[..., 0])
    assert (at == ~sample.visible)[inside].float().mean() > 0.95  # except at box edges
    boxes = OccluderBoxes(torch.zeros(4, 1, 2), torch.full((4, 1, 2), 0.5), torch.ones(4, dtype=torch.bool))
    assert (boxes.mask(64) > 0.5).float().mean() == pytest.approx(0.25)


@pytest.mark.slow
def test_evaluate_reports_bands_and_changes_nothing_else(mapped: SyntheticHumans) -> None:
    pipe = small_pipeline()
    options = {"num_hypotheses": 3, "num_inference_steps": 2}
    report = evaluate(pipe, mapped, "test_occluded", 7, SamplingConfig(**options), visibility_bins=True)
    plain = evaluate(pipe, mapped, "test_occluded", 7, SamplingConfig(**options))
    bands = report.pop("bands")
    assert report == plain
    assert sum(entry["people"] for entry in bands[:-1]) == bands[-1]["people"] == 7
    for metric in ("pve", "pa_mpjpe"):
        for kind in ("first", "mean", "oracle"):
            assert bands[-1]["errors"][metric][kind] == plain["errors"][metric][kind]
    assert bands[-1]["spread"]["value"] > 0 and set(bands[-1]["spread_of"]) == set(GROUPS)
    assert set(bands[-1]["error_of"]) == set(GROUPS)
    with pytest.raises(UserError, match=r"do not carry one; give them pictures \(data.pictures\) or maps"):
        evaluate(pipe, people(True), "test", 2, SamplingConfig(**options), visibility_bins=True)


def test_errors_of_hidden_and_visible_vertices_are_told_apart(mapped: SyntheticHumans) -> None:
    sample = mapped.block("test_occluded", 0)
    output = predict_batch(small_pipeline(), sample, as_heatmaps(sample), SamplingConfig(2, 1))
    groups = vertex_groups(sample, output.faces)
    # Ground truth plus an error of 30 mm at hidden and 10 mm at other vertices, with symmetric hypotheses.
    off = torch.where(groups == GROUPS.index("hidden"), 0.03, 0.01)[:, None, :, None] * torch.tensor([0.0, 0.6, 0.8])
    apart = torch.tensor([-0.05, 0.05])[None, :, None, None]
    collector = VisibilityCollector()
    collector(sample, dataclasses.replace(output, vertices=sample.vertices[:, None] + off + apart))
    same = torch.full((len(sample),), 20.0)
    errors = {name: {"first": same, "mean": same, "oracle": same} for name in ("pve", "pa_mpjpe")}
    entry = collector.report(Measured(errors, {}, torch.empty(0), torch.empty(0), {}, ()))[-1]
    assert {group: round(entry["error_of"][group]["value"], 2) for group in GROUPS} == {
        "visible": 10.0,
        "turned away": 10.0,
        "hidden": 30.0,
    }
    assert entry["error_hidden_over_same_vertices_visible"]["value"] == pytest.approx(3, rel=1e-4)
    assert entry["hidden_over_same_vertices_visible"]["value"] == pytest.approx(1, rel=1e-4)


def test_samples_keep_their_occlusion_map(mapped: SyntheticHumans) -> None:
    sample = mapped.block("test_occluded", 1)
    assert isinstance(sample, Sample) and sample.occlusion.dtype == torch.bool
    seen = (sample.silhouette.bool() & ~sample.occlusion).sum((1, 2)) / sample.silhouette.sum((1, 2))
    assert torch.allclose(seen, sample.visible_fraction)


@pytest.mark.slow
def test_the_command_prints_and_keeps_the_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_pipeline().save_pretrained(tmp_path / "tiny")
    arguments = [
        "evaluate",
        "--checkpoint",
        str(tmp_path / "tiny"),
        "--split",
        "test_occluded",
        "--people",
        "3",
        "--num-hypotheses",
        "2",
        "--steps",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    path = tmp_path / "out" / "tiny_test_occluded.json"
    plain = json.loads(path.read_text())
    assert "bands" not in plain and "by visible fraction" not in capsys.readouterr().out
    assert main([*arguments, "--bands"]) == 0  # the stored report has no bins, so it is recomputed
    found = json.loads(path.read_text())
    assert found.pop("bands")[-1]["people"] == 3 and found == plain
    assert "tiny, test_occluded, by visible fraction" in capsys.readouterr().out
    assert main(["evaluate", "--bands", "--protocol", "spin"]) == 2
    assert "--bands is about the synthetic splits" in capsys.readouterr().err
