"""DAT, the Distribution Alignment Technique of HMDiff (arXiv 2308.13369), as a wrapper of the denoiser.

Per reverse step k, for every hypothesis i of a person:

    x̂_0          the clean mesh that the denoiser sees in x_k
    D_k           = sum_j w_j |u_ij - f_j(x̂_0)|²       the distribution gap; u_i drawn from U, the estimator's heatmaps,
                                                        f: mesh -> its keypoints in the crop
    R_k           = (D_k - floor) / (D_K - floor)       the relative gap; DAT is on while it exceeds a threshold
    ĝ             = eps + s sqrt(1 - abar_k) grad_{x_k} D_k, the gradient going through x̂_0 and so the denoiser

and the ordinary scheduler step follows with ĝ. The paper gives D_k, the gradient through x̂_0, that a relative gap
switches DAT off, and the two comparisons (`none`, and `disrupted`: gap and gradient at x_k itself). Ours, since it
leaves them open: R_k's formula and its floor (the variance of the u_i, which no mesh can explain), the threshold, the
weights w (the peaks' heights), u_i paired with hypothesis i or their mean, the decision by hypothesis and not by image
(so that a hypothesis does not depend on how many others were asked for), and the length of the step.

On that length: in terms of x̂_0 the formula for ĝ says x̂_0 - s (1 - abar)/sqrt(abar) grad_{x_k} D. Where abar is small,
the factor is huge and the gradient a difference of small numbers. `step="line"` keeps the direction and takes the
length that the residual asks for (Gauss-Newton along the line: <r, df> / |df|²), so that s = 1 means "as far as this
direction explains". `step="score"` is the formula, its gradient divided by sqrt(D_k).

And on its cost: going back through the denoiser is twice its price, and the late steps give most of the gain. `last`
keeps DAT to the end of the process, where k/K <= last; 1 is the paper's form.

M rows (a person's hypotheses side by side), P points, J keypoints, H x W heatmaps. 2D in crop coordinates, -1..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hmdiff.diffusion.noising import clean_estimate
from hmdiff.diffusion.sampling import Callback, Denoise, sample
from hmdiff.errors import UserError
from hmdiff.geometry import fitted_projection, perspective_fit, weak_perspective_projection
from hmdiff.heatmaps.distribution import draw_samples, normalised, soft_argmax

MODES = ("none", "disrupted", "dat")
_CHOICES = {
    "mode": MODES,
    "pairing": ("mean", "paired"),
    "gap": ("samples", "likelihood"),
    "gradient": ("denoiser", "estimate"),
    "projection": ("fit", "camera"),
    "step": ("line", "score"),
}
_LEAST_SIGNAL = 0.1  # sqrt(abar) below which the score's factor grows no further
_NO_SIGNAL = 1e-6  # abar of a terminal step: nothing is steered through the denoiser there
_BACKGROUND = 0.1  # of the peak: what lies below is an estimator's background, wide and meaningless
_LONGEST = 2.0  # root mean square of a point's move, in units of the data


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
    step: str = "line"  # length of the step, see above; or the paper's "score"
    sharpness: float = 4.0  # U is raised to this power: an estimator's Gaussians are wider than its errors
    joint_weights: tuple[float, ...] | None = None  # of the J keypoints, on top of the peaks' heights

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"guidance {name} {value!r} is not known; choose one of {', '.join(allowed)}")
        for name, least in (("strength", 0.0), ("threshold", 0.0), ("sharpness", 0.0)):
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


@dataclasses.dataclass(frozen=True)
class Target:
    """What the hypotheses are compared with, one row each."""

    points: Tensor  # (M, J, 2) u_i, crop coordinates
    weight: Tensor  # (M, J) w, sums to 1 a row; 0 for a joint that the estimator did not see
    floor: Tensor  # (M,) weighted variance of the u_i
    heatmaps: Tensor  # (B, J, H, W) U, each sums to 1, or is 0
    camera: Tensor  # (M, 3) the head's weak perspective
    principal_point: Tensor  # (M, 2) of the photo, crop coordinates

    @property
    def known(self) -> Tensor:  # (M,) bool: whether there is anything to compare with
        return self.weight.sum(-1) > 0


def make_target(
    guidance: Guidance,
    heatmaps: Tensor,  # (B, J, H, W) >= 0, the peak = confidence
    camera: Tensor,  # (B, 3) the head's
    generators: list[torch.Generator],  # M = B * N, a person's hypotheses side by side
    principal_point: Tensor | None = None,  # (B, 2) of the photo, crop coordinates; None: the crop's centre
) -> Target:
    """Draw the u_i. Joints whose mass lies under the floor of `normalised` are left out.

    Raises:
        UserError: `joint_weights` of another number than J.
    """
    joints, count = heatmaps.shape[1], len(generators) // len(heatmaps)
    peak = heatmaps.flatten(2).amax(-1)
    seen = normalised(heatmaps).flatten(2).amax(-1) > 0
    weight = peak.clamp(max=1) * seen
    if guidance.joint_weights is not None:
        if len(guidance.joint_weights) != joints:
            raise UserError(f"guidance joint_weights: {len(guidance.joint_weights)} numbers for {joints} keypoints")
        weight = weight * weight.new_tensor(guidance.joint_weights)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-8)
    relative = heatmaps / peak[..., None, None].clamp_min(1e-12)
    sharpened = ((relative - _BACKGROUND).clamp_min(0) / (1 - _BACKGROUND)) ** guidance.sharpness
    sharpened = sharpened * seen[..., None, None]
    distribution = sharpened / sharpened.sum((-2, -1), keepdim=True).clamp_min(1e-12)

    mean = soft_argmax(distribution)  # (B, J, 2)
    variance = (weight * _variance(distribution, mean)).sum(-1)
    if guidance.pairing == "paired":
        points = torch.cat([
            draw_samples(distribution[row // count], 1, generator) for row, generator in enumerate(generators)
        ])  # fmt: skip
    else:
        points, variance = mean.repeat_interleave(count, 0), torch.zeros_like(variance)
    return Target(
        points, weight.repeat_interleave(count, 0), variance.repeat_interleave(count, 0), distribution,
        camera.repeat_interleave(count, 0),
        (torch.zeros_like(mean[:, 0]) if principal_point is None else principal_point).repeat_interleave(count, 0),
    )  # fmt: skip


def _variance(distribution: Tensor, mean: Tensor) -> Tensor:  # (B, J)
    height, width = distribution.shape[-2:]
    y = (torch.arange(height, device=mean.device, dtype=mean.dtype) + 0.5) * (2 / height) - 1
    x = (torch.arange(width, device=mean.device, dtype=mean.dtype) + 0.5) * (2 / width) - 1
    across = (distribution.sum(-2) * (x - mean[..., :1]).square()).sum(-1)
    return across + (distribution.sum(-1) * (y - mean[..., 1:]).square()).sum(-1)


def project(
    guidance: Guidance,
    keypoints: Tensor,  # (M, J, 3) metres
    target: Target,
) -> Tensor:  # (M, J, 2) crop coordinates
    """f: the keypoints in the crop, by a camera fitted to the targets or by the head's."""
    if guidance.projection == "camera":
        return weak_perspective_projection(keypoints, target.camera)
    fitted = perspective_fit(keypoints, target.points, target.weight, target.principal_point)
    return fitted_projection(keypoints, fitted, target.principal_point)


def distribution_gap(
    guidance: Guidance,
    projected: Tensor,  # (M, J, 2)
    target: Target,
) -> Tensor:  # (M,) squared crop half-sides, a weighted mean over the joints
    """D_k. By `likelihood`: -2 sigma² log U(f), sigma² the variance of a joint's peak, so that both have one unit."""
    if guidance.gap == "samples":
        return (target.weight * (projected - target.points).square().sum(-1)).sum(-1)
    people, joints = target.heatmaps.shape[:2]
    maps = target.heatmaps / target.heatmaps.flatten(2).amax(-1)[..., None, None].clamp_min(1e-12)
    grid = projected.reshape(people, -1, joints, 2).transpose(1, 2).flatten(0, 1)[:, None]  # (B*J, 1, N, 2)
    maps = maps.flatten(0, 1)[:, None]
    values = torch.nn.functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    values = values[:, 0, 0].unflatten(0, (people, joints)).transpose(1, 2).flatten(0, 1)  # (M, J)
    # A map says nothing about the way to its peak from afar: there the distance to the target has to.
    far = (projected - target.points).square().sum(-1)
    variance = target.floor[:, None].clamp_min(1e-4)
    negative = -2 * variance * values.clamp_min(1e-6).log()
    return (target.weight * torch.where(values > 1e-3, negative, negative.detach() + far)).sum(-1)


class AlignedDenoiser:
    """The denoiser with DAT around it, to be given to `sample` in its place. Keeps what happened, for the report."""

    def __init__(
        self,
        denoise: Denoise,
        scheduler: SchedulerMixin,  # with `alphas_cumprod`
        keypoints: Callable[[Tensor], Tensor],  # points of the diffusion (M, P, 3) -> keypoints (M, J, 3) metres
        target: Target,
        guidance: Guidance,
    ) -> None:
        self.denoise, self.keypoints, self.target, self.guidance = denoise, keypoints, target, guidance
        self.shares: Tensor = scheduler.alphas_cumprod  # type: ignore[attr-defined]
        self.kind: str = scheduler.config.prediction_type  # type: ignore[attr-defined]
        self.first_gap: Tensor | None = None  # (M,) D_K
        self.first_estimate: Tensor | None = None  # (M, P, 3) x̂_0 before any guidance
        self.on = target.known.clone()  # (M,) bool
        self.steps: list[Tensor] = []  # (M,) bool each: whether DAT acted

    def __call__(self, points: Tensor, step: Tensor) -> Tensor:
        guidance = self.guidance
        number = (step[0] * len(self.shares)).round().long() - 1
        share = self.shares[number.cpu()].to(points)
        through = guidance.mode == "dat" and guidance.gradient == "denoiser"
        if not self.on.any():  # off for good: nothing more than the denoiser is computed
            self.steps.append(torch.zeros_like(self.on))
            return self.denoise(points, step)
        # x_K is noise alone: x̂_0 does not depend on it, and the Jacobian of a trained network there means nothing.
        no_signal = through and bool(share < _NO_SIGNAL)
        if no_signal or float(step[0]) > guidance.last + 1e-4:
            prediction = self.denoise(points, step)
            if self.first_estimate is None:
                self.first_estimate = clean_estimate(prediction, points, share, self.kind)
                self._switch(self.gap(self.first_estimate))
            self.steps.append(torch.zeros_like(self.on))
            return prediction
        with torch.enable_grad():
            noisy = points.detach().requires_grad_(through or guidance.mode == "disrupted")
            with torch.set_grad_enabled(through):
                prediction = self.denoise(noisy, step)
                clean = clean_estimate(prediction, noisy, share, self.kind)
            if self.first_estimate is None:
                self.first_estimate = clean.detach()
            place = noisy if guidance.mode == "disrupted" else clean if through else clean.detach().requires_grad_()
            projected = project(guidance, self.keypoints(place), self.target)
            gap = distribution_gap(guidance, projected, self.target)
            self._switch(gap.detach())
            self.steps.append(self.on.clone())
            if not self.on.any():
                return prediction.detach()
            leaf = noisy if guidance.mode == "disrupted" or through else place
            (gradient,) = torch.autograd.grad(gap.sum(), leaf)
        clean = clean.detach()
        if guidance.step == "line":
            move = self._line(clean, gradient)
        else:
            # The form of the paper's ĝ, in terms of x̂_0; stopped at x̂_0, its gradient is that over sqrt(abar).
            signal = share.sqrt().clamp_min(_LEAST_SIGNAL)
            over = signal if leaf is noisy else signal**2
            move = (1 - share) / over * gradient / (2 * gap.detach().clamp_min(1e-8).sqrt())[:, None, None]
        length = move.square().mean((-2, -1), keepdim=True).sqrt()
        move = move * (_LONGEST / length.clamp_min(1e-12)).clamp(max=1) * self.on[:, None, None]
        clean = clean - guidance.strength * move.nan_to_num()
        return torch.where(self.on[:, None, None], self._prediction(clean, points, share), prediction.detach())

    def _switch(self, gap: Tensor) -> None:  # (M,)
        """On at the first step, and as long as the relative gap stays above the threshold."""
        floor = self.target.floor
        if self.first_gap is None:
            self.first_gap = gap
        relative = (gap - floor).clamp_min(0) / (self.first_gap - floor).clamp_min(1e-8)
        self.on = self.on & (relative > self.guidance.threshold)

    def _line(self, clean: Tensor, direction: Tensor) -> Tensor:  # (M, P, 3)
        """How far along -direction the residual asks to go: least squares on the linear part of f."""
        norm = direction.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-20)
        unit = direction / norm
        small = 0.03  # units of the data, about a centimetre: where f is still linear, and far above rounding
        with torch.no_grad():
            here = project(self.guidance, self.keypoints(clean), self.target)
            there = project(self.guidance, self.keypoints(clean - small * unit), self.target)
            change, residual = (there - here) / small, self.target.points - here
            weight = self.target.weight[..., None]
            along = (weight * residual * change).sum((-2, -1))
            length = along / (weight * change.square()).sum((-2, -1)).clamp_min(1e-8)
        return unit * length.clamp_min(0)[:, None, None]

    def _prediction(self, clean: Tensor, points: Tensor, share: Tensor) -> Tensor:
        """x̂_0 as what the network predicts."""
        if self.kind == "sample":
            return clean
        alpha, sigma = share.sqrt().clamp_min(1e-4), (1 - share).sqrt().clamp_min(1e-4)
        noise = (points - alpha * clean) / sigma
        return noise if self.kind == "epsilon" else alpha * noise - sigma * clean

    @torch.no_grad()
    def gap(self, points: Tensor) -> Tensor:  # (M,)
        """D of a finished mesh, squared crop half-sides."""
        return distribution_gap(self.guidance, project(self.guidance, self.keypoints(points), self.target), self.target)


@dataclasses.dataclass(frozen=True)
class GuidanceReport:
    """What guidance did. Gaps are D in squared crop half-sides, of the first estimate x̂_0 and of the finished mesh."""

    gap_before: Tensor  # (B, N)
    gap_after: Tensor  # (B, N)
    active: Tensor  # (K, B) share of the person's hypotheses on which DAT acted at each step
    fell_back: Tensor  # (B, N) bool: guidance raised the gap, so the unguided mesh was taken

    @classmethod
    def join(cls, parts: list[GuidanceReport]) -> GuidanceReport:
        """Reports about further hypotheses of the same people, as one."""
        sizes = torch.tensor([part.gap_before.shape[1] for part in parts], dtype=torch.float32)
        active = torch.stack([part.active.cpu() for part in parts], -1) @ sizes / sizes.sum()
        names = ("gap_before", "gap_after", "fell_back")
        before, after, fell = (torch.cat([getattr(part, name) for part in parts], 1) for name in names)
        return cls(before, after, active, fell)


def aligned_sample(
    denoise: Denoise,
    scheduler: SchedulerMixin,
    start: tuple[Tensor, Sequence[torch.Generator]],  # x_K (M, P, 3), the rows' generators
    num_inference_steps: int,
    eta: float,
    keypoints: Callable[[Tensor], Tensor],  # (M, P, 3) -> (M, J, 3) metres
    target: Target,
    guidance: Guidance,
    people: int,  # B; M = B * N
    unguided: Callable[[Tensor], Tensor],  # numbers of rows (R,) -> their x_0 (R, P, 3) from the same x_K without DAT
    callback: Callback | None = None,
) -> tuple[Tensor, GuidanceReport]:  # x_0 (M, P, 3)
    """The reverse process with DAT.

    A hypothesis that ends with a larger gap than its first x̂_0 (the mean of all) is also drawn without, and the one
    with the smaller gap is kept. They are few, so this costs little.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"guidance needs a scheduler with a signal share; {type(scheduler).__name__} has none")
    aligned = AlignedDenoiser(denoise, scheduler, keypoints, target, guidance)
    noise, generators = start
    points = sample(aligned, scheduler, noise, num_inference_steps, generators, eta, callback=callback)
    before = aligned.gap(points if aligned.first_estimate is None else aligned.first_estimate)
    after = aligned.gap(points)
    worse = (after > before) & target.known
    if worse.any():
        plain = points.clone()
        plain[worse] = unguided(worse.nonzero()[:, 0]).to(plain)
        without = aligned.gap(plain)
        worse &= without < after
        points, after = torch.where(worse[:, None, None], plain, points), torch.where(worse, without, after)
    active = torch.stack(aligned.steps).float().unflatten(1, (people, -1)).mean(-1)
    rows = (people, -1)
    return points, GuidanceReport(before.unflatten(0, rows), after.unflatten(0, rows), active, worse.unflatten(0, rows))
