"""Temperature scaling of a pipeline's hypothesis spread, one temperature per sampling configuration."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.diffusion.hypotheses import Reprojection, keypoint_nearness
from hmdiff.diffusion.image_evidence import image_evidence
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.schedule import sampler_name
from hmdiff.diffusion.temperature import Sampling, Temperature
from hmdiff.files.diffusers_parts import Scheduler
from hmdiff.heatmaps import Heatmaps, heatmap_peaks
from hmdiff.output import MeshOutput, keypoint_distance, projected_keypoints


class Calibrated:
    """Mixin of `HMDiffPipeline`: the fitted temperatures."""

    scheduler: Scheduler
    num_inference_steps: int
    eta: float
    temperatures: dict[Sampling, Temperature]

    def resolved(self, sampling: SamplingConfig) -> SamplingConfig:
        """The settings with None replaced by the pipeline's defaults; guidance without effect becomes None."""
        steps, name, eta = sampling.num_inference_steps, sampling.scheduler, sampling.eta
        return sampling.but(
            num_inference_steps=self.num_inference_steps if steps is None else steps,
            scheduler=sampler_name(self.scheduler) if name is None else name,
            eta=self.eta if eta is None else eta,
            guidance=sampling.steered,
        )

    def calibration(self, sampling: SamplingConfig) -> Temperature | None:
        """Temperature, evidence factor and confidence fitted for these settings; None if none were fitted."""
        return self.temperatures.get(Sampling.of(self.resolved(sampling)))

    def temperature(self, sampling: SamplingConfig) -> float:
        """The temperature of a typical person for these settings, 1 if none was fitted.

        `MeshOutput.temperature` has the temperature of each person.
        """
        fitted = self.calibration(sampling)
        return 1.0 if fitted is None else fitted.temperature

    def set_temperature(self, fitted: Temperature) -> None:
        """Use this temperature from now on; it is saved with the pipeline and replaces one for the same settings."""
        self.temperatures[fitted.sampling] = fitted


def calibrated(
    output: MeshOutput,
    heatmaps: Heatmaps | None,
    side: Tensor,  # (B,) of the crops, photo pixels
    fitted: Temperature | None,  # for these sampling settings
) -> MeshOutput:
    """Add each person's image evidence, reprojection errors and temperature to the output."""
    confidence = distance = seen = None
    if heatmaps is not None and output.keypoints is not None:
        assert output.body is not None
        peaks, confidence = heatmap_peaks(heatmaps.values.to(side))
        distance = keypoint_distance(output, heatmaps).mean(1) / side
        pixels = projected_keypoints(output.keypoints, output.translation, output.focal, output.principal_point)
        error = (pixels - heatmaps.crop.to_photo(peaks)[:, None]).norm(dim=-1) / side[:, None, None]
        seen = Reprojection(error, confidence.clamp(max=1), _surface_nearness(output.body, output.joints.device))
    evidence = image_evidence(output.joints, confidence, distance)
    return dataclasses.replace(
        output,
        evidence=evidence,
        reprojection=seen,
        temperature=evidence.new_ones(len(evidence)) if fitted is None else fitted.of(evidence),
        calibration=None if fitted is None else fitted.confidence,
        calibrated_spread=fitted is not None,
    )


@functools.lru_cache(maxsize=4)
def _surface_nearness(body: Body, device: torch.device) -> Tensor:  # (V, J)
    rest = body.v_template.to(device)
    return keypoint_nearness(rest, body.keypoints(rest[None])[0])
