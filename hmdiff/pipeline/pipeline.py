"""The assembly: encode once, run the reverse process for N hypotheses, fit bodies, place them in the photo.

B people, N hypotheses, V vertices, K body joints, J keypoints (HALPE26).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.fitting import FittedBodies
from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.diffusion.dat import GuidanceReport
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.hypotheses import keypoint_nearness
from hmdiff.diffusion.sampling import Callback
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.diffusion.schedule import change_scheduler
from hmdiff.diffusion.temperature import Sampling, Temperature
from hmdiff.errors import UserError
from hmdiff.estimators.people import Photo, PhotoPeople, people_in
from hmdiff.estimators.source import PoseSource
from hmdiff.files.diffusers_parts import Scheduler
from hmdiff.heatmaps import Crop, Heatmaps, heatmap_peaks
from hmdiff.heatmaps.upright import turned_upright
from hmdiff.losses.rle import joint_confidence, rle_log_likelihood
from hmdiff.models.aggregation import HypothesisAggregator
from hmdiff.models.conditioning import Conditioning
from hmdiff.models.inputs import check_call, check_camera, check_result, check_weights
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.output import MeshOutput, log_likelihood
from hmdiff.pipeline.calibrated import Calibrated, calibrated
from hmdiff.pipeline.callbacks import Progress, StepEnd, progress_bar, step_callback
from hmdiff.pipeline.cameras import CropCamera
from hmdiff.pipeline.image_plane import REACH, ROUNDS, moved_to_peaks
from hmdiff.pipeline.inputs import depth_input, model_inputs, photo_inputs
from hmdiff.pipeline.reverse import GuidancePlan, draw_hypotheses, guidance_plan
from hmdiff.pipeline.saved import SavedPipeline
from hmdiff.pipeline.surface import SURFACES, nearest_bodies

if TYPE_CHECKING:
    from hmdiff.video.recover import Video

Photos = Photo | Sequence[Photo]


class HMDiffPipeline(SavedPipeline, Calibrated):
    """A model, its diffusion schedule and its body."""

    def __init__(
        self,
        model: MeshRecoveryModel,
        scheduler: Scheduler,  # of diffusers, by `make_scheduler`
        body: Body,
        num_inference_steps: int = 10,
        eta: float = 0.0,
    ) -> None:
        if body.num_vertices != model.config.num_vertices:
            raise UserError(
                f"the model predicts {model.config.num_vertices} vertices, but body {body.name!r} has "
                f"{body.num_vertices}; load the body that the model was trained on ({model.config.body!r})"
            )
        if body.faces is None:
            raise UserError(f"body {body.name!r} has no faces: give the whole body, not a selection of its vertices")
        if model.config.tokens == "parts":
            model.set_basis(lbs_basis(body, model.coarse_ids))
        self.model = model.eval()
        self.scheduler = scheduler
        self.faces = body.faces
        self.body = body
        self.num_inference_steps, self.eta = num_inference_steps, eta
        self.temperatures: dict[Sampling, Temperature] = {}
        self.aggregator: HypothesisAggregator | None = None  # optional MLP from N hypotheses to one mesh
        self._source: PoseSource | None = None
        self.dtype = torch.float32  # compute dtype of the networks
        self._progress_bar_config: dict[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.coarse_ids.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> HMDiffPipeline:
        """Move to a device; set the compute dtype of the networks, float32 or bfloat16 (by autocast).

        Raises:
            UserError: another dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            if dtype not in (torch.float32, torch.bfloat16):
                raise UserError(f"dtype {dtype}: choose torch.float32 or torch.bfloat16")
            self.dtype = dtype
        if device is not None:
            if self.aggregator is not None:
                self.aggregator.to(device)
            torch.nn.Module.to(self.model, device)  # ModelMixin.to is slow: it imports torch's compiler
            self.body.to(device)
            self.faces = self.faces.to(device)
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """Show a tqdm bar over the hypotheses of every call, with these options; `disable=True` hides it."""
        self._progress_bar_config = config

    def compile(self, **options: Any) -> HMDiffPipeline:
        """Compile the encoder and the denoiser, DAT's gradient included, by `torch.compile`, whose options these are.

        `mode="reduce-overhead"` records CUDA graphs. The first call of every shape (people, hypotheses) takes up to
        minutes; results change by rounding.
        """
        self.model.encode = torch.compile(self.model.encode, **options)  # type: ignore[method-assign]
        self.model.denoise = torch.compile(self.model.denoise, **options)  # type: ignore[method-assign]
        return self

    @torch.no_grad()
    def __call__(
        self,
        images: Photos | Tensor | None = None,  # photos, see `read`; or crops (B, 3, S, S) RGB 0..1
        heatmaps: Heatmaps | None = None,
        sampling: SamplingConfig | None = None,  # None: the defaults
        *,
        photo_sizes: Tensor | None = None,  # (B, 2) width, height in pixels; None: from the crop
        focal: Tensor | None = None,  # (B,) pixels; None: from the crop
        fit_camera: bool = True,  # fit each hypothesis' translation to the heatmaps' peaks; False: the camera head
        people: Sequence[int] | None = None,  # index of each person for the random seed; None: 0, 1, ...
        callback_on_step_end: StepEnd | None = None,  # as in diffusers; "latents" are the points, (B N, P, 3)
        progress: Progress | None = None,  # called with the number of hypotheses done
        depth: Tensor | None = None,  # (B, S, S) of the crops, larger = farther, any scale and shift, NaN = unknown
        **settings: Any,  # of `SamplingConfig`, override `sampling`: num_hypotheses=5, guidance=Guidance(), ...
    ) -> MeshOutput:
        """Recover all people. A seed gives the same result for any batch size.

        `pipe("photo.jpg")` uses keypoint or heatmap files beside the photo, or else the pose estimator `pipe.source`.
        Each person in the photos is a row of the output.

        Raises:
            UserError: an input that the model needs is missing, or a number is out of its range.
        """
        sampling = (sampling or SamplingConfig()).but(**settings)
        check_call(sampling.num_hypotheses, sampling.seed, sampling.eta, people)
        check_weights(next(self.model.parameters()).dtype)
        if sampling.surface not in SURFACES:
            raise UserError(f"surface {sampling.surface!r} is not known; choose one of {', '.join(SURFACES)}")
        photos: tuple[tuple[PhotoPeople, int], ...] = ()
        if images is not None and not isinstance(images, Tensor):
            found = self.read(images)
            photos = tuple((photo, number) for photo in found for number in range(len(photo.heatmaps)))
            images, heatmaps = photo_inputs(self.model, found)
            people = [number for _, number in photos] if people is None else people
            if sampling.guidance is None:
                sampling = sampling.but(guidance=self.default_guidance())
        if sampling.upright and heatmaps is not None and self.model.config.inputs == "heatmaps" and depth is None:
            heatmaps = turned_upright(heatmaps)
        images, values, valid = model_inputs(self.model, self.device, images, heatmaps, self.body.keypoint_names)
        given = len(values) if values is not None else len(images)  # type: ignore[arg-type]
        depth = depth_input(self.model, self.device, depth, given)
        with self._autocast():
            conditioning, camera = self.model.encode(images, values, valid, depth)
        camera = camera.float()
        count = len(camera)
        people = list(range(count)) if people is None else list(people)
        if len(people) != count:
            raise UserError(f"people: {len(people)} numbers for {count} people; give one for each")
        check_camera(photo_sizes, focal, count)
        if heatmaps is not None:
            crop = heatmaps.crop.to(camera)
        else:
            assert images is not None
            side = camera.new_full((count,), images.shape[-1])
            crop = Crop.of(side[:, None].expand(-1, 2) / 2, side)
        frames = CropCamera.of(crop.with_camera(photo_sizes, focal), self.model.config.frame == "crop")

        plan = guidance_plan(self.model, self.body, sampling.steered, heatmaps, camera, frames)
        callback, total = step_callback(self, callback_on_step_end), count * sampling.num_hypotheses
        with self._autocast(), progress_bar(self._progress_bar_config, total, progress) as done:
            points, report = self.denoised(conditioning, people, sampling, callback, done, plan)
        points = points.float()
        confidence, joint_scale, regressed = self._certainty(conditioning, points) or (None, None, None)
        one = None
        if self.aggregator is not None:
            together = frames.to_camera(self.aggregator(points)[:, None])
            together = self._at_peaks(together, plan, values, camera, frames)
            one = self._surface(together, sampling.surface, frames.translation(camera, 1))[0]
        translation = frames.translation(camera, sampling.num_hypotheses)
        placed = self._at_peaks(frames.to_camera(points), plan, values, camera, frames)
        vertices, joints, fitted = self._surface(placed, sampling.surface, translation)
        keypoints = self.body.keypoints(vertices) if self.body.keypoint_regressor is not None else None

        if fit_camera and values is not None and keypoints is not None:
            translation = frames.fitted_translation(keypoints, values, translation)
        check_result((vertices, translation))
        turned, likelihood = frames.turned, None
        if values is not None and keypoints is not None:
            assert valid is not None and heatmaps is not None
            seen = Heatmaps(values, valid, turned, heatmaps.names)
            likelihood = log_likelihood(keypoints, translation, turned.focal, turned.principal_point, seen)
        if frames.is_turned:
            vertices, joints, translation = frames.back(vertices), frames.back(joints), frames.back(translation)
            keypoints = None if keypoints is None else frames.back(keypoints)
            one = None if one is None else frames.back(one)
            fitted = None if fitted is None else frames.back_fitted(fitted)
        output = MeshOutput(
            vertices,
            joints,
            keypoints,
            camera,
            translation,
            turned.focal,
            turned.principal_point,
            self.faces,
            report,
            likelihood,
            confidence=confidence,
            joint_scale=joint_scale,
            rle_log_likelihood=regressed,
            fitted=fitted,
            body=self.body,
            photos=photos,
            aggregated_vertices=None if one is None else one[:, 0],
        )
        return calibrated(output, heatmaps, frames.crop.side, self.calibration(sampling))

    def _at_peaks(
        self,
        points: Tensor,  # (B, N, P, 3) of the diffusion, the camera's axes
        plan: GuidancePlan | None,
        heatmaps: Tensor | None,  # (B, J, H, W)
        camera: Tensor,  # (B, 3)
        frames: CropCamera,
    ) -> Tensor:  # (B, N, P, 3)
        """Apply the last step of guidance (`image_plane`), if enabled."""
        if plan is None or heatmaps is None or plan.guidance.mode != "dat" or plan.guidance.peaks == 0:
            return points
        peaks, confidence = heatmap_peaks(heatmaps)
        if plan.guidance.joint_weights is not None:
            confidence = confidence * confidence.new_tensor(plan.guidance.joint_weights).clamp(max=1)
        rest = self.body.v_template
        ours = torch.cat([rest[self.model.coarse_ids], self.body.joint_template])
        nearness = keypoint_nearness(ours, self.body.keypoints(rest[None])[0], REACH)
        regressor, seen_at = self.model.keypoint_regressor(self.body), frames.turned.to_photo(peaks)
        for _ in range(ROUNDS):
            keypoints = regressor @ self.model.to_coarse(points)
            translation = frames.fitted_translation(keypoints, heatmaps, frames.translation(camera, points.shape[1]))
            points = moved_to_peaks(
                points, keypoints, translation, seen_at, confidence, frames.turned, nearness, plan.guidance.peaks
            )
        return points

    def _surface(
        self,
        points: Tensor,  # (B, N, P, 3) of the diffusion, the camera's axes
        surface: str,
        translation: Tensor,  # (B, N, 3) metres
    ) -> tuple[Tensor, Tensor, FittedBodies | None]:  # vertices (B, N, V, 3), joints (B, N, K, 3), fit (B, N, ...)
        coarse = self.model.to_coarse(points)
        if surface == "body":
            return nearest_bodies(self.body, self.model, coarse, translation)
        return self.model.upsample(coarse), self.model.to_joints(points), None

    def denoised(
        self,
        conditioning: Conditioning,  # of B people
        people: Sequence[int],
        sampling: SamplingConfig,
        callback: Callback | None = None,
        progress: Progress | None = None,
        plan: GuidancePlan | None = None,
    ) -> tuple[Tensor, GuidanceReport | None]:  # (B, N, P, 3) points of the diffusion
        """Run the reverse process for all hypotheses. The direct baseline returns N copies."""
        found, sampler = self.resolved(sampling), self.scheduler
        if sampling.scheduler is not None and self.model.config.mode != "direct":
            sampler = change_scheduler(sampler, sampling.scheduler)
        return draw_hypotheses(self.model, sampler, conditioning, people, found, callback, progress, plan)

    def _certainty(
        self,
        conditioning: Conditioning,
        points: Tensor,  # (B, N, P, 3) of the hypotheses, the model's frame
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[()]:
        """RLE's joint confidence, σ̂ and log-likelihood per hypothesis, if the model has RLE.

        Evaluated at t = T, where σ̂ describes p(x_0 | image), see `losses/rle.py`.
        """
        if "joints" not in self.model.config.rle:
            return ()
        at_last = self.model.at_last_step(conditioning)
        mean, scale = at_last.points[:, 0, self.model.config.num_coarse :], at_last.scale["joints"][:, 0]
        flow = self.model.flow_log_probs()["joints"]
        joints = points[..., self.model.config.num_coarse :, :]
        likelihood = rle_log_likelihood(joints, mean, scale, flow, self.model.config.rle_variant)
        return joint_confidence(scale), scale * self.model.config.mesh_scale, likelihood

    def read(self, photos: Photos) -> list[PhotoPeople]:
        """Find the people in photos: a path, a PIL image, an array (H, W, 3) of uint8 RGB, or a list of these.

        Raises:
            UserError: a photo cannot be read, or nobody is found in it.
        """
        many = list(photos) if isinstance(photos, list | tuple) else [photos]
        if not many:
            raise UserError("no photos: the list is empty")
        return [people_in(photo, self.source) for photo in many]

    def video(self, clip: str | Path, **options: Any) -> Video:
        """Recover and track all people in a video: `pipe.video("clip.mp4", num_hypotheses=8, smoothing=0.06)`.

        Options and errors: see `hmdiff.video.recover.recover_video`.
        """
        from hmdiff.video.recover import recover_video

        return recover_video(self, clip, **options)

    @property
    def source(self) -> PoseSource:
        """The pose estimator for photos; to change it: ``pipe.source = load_source("vitpose:MODEL")``."""
        if self._source is None:
            from hmdiff.estimators.choose import load_source

            self._source = load_source()
        return self._source

    @source.setter
    def source(self, source: PoseSource | None) -> None:
        self._source = source

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def default_guidance(self) -> Guidance | None:
        """DAT with its defaults, as on the command line; None for a model that cannot be guided."""
        if self.model.config.mode == "direct" or self.body.keypoint_regressor is None:
            return None
        return Guidance()
