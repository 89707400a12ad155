"""HMDiffPipeline: photos or heatmaps in, several meshes of every person out.

    pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
    output = pipe(heatmaps=heatmaps, num_hypotheses=25, seed=0)
    output.vertices  # (B, 25, V, 3) metres

`pipeline` is the assembly; `inputs` checks what comes in, `cameras` holds the frames, `reverse` runs the reverse
process in chunks, `surface` fits the bodies, `saved` is the folder on disk, `calibrated` the temperatures.
"""

from __future__ import annotations

from hmdiff.output import MeshOutput, keypoint_distance
from hmdiff.pipeline.pipeline import HMDiffPipeline
from hmdiff.pipeline.reverse import GuidancePlan

__all__ = ["GuidancePlan", "HMDiffPipeline", "MeshOutput", "keypoint_distance"]
