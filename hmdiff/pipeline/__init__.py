"""HMDiffPipeline: from photos or heatmaps to several meshes per person.

    pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
    output = pipe(heatmaps=heatmaps, num_hypotheses=25, seed=0)
    output.vertices  # (B, 25, V, 3) metres

Modules: `pipeline` is the assembly, `inputs` checks the inputs, `cameras` holds the frames, `reverse` runs the reverse
process in chunks, `surface` fits the bodies, `saved` reads and writes pipelines, `calibrated` holds the temperatures.
"""

from __future__ import annotations

from hmdiff.output import MeshOutput, keypoint_distance
from hmdiff.pipeline.pipeline import HMDiffPipeline
from hmdiff.pipeline.reverse import GuidancePlan

__all__ = ["GuidancePlan", "HMDiffPipeline", "MeshOutput", "keypoint_distance"]
