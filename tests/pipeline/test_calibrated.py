"""The pipeline's image evidence: lengths are relative to the crop."""

from __future__ import annotations

import torch
from small import people_block, small_pipeline

from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments
from hmdiff.heatmaps import Crop, Heatmaps


def test_a_photo_of_twice_the_size_is_the_same_evidence() -> None:
    pipe, block = small_pipeline(), people_block()
    maps, photo = as_heatmaps(block), camera_arguments(block)
    assert maps is not None
    options = {"num_hypotheses": 3, "num_inference_steps": 2}
    output = pipe(heatmaps=maps, **options, **photo)
    larger = Heatmaps(maps.values, maps.valid, Crop.of(2 * maps.center, 2 * maps.side))
    twice = pipe(heatmaps=larger, **options, **{name: 2 * value for name, value in photo.items()})
    assert output.evidence is not None and output.evidence.isfinite().all()
    assert output.reprojection is not None and twice.reprojection is not None
    torch.testing.assert_close(twice.evidence, output.evidence, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(twice.reprojection.error, output.reprojection.error, rtol=1e-3, atol=1e-4)
