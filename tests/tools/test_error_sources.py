"""The rows of `tools.build.error_sources` take away what their names say."""

from unittest import mock

from small import free_body, people

from hmdiff.data.synthetic import people as synthetic
from hmdiff.heatmaps.distribution import heatmap_peaks
from tools.build.error_sources import EXACT, rows


def test_the_cumulative_rows_end_with_whole_people_and_exact_joints():
    table = {name: (scene, corruption) for name, scene, corruption, _ in rows()}
    scene, corruption = table["and no noise"]
    assert corruption == EXACT and (scene.truncated, scene.occluded) == (0, 0)
    body, mesh = free_body()
    data = synthetic.SyntheticHumans(body, people().poses, mesh.coarse_ids, 16, corruption=corruption)
    with mock.patch.dict(synthetic.SPLIT_SCENES, test=scene):
        sample = data.block("test", 0)
    assert sample.heatmap_valid.all()
    peaks, confidence = heatmap_peaks(sample.heatmaps)
    # Face joints of a head turned away stay missing.
    found = (confidence > 0) & (sample.joints_2d.abs() < 0.95).all(-1)
    assert found.float().mean() > 0.8
    assert (peaks - sample.joints_2d)[found].abs().max() < 1 / 64  # half a heatmap pixel


def test_every_row_differs_from_the_others():
    settings = [(scene, corruption, tuple(poses.shares.tolist())) for _, scene, corruption, poses in rows()]
    assert all(one not in settings[:number] for number, one in enumerate(settings))
