"""HMDiffPipeline: photos or heatmaps in, several meshes of every person out.

    pipe = HMDiffPipeline.from_pretrained("hmdiff_small")
    output = pipe(heatmaps=heatmaps, num_hypotheses=25, seed=0)
    output.vertices  # (B, 25, V, 3) metres

A saved pipeline is a folder of JSON and safetensors; nothing in it is unpickled, and no licensed body is in it.
B people, N hypotheses, V vertices, K body joints, J keypoints (HALPE26).
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hmdiff.body.body import Body, load_named_body
from hmdiff.body.fitting import FittedBodies, fit_coarse
from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.diffusion.dat import GuidanceReport, aligned_sample
from hmdiff.diffusion.gap import make_target
from hmdiff.diffusion.guidance import Guidance
from hmdiff.diffusion.hypotheses import Reprojection, keypoint_nearness
from hmdiff.diffusion.image_evidence import image_evidence
from hmdiff.diffusion.sampling import Callback, hypothesis_generators, initial_noise
from hmdiff.diffusion.sampling import sample as reverse_diffusion
from hmdiff.diffusion.schedule import change_scheduler, load_scheduler, sampler_name
from hmdiff.diffusion.temperature import Sampling, Temperature
from hmdiff.errors import UserError
from hmdiff.estimators.people import Photo, PhotoPeople, crops, people_in
from hmdiff.estimators.source import PoseSource
from hmdiff.files.checksums import folder_checksums, verify_checksums
from hmdiff.files.diffusers_parts import SchedulerMixin
from hmdiff.files.hub import download, is_repository_id, upload
from hmdiff.files.reading import read_json
from hmdiff.files.resources import asset_path
from hmdiff.files.storage import atomic_folder
from hmdiff.geometry import (
    axis_angle_to_matrix,
    crop_rotation,
    matrix_to_axis_angle,
    perspective_translation_fit,
    weak_to_full_camera,
)
from hmdiff.heatmaps import Crop, Heatmaps, concatenate_heatmaps, heatmap_peaks
from hmdiff.heatmaps.upright import turned_upright
from hmdiff.losses.rle import joint_confidence, rle_log_likelihood
from hmdiff.models.aggregation import HypothesisAggregator, load_aggregator, save_aggregator
from hmdiff.models.conditioning import Conditioning
from hmdiff.models.inputs import check_call, check_camera, check_depth, check_pictures, check_result, check_weights
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.models.saved import WEIGHTS, load_model
from hmdiff.output import MeshOutput, keypoint_distance, log_likelihood, projected_keypoints

if TYPE_CHECKING:
    from hmdiff.video.recover import Video

__all__ = ["GuidancePlan", "HMDiffPipeline", "MeshOutput", "keypoint_distance"]

FORMAT = 1
Photos = Photo | Sequence[Photo]
ABOUT = "hmdiff.json"
AGGREGATOR = "aggregator"  # the folder of the optional head
GUIDANCE_STREAM = 1 << 32  # added to the seed where guidance draws
SURFACES = ("body", "vertices")
ROWS_AT_ONCE = 512  # people times hypotheses in one evaluation of the denoiser: bounds the memory, changes no result
GUIDED_ROWS_AT_ONCE = 128  # where a gradient goes back through it, and all that the denoiser computed is kept


@dataclasses.dataclass(frozen=True)
class GuidancePlan:
    """All that DAT needs to know of the people of one call."""

    guidance: Guidance
    heatmaps: Tensor  # (B, J, H, W)
    camera: Tensor  # (B, 3) the head's
    principal_point: Tensor  # (B, 2) of the photo, crop coordinates
    keypoints: Callable[[Tensor], Tensor]  # points of the diffusion (M, P, 3) -> (M, J, 3) metres


class HMDiffPipeline:
    """A model, the schedule it was trained with, and its body."""

    def __init__(
        self,
        model: MeshRecoveryModel,
        scheduler: SchedulerMixin,  # of diffusers, by `make_scheduler`
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
        self.aggregator: HypothesisAggregator | None = None  # from N hypotheses to one mesh, where one was trained
        self._source: PoseSource | None = None
        self.dtype = torch.float32  # what the networks compute in

    @property
    def device(self) -> torch.device:
        return self.model.coarse_ids.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> HMDiffPipeline:
        """Move to a device; weights to bfloat16 or float32, which changes how the denoiser computes and nothing else.

        Raises:
            UserError: a dtype that the model cannot compute in.
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
            torch.nn.Module.to(self.model, device)  # ModelMixin's own imports torch's compiler, to look for its hooks
            self.body.to(device)
            self.faces = self.faces.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        images: Photos | Tensor | None = None,  # photos, as `read`; or crops (B, 3, S, S) RGB 0..1
        heatmaps: Heatmaps | None = None,
        num_hypotheses: int = 25,
        num_inference_steps: int | None = None,  # None: the number saved with the pipeline
        seed: int = 0,
        scheduler: str | None = None,  # another sampler, such as "ddpm" or "dpm++"
        eta: float | None = None,  # DDIM's share of fresh noise
        photo_sizes: Tensor | None = None,  # (B, 2) width, height in pixels; None: the size that the crop carries
        focal: Tensor | None = None,  # (B,) pixels; None: the focal length that the crop carries
        fit_camera: bool = True,  # place every hypothesis where the heatmaps' peaks see it; False: the head's camera
        people: Sequence[int] | None = None,  # number of every person among all asked for; None: 0, 1, ...
        callback: Callback | None = None,
        progress: Callable[[int], None] | None = None,  # told how many hypotheses are done
        guidance: Guidance | None = None,  # DAT towards `heatmaps`, which an image model may be given for this alone;
        # of photos DAT is the default, as on the command line: Guidance(mode="none") is none
        depth: Tensor | None = None,  # (B, S, S) of the crops, larger = farther, any scale and shift, NaN = not known
        surface: str = "body",  # of every hypothesis: the nearest body's, or the predicted "vertices" as they are
        upright: bool = True,  # heatmaps alone: turn the crops of people who lie or are upside down
    ) -> MeshOutput:
        """Recover the people. The same seed gives the same result whatever the batch or the device's number of rows.

        `pipe("photo.jpg")` looks for keypoints or heatmaps beside the photo, else its pose estimator looks at it
        (`pipe.source`); everybody in the photos is a row of the output.

        Raises:
            UserError: an input that the model needs is missing, or a number is out of its range.
        """
        check_call(num_hypotheses, seed, eta, people)
        check_weights(next(self.model.parameters()).dtype)
        if surface not in SURFACES:
            raise UserError(f"surface {surface!r} is not known; choose one of {', '.join(SURFACES)}")
        photos: tuple[tuple[PhotoPeople, int], ...] = ()
        if images is not None and not isinstance(images, Tensor):
            found = self.read(images)
            photos = tuple((photo, number) for photo in found for number in range(len(photo.heatmaps)))
            images, heatmaps = self._photo_inputs(found)
            people = [number for _, number in photos] if people is None else people
            guidance = self.default_guidance() if guidance is None else guidance
        if upright and heatmaps is not None and self.model.config.inputs == "heatmaps" and depth is None:
            heatmaps = turned_upright(heatmaps)
        images, values, valid = self._inputs(images, heatmaps)
        depth = self._depth(depth, len(values) if values is not None else len(images))  # type: ignore[arg-type]
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
        crop = crop.with_camera(photo_sizes, focal)
        # All that follows happens in the photo's camera turned about its axis until the crop is upright; the result is
        # turned back at the end.
        turned, turn = crop.upright(), crop.turn_3d()
        center, side, focal, principal = turned.center, turned.side, turned.focal, turned.principal_point
        principal_in_crop = turned.from_photo(principal[:, None])[:, 0]
        rotation = None
        if self.model.config.frame == "crop":
            rotation = crop_rotation(principal_in_crop, focal * 2 / side)

        plan = self._guidance_plan(guidance, heatmaps, camera, principal_in_crop, rotation)
        with self._autocast():
            points, report = self.denoised(
                conditioning, people, num_hypotheses, num_inference_steps, seed, scheduler, eta, callback, progress,
                plan,
            )  # fmt: skip
        points = points.float()
        confidence, joint_scale, regressed = self._certainty(conditioning, points) or (None, None, None)
        together = None if self.aggregator is None else self.aggregator(points)[:, None]
        if rotation is not None:
            points = points @ rotation[:, None].mT
            together = None if together is None else together @ rotation[:, None].mT
        coarse, joints = self.model.to_coarse(points), self.model.to_joints(points)
        fitted = None
        if surface == "body":
            vertices, joints, fitted = self._bodies(coarse)
        else:
            vertices = self.model.upsample(coarse)
        keypoints = self.body.keypoints(vertices) if self.body.keypoint_regressor is not None else None
        one = None
        if together is not None:
            one = self.model.to_coarse(together)
            one = self._bodies(one)[0] if surface == "body" else self.model.upsample(one)

        translation = weak_to_full_camera(camera, center, side, focal, principal)
        translation = translation[:, None].expand(-1, num_hypotheses, -1)
        if fit_camera and heatmaps is not None and keypoints is not None:
            assert values is not None
            peaks, height = heatmap_peaks(values)
            translation = perspective_translation_fit(
                keypoints, turned.to_photo(peaks)[:, None], height[:, None], focal[:, None],
                principal[:, None], prior=translation,
            )  # fmt: skip
        check_result((vertices, translation))
        likelihood = None
        if heatmaps is not None and keypoints is not None:
            assert values is not None and valid is not None
            likelihood = log_likelihood(keypoints, translation, focal, principal, Heatmaps(values, valid, turned))
        if crop.rotation.any():
            back = turn[:, None].mT
            vertices, joints, translation = vertices @ back, joints @ back, (translation[:, :, None] @ back)[:, :, 0]
            keypoints = None if keypoints is None else keypoints @ back
            one = None if one is None else one @ back
            if fitted is not None:  # about the pelvis, which is at the origin: the translation stays
                root = turn[:, None] @ axis_angle_to_matrix(fitted.pose[:, :, 0])
                pose = torch.cat([matrix_to_axis_angle(root)[:, :, None], fitted.pose[:, :, 1:]], 2)
                fitted = fitted._replace(pose=pose)
        output = MeshOutput(
            vertices, joints, keypoints, camera, translation, focal, principal, self.faces, report, likelihood,
            confidence=confidence, joint_scale=joint_scale, rle_log_likelihood=regressed, fitted=fitted, body=self.body,
            photos=photos, aggregated_vertices=None if one is None else one[:, 0],
        )  # fmt: skip
        calibration = self.calibration(num_inference_steps, scheduler, eta, guidance)
        return _calibrated(output, heatmaps, crop.side, calibration)

    def _bodies(
        self,
        coarse: Tensor,  # (B, N, C, 3) metres
    ) -> tuple[Tensor, Tensor, FittedBodies]:  # vertices (B, N, V, 3), joints (B, N, K, 3), of (B, N, ...)
        """Every hypothesis as the body nearest to its coarse mesh, the pelvis at the origin."""
        people, hypotheses = coarse.shape[:2]
        # The direct baseline's hypotheses are copies of one.
        alone = coarse[:, :1] if self.model.config.mode == "direct" else coarse
        found = fit_coarse(self.body, self.model.coarse_ids, alone.flatten(0, 1))
        posed = self.body(found.betas, axis_angle_to_matrix(found.pose))
        shift = -posed.joints[:, 0]
        found = found._replace(translation=shift)

        def grouped(value: Tensor) -> Tensor:
            return value.unflatten(0, (people, -1)).expand(-1, hypotheses, *value.shape[1:])

        fitted = FittedBodies(*map(grouped, found))
        return grouped(posed.vertices + shift[:, None]), grouped(posed.joints + shift[:, None]), fitted

    def read(self, photos: Photos) -> list[PhotoPeople]:
        """Photos as the pipeline takes them: a path, a PIL image, an array (H, W, 3) of uint8 RGB, or a list of these.

        Raises:
            UserError: a photo cannot be read, or nobody is found in it.
        """
        many = list(photos) if isinstance(photos, list | tuple) else [photos]
        if not many:
            raise UserError("no photos: the list is empty")
        return [people_in(photo, self.source) for photo in many]

    def video(self, clip: str | Path, **options: Any) -> Video:
        """Everybody in a video as tracks of bodies: `pipe.video("clip.mp4", num_hypotheses=8, smoothing=0.08)`.

        Options, and what raises `UserError`: see `hmdiff.video.recover.recover_video`.
        """
        from hmdiff.video.recover import recover_video

        return recover_video(self, clip, **options)

    @property
    def source(self) -> PoseSource:
        """What looks at photos; set another, such as ``pipe.source = load_source("vitpose:MODEL")``."""
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
        """DAT, as the command line has it; None where nothing can be steered."""
        if self.model.config.mode == "direct" or self.body.keypoint_regressor is None:
            return None
        return Guidance()

    def _photo_inputs(self, found: Sequence[PhotoPeople]) -> tuple[Tensor | None, Heatmaps]:
        heatmaps = concatenate_heatmaps([photo.heatmaps for photo in found])
        if self.model.config.inputs == "heatmaps":
            return None, heatmaps
        size = self.model.config.image_size
        return torch.cat([crops(photo.pixels(), photo.heatmaps, size) for photo in found]), heatmaps

    def sampling(
        self,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        eta: float | None = None,
        guidance: Guidance | None = None,
    ) -> Sampling:
        """The way of sampling that these arguments of a call mean; None is what was saved."""
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        name = sampler_name(self.scheduler) if scheduler is None else scheduler
        return Sampling.of(steps, name, self.eta if eta is None else eta, guidance)

    def temperature(
        self,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        eta: float | None = None,
        guidance: Guidance | None = None,
    ) -> float:
        """By what the spread of these hypotheses is multiplied to be calibrated; 1 where nothing was fitted.

        Of a person like most that it was fitted on: `MeshOutput.temperature` has everybody's own.
        """
        fitted = self.calibration(num_inference_steps, scheduler, eta, guidance)
        return 1.0 if fitted is None else fitted.temperature

    def calibration(
        self,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        eta: float | None = None,
        guidance: Guidance | None = None,
    ) -> Temperature | None:
        """What was fitted for this way of sampling: temperature, factor of the evidence, confidence. None: nothing."""
        return self.temperatures.get(self.sampling(num_inference_steps, scheduler, eta, guidance))

    def set_temperature(self, fitted: Temperature) -> None:
        """Use it from now on, and save it with the pipeline; it replaces an older one of the same way of sampling."""
        self.temperatures[fitted.sampling] = fitted

    def denoised(
        self,
        conditioning: Conditioning,  # of B people
        people: Sequence[int],
        num_hypotheses: int,
        num_inference_steps: int | None = None,
        seed: int = 0,
        scheduler: str | None = None,
        eta: float | None = None,
        callback: Callback | None = None,
        progress: Callable[[int], None] | None = None,
        plan: GuidancePlan | None = None,
    ) -> tuple[Tensor, GuidanceReport | None]:  # (B, N, P, 3) points of the diffusion
        """Run the reverse process for all hypotheses, in chunks of bounded size. The direct baseline gives N copies."""
        count = len(conditioning.tokens)
        if self.model.config.mode == "direct":
            return self.model.regress(conditioning).expand(-1, num_hypotheses, -1, -1), None
        sampler = self.scheduler if scheduler is None else change_scheduler(self.scheduler, scheduler)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        total = sampler.config.num_train_timesteps  # type: ignore[attr-defined]
        if not 1 <= steps <= total:
            raise UserError(f"num_inference_steps {steps}: the model was trained with {total} steps; choose 1 to that")
        eta = self.eta if eta is None else eta

        through = plan is not None and plan.guidance.mode == "dat" and plan.guidance.gradient == "denoiser"
        chunk = max(1, (GUIDED_ROWS_AT_ONCE if through else ROWS_AT_ONCE) // count)
        if plan is not None and plan.guidance.decision == "image":
            chunk = num_hypotheses  # the decision is about all of an image's hypotheses
        parts, reports = [], []
        for first in range(0, num_hypotheses, chunk):
            width = min(chunk, num_hypotheses - first)

            def start(first: int = first, width: int = width) -> tuple[Tensor, list[torch.Generator]]:
                generators = hypothesis_generators(seed, people, width, first)
                return initial_noise(generators, self.model.num_points, self.device), generators

            def denoise(points: Tensor, step: Tensor, width: int = width) -> Tensor:
                grouped = points.unflatten(0, (count, width))
                return self.model.denoise(grouped, step.reshape(count, width), conditioning).flatten(0, 1)

            def unguided(rows: Tensor, width: int = width, start: Any = start) -> Tensor:
                noise, generators = start()
                some = conditioning.rows(rows // width)
                return reverse_diffusion(
                    lambda points, step: self.model.denoise(points[:, None], step[:, None], some)[:, 0],
                    sampler, noise[rows], steps, [generators[row] for row in rows.tolist()], eta,
                )  # fmt: skip

            noise, generators = start()
            if plan is None:
                result = reverse_diffusion(denoise, sampler, noise, steps, generators, eta, callback=callback)
            else:
                # A stream of its own: the u_i neither repeat nor disturb the noise of the hypotheses.
                draws = hypothesis_generators(seed + GUIDANCE_STREAM, people, width, first)
                target = make_target(plan.guidance, plan.heatmaps, plan.camera, draws, plan.principal_point)
                result, report = aligned_sample(
                    denoise, sampler, (noise, generators), steps, eta, plan.keypoints, target, plan.guidance, count,
                    unguided, callback,
                )  # fmt: skip
                reports.append(report)
            parts.append(result.unflatten(0, (count, width)))
            if progress is not None:
                progress(width * count)
        return torch.cat(parts, 1), GuidanceReport.join(reports) if reports else None

    def _certainty(
        self,
        conditioning: Conditioning,
        points: Tensor,  # (B, N, P, 3) of the hypotheses, the model's frame
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[()]:
        """Confidence and σ̂ of the joints and the likelihood of every hypothesis, by RLE where the model has it.

        At the last step, where σ̂ is of p(x_0 | image): see `losses/rle.py`.
        """
        if "joints" not in self.model.config.rle:
            return ()
        at_last = self.model.at_last_step(conditioning)
        mean, scale = at_last.points[:, 0, self.model.config.num_coarse :], at_last.scale["joints"][:, 0]
        flow = self.model.flow_log_probs()["joints"]
        joints = points[..., self.model.config.num_coarse :, :]
        likelihood = rle_log_likelihood(joints, mean, scale, flow, self.model.config.rle_variant)
        return joint_confidence(scale), scale * self.model.config.mesh_scale, likelihood

    def _depth(self, depth: Tensor | None, people: int) -> Tensor | None:
        """The depth maps, checked against what the model reads."""
        if not self.model.config.depth_map:
            if depth is not None:
                raise UserError("this model reads no depth maps: leave depth out, or take one with model.depth_map")
            return None
        if depth is None:
            raise UserError("this model reads depth maps: give depth=(B, S, S), NaN where it is not known")
        if depth.dim() != 3 or len(depth) != people or depth.shape[1] != depth.shape[2] or depth.shape[1] < 2:
            found = tuple(depth.shape)
            raise UserError(f"depth: shape {found} found, ({people}, S, S) expected: a map of each square crop")
        if not depth.is_floating_point():
            depth = depth.float()
        check_depth(depth)
        return depth.to(self.device)

    def _guidance_plan(
        self,
        guidance: Guidance | None,
        heatmaps: Heatmaps | None,
        camera: Tensor,  # (B, 3)
        principal_point: Tensor,  # (B, 2) crop coordinates
        rotation: Tensor | None,  # (B, 3, 3) from the model's frame to the camera's
    ) -> GuidancePlan | None:
        if guidance is None or not guidance.active or self.model.config.mode == "direct":
            return None
        if heatmaps is None:
            raise UserError("guidance needs heatmaps to steer by: give heatmaps=Heatmaps beside the images")
        if self.body.keypoint_regressor is None:
            raise UserError(f"guidance compares keypoints, and body {self.body.name!r} has none")
        matrix = self.model.keypoint_regressor(self.body)

        def keypoints(points: Tensor) -> Tensor:
            found = matrix @ self.model.to_coarse(points)
            if rotation is not None:
                found = found @ rotation.mT.repeat_interleave(len(found) // len(rotation), 0)
            return found

        return GuidancePlan(guidance, heatmaps.values.to(self.device), camera, principal_point, keypoints)

    def _inputs(
        self, images: Tensor | None, heatmaps: Heatmaps | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        needs = self.model.config.inputs
        if needs in ("heatmaps", "both") and heatmaps is None:
            raise UserError("this model reads heatmaps: give heatmaps=Heatmaps, from keypoints, a file or mmpose")
        if needs in ("image", "both"):
            if images is None:
                raise UserError("this model reads pictures: give images=(B, 3, S, S) crops, RGB 0..1")
            size = self.model.config.image_size
            if images.dim() != 4 or images.shape[1] != 3:
                raise UserError(f"images: shape {tuple(images.shape)} found, (B, 3, {size}, {size}) expected")
            if not images.is_floating_point():
                raise UserError(f"images: {images.dtype} found, RGB of 0..1 expected; divide 8-bit pictures by 255")
            if heatmaps is not None and len(heatmaps) != len(images):
                raise UserError(f"{len(images)} images but heatmaps of {len(heatmaps)} people; give one for each")
            check_pictures(images)
            images = torch.nn.functional.interpolate(
                images.to(self.device), (size, size), mode="bilinear", align_corners=False, antialias=True
            )
        if heatmaps is None:
            return images, None, None
        return images, heatmaps.values.to(self.device), heatmaps.valid.to(self.device)

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write the pipeline, atomically: an older one at `folder` stays until the new one is whole.

        Reloaded it gives bit-equal results; with `half` the weights are rounded to float16, in half the bytes.
        """
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary / "model", safe_serialization=True)
            if half:
                _halve(temporary / "model" / WEIGHTS)
            self.scheduler.save_pretrained(temporary / "scheduler")  # type: ignore[attr-defined]
            if self.aggregator is not None:
                save_aggregator(self.aggregator, temporary / AGGREGATOR)
            about = {**self._about(), "checksums": folder_checksums(temporary)}
            (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n")

    def push_to_hub(self, repository: str, private: bool = False, card: str = "") -> str:
        """Save the pipeline, with a model card (`hmdiff card` writes one), into OWNER/NAME of the Hugging Face Hub.

        Returns its address. Raises `UserError` where the Hub does not take it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "pipeline")
            if card:
                (Path(folder) / "pipeline" / "README.md").write_text(card)
            return upload(Path(folder) / "pipeline", repository, private)

    def _about(self) -> dict[str, Any]:
        about = {
            "format": FORMAT,
            "body": self.model.config.body,
            "sampler": sampler_name(self.scheduler),
            "num_inference_steps": self.num_inference_steps,
            "eta": self.eta,
        }
        if self.temperatures:
            about["temperatures"] = [fitted.as_json() for fitted in self.temperatures.values()]
        return about

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,  # of `save_pretrained`, the name of a shipped one, or OWNER/NAME on the Hugging Face Hub
        device: torch.device | str = "cpu",
        body: Body | None = None,  # None: the body that the checkpoint names
        revision: str | None = None,  # of a repository: a branch, a tag or a commit
        torch_dtype: torch.dtype = torch.float32,  # what the networks compute in, as `to`
    ) -> HMDiffPipeline:
        """Read a saved pipeline. Raises `UserError` for a folder that is not one, or that is damaged."""
        place = download(str(folder), revision) if is_repository_id(str(folder)) else Path(folder)
        if not place.exists() and len(place.parts) == 1:
            try:
                place = asset_path(str(folder))
            except UserError:
                raise UserError(
                    f"{folder}: neither a folder nor a shipped checkpoint (hmdiff_small, direct_small)"
                ) from None
        if not (place / "hmdiff.json").is_file():
            raise UserError(
                f"{folder}: not a saved hmdiff pipeline (it has no hmdiff.json); give the folder that save_pretrained "
                "or training wrote, such as runs/NAME/pipeline"
            )
        about = _read_about(place / ABOUT)
        try:
            temperatures = [Temperature.from_json(each) for each in about.get("temperatures", ())]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, UserError) as error:
            raise UserError(f"{place / ABOUT}: damaged ({error!r:.160}); save the pipeline again") from None
        if "checksums" in about:  # those saved before there were any are read without
            verify_checksums(place, about["checksums"], "save or copy the checkpoint again")
        model = load_model(place / "model")
        scheduler = load_scheduler(place / "scheduler" / "scheduler_config.json", about["sampler"])
        if body is None:
            body = load_named_body(about["body"])
        pipeline = cls(model, scheduler, body, about["num_inference_steps"], float(about["eta"]))
        for fitted in temperatures:
            pipeline.set_temperature(fitted)
        if (place / AGGREGATOR).is_dir():
            pipeline.aggregator = load_aggregator(place / AGGREGATOR, model.num_points, model.config.num_joints)
            pipeline.aggregator.set_basis(lbs_basis(body, model.coarse_ids).points)
        return pipeline.to(device, torch_dtype)


def _calibrated(
    output: MeshOutput,
    heatmaps: Heatmaps | None,
    side: Tensor,  # (B,) of the crops, photo pixels
    fitted: Temperature | None,  # for this way of sampling
) -> MeshOutput:
    """With what the image says of the spread, and the temperatures of everybody."""
    confidence = distance = seen = None
    if heatmaps is not None and output.keypoints is not None:
        assert output.body is not None
        peaks, confidence = heatmap_peaks(heatmaps.values.to(side))
        distance = keypoint_distance(output, heatmaps).mean(1) / side
        pixels = projected_keypoints(output.keypoints, output.translation, output.focal, output.principal_point)
        error = (pixels - heatmaps.crop.to_photo(peaks)[:, None]).norm(dim=-1) / side[:, None, None]
        rest = output.body.v_template
        nearness = keypoint_nearness(rest, output.body.keypoints(rest[None])[0])
        seen = Reprojection(error, confidence.clamp(max=1), nearness)
    evidence = image_evidence(output.joints, confidence, distance)
    return dataclasses.replace(
        output,
        evidence=evidence,
        reprojection=seen,
        temperature=evidence.new_ones(len(evidence)) if fitted is None else fitted.of(evidence),
        calibration=None if fitted is None else fitted.confidence,
        calibrated_spread=fitted is not None,
    )


def _halve(path: Path) -> None:
    """float16 for the weights and int32 for the indices; loading widens both again."""
    from safetensors.torch import load_file, save_file

    narrow = {torch.float32: torch.float16, torch.int64: torch.int32}
    state = {name: value.to(narrow.get(value.dtype, value.dtype)) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def _read_about(path: Path) -> dict[str, Any]:
    """hmdiff.json, its fields of the types that `save_pretrained` writes."""
    about = read_json(path, 1 << 24, "save the pipeline again")
    if not isinstance(about, dict):
        raise UserError(f"{path}: damaged (a {type(about).__name__}, a mapping was expected); save the pipeline again")
    if "format" not in about:
        raise UserError(f"{path}: damaged (it has no format); save the pipeline again")
    if about["format"] != FORMAT:
        raise UserError(f"{path}: format {about['format']!r:.40}, this hmdiff reads {FORMAT}; update hmdiff")
    checks: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "body": (str, lambda value: True),
        "sampler": (str, lambda value: True),
        "num_inference_steps": (int, lambda value: value >= 1),
        "eta": (int | float, lambda value: 0 <= value < math.inf),
        "temperatures": (list, lambda value: True),
    }
    for name, (kind, fits) in checks.items():
        value = about.get(name, [] if name == "temperatures" else None)
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise UserError(f"{path}: damaged ({name} is {value!r:.60}); save the pipeline again")
    return about
