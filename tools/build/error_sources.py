"""What the error on the split `test` is made of: its people with one difficulty after the other taken away.

python -m tools.build.error_sources --checkpoint hmdiff_small --people 192

The first rows are cumulative, from `test` as it is to whole people in view with every joint and without noise; then
`test` with the poses of one sampler alone, and the easiest of all. Rows draw from the same seed, not always the same
people. What remains without noise is what 2D joints leave open and what the network has not learned.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

from hmdiff.build import build_mesh
from hmdiff.config import Config, HeatmapCorruption
from hmdiff.data.synthetic import people as synthetic
from hmdiff.data.synthetic.poses import PoseMixture
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.evaluate.evaluation import evaluate
from hmdiff.pipeline import HMDiffPipeline

ONLY = {"the prior": (1.0, 0.0, 0.0), "the joint limits": (0.0, 1.0, 0.0), "blends of both": (0.0, 0.0, 1.0)}
EXACT = HeatmapCorruption(jitter=0.0, missing=0.0, missing_hidden=0.0, second_peak=0.0, swap=0.0, all_joints=True)

Row = tuple[str, synthetic.SceneOptions, HeatmapCorruption, PoseMixture]


def rows() -> Iterator[Row]:
    scene, corruption, poses = synthetic.SceneOptions(), HeatmapCorruption(), PoseMixture()
    yield "test", scene, corruption, poses
    scene = dataclasses.replace(scene, truncated=0.0)
    yield "nobody truncated", scene, corruption, poses
    scene = dataclasses.replace(scene, occluded=0.0)
    yield "nobody occluded either", scene, corruption, poses
    yield "and all 26 joints", scene, dataclasses.replace(corruption, all_joints=True), poses
    yield "and no noise", scene, EXACT, poses
    for name, shares in ONLY.items():
        yield f"test, poses of {name} alone", synthetic.SceneOptions(), HeatmapCorruption(), PoseMixture(*shares)
    yield "the prior alone, whole, all joints, no noise", scene, EXACT, PoseMixture(*ONLY["the prior"])


def measure_row(
    pipeline: HMDiffPipeline, row: Row, people: int, sampling: SamplingConfig
) -> dict[str, Any]:  # as `evaluate` returns
    _, scene, corruption, poses = row
    mesh = build_mesh(Config(), pipeline.body)
    data = synthetic.SyntheticHumans(pipeline.body, poses, mesh.coarse_ids, full_mesh=True, corruption=corruption)
    with mock.patch.dict(synthetic.SPLIT_SCENES, test=scene):
        return evaluate(pipeline, data, "test", people, sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="hmdiff_small")
    parser.add_argument("--people", type=int, default=192)
    parser.add_argument("--num-hypotheses", type=int, default=25)
    options = parser.parse_args()
    pipeline = HMDiffPipeline.from_pretrained(options.checkpoint)
    print("mm: PVE of the mean and of the best hypothesis, MPJPE and PA-MPJPE of the mean", flush=True)
    for row in rows():
        found = measure_row(pipeline, row, options.people, SamplingConfig(num_hypotheses=options.num_hypotheses))
        errors = found["errors"]
        wanted = (("pve", "mean"), ("pve", "oracle"), ("mpjpe", "mean"), ("pa_mpjpe", "mean"))
        cells = [f"{errors[metric][kind]['value']:6.1f}" for metric, kind in wanted if kind in errors[metric]]
        print(f"{row[0]:46s}" + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
