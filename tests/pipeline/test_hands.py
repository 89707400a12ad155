"""DAT for hands: heatmaps of 21 keypoints guide MANO's mesh through its keypoint regressor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import standin_bodies as bodies
import standins as s
import torch
from small import awaken, free_body, small_config, small_pipeline

from hmdiff.body.body import load_body
from hmdiff.body.mesh import MeshSampler
from hmdiff.body.skeletons import HALPE26, HAND21
from hmdiff.build import build_mesh, build_model, build_scheduler
from hmdiff.data.prepare import prepare_dataset
from hmdiff.data.readers import open_reader
from hmdiff.data.recorded import RecordedPeople
from hmdiff.data.shards import PreparedShards
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps, predict_batches
from hmdiff.heatmaps import Heatmaps, heatmap_peaks
from hmdiff.heatmaps.arrays import load_heatmaps, save_heatmaps
from hmdiff.heatmaps.keypoints import PersonKeypoints, heatmaps_from_keypoints
from hmdiff.pipeline import HMDiffPipeline

HAND = ("model.num_keypoints=21", "model.mesh_scale=0.05", "model.frame=crop")
STEPS = SamplingConfig(3, 6, surface="vertices")


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> tuple[HMDiffPipeline, RecordedPeople]:
    """A pipeline whose output depends on the noise, and FreiHAND records with heatmaps of their labels."""
    folder, patch = tmp_path_factory.mktemp("hands"), pytest.MonkeyPatch()
    patch.setenv("HMDIFF_BODY_DIR", str(folder / "bodies"))
    patch.setenv("HMDIFF_CACHE_DIR", str(folder / "cache"))
    patch.setattr("hmdiff.body.mesh_cache.FITTED_ON", 16)
    bodies.write_pickle(folder / "bodies" / "MANO_RIGHT.pkl", bodies.mano_arrays())
    hand = load_body("mano_right")
    config = small_config("unused", "body=mano_right", "model.num_coarse=195", "model.patch_size=15", *HAND)
    mesh: MeshSampler = build_mesh(config, hand)
    model = build_model(config, hand, mesh)
    weight = model.upsample_weight.detach().clone()
    awaken(model, 0.5)
    with torch.no_grad():
        model.upsample_weight.copy_(weight)
    s.make_freihand(folder / "raw", load_body("mano_right"), rows=2)  # which turns its body into doubles
    prepare_dataset(open_reader("freihand", folder / "raw", "evaluation"), folder / "out")
    shards = PreparedShards(folder / "out")
    data = RecordedPeople(shards, hand, mesh.coarse_ids, 2, full_mesh=True, heatmaps="labels")
    patch.undo()
    return HMDiffPipeline(model, build_scheduler(config), hand, 6), data


def test_freihand_is_steered_by_its_21_keypoints(hands: tuple[HMDiffPipeline, RecordedPeople]) -> None:
    pipeline, data = hands
    sample = data.block("val", 0)
    assert sample.heatmaps is not None and sample.heatmaps.shape == (2, 21, 64, 64)
    seen = as_heatmaps(sample)
    assert seen is not None and seen.names == HAND21 == pipeline.body.keypoint_names
    (plain,) = predict_batches(pipeline, [sample], STEPS)
    assert plain.output.reprojection is not None
    before = plain.output.reprojection.error
    assert before.shape == (2, 3, 21)
    # With an untrained network DAT reduces part of the gap, the move to the peaks a further part.
    errors = [float(before.mean())]
    for guidance in (Guidance(peaks=0.0), Guidance()):
        (guided,) = predict_batches(pipeline, [sample], STEPS.but(guidance=guidance))
        report, found = guided.output.guidance, guided.output.reprojection
        assert report is not None and report.active.any() and found is not None
        assert (report.gap_after <= report.gap_before).float().mean() > 0.5
        errors.append(float(found.error.mean()))
    assert errors[1] < 0.97 * errors[0] and errors[2] < errors[1], errors
    (off,) = predict_batches(pipeline, [sample], STEPS.but(guidance=Guidance(strength=0.0)))
    assert torch.equal(off.output.vertices, plain.output.vertices)


def test_the_target_is_where_the_hands_own_keypoints_are(hands: tuple[HMDiffPipeline, RecordedPeople]) -> None:
    """Heatmaps of a hand's own regressed keypoints (HAND21) have zero gap to it."""
    pipeline, data = hands
    sample = data.block("val", 0)
    assert sample.heatmaps is not None and sample.keypoints_3d is not None and sample.vertices is not None
    torch.testing.assert_close(pipeline.body.keypoints(sample.vertices), sample.keypoints_3d, rtol=0, atol=1e-5)
    inside = (sample.joints_2d.abs() < 0.9).all(-1)  # type: ignore[union-attr]
    peaks, confidence = heatmap_peaks(sample.heatmaps)
    assert (confidence[inside] > 0.9).all()
    torch.testing.assert_close(peaks[inside], sample.joints_2d[inside], rtol=0, atol=0.01)  # type: ignore[index]


def test_hands_and_bodies_are_told_apart(hands: tuple[HMDiffPipeline, RecordedPeople], tmp_path: Path) -> None:
    points = torch.cat([torch.rand(21, 2, generator=torch.Generator().manual_seed(0)) * 100, torch.ones(21, 1)], 1)
    hand = heatmaps_from_keypoints([PersonKeypoints(points, HAND21)])
    assert hand.names == HAND21 and hand.values.shape == (1, 21, 64, 64) and not hand.crop.rotation.any()
    with pytest.raises(UserError, match=r"heatmaps of a hand \(21 joints\).* keypoints of a body \(26 joints\)"):
        small_pipeline()(heatmaps=hand, num_hypotheses=1)
    body = Heatmaps(torch.ones(1, 26, 64, 64), torch.ones(1, 26, dtype=torch.bool), hand.crop)
    assert body.names == HALPE26
    with pytest.raises(UserError, match=r"heatmaps of a body \(26 joints\).* keypoints of a hand \(21 joints\)"):
        hands[0](heatmaps=body, num_hypotheses=1)
    save_heatmaps(tmp_path / "hand.npz", hand)
    again = load_heatmaps(tmp_path / "hand.npz")
    assert again.names == HAND21 and again[0].names == HAND21
    np.testing.assert_array_equal(again.values, hand.values)
    assert free_body()[0].keypoint_names == HALPE26
