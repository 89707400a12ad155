"""The reverse process for all hypotheses of all people, in chunks of bounded size, optionally with DAT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.diffusion.dat import NO_SIGNAL, GuidanceReport, aligned_sample
from hmdiff.diffusion.gap import make_target
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.sampling import Callback, hypothesis_generators, initial_noise
from hmdiff.diffusion.sampling import sample as reverse_diffusion
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.files.diffusers_parts import Scheduler
from hmdiff.heatmaps import Heatmaps
from hmdiff.models.conditioning import Conditioning
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.pipeline.callbacks import Progress
from hmdiff.pipeline.cameras import CropCamera

GUIDANCE_STREAM = 1 << 32  # added to the seed for guidance's random draws
ROWS_AT_ONCE = 512  # people times hypotheses per denoiser call: bounds memory, results do not depend on it
GUIDED_ROWS_AT_ONCE = 128  # the same if guidance differentiates through the denoiser and keeps its activations


@dataclasses.dataclass(frozen=True)
class GuidancePlan:
    """Inputs of DAT for the people of one call."""

    guidance: Guidance
    heatmaps: Tensor  # (B, J, H, W)
    camera: Tensor  # (B, 3) predicted by the camera head
    principal_point: Tensor  # (B, 2) of the photo, crop coordinates
    keypoints: Callable[[Tensor], Tensor]  # diffusion points (M, P, 3) -> keypoints (M, J, 3) metres


def guidance_plan(
    model: MeshRecoveryModel,
    body: Body,
    guidance: Guidance | None,  # None: unguided
    heatmaps: Heatmaps | None,
    camera: Tensor,  # (B, 3)
    frames: CropCamera,
) -> GuidancePlan | None:
    """None for unguided sampling. Raises `UserError` without heatmaps, or for a body without keypoints."""
    if guidance is None or model.config.mode == "direct":
        return None
    if heatmaps is None:
        raise UserError("guidance needs heatmaps to steer by: give heatmaps=Heatmaps beside the images")
    if body.keypoint_regressor is None:
        raise UserError(f"guidance compares keypoints, and body {body.name!r} has none")
    matrix, rotation = model.keypoint_regressor(body), frames.rotation

    def keypoints(points: Tensor) -> Tensor:
        found = matrix @ model.to_coarse(points)
        if rotation is not None:
            found = found @ rotation.mT.repeat_interleave(len(found) // len(rotation), 0)
        return found

    return GuidancePlan(guidance, heatmaps.values.to(camera.device), camera, frames.principal_in_crop, keypoints)


def draw_hypotheses(
    model: MeshRecoveryModel,
    sampler: Scheduler,
    conditioning: Conditioning,  # of B people
    people: Sequence[int],
    sampling: SamplingConfig,  # resolved
    callback: Callback | None = None,
    progress: Progress | None = None,
    plan: GuidancePlan | None = None,
) -> tuple[Tensor, GuidanceReport | None]:  # (B, N, P, 3) points of the diffusion
    """Run the reverse process for all hypotheses. The direct baseline returns N copies.

    Raises:
        UserError: more steps than the model was trained with, or fewer than 1.
    """
    count, device, num_hypotheses = len(conditioning.tokens), conditioning.tokens.device, sampling.num_hypotheses
    if model.config.mode == "direct":
        return model.regress(conditioning).expand(-1, num_hypotheses, -1, -1), None
    steps, eta, seed = sampling.num_inference_steps, sampling.eta, sampling.seed
    assert steps is not None and eta is not None
    total = sampler.config.num_train_timesteps
    if not hasattr(steps, "__index__"):
        raise UserError(f"num_inference_steps {steps!r:.60}: a whole number is needed")
    if not 1 <= steps <= total:
        raise UserError(f"num_inference_steps {steps}: the model was trained with {total} steps; choose 1 to that")

    through = plan is not None and plan.guidance.mode == "dat" and plan.guidance.gradient == "denoiser"
    chunk = max(1, (GUIDED_ROWS_AT_ONCE if through else ROWS_AT_ONCE) // count)
    if plan is not None and plan.guidance.decision == "image":
        chunk = num_hypotheses  # the decision needs all hypotheses of an image at once
    # Every hypothesis starts from pure noise, which says nothing: their first x̂_0 is the same, the regressor's.
    shared = model.at_last_step(conditioning).points if _starts_from_nothing(sampler) else None
    parts, reports = [], []
    for first in range(0, num_hypotheses, chunk):
        width = min(chunk, num_hypotheses - first)

        def start(first: int = first, width: int = width) -> tuple[Tensor, list[torch.Generator]]:
            generators = hypothesis_generators(seed, people, width, first)
            return initial_noise(generators, model.num_points, device), generators

        def denoise(points: Tensor, step: Tensor, width: int = width) -> Tensor:
            if shared is not None and float(step[0]) == 1:
                return shared.expand(-1, width, -1, -1).flatten(0, 1)
            grouped = points.unflatten(0, (count, width))
            return model.denoise(grouped, step[:1, None], conditioning).flatten(0, 1)

        def unguided(rows: Tensor, width: int = width, start: Any = start) -> Tensor:
            noise, generators = start()
            some, same = conditioning.rows(rows // width), None if shared is None else shared[rows // width, 0]

            def denoise_rows(points: Tensor, step: Tensor) -> Tensor:
                if same is not None and float(step[0]) == 1:
                    return same
                return model.denoise(points[:, None], step[:1, None], some)[:, 0]

            return reverse_diffusion(
                denoise_rows,
                sampler,
                noise[rows],
                steps,
                [generators[row] for row in rows.tolist()],
                eta,
            )

        noise, generators = start()
        if plan is None:
            result = reverse_diffusion(denoise, sampler, noise, steps, generators, eta, callback=callback)
        else:
            # A separate random stream: drawing the u_i must not change the hypotheses' noise.
            draws = hypothesis_generators(seed + GUIDANCE_STREAM, people, width, first)
            target = make_target(plan.guidance, plan.heatmaps, plan.camera, draws, plan.principal_point)
            result, report = aligned_sample(
                denoise,
                sampler,
                (noise, generators),
                steps,
                eta,
                plan.keypoints,
                target,
                plan.guidance,
                count,
                unguided,
                callback,
            )
            reports.append(report)
        parts.append(result.unflatten(0, (count, width)))
        if progress is not None:
            progress(width * count)
    return torch.cat(parts, 1), GuidanceReport.join(reports) if reports else None


def _starts_from_nothing(sampler: Scheduler) -> bool:
    """Whether x_K holds no signal and the prediction is a mesh, so that one evaluation serves all hypotheses."""
    shares = getattr(sampler, "alphas_cumprod", None)
    return shares is not None and float(shares[-1]) < NO_SIGNAL and sampler.config.prediction_type == "sample"
