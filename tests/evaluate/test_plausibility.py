"""Torn edges and joint limit violations, on known meshes and on a pipeline's two surfaces."""

from __future__ import annotations

import pytest
import torch
from small import people_block, small_pipeline

from hmdiff.body.surface import mesh_edges
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.evaluate.evaluation import as_heatmaps, predict_batch
from hmdiff.evaluate.plausibility import PlausibilityCollector
from hmdiff.evidence import torn_share

SQUARE = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
FACES = torch.tensor([[0, 1, 2], [0, 2, 3]])


def test_edges_are_counted_once_and_torn_both_ways() -> None:
    edges = mesh_edges(FACES)
    assert edges.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [2, 3]]
    assert torn_share(SQUARE, SQUARE, edges) == 0
    assert torn_share(1.9 * SQUARE, SQUARE, edges) == 0 and torn_share(2.1 * SQUARE, SQUARE, edges) == 1
    assert torn_share(0.4 * SQUARE, SQUARE, edges) == 1
    pulled = SQUARE.clone()
    pulled[1] = torch.tensor([3.5, 0, 0])  # both of its edges, and no other
    assert torn_share(torch.stack([SQUARE, pulled]), SQUARE, edges).tolist() == pytest.approx([0, 0.4])


def test_the_body_surface_is_a_body_and_the_vertices_of_an_untrained_model_are_not() -> None:
    pipeline = small_pipeline()
    sample = people_block("val").map(lambda tensor: tensor[:2])
    reports = {}
    for surface in ("body", "vertices"):
        collector = PlausibilityCollector(pipeline.body)
        output = predict_batch(pipeline, sample, as_heatmaps(sample), SamplingConfig(3, 2, surface=surface))
        collector(sample, output)
        reports[surface] = collector.report()
    body, vertices = reports["body"], reports["vertices"]
    assert vertices["torn_edges"]["value"] > 0.3 and body["torn_edges"]["value"] < 0.2
    assert body["torn_edges_of_true_bodies"] == vertices["torn_edges_of_true_bodies"]
    assert body["beyond_limits_degrees"]["largest"] < 1 and body["surface_distance_mm"]["value"] > 20
    assert "surface_distance_mm" not in vertices


def test_the_body_surface_is_the_skin_of_its_parameters() -> None:
    from hmdiff.geometry import axis_angle_to_matrix

    pipeline = small_pipeline()
    sample = people_block("val").map(lambda tensor: tensor[:2])
    output = predict_batch(pipeline, sample, as_heatmaps(sample), SamplingConfig(3, 2))
    assert output.fitted is not None and output.fitted.pose.shape == (2, 3, 24, 3)
    skin = pipeline.body(output.fitted.betas, axis_angle_to_matrix(output.fitted.pose), output.fitted.translation)
    torch.testing.assert_close(skin.vertices, output.vertices, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(skin.joints, output.joints, atol=1e-5, rtol=1e-4)
    assert output.joints[:, :, 0].abs().max() < 1e-5
