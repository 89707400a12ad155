"""Synthetic people, generated on the fly: shape, pose, camera, crop, keypoints, an estimator's heatmaps, and images.

Nothing is stored: block i of a stream is a function of (seed, stream, i) alone. So a resumed training sees the same
data, several processes share a stream without overlap, and a split is fixed by its name. All figures of the process are
our choice. The appearance in images, and the scene and corruptions of depth maps, use separate generators, so that
people are the same with and without them. n people a block, V vertices, C coarse vertices, J keypoints (HALPE26).
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.config import DepthCorruption, HeatmapCorruption
from hmdiff.data.sample import Sample
from hmdiff.data.synthetic.corruption import (
    estimate_heatmaps,
    estimate_peaks,
    face_visibility,
    scaled_peaks,
)
from hmdiff.data.synthetic.occluders import CombinedOccluders, OccluderSampler
from hmdiff.data.synthetic.poses import PoseMixture, sample_orientation
from hmdiff.data.synthetic.postures import PostureSampler
from hmdiff.data.synthetic.rendering import ImageRenderer, MapRenderer, OccluderBoxes
from hmdiff.errors import UserError
from hmdiff.names import SPLITS

# Crop half-sides: error of a trained network's guess of a hidden joint (see corruption.py).
GUESS = 0.26


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """Camera, crop and occluders of a stream. Angles as tangents, lengths in metres or crop half-sides."""

    distance: tuple[float, float] = (2.0, 10.0)  # metres to the pelvis, log-uniform
    off_axis: float = 0.2  # standard deviation of the pelvis position in the photo, as a tangent
    padding: tuple[float, float] = (1.08, 1.45)  # crop side over the longer side of the body's box
    shift: float = 0.05  # standard deviation of the crop's displacement, relative to its side
    truncated: float = 0.12  # share of people truncated by the crop: a portrait, an upper body
    truncation: tuple[float, float] = (0.45, 0.85)  # their crop sides, relative to the whole body's
    occluded: float = 0.3  # share of people behind an occluder
    occluder_size: tuple[float, float] = (0.15, 0.45)  # relative to the crop's side
    occluders: int = 1  # boxes in front of each occluded person
    tail: bool = False  # out-of-distribution poses and orientations
    postures: float = 0.0  # share of people who sit, lie, kneel, ... (`postures.py`)
    wide: bool = False  # any elevation of the camera, rolled photos, estimators of few joints
    guess: float | None = None  # overrides `hidden` of the estimator's faults; None: no override


# Wider than `val` and `test`, which stay unchanged for comparability: covers photos and the tail.
TRAIN_SCENE = SceneOptions(postures=0.25, wide=True, truncated=0.18, truncation=(0.3, 0.85))
SPLIT_SCENES = {
    "val": SceneOptions(),
    "test": SceneOptions(),
    "test_occluded": SceneOptions(occluded=1.0, occluders=2, occluder_size=(0.3, 0.6)),
    "test_guessed": SceneOptions(occluded=1.0, occluders=2, occluder_size=(0.3, 0.6), guess=GUESS),
    "test_ood": SceneOptions(tail=True),
    "test_postures": SceneOptions(postures=1.0, wide=True),
}
# `calibration` alternates between these scenes by block, with separate people: the spread must be calibrated on all
# kinds of photos, but not on test people.
_CALIBRATION = tuple(SPLIT_SCENES[split] for split in SPLITS if split.startswith("test"))
_SAME_PEOPLE_AS = {"test_guessed": "test_occluded"}  # the same people behind the same occluders


def block_generator(seed: int, stream: str, number: int) -> torch.Generator:
    """The generator of a block. torch uses only 32 bits of a seed, so the three parts are hashed."""
    if seed < 0:
        raise UserError(f"seed {seed}: a whole number from 0 on is needed")
    # The upper word of a seed beyond 32 bits comes last, or it would take the position of the stream.
    state = np.random.SeedSequence([seed % 2**32, zlib.crc32(stream.encode()), number, seed >> 32]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


class SyntheticHumans:
    """Blocks of synthetic people. `coarse_ids` restricts skinning to the vertices that training needs.

    A keypoint is `visible` when it lies inside the crop and behind no occluder. Self-occlusion is not considered: for
    that see `hmdiff.viz.renderer.visible_vertices`.
    """

    def __init__(
        self,
        body: Body,
        poses: PoseMixture,
        coarse_ids: Tensor,  # (C,) vertices of the coarse mesh
        block_size: int = 32,
        seed: int = 0,
        full_mesh: bool = False,  # also give all vertices (evaluation, rendering)
        corruption: HeatmapCorruption | None = None,
        device: torch.device | str = "cpu",
        image_size: int | None = None,  # S: also image, silhouette, depth (each S x S) and visible_fraction
        map_size: int | None = None,  # size of silhouette, depth and depth_input, drawn with or without images
        depth_corruption: DepthCorruption | None = None,  # corruption of depth_input
        occluder_sampler: OccluderSampler | None = None,  # additional occluders in the stream `train`
        training_poses: PoseMixture | None = None,  # for the stream `train`, from more recordings; None: `poses`
        peaks: bool = False,  # stream `train`: `Sample.peaks` instead of heatmaps, whose drawing dominated the time
    ) -> None:
        self.block_size, self.seed, self.full_mesh = block_size, seed, full_mesh
        self.corruption = corruption or HeatmapCorruption()
        self.poses, self.training_poses = poses, training_poses or poses
        self.occluder_sampler, self.peaks = occluder_sampler, peaks
        self.device = torch.device(device)
        if body.keypoint_regressor is None:
            raise UserError(f"body {body.name!r} has no keypoint regressor: synthetic heatmaps need one, as free has")
        body.from_smpl(torch.eye(3).expand(24, 3, 3))  # reject a body without SMPL's joints now, not in a worker
        self.coarse_ids = coarse_ids
        self.image_size = image_size
        self._image_renderer = None if image_size is None else ImageRenderer(body, image_size, self.device)
        self.map_size = map_size
        self._map_renderer = None if map_size is None else MapRenderer(body, map_size, depth_corruption, self.device)
        if full_mesh:
            self.body = body.to(self.device)
            self._coarse = coarse_ids.to(self.device)
        else:
            ids = torch.cat([coarse_ids, body.keypoint_support()])
            self.body = body.select(ids).to(self.device)
            self._coarse = torch.arange(len(coarse_ids), device=self.device)

    def block(
        self,
        stream: str,  # "train", or the name of a split
        number: int,
    ) -> Sample:
        """The people of one block. Raises `UserError` for an unknown stream."""
        if stream not in ("train", "calibration") and stream not in SPLIT_SCENES:
            raise UserError(f"split {stream!r} is not known; choose one of train, {', '.join(SPLITS)}")
        scene = SPLIT_SCENES.get(stream, TRAIN_SCENE)
        if stream == "calibration":
            scene = _CALIBRATION[number % len(_CALIBRATION)]
        corruption = (
            self.corruption if scene.guess is None else dataclasses.replace(self.corruption, hidden=scene.guess)
        )
        corruption = dataclasses.replace(corruption, few_joints=corruption.few_joints or scene.wide)
        stream = _SAME_PEOPLE_AS.get(stream, stream)
        seed = self.seed if stream == "train" else 0
        generator = block_generator(seed, stream, number)
        n = self.block_size
        betas = torch.randn(n, self.body.num_betas, generator=generator).clamp(-2.5, 2.5).to(self.device)
        pose_mixture = self.training_poses if stream == "train" else self.poses
        rotations = pose_mixture.sample(n, generator, tail=scene.tail).clone()
        lean = None
        if count := round(scene.postures * n):
            poses, lean = PostureSampler().sample(count, generator)
            rotations[: len(poses)] = poses
        rotations[:, 0] = sample_orientation(n, generator, scene.tail, lean, scene.wide)
        rotations = self.body.from_smpl(rotations.to(self.device))
        output = self.body(betas, rotations)
        pelvis = output.joints[:, :1]
        vertices, joints = output.vertices - pelvis, output.joints - pelvis
        keypoints = self.body.keypoints(vertices)
        coarse = vertices[:, self._coarse]

        position, center, side = self._camera(coarse, keypoints, scene, generator)
        focal, principal = 2 / side, -center * (2 / side)[:, None]
        camera_points = keypoints + position[:, None]
        points = camera_points[..., :2] / camera_points[..., 2:] * focal[:, None, None] + principal[:, None]
        scale = focal / position[:, 2]
        camera = torch.cat([scale[:, None], position[:, :2] / position[:, 2:] * focal[:, None] + principal], -1)

        occluders, training_occluders = self._occluders(scene, generator), None
        if stream == "train" and self.occluder_sampler is not None and self.occluder_sampler.active:
            inside = (points.abs() <= 1).all(-1)
            training_occluders = self.occluder_sampler(points, inside, block_generator(seed, f"{stream}/front", number))
            occluders = CombinedOccluders.of(occluders, training_occluders)
        visible = ~occluders.cover(points)
        heatmaps = peaks = None
        estimator_inputs = (points, visible, face_visibility(keypoints), corruption, generator)
        if self.peaks and stream == "train":
            peak_parameters, confidence, valid = estimate_peaks(*estimator_inputs)
            peaks = scaled_peaks(peak_parameters, confidence)
        else:
            heatmaps, valid = estimate_heatmaps(*estimator_inputs)
        inside = (points.abs() <= 1).all(-1)
        everyone = torch.ones(n, dtype=torch.bool, device=self.device)
        images = {}
        if self._image_renderer is not None:
            appearance_generator = block_generator(seed, f"{stream}/picture", number)
            rendered = self._image_renderer(
                betas, rotations, position, focal, principal, occluders, appearance_generator
            )
            images = {field.name: getattr(rendered, field.name) for field in dataclasses.fields(rendered)}
            if training_occluders is not None:
                images["image"] = training_occluders.paint(images["image"])
        if self._map_renderer is not None:
            scene_generator = block_generator(seed, f"{stream}/depth", number)
            maps = self._map_renderer(betas, rotations, position, focal, principal, occluders, scene_generator)
            images |= {field.name: getattr(maps, field.name) for field in dataclasses.fields(maps)}
        return Sample(
            heatmaps=heatmaps,
            heatmap_valid=valid,
            peaks=peaks,
            vertices=vertices if self.full_mesh else None,
            coarse_vertices=coarse,
            has_vertices=everyone,
            joints_3d=joints,
            has_joints_3d=everyone,
            keypoints_3d=keypoints,
            joints_2d=points,
            joints_2d_confidence=inside.float(),
            visible=visible & inside,
            camera=camera,
            pelvis=position,
            focal=focal,
            principal_point=principal,
            index=torch.arange(number * n, (number + 1) * n, device=self.device),
            **images,
        )

    def _camera(
        self,
        coarse: Tensor,  # (n, C, 3)
        keypoints: Tensor,  # (n, J, 3)
        scene: SceneOptions,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:  # pelvis (n, 3) metres; crop centre (n, 2) and side (n,) on the plane z = 1
        """The person's position, and a detector's square crop."""
        n = len(coarse)
        random = torch.rand(n, 6, generator=generator).to(self.device)
        normal = torch.randn(n, 4, generator=generator).to(self.device)
        low, high = scene.distance
        distance = low * (high / low) ** random[:, 0]
        off_axis = (scene.off_axis * normal[:, :2] * torch.tensor([1.0, 0.5], device=self.device)).clamp(-0.5, 0.5)
        position = torch.cat([off_axis, torch.ones_like(distance)[:, None]], -1) * distance[:, None]
        # At least half a metre between the camera and the nearest point of the body.
        nearest = coarse[..., 2].amin(-1) + position[:, 2]
        position = position * (1 + (0.5 - nearest).clamp_min(0) / position[:, 2])[:, None]

        camera_points = coarse + position[:, None]
        projected = camera_points[..., :2] / camera_points[..., 2:]
        low_corner, high_corner = projected.amin(1), projected.amax(1)
        center, side = (low_corner + high_corner) / 2, (high_corner - low_corner).amax(-1)
        truncated = random[:, 1] < scene.truncated
        chest = keypoints[:, 17:19].mean(1) + position  # top of the head and neck
        chest = chest[:, :2] / chest[:, 2:]
        center = torch.where(truncated[:, None], chest + 0.1 * side[:, None] * (random[:, 2:4] - 0.3), center)
        smallest, largest = scene.truncation
        side = side * torch.where(truncated, smallest + (largest - smallest) * random[:, 4], 1.0)
        min_padding, max_padding = scene.padding
        side = side * (min_padding + (max_padding - min_padding) * random[:, 5])
        center = center + scene.shift * side[:, None] * normal[:, 2:]
        return position, center, side

    def _occluders(
        self,
        scene: SceneOptions,
        generator: torch.Generator,
    ) -> OccluderBoxes:
        """Random boxes in front of people."""
        n, (min_size, max_size) = self.block_size, scene.occluder_size
        enabled = torch.rand(n, 1, generator=generator)[:, 0] < scene.occluded
        random = torch.stack([torch.rand(n, 4, generator=generator) for _ in range(scene.occluders)], 1)
        half = (
            min_size + (max_size - min_size) * random[..., 2:]
        )  # in crop half-sides, so equal to the fraction of the side
        center = 1.6 * random[..., :2] - 0.8
        return OccluderBoxes(center.to(self.device), half.to(self.device), enabled.to(self.device))
