"""DAT, the Distribution Alignment Technique of HMDiff (arXiv 2308.13369), as a wrapper of the denoiser.

Per reverse step k, for every hypothesis i of a person:

    x̂_0          the clean mesh that the denoiser sees in x_k
    D_k           = sum_j w_j |u_ij - f_j(x̂_0)|²       the distribution gap; u_i drawn from U, the estimator's heatmaps,
                                                        f: mesh -> its keypoints in the crop
    R_k           = (D_k - floor) / (D_K - floor)       the relative gap; DAT is on while it exceeds a threshold, and
                                                        then off for good
    ĝ             = eps + s sqrt(1 - abar_k) grad_{x_k} D_k, the gradient going through x̂_0 and so the denoiser

and the ordinary scheduler step follows with ĝ. The paper gives D_k, the gradient through x̂_0, that a relative gap
switches DAT off, and the two comparisons (`none`, and `disrupted`: gap, gradient and length at x_k itself). `PAPER` is
its form with what it leaves open filled in: R_k's formula and floor (what the draws of U themselves are off), s and the
threshold. Our default differs, since it measures better (LOG.md): the mean of U in place of draws, the decision by
hypothesis (one does not depend on how many others were asked for), nothing at the first step, and the length.

On that length: in terms of x̂_0 the formula for ĝ says x̂_0 - s (1 - abar)/sqrt(abar) grad_{x_k} D. Where abar is small,
the factor is huge and the gradient a difference of small numbers. `step="line"` keeps the direction and takes the
length that the residual asks for (Gauss-Newton along the line: <r, df> / |df|²), so that s = 1 means "as far as this
direction explains". `step="gradient"` is the formula; its s has the unit of 1 / D, here of squared crop half-sides in
the mean over joints, so s = 1 moves nothing that could be seen. `step="score"` is the formula over 2 sqrt(D_k).

And on its cost: going back through the denoiser is twice its price, and the late steps give most of the gain. `last`
keeps DAT to the end of the process, where k/K <= last; 1 is the paper's form.

M rows (a person's hypotheses side by side), P points, J keypoints, H x W heatmaps. 2D in crop coordinates, -1..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hmdiff.diffusion.gap import Target, distribution_gap, project
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.noising import clean_estimate
from hmdiff.diffusion.sampling import Callback, Denoise, sample
from hmdiff.errors import UserError
from hmdiff.files.diffusers_parts import Scheduler

_LEAST_SIGNAL = 0.1  # sqrt(abar) below which the score's factor grows no further
_NO_SIGNAL = 1e-6  # abar of a terminal step: nothing is steered through the denoiser there
_LONGEST = 2.0  # root mean square of a point's move, in units of the data


class AlignedDenoiser:
    """The denoiser with DAT around it, to be given to `sample` in its place. Keeps what happened, for the report."""

    def __init__(
        self,
        denoise: Denoise,
        scheduler: Scheduler,  # with `alphas_cumprod`
        keypoints: Callable[[Tensor], Tensor],  # points of the diffusion (M, P, 3) -> keypoints (M, J, 3) metres
        target: Target,
        guidance: Guidance,
        people: int = 1,  # B, of which the M rows are; for a decision by image
    ) -> None:
        self.people = people
        self.denoise, self.keypoints, self.target, self.guidance = denoise, keypoints, target, guidance
        self.shares: Tensor = scheduler.alphas_cumprod
        self.kind: str = scheduler.config.prediction_type
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
        if no_signal and guidance.first:
            no_signal = through = False  # steered at x̂_0 itself
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
            move = self._line(noisy.detach() if guidance.mode == "disrupted" else clean, gradient)
        else:
            # The paper's ĝ in terms of x̂_0. Stopped at x̂_0, its gradient is that over sqrt(abar), and 1 is taken for
            # it where there is no signal.
            signal = share.sqrt().clamp_min(_LEAST_SIGNAL)
            over = signal if leaf is noisy or bool(share < _NO_SIGNAL) else signal**2
            move = (1 - share) / over * gradient
            if guidance.step == "score":
                move = move / (2 * gap.detach().clamp_min(1e-8).sqrt())[:, None, None]
        length = move.square().mean((-2, -1), keepdim=True).sqrt()
        move = move * (_LONGEST / length.clamp_min(1e-12)).clamp(max=1) * self.on[:, None, None]
        clean = clean - guidance.strength * move.nan_to_num()
        return torch.where(self.on[:, None, None], self._prediction(clean, points, share), prediction.detach())

    def _switch(self, gap: Tensor) -> None:  # (M,)
        """On at the first step, and as long as the relative gap stays above the threshold."""
        if self.first_gap is None:
            self.first_gap = gap
        excess, first = gap - self.target.floor, self.first_gap - self.target.floor
        if self.guidance.decision == "image":
            excess, first = (self._of_images(values) for values in (excess, first))
        relative = excess.clamp_min(0) / first.clamp_min(1e-8)
        self.on = self.on & (relative > self.guidance.threshold)

    def _of_images(self, values: Tensor) -> Tensor:  # (M,)
        """The mean over the hypotheses of each image, for all of them."""
        return values.unflatten(0, (self.people, -1)).mean(1).repeat_interleave(len(values) // self.people)

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
    scheduler: Scheduler,
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
    aligned = AlignedDenoiser(denoise, scheduler, keypoints, target, guidance, people)
    noise, generators = start
    points = sample(aligned, scheduler, noise, num_inference_steps, generators, eta, callback=callback)
    before = aligned.gap(points if aligned.first_estimate is None else aligned.first_estimate)
    after = aligned.gap(points)
    worse = (after > before) & target.known & guidance.fall_back
    if worse.any():
        plain = points.clone()
        plain[worse] = unguided(worse.nonzero()[:, 0]).to(plain)
        without = aligned.gap(plain)
        worse &= without < after
        points, after = torch.where(worse[:, None, None], plain, points), torch.where(worse, without, after)
    active = torch.stack(aligned.steps).float().unflatten(1, (people, -1)).mean(-1)
    rows = (people, -1)
    return points, GuidanceReport(before.unflatten(0, rows), after.unflatten(0, rows), active, worse.unflatten(0, rows))
