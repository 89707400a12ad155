"""Options of DAT (`hmdiff.diffusion.dat`), our default, and the preset of HMDiff (arXiv 2308.13369)."""

from __future__ import annotations

import dataclasses

from hmdiff.errors import UserError

MODES = ("none", "disrupted", "dat")
CHOICES = {  # the first is the default
    "pairing": ("mean", "paired"),
    "gap": ("samples", "likelihood"),
    "gradient": ("denoiser", "estimate"),
    "projection": ("fit", "camera"),
    "step": ("line", "score", "gradient"),
    "decision": ("hypothesis", "image"),
}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Heatmap guidance of the reverse process. Raises `UserError` for an unknown choice or a number out of range."""

    mode: str = "dat"  # "none"; "disrupted": gap and gradient at x_k itself; "dat"
    strength: float = 1.0  # s; 0 equals "none"
    threshold: float = 0.05  # on the relative gap R_k; DAT is off at or below it
    last: float = 0.5  # DAT acts in this last fraction of the reverse process, at least one step (paper: 1)
    pairing: str = "mean"  # compare with the mean of U; "paired": with u_i drawn from U for hypothesis i
    gap: str = "samples"  # squared distance to u_i; "likelihood": of the keypoints under U
    gradient: str = "denoiser"  # through the denoiser's Jacobian; "estimate": stopped at x̂_0
    projection: str = "fit"  # differentiable closed-form fit of the camera to u_i; "camera": the camera head's
    step: str = "line"  # Gauss-Newton length, see `dat`; "score"; "gradient": the paper's
    decision: str = "hypothesis"  # R_k per hypothesis; "image": over all hypotheses of an image (paper)
    first: bool = False  # guide the terminal step too, where x_k holds no signal (paper)
    fall_back: bool = True  # return the unguided hypothesis where guidance raised the gap (not in the paper)
    sharpness: float = 4.0  # exponent on U: the estimator's Gaussians are wider than its errors
    peaks: float = 1.0  # final move to the heatmap peaks, 0 none, 1 full (`pipeline/image_plane.py`); not in the paper
    joint_weights: tuple[float, ...] | None = None  # of the J keypoints, multiplied by the peak heights

    def __post_init__(self) -> None:
        for name, allowed in {"mode": MODES, **CHOICES}.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"guidance {name} {value!r} is not known; choose one of {', '.join(allowed)}")
        for name, least in (("strength", 0.0), ("threshold", 0.0), ("sharpness", 0.0), ("peaks", 0.0)):
            if not getattr(self, name) >= least or getattr(self, name) == float("inf"):
                raise UserError(f"guidance {name} {getattr(self, name)}: a number from {least:g} on is needed")
        if not 0 < self.last <= 1:
            raise UserError(f"guidance last {self.last}: a share of the steps is needed, above 0 and up to 1")
        weights = self.joint_weights
        if weights is not None and not (all(0 <= w < float("inf") for w in weights) and sum(weights) > 0):
            raise UserError("guidance joint_weights: finite numbers from 0 on are needed, not all of them 0")

    @property
    def active(self) -> bool:
        return self.mode != "none" and self.strength > 0


# DAT as in the HMDiff paper. Strength and threshold are not published; these reproduce its claims best on the shipped
# checkpoint (LOG.md). The paper samples N = 25 hypotheses by 40 DDIM steps of K = 200.
PAPER = Guidance(
    pairing="paired",
    step="gradient",
    decision="image",
    first=True,
    fall_back=False,
    sharpness=1.0,
    strength=3000.0,
    threshold=0.3,
    last=1.0,
    peaks=0.0,
)
PRESETS = {"ours": Guidance(), "paper": PAPER}
