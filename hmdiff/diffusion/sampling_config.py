"""How hypotheses are asked for: one group of settings from the command line to the key of a stored result."""

from __future__ import annotations

import dataclasses
from typing import Any

from hmdiff.diffusion.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The settings of a call of the pipeline. None is what was saved with the pipeline (`HMDiffPipeline.resolved`)."""

    num_hypotheses: int = 25
    num_inference_steps: int | None = None
    seed: int = 0
    scheduler: str | None = None  # another sampler, such as "ddpm" or "dpm++"
    eta: float | None = None  # DDIM's share of fresh noise
    guidance: Guidance | None = None  # DAT towards the heatmaps; of photos DAT is the default, and mode="none" is none
    surface: str = "body"  # of every hypothesis: the nearest body's, or the predicted "vertices" as they are
    upright: bool = True  # heatmaps alone: turn the crops of people who lie or are upside down

    def but(self, **changes: Any) -> SamplingConfig:
        """The same with other values. Raises `TypeError` for a name that is none of these."""
        return dataclasses.replace(self, **changes)

    @property
    def steered(self) -> Guidance | None:
        """The guidance, if it does anything."""
        return self.guidance if self.guidance is not None and self.guidance.active else None
