"""Calibration: fitting, applying and saving a pipeline's temperature, and its effect on the hypotheses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import free_body, people, people_block, small_pipeline

from hmdiff.cli.main import main
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.hypotheses import apply_temperature, heatmap_log_likelihood, select
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.temperature import Sampling, Temperature
from hmdiff.errors import UserError
from hmdiff.evaluate.calibration import calibrate, store_temperature
from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments
from hmdiff.evaluate.measured import Measured, summary
from hmdiff.evaluate.metrics import expected_calibration_error
from hmdiff.evaluate.reliability import measure_spread
from hmdiff.evaluate.split_tables import calibration_line
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Heatmaps
from hmdiff.output import log_likelihood
from hmdiff.pipeline import HMDiffPipeline, MeshOutput


def in_steps(number: int, **changes: Any) -> SamplingConfig:
    return SamplingConfig(num_inference_steps=number, **changes)


@pytest.fixture
def pipe() -> HMDiffPipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def maps() -> Heatmaps:
    found = as_heatmaps(people_block())
    assert found is not None
    return found[[0, 1, 2]]


def photo(first: int = 0, last: int = 3) -> dict[str, Any]:
    return {name: value[first:last] for name, value in camera_arguments(people_block()).items()}


def fitted(temperature: float, steps: int = 2, sampler: str = "ddim", eta: float = 0.0) -> Temperature:
    return Temperature(Sampling(steps, sampler, eta), temperature, {"split": "val"})


def test_the_output_selects_by_heatmaps_and_joints(pipe: HMDiffPipeline, maps: Heatmaps) -> None:
    raw = {"num_hypotheses": 4, "num_inference_steps": 2, "surface": "vertices"}
    output = pipe(heatmaps=maps, **raw, **photo())
    assert output.keypoints is not None and output.log_likelihood is not None
    assert output.log_likelihood.shape == (3, 4) and output.log_likelihood.std(1).min() > 0
    # By hand: the crop's camera is that of the photo, moved and scaled.
    placed = output.keypoints[1] + output.translation[1][:, None]
    pixels = perspective_projection(placed, output.focal[1].expand(4), output.principal_point[1].expand(4, 2))
    seen = (pixels - maps.center[1]) / (maps.side[1] / 2)
    expected = heatmap_log_likelihood(seen[None], maps.values[1:2])
    torch.testing.assert_close(output.log_likelihood[1:2], expected, rtol=1e-4, atol=1e-3)
    chosen = select(output.vertices, output.joints[:, :, 0], output.log_likelihood, seen=output.reprojection)
    assert torch.equal(output.selected, chosen)
    assert torch.equal(output.selected_vertices[2], output.vertices[2, output.selected[2]])
    alone = pipe(heatmaps=maps[2], **raw, people=[2], **photo(2, 3))
    assert alone.selected[0] == output.selected[2]
    modes = output.modes(2)
    assert modes.pick(output.vertices).shape == (3, 2, *output.vertices.shape[2:])
    assert torch.equal(alone.modes(2).label[0], modes.label[2])


def test_likelier_is_what_projects_onto_the_peaks(maps: Heatmaps) -> None:
    """The ground truth has a higher likelihood than the same body shifted, rotated or mirrored."""
    sample = people_block()
    assert sample.keypoints_3d is not None and sample.pelvis is not None and sample.focal is not None
    true = sample.keypoints_3d[:3]
    turned = true * torch.tensor([-1.0, 1.0, -1.0])
    shifted = true + torch.tensor([0.3, 0.0, 0.0])
    bodies = torch.stack([true, turned, shifted], 1)
    translation = sample.pelvis[:3, None].expand(-1, 3, -1)
    found = log_likelihood(bodies, translation, sample.focal[:3], photo()["photo_sizes"] / 2, maps)
    assert (found[:, :1] > found[:, 1:] + 10).all()


def test_a_temperature_changes_what_is_said_of_the_spread_and_no_mesh(pipe: HMDiffPipeline, maps: Heatmaps) -> None:
    def run(steps: int = 2, **options: object) -> MeshOutput:
        return pipe(heatmaps=maps, num_hypotheses=3, num_inference_steps=steps, **options)  # type: ignore[arg-type]

    plain = run()
    pipe.set_temperature(fitted(2.5))
    hot = run()
    assert hot.temperature.tolist() == [2.5] * 3 and torch.equal(hot.vertices, plain.vertices)
    assert torch.equal(hot.selected, plain.selected)
    torch.testing.assert_close(hot.spread, plain.spread * 2.5)
    tempered = hot.calibrated(hot.joints)
    torch.testing.assert_close(tempered.mean(1), plain.mean_joints, rtol=0, atol=1e-6)
    torch.testing.assert_close(tempered - tempered.mean(1, True), 2.5 * (hot.joints - hot.joints.mean(1, True)))
    # Nothing was fitted for other sampling settings.
    first = {
        str(options): run(**options).temperature.tolist()
        for options in (  # type: ignore[arg-type]
            {"steps": 3},
            {"eta": 1.0},
            {"scheduler": "ddpm"},
            {"guidance": Guidance()},
        )
    }
    assert all(temperatures == [1.0] * 3 for temperatures in first.values()), first
    for options in ({"scheduler": "ddim"}, {"guidance": Guidance("none")}):
        assert run(**options).temperature.tolist() == [2.5] * 3  # type: ignore[arg-type]
    pipe.set_temperature(fitted(1.5, sampler="ddpm"))
    assert run(scheduler="ddpm", eta=0.7).temperature[0] == 1.5  # eta is ddim's alone
    guided = Temperature(Sampling.of(pipe.resolved(in_steps(2, guidance=Guidance(strength=0.5)))), 3.0)
    pipe.set_temperature(guided)
    assert pipe.temperature(in_steps(2, guidance=Guidance(strength=0.5))) == 3.0
    assert pipe.temperature(in_steps(2, guidance=Guidance(strength=0.6))) == 1.0


def test_temperatures_are_saved_with_the_pipeline(pipe: HMDiffPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "older")
    assert "temperatures" not in json.loads((tmp_path / "older" / "hmdiff.json").read_text())
    assert HMDiffPipeline.from_pretrained(tmp_path / "older").temperatures == {}  # as in old pipelines
    guided = Temperature(Sampling.of(pipe.resolved(in_steps(5, guidance=Guidance(joint_weights=(1.0, 0.5))))), 3.0)
    for each in (fitted(2.5), fitted(1.25, 7, "ddim", 0.5), guided):
        pipe.set_temperature(each)
    pipe.save_pretrained(tmp_path / "saved", half=True)
    again = HMDiffPipeline.from_pretrained(tmp_path / "saved")
    assert again.temperatures == pipe.temperatures
    assert again.temperature(in_steps(5, guidance=Guidance(joint_weights=(1.0, 0.5)))) == 3.0

    store_temperature(tmp_path / "saved", fitted(4.0))  # in place of the first
    stored = HMDiffPipeline.from_pretrained(tmp_path / "saved")
    assert [each.temperature for each in stored.temperatures.values()] == [1.25, 3.0, 4.0]
    store_temperature(tmp_path / "older", fitted(4.0))
    assert HMDiffPipeline.from_pretrained(tmp_path / "older").temperature(in_steps(2)) == 4.0


def test_bad_temperatures_are_named(pipe: HMDiffPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"temperature 0\.0: a finite number above 0"):
        fitted(0.0)
    with pytest.raises(UserError, match=r"not a saved hmdiff pipeline \(it has no hmdiff.json\)"):
        store_temperature(tmp_path, fitted(1.0))
    pipe.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "hmdiff.json"
    about = json.loads(path.read_text())
    for record in (3, {}, {**fitted(1.0).as_json(), "temperature": "hot"}, {**fitted(1.0).as_json(), "guidance": 7}):
        path.write_text(json.dumps({**about, "temperatures": [record]}))
        for act in (HMDiffPipeline.from_pretrained, lambda place: store_temperature(place, fitted(1.0))):
            with pytest.raises(UserError, match=r"hmdiff.json: damaged .*; save the pipeline again"):
                act(tmp_path / "saved")
    path.write_text(json.dumps({**about, "temperatures": [{**fitted(1.0).as_json(), "temperature": -1}]}))
    with pytest.raises(UserError, match=r"hmdiff.json: damaged .*temperature -1\.0: a finite number above 0"):
        HMDiffPipeline.from_pretrained(tmp_path / "saved")
    direct = small_pipeline("model.mode=direct")
    with pytest.raises(UserError, match="a direct baseline gives one mesh; there is no spread"):
        calibrate(direct, people(True), "val", 8, SamplingConfig())
    body, _ = free_body()
    pipe.body = body.select(torch.arange(body.num_vertices))
    pipe.body.keypoint_regressor = None
    with pytest.raises(UserError, match="has no keypoints to calibrate by"):
        calibrate(pipe, people(True), "val", 8, SamplingConfig())


def test_calibration_sets_the_temperature_and_lowers_the_error(pipe: HMDiffPipeline) -> None:
    done: list[int] = []
    found = calibrate(pipe, people(True), "val", 8, SamplingConfig(6, 2), done.append)
    assert sum(done) == 8 and pipe.temperature(in_steps(2)) == found.temperature != 1.0
    about = found.fitted_on
    assert about["expected_calibration_error_after"] < about["expected_calibration_error_before"]
    assert (about["split"], about["people"], about["num_hypotheses"]) == ("val", 8, 6)
    measured, _ = measure_spread(pipe, people(True), "val", 8, SamplingConfig(6, 2))
    samples, target = measured.joints, measured.true_joints
    assert samples.shape == (8, 6, 14, 3)
    assert about["expected_calibration_error_before"] == pytest.approx(expected_calibration_error(samples, target))
    torch.testing.assert_close(samples[:, :, [2, 3]].mean(2), torch.zeros(8, 6, 3), rtol=0, atol=1e-6)  # the hips


@pytest.mark.slow
def test_the_command_writes_it_into_the_pipeline(
    pipe: HMDiffPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmdiff.cli.splits.test_people", lambda *_: people(True))
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    before = HMDiffPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    words = ["--people", "8", "--num-hypotheses", "5", "--steps", "3", "2", "--device", "cpu"]
    assert main(["prepare", "temperature", str(tmp_path / "run"), *words, "--guidance", "none"]) == 0
    told = capsys.readouterr().out
    assert "ddim, 2 steps" in told and "calibration error" in told and str(tmp_path / "run" / "pipeline") in told
    after = HMDiffPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert {(each.num_inference_steps, each.sampler) for each in after.temperatures} == {(3, "ddim"), (2, "ddim")}
    assert after.temperature(in_steps(2)) != 1.0 and before.temperature(in_steps(2)) == 1.0
    assert main(["prepare", "temperature", str(tmp_path / "run"), *words]) == 0
    guided = HMDiffPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert guided.temperature(in_steps(2)) == after.temperature(in_steps(2))  # both are kept
    assert guided.temperature(in_steps(2, guidance=Guidance())) != 1.0
    assert main(["prepare", "temperature", str(tmp_path / "run"), "--guidance", "none", "--strength", "1"]) == 2
    assert "--strength is of a guidance" in capsys.readouterr().err
    assert main(["prepare", "temperature", str(tmp_path / "run"), "--guidance", "none", "--last", "0.5"]) == 2
    assert "--last is of a guidance" in capsys.readouterr().err
    assert main(["prepare", "temperature", str(tmp_path / "run"), *words[:4], "--steps", "999"]) == 2
    assert "--steps 999: the model was trained with 200 steps" in capsys.readouterr().err


def test_the_report_with_a_temperature() -> None:
    drawn = torch.Generator().manual_seed(3)
    truth = torch.randn(60, 14, 3, generator=drawn)
    joints = torch.randn(60, 20, 14, 3, generator=drawn) * 0.4  # as far as they should be, times 0.4
    errors = {"pve": {"mean": torch.rand(60, generator=drawn)}}
    plain = Measured(errors, {}, joints, truth, {}, ())
    hot = dataclasses.replace(plain, temperatures=torch.full((60,), 2.5))
    report, as_drawn = summary(hot), summary(plain)
    assert "tempered" not in as_drawn
    assert {name: value for name, value in report.items() if name != "tempered"} == as_drawn
    scaled = summary(dataclasses.replace(plain, joints=apply_temperature(joints, 2.5)))
    tempered = report["tempered"]
    assert tempered.pop("temperature") == 2.5
    assert tempered == {name: scaled[name] for name in tempered}
    assert tempered["expected_calibration_error"] < 0.07 < 0.2 < as_drawn["expected_calibration_error"]
    told = calibration_line({"checkpoint": "ours", **report, "tempered": {"temperature": 2.5, **tempered}})
    assert told.startswith("ours: expected calibration error 0.") and "with a temperature of 2.50 (median)" in told
