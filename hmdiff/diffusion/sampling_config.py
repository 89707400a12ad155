"""Sampling settings, shared by the command line, the pipeline and the keys of cached results."""

from __future__ import annotations

import dataclasses
from typing import Any

from hmdiff.diffusion.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of a pipeline call. None: the value saved with the pipeline (`HMDiffPipeline.resolved`)."""

    num_hypotheses: int = 25
    num_inference_steps: int | None = None
    seed: int = 0
    scheduler: str | None = None  # a sampler such as "ddpm" or "dpm++"
    eta: float | None = None  # DDIM's fresh noise, 0..1
    guidance: Guidance | None = None  # DAT towards the heatmaps; for photos the default is DAT, mode="none" disables it
    surface: str = "body"  # the nearest body to each hypothesis, or the predicted "vertices"
    upright: bool = True  # heatmap models: rotate crops of people who lie or are upside down

    def but(self, **changes: Any) -> SamplingConfig:
        """A copy with some values replaced. Raises `TypeError` for an unknown name."""
        return dataclasses.replace(self, **changes)

    @property
    def steered(self) -> Guidance | None:
        """The guidance if it is active, else None."""
        return self.guidance if self.guidance is not None and self.guidance.active else None
