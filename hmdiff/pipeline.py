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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hmdiff.body import Body, load_body
from hmdiff.diffusion.sampling import Callback, hypothesis_generators, initial_noise
from hmdiff.diffusion.sampling import sample as reverse_diffusion
from hmdiff.diffusion.schedule import change_scheduler, make_scheduler, sampler_name
from hmdiff.errors import UserError
from hmdiff.geometry import (
    crop_to_photo,
    perspective_projection,
    perspective_translation_fit,
    weak_to_full_camera,
)
from hmdiff.heatmaps import Heatmaps, heatmap_peaks
from hmdiff.models.conditioning import Conditioning
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.resources import asset_path
from hmdiff.storage import atomic_folder

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
ROWS_AT_ONCE = 512  # people times hypotheses in one evaluation of the denoiser: bounds the memory, changes no result


@dataclasses.dataclass(frozen=True)
class MeshOutput:
    """What was recovered. Meshes are in the camera's frame (x right, y down, z forward), the pelvis at the origin."""

    vertices: Tensor  # (B, N, V, 3) metres
    joints: Tensor  # (B, N, K, 3) metres, the body's own joints
    keypoints: Tensor | None  # (B, N, J, 3) metres, HALPE26 regressed from the mesh; None for a body without them
    camera: Tensor  # (B, 3) weak perspective in the crop: scale (half-sides per metre), tx, ty
    translation: Tensor  # (B, N, 3) metres, every hypothesis' pelvis in the frame of the full photo's camera
    focal: Tensor  # (B,) pixels, of the full photo's camera
    principal_point: Tensor  # (B, 2) pixels
    faces: Tensor  # (F, 3) long

    @property
    def mean_vertices(self) -> Tensor:  # (B, V, 3)
        """The mean of the hypotheses: the estimate with the least expected squared error."""
        return self.vertices.mean(1)

    @property
    def mean_joints(self) -> Tensor:  # (B, K, 3)
        return self.joints.mean(1)

    @property
    def spread(self) -> Tensor:  # (B, V) millimetres
        """Mean distance of the hypotheses' vertex to their mean: where the photo leaves the body open."""
        return (self.vertices - self.vertices.mean(1, keepdim=True)).norm(dim=-1).mean(1) * 1000


def keypoint_distance(
    output: MeshOutput,
    heatmaps: Heatmaps,  # of the same B people
    least_confidence: float = 0.1,  # of a peak that counts
) -> Tensor:  # (B, N) photo pixels; NaN for a person without such a peak
    """Mean distance of every hypothesis' projected keypoints to the heatmaps' peaks: how well it fits the photo."""
    if output.keypoints is None:
        raise UserError("this body has no keypoints to compare with the heatmaps")
    placed = output.keypoints + output.translation[:, :, None]
    projected = perspective_projection(placed, output.focal[:, None], output.principal_point[:, None])
    peaks, confidence = heatmap_peaks(heatmaps.values.to(projected))
    seen = crop_to_photo(peaks, heatmaps.center.to(projected), heatmaps.side.to(projected))
    distance = (projected - seen[:, None]).norm(dim=-1)
    counted = (confidence >= least_confidence)[:, None]
    return torch.where(counted, distance, distance.new_tensor(float("nan"))).nanmean(-1)


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
        self.model = model.eval()
        self.scheduler = scheduler
        self.faces = body.faces
        self.body = body
        self.num_inference_steps, self.eta = num_inference_steps, eta

    @property
    def device(self) -> torch.device:
        return self.model.upsample_weight.device

    def to(self, device: torch.device | str) -> HMDiffPipeline:
        self.model.to(device)
        self.body.to(device)
        self.faces = self.faces.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor | None = None,  # (B, 3, S, S) RGB 0..1, the crops
        heatmaps: Heatmaps | None = None,
        num_hypotheses: int = 25,
        num_inference_steps: int | None = None,  # None: the number saved with the pipeline
        seed: int = 0,
        scheduler: str | None = None,  # another sampler, such as "ddpm" or "dpm++"
        eta: float | None = None,  # DDIM's share of fresh noise
        photo_sizes: Tensor | None = None,  # (B, 2) width, height in pixels; None: the crop is the photo
        focal: Tensor | None = None,  # (B,) pixels; None: the photo's diagonal, as CLIFF (arXiv 2208.00571)
        fit_camera: bool = True,  # place every hypothesis where the heatmaps' peaks see it; False: the head's camera
        people: Sequence[int] | None = None,  # number of every person among all asked for; None: 0, 1, ...
        callback: Callback | None = None,
        progress: Callable[[int], None] | None = None,  # told how many hypotheses are done
    ) -> MeshOutput:
        """Recover the people. The same seed gives the same result whatever the batch or the device's number of rows.

        Raises:
            UserError: an input that the model needs is missing, or a number is out of its range.
        """
        if num_hypotheses < 1:
            raise UserError(f"num_hypotheses {num_hypotheses}: at least 1 is needed")
        images, values, valid = self._inputs(images, heatmaps)
        conditioning, camera = self.model.encode(images, values, valid)
        count = len(camera)
        people = list(range(count)) if people is None else list(people)
        if len(people) != count:
            raise UserError(f"people: {len(people)} numbers for {count} people; give one for each")
        points = self.denoised(
            conditioning, people, num_hypotheses, num_inference_steps, seed, scheduler, eta, callback, progress
        )
        coarse, joints = self.model.to_coarse(points), self.model.to_joints(points)
        vertices = self.model.upsample(coarse)
        keypoints = self.body.keypoints(vertices) if self.body.keypoint_regressor is not None else None

        if heatmaps is not None:
            center, side = heatmaps.center.to(camera), heatmaps.side.to(camera)
        else:
            assert images is not None
            side = camera.new_full((count,), images.shape[-1])
            center = side[:, None].expand(-1, 2) / 2
        if photo_sizes is None:
            photo_sizes = (center * 2).round()
        photo_sizes = photo_sizes.to(camera)
        focal = photo_sizes.norm(dim=-1) if focal is None else focal.to(camera)
        principal = photo_sizes / 2
        translation = weak_to_full_camera(camera, center, side, focal, principal)
        translation = translation[:, None].expand(-1, num_hypotheses, -1)
        if fit_camera and heatmaps is not None and keypoints is not None:
            assert values is not None
            peaks, confidence = heatmap_peaks(values)
            translation = perspective_translation_fit(
                keypoints, crop_to_photo(peaks, center, side)[:, None], confidence[:, None], focal[:, None],
                principal[:, None], prior=translation,
            )  # fmt: skip
        return MeshOutput(vertices, joints, keypoints, camera, translation, focal, principal, self.faces)

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
    ) -> Tensor:  # (B, N, P, 3) points of the diffusion
        """Run the reverse process for all hypotheses, in chunks of bounded size. The direct baseline gives N copies."""
        count = len(conditioning.tokens)
        if self.model.config.mode == "direct":
            return self.model.regress(conditioning).expand(-1, num_hypotheses, -1, -1)
        sampler = self.scheduler if scheduler is None else change_scheduler(self.scheduler, scheduler)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        total = sampler.config.num_train_timesteps  # type: ignore[attr-defined]
        if not 1 <= steps <= total:
            raise UserError(f"num_inference_steps {steps}: the model was trained with {total} steps; choose 1 to that")
        eta = self.eta if eta is None else eta

        chunk = max(1, ROWS_AT_ONCE // count)
        parts = []
        for first in range(0, num_hypotheses, chunk):
            width = min(chunk, num_hypotheses - first)
            generators = hypothesis_generators(seed, people, width, first)
            noise = initial_noise(generators, self.model.num_points, self.device)

            def denoise(points: Tensor, step: Tensor, width: int = width) -> Tensor:
                grouped = points.unflatten(0, (count, width))
                return self.model.denoise(grouped, step.reshape(count, width), conditioning).flatten(0, 1)

            result = reverse_diffusion(denoise, sampler, noise, steps, generators, eta, callback=callback)
            parts.append(result.unflatten(0, (count, width)))
            if progress is not None:
                progress(width * count)
        return torch.cat(parts, 1)

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
            about = {
                "format": FORMAT,
                "body": self.model.config.body,
                "sampler": sampler_name(self.scheduler),
                "num_inference_steps": self.num_inference_steps,
                "eta": self.eta,
            }
            (temporary / "hmdiff.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,  # of `save_pretrained`, or the name of a shipped one, such as "hmdiff_small"
        device: torch.device | str = "cpu",
        body: Body | None = None,  # None: the body that the checkpoint names
    ) -> HMDiffPipeline:
        """Read a saved pipeline. Raises `UserError` for a folder that is not one, or that is damaged."""
        place = Path(folder)
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
        try:
            about = json.loads((place / "hmdiff.json").read_text())
            found = about["format"]
            steps, eta, name, sampler = about["num_inference_steps"], about["eta"], about["body"], about["sampler"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{place / 'hmdiff.json'}: damaged ({error!r}); save the pipeline again") from None
        if found != FORMAT:
            raise UserError(f"{folder}: format {found} of saved pipelines, this one reads {FORMAT}; update hmdiff")
        model = _load_model(place / "model")
        scheduler = _load_scheduler(place / "scheduler", sampler)
        if body is None:
            body = load_body(name)
        return cls(model, scheduler, body, steps, eta).to(device)


def _halve(path: Path) -> None:
    """float16 for the weights and int32 for the indices; loading widens both again."""
    from safetensors.torch import load_file, save_file

    narrow = {torch.float32: torch.float16, torch.int64: torch.int32}
    state = {name: value.to(narrow.get(value.dtype, value.dtype)) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def _load_model(folder: Path) -> MeshRecoveryModel:
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; the checkpoint is not whole, save or copy it again")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("_class_name") != "MeshRecoveryModel":
            raise UserError(f"{folder}: holds a {config.get('_class_name')}, not a MeshRecoveryModel of hmdiff")
        model = MeshRecoveryModel.from_config({**config, "pretrained": False})
        from safetensors.torch import load_file

        state = load_file(folder / WEIGHTS)
        model.load_state_dict(state, strict=True)
    except UserError:
        raise
    except Exception as error:  # safetensors, JSON and torch each raise their own
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{folder}: cannot be read as a model ({reason}); save or copy the checkpoint again") from None
    return model.eval()


def _load_scheduler(folder: Path, sampler: str) -> SchedulerMixin:
    try:
        config = json.loads((folder / "scheduler_config.json").read_text())
        blank = make_scheduler(sampler, 10, prediction_type=config["prediction_type"])
        return type(blank).from_config(config)  # type: ignore[attr-defined]
    except UserError:
        raise
    except Exception as error:  # JSON, missing files, and whatever a foreign config brings out in diffusers
        raise UserError(f"{folder}: cannot be read as a scheduler ({error!r}); save the pipeline again") from None
