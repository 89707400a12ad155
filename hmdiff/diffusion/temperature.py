"""Temperature scaling of the hypothesis spread of a saved pipeline.

One scalar per sampling settings (steps, sampler, eta, guidance), since each gives a different spread. Fitted by
`hmdiff.evaluate.calibration` on people with ground truth, and saved in the pipeline's hmdiff.json with the data of the
fit. A per-person factor can multiply it (`image_evidence.py`). Settings without a fit have temperature 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hmdiff.diffusion.confidence import Confidence
from hmdiff.diffusion.image_evidence import EvidenceFactor
from hmdiff.errors import UserError

if TYPE_CHECKING:
    from hmdiff.diffusion.sampling_config import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings that the spread depends on, besides the model."""

    num_inference_steps: int
    sampler: str
    eta: float = 0.0  # of ddim only; 0 for other samplers
    guidance: str = ""  # as JSON; empty without guidance

    @classmethod
    def of(cls, config: SamplingConfig) -> Sampling:
        """From settings without None, see `HMDiffPipeline.resolved`."""
        steps, sampler, eta, guidance = config.num_inference_steps, config.scheduler, config.eta, config.steered
        assert steps is not None and sampler is not None and eta is not None
        steered = "" if guidance is None else json.dumps(dataclasses.asdict(guidance), sort_keys=True)
        return cls(steps, sampler, float(eta) if sampler == "ddim" else 0.0, steered)

    def __str__(self) -> str:
        eta = f", eta {self.eta:g}" if self.eta else ""
        return f"{self.sampler}, {self.num_inference_steps} steps{eta}{', guided' if self.guidance else ''}"


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A fitted temperature. Raises `UserError` for one that is not a finite number above 0."""

    sampling: Sampling
    temperature: float
    fitted_on: dict[str, Any] = dataclasses.field(default_factory=dict)  # split, people, errors before and after
    confidence: Confidence | None = None  # for the spread at this temperature; None in older files
    evidence: EvidenceFactor | None = None  # per-person factor; None: one temperature for all

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature {self.temperature}: a finite number above 0 is needed")

    def of(
        self,
        evidence: Tensor,  # (B, 3), see `image_evidence`
    ) -> Tensor:  # (B,) temperature of each person
        if self.evidence is None:
            return evidence.new_full((len(evidence),), self.temperature)
        return self.temperature * self.evidence(evidence)

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.sampling),
            "guidance": json.loads(self.sampling.guidance) if self.sampling.guidance else None,
            "temperature": self.temperature,
            "fitted_on": self.fitted_on,
            **({} if self.confidence is None else {"confidence": self.confidence.as_json()}),
            **({} if self.evidence is None else {"evidence": dataclasses.asdict(self.evidence)}),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Temperature:
        """Inverse of `as_json`. Raises `KeyError`, `TypeError`, `ValueError` or `UserError`."""
        from hmdiff.diffusion.guidance import Guidance

        guidance = found.get("guidance")
        sampling = Sampling(
            int(found["num_inference_steps"]),
            str(found["sampler"]),
            float(found.get("eta", 0.0)),
            # Options that are newer than the file take their defaults.
            json.dumps({**dataclasses.asdict(Guidance()), **guidance}, sort_keys=True) if guidance else "",
        )
        confidence, evidence = found.get("confidence"), found.get("evidence")
        return cls(
            sampling,
            float(found["temperature"]),
            dict(found.get("fitted_on", {})),
            None if confidence is None else Confidence.from_json(confidence),
            None if evidence is None else EvidenceFactor.from_json(evidence),
        )
