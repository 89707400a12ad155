"""How DAT works (`hmdiff.diffusion.dat`): its choices, our default, and its form in HMDiff (arXiv 2308.13369)."""

from __future__ import annotations

import dataclasses

from hmdiff.errors import UserError

MODES = ("none", "disrupted", "dat")
CHOICES = {  # beside the mode; the first is our default
    "pairing": ("mean", "paired"),
    "gap": ("samples", "likelihood"),
    "gradient": ("denoiser", "estimate"),
    "projection": ("fit", "camera"),
    "step": ("line", "score", "gradient"),
    "decision": ("hypothesis", "image"),
}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How heatmaps steer the reverse process. Raises `UserError` for an unknown choice or a number out of range."""

    mode: str = "dat"  # "none"; "disrupted", with gap and gradient at x_k itself; "dat"
    strength: float = 1.0  # s; 0 is exactly "none"
    threshold: float = 0.05  # of the relative gap R_k, below which DAT is off
    last: float = 1.0  # share of the reverse process, from its end, in which DAT may act; 0.3 is three steps of ten
    pairing: str = "mean"  # all compared with the mean of U, or "paired": u_i drawn from U for hypothesis i
    gap: str = "samples"  # squared distance to u_i, or the "likelihood" of the keypoints under U
    gradient: str = "denoiser"  # through the denoiser's Jacobian, or stopped at the "estimate" x̂_0
    projection: str = "fit"  # the camera: closed-form fit of x̂_0 to u_i, differentiated through; or the head's "camera"
    step: str = "line"  # length of the step, see above; or "score"; or the paper's "gradient"
    decision: str = "hypothesis"  # R_k of each hypothesis, or the paper's, of the sum over an "image"'s hypotheses
    first: bool = False  # also at the terminal step, where x_k holds no signal; the paper's DAT acts there
    fall_back: bool = True  # take the unguided hypothesis where guidance raised the gap; the paper has no such guard
    sharpness: float = 4.0  # U is raised to this power: an estimator's Gaussians are wider than its errors
    peaks: float = 1.0  # share of the way left to the peaks, which "dat" goes at last (`pipeline/image_plane.py`); ours
    joint_weights: tuple[float, ...] | None = None  # of the J keypoints, on top of the peaks' heights

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


# HMDiff's DAT as its paper describes it, beside our default. Strength and threshold are not published: those at which
# its claims show on the shipped checkpoint, as far as they do (LOG.md). Its sampling: N = 25, 40 DDIM steps of K = 200.
PAPER = Guidance(
    pairing="paired",
    step="gradient",
    decision="image",
    first=True,
    fall_back=False,
    sharpness=1.0,
    strength=3000.0,
    threshold=0.3,
    peaks=0.0,
)
PRESETS = {"ours": Guidance(), "paper": PAPER}
