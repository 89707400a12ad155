"""DAT, the Distribution Alignment Technique of HMDiff (arXiv 2308.13369), as a wrapper of the denoiser.

Per reverse step k, for every hypothesis i of a person:

    x̂_0          the x0 prediction of the denoiser at x_k
    D_k           = sum_j w_j |u_ij - f_j(x̂_0)|²       distribution gap; u_i drawn from U, the estimator's heatmaps;
                                                        f: mesh -> its keypoints in the crop
    R_k           = (D_k - floor) / (D_K - floor)       relative gap; DAT is on while it exceeds a threshold, then off
                                                        for all later steps
    ĝ             = eps + s sqrt(1 - alpha_bar_k) grad_{x_k} D_k, with the gradient through x̂_0 and the denoiser

The scheduler then steps with ĝ. The paper publishes D_k, the gradient through x̂_0, the switch by a relative gap, and
two baselines: `none`, and `disrupted` (gap and gradient at x_k itself). `PAPER` is that form; the formula and the floor
of R_k (the expected gap of the draws themselves), s and the threshold are ours. The default differs where it measures
better (LOG.md): the mean of U instead of draws, R_k per hypothesis (independent of N), guidance in the second half of
the steps alone, and the step length.

Step length: in terms of x̂_0, the formula for ĝ is x̂_0 - s (1 - alpha_bar)/sqrt(alpha_bar) grad_{x_k} D. At small
alpha_bar the factor is huge and the gradient ill-conditioned. `step="line"` keeps the direction and takes the
Gauss-Newton length along it, <r, df> / |df|²; s = 1 is the full step. `step="gradient"` is the paper's formula; s has
the unit of 1 / D (squared crop half-sides), so that s = 1 has no visible effect. `step="score"` divides it by
2 sqrt(D_k).

Cost: backpropagation through the denoiser costs twice its forward pass, and the late steps give most of the gain, so
DAT is restricted to k/K <= `last`, a half; 1 is the paper's form.

M rows (the hypotheses of a person are adjacent), P points, J keypoints, H x W heatmaps. 2D in crop coordinates, -1..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hmdiff.diffusion.gap import Target, distribution_gap, project
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.noising import predict_x0
from hmdiff.diffusion.sampling import Callback, Denoise, sample
from hmdiff.errors import UserError
from hmdiff.files.diffusers_parts import Scheduler

_LEAST_SIGNAL = 0.1  # lower bound on sqrt(alpha_bar) in the score's factor
NO_SIGNAL = 1e-6  # alpha_bar of a terminal step: no gradient through the denoiser there
_LONGEST = 2.0  # bound on the RMS displacement of the points, units of the diffusion


class AlignedDenoiser:
    """Wraps a denoiser with DAT, for use in `sample`. Records the gap and the active steps for `GuidanceReport`."""

    def __init__(
        self,
        denoise: Denoise,
        scheduler: Scheduler,  # with `alphas_cumprod`
        keypoints: Callable[[Tensor], Tensor],  # points of the diffusion (M, P, 3) -> keypoints (M, J, 3) metres
        target: Target,
        guidance: Guidance,
        people: int = 1,  # B, for decision="image"
    ) -> None:
        self.people = people
        self.denoise, self.keypoints, self.target, self.guidance = denoise, keypoints, target, guidance
        self.shares: Tensor = scheduler.alphas_cumprod
        self.kind: str = scheduler.config.prediction_type
        self.first_gap: Tensor | None = None  # (M,) D_K
        self.first_estimate: Tensor | None = None  # (M, P, 3) x̂_0 before any guidance
        self.on = target.known.clone()  # (M,) bool
        self.steps: list[Tensor] = []  # (M,) bool each: whether DAT acted

    def __call__(self, x_t: Tensor, step: Tensor) -> Tensor:
        guidance = self.guidance
        number = (step[0] * len(self.shares)).round().long() - 1
        alpha_bar = self.shares[number.cpu()].to(x_t)
        through = guidance.mode == "dat" and guidance.gradient == "denoiser"
        if not self.on.any():
            self.steps.append(torch.zeros_like(self.on))
            return self.denoise(x_t, step)
        # x_K is pure noise: x̂_0 does not depend on it, so the Jacobian of a trained network is meaningless there.
        no_signal = through and bool(alpha_bar < NO_SIGNAL)
        if no_signal and guidance.first:
            no_signal = through = False  # gradient at x̂_0 itself
        if no_signal or float(step[0]) > guidance.last + 1e-4:
            prediction = self.denoise(x_t, step)
            if self.first_estimate is None:
                self.first_estimate = predict_x0(prediction, x_t, alpha_bar, self.kind)
                self._switch(self.gap(self.first_estimate))
            self.steps.append(torch.zeros_like(self.on))
            return prediction
        with torch.enable_grad():
            x_t_leaf = x_t.detach().requires_grad_(through or guidance.mode == "disrupted")
            with torch.set_grad_enabled(through):
                prediction = self.denoise(x_t_leaf, step)
                x0_pred = predict_x0(prediction, x_t_leaf, alpha_bar, self.kind)
            if self.first_estimate is None:
                self.first_estimate = x0_pred.detach()
            place = (
                x_t_leaf if guidance.mode == "disrupted" else x0_pred if through else x0_pred.detach().requires_grad_()
            )
            projected = project(guidance, self.keypoints(place), self.target)
            gap = distribution_gap(guidance, projected, self.target)
            self._switch(gap.detach())
            self.steps.append(self.on.clone())
            if not self.on.any():
                return prediction.detach()
            leaf = x_t_leaf if guidance.mode == "disrupted" or through else place
            (gradient,) = torch.autograd.grad(gap.sum(), leaf)
        x0_pred = x0_pred.detach()
        if guidance.step == "line":
            move = self._line(x_t_leaf.detach() if guidance.mode == "disrupted" else x0_pred, gradient)
        else:
            # The paper's ĝ in terms of x̂_0. If the gradient stops at x̂_0, grad_{x_k} = grad_{x̂_0} / sqrt(alpha_bar);
            # the factor is 1 where alpha_bar is 0.
            signal = alpha_bar.sqrt().clamp_min(_LEAST_SIGNAL)
            over = signal if leaf is x_t_leaf or bool(alpha_bar < NO_SIGNAL) else signal**2
            move = (1 - alpha_bar) / over * gradient
            if guidance.step == "score":
                move = move / (2 * gap.detach().clamp_min(1e-8).sqrt())[:, None, None]
        length = move.square().mean((-2, -1), keepdim=True).sqrt()
        move = move * (_LONGEST / length.clamp_min(1e-12)).clamp(max=1)
        x0_pred = x0_pred - guidance.strength * move.nan_to_num()
        return torch.where(self.on[:, None, None], self._prediction(x0_pred, x_t, alpha_bar), prediction.detach())

    def _switch(self, gap: Tensor) -> None:  # (M,)
        """Update `on`: True until the relative gap is at or below the threshold."""
        if self.first_gap is None:
            self.first_gap = gap
        excess, first = gap - self.target.floor, self.first_gap - self.target.floor
        if self.guidance.decision == "image":
            excess, first = (self._of_images(values) for values in (excess, first))
        relative = excess.clamp_min(0) / first.clamp_min(1e-8)
        self.on = self.on & (relative > self.guidance.threshold)

    def _of_images(self, values: Tensor) -> Tensor:  # (M,)
        """Mean over the hypotheses of each image, repeated for each of them."""
        return values.unflatten(0, (self.people, -1)).mean(1).repeat_interleave(len(values) // self.people)

    def _line(self, points: Tensor, direction: Tensor) -> Tensor:  # (M, P, 3)
        """Gauss-Newton step along -direction: least squares on the linearisation of f."""
        norm = direction.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-20)
        unit = direction / norm
        small = 0.03  # finite difference, about 1 cm: f is nearly linear over it, and rounding is negligible
        with torch.no_grad():
            here = project(self.guidance, self.keypoints(points), self.target)
            there = project(self.guidance, self.keypoints(points - small * unit), self.target)
            change, residual = (there - here) / small, self.target.points - here
            weight = self.target.weight[..., None]
            along = (weight * residual * change).sum((-2, -1))
            length = along / (weight * change.square()).sum((-2, -1)).clamp_min(1e-8)
        return unit * length.clamp_min(0)[:, None, None]

    def _prediction(self, x0_pred: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """x̂_0 converted to the prediction type."""
        if self.kind == "sample":
            return x0_pred
        alpha, sigma = alpha_bar.sqrt().clamp_min(1e-4), (1 - alpha_bar).sqrt().clamp_min(1e-4)
        noise = (x_t - alpha * x0_pred) / sigma
        return noise if self.kind == "epsilon" else alpha * noise - sigma * x0_pred

    @torch.no_grad()
    def gap(self, points: Tensor) -> Tensor:  # (M,)
        """D of a mesh, squared crop half-sides."""
        return distribution_gap(self.guidance, project(self.guidance, self.keypoints(points), self.target), self.target)


@dataclasses.dataclass(frozen=True)
class GuidanceReport:
    """Effect of guidance. Gaps are D in squared crop half-sides, of the first x̂_0 and of the final mesh."""

    gap_before: Tensor  # (B, N)
    gap_after: Tensor  # (B, N)
    active: Tensor  # (K, B) fraction of the hypotheses with DAT active at each step
    fell_back: Tensor  # (B, N) bool: guidance raised the gap, so the unguided mesh is returned

    @classmethod
    def join(cls, parts: list[GuidanceReport]) -> GuidanceReport:
        """Concatenate reports on different hypotheses of the same people."""
        sizes = torch.tensor([part.gap_before.shape[1] for part in parts], dtype=torch.float32)
        active = torch.stack([part.active.cpu() for part in parts], -1) @ sizes / sizes.sum()
        names = ("gap_before", "gap_after", "fell_back")
        before, after, fell = (torch.cat([getattr(part, name) for part in parts], 1) for name in names)
        return cls(before, after, active, fell)


def aligned_sample(
    denoise: Denoise,
    scheduler: Scheduler,
    start: tuple[Tensor, Sequence[torch.Generator]],  # x_K (M, P, 3); a generator per row
    num_inference_steps: int,
    eta: float,
    keypoints: Callable[[Tensor], Tensor],  # (M, P, 3) -> (M, J, 3) metres
    target: Target,
    guidance: Guidance,
    people: int,  # B; M = B * N
    unguided: Callable[[Tensor], Tensor],  # row indices (R,) -> their x_0 (R, P, 3) from the same x_K without DAT
    callback: Callback | None = None,
) -> tuple[Tensor, GuidanceReport]:  # x_0 (M, P, 3)
    """The reverse process with DAT. Raises `UserError` for a scheduler without `alphas_cumprod`.

    With `fall_back`, a hypothesis whose final gap exceeds that of its first x̂_0 is also sampled without guidance, and
    the one with the smaller gap is returned. This is rare, so the cost is small.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"guidance needs a scheduler with alphas_cumprod; {type(scheduler).__name__} has none")
    # The last step is guided whatever `last` says; timesteps are rounded to 1 / K.
    least = 1 / num_inference_steps + 0.5 / len(scheduler.alphas_cumprod)
    guidance = dataclasses.replace(guidance, last=min(1.0, max(guidance.last, least)))
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
