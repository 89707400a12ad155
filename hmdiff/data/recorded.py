"""Recorded people: prepared records as blocks of samples, cropped and augmented, with an estimator's heatmaps.

The stream `train` repeats all records without end, in a new order every epoch; any other stream gives the records in
order, without augmentation. Block i of a stream is a function of (seed, stream, i) alone. n people a block, C coarse
vertices, K joints, J keypoints (HALPE26; HAND21 for a hand), S pixels a side.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.skeletons import HALPE26
from hmdiff.config import Augment, HeatmapCorruption
from hmdiff.data.labelled_bodies import LabelledBodies, PosedBodies
from hmdiff.data.person_maps import crop_depth, crop_mask, map_fields
from hmdiff.data.record import Record
from hmdiff.data.record_crops import read_crop, read_heatmaps, reorder_by_name
from hmdiff.data.sample import Sample
from hmdiff.data.shards import RecordStore
from hmdiff.data.synthetic.corruption import estimate_heatmaps, face_visibility
from hmdiff.data.synthetic.occluders import OccluderSampler
from hmdiff.data.synthetic.people import block_generator
from hmdiff.data.transforms import (
    NO_AUGMENTATION,
    Augmentation,
    augment_points,
    augment_pose,
    crop_affine,
    crop_camera,
    map_points,
    sample_augmentation,
    swap_left_right,
)
from hmdiff.errors import UserError
from hmdiff.geometry import perspective_projection, weak_perspective_fit
from hmdiff.heatmaps.distribution import gaussian_heatmaps

_SIGMA = 2.0  # heatmap pixels of a labelled keypoint
_MIN_KEYPOINTS_TO_FIT = 6  # keypoints known in 2D and in 3D from which a weak-perspective camera is fitted
_MIN_DEPTH = 0.1  # metres: minimum depth for a camera label and for projected keypoints


@dataclasses.dataclass(frozen=True)
class _Person:
    """A record after the crop: everything in the image plane."""

    record: Record
    augmentation: Augmentation
    affine: np.ndarray  # (2, 3) photo pixels to crop coordinates
    image: np.ndarray | None  # (S, S, 3) uint8 RGB
    points: np.ndarray  # (J, 2) crop coordinates
    confidence: np.ndarray  # (J,) 0..1, 0 = not labelled
    depth: np.ndarray | None = None  # (s, s) NaN = unknown; None: not stored or not read
    mask: np.ndarray | None = None  # (s, s) 0..1


class RecordedPeople:
    """Blocks of recorded people. `coarse_vertices` and `joints_3d` are always set, with their masks.

    A keypoint is `visible` when labelled and inside the crop: real data sets do not label occlusion. Without labelled
    2D keypoints they are projected from the labelled body, if the camera is known; heatmaps of these contain ground
    truth, so results on them are not comparable with published ones. Betas beyond the body's are dropped.
    """

    def __init__(
        self,
        store: RecordStore,
        body: Body,  # the model's body
        coarse_ids: Tensor,  # (C,)
        block_size: int = 32,
        seed: int = 0,
        full_mesh: bool = False,
        image_size: int | None = None,  # S of the images; None: images are not read
        augment: Augment | None = None,  # for the stream `train`
        corruption: HeatmapCorruption | None = None,
        heatmaps: str | Path = "faults",  # "faults", "labels" (as they are), "none", or a folder of NAME.npz
        same_body: bool = False,  # see LabelledBodies
        numbers: np.ndarray | None = None,  # (N,) selected records of the store; None: all
        map_size: int | None = None,  # s of depth maps and silhouettes; None: not read
    ) -> None:
        self.store, self.body, self.map_size = store, body, map_size
        self.block_size, self.seed, self.full_mesh, self.image_size = block_size, seed, full_mesh, image_size
        self.augment, self.corruption = augment or Augment(), corruption or HeatmapCorruption()
        self._occluder_sampler = OccluderSampler(self.augment)
        self.heatmaps = heatmaps
        if heatmaps not in ("faults", "labels", "none") and not Path(heatmaps).is_dir():
            raise UserError(f"heatmaps {str(heatmaps)!r}: faults, labels, none or a folder of NAME.npz is expected")
        self.names = HALPE26 if body.keypoint_names is None else body.keypoint_names
        self.bodies = LabelledBodies(body, coarse_ids, full_mesh, same_body)
        self.numbers = np.arange(len(store)) if numbers is None else np.asarray(numbers)
        if not len(self.numbers):
            raise UserError("no record is left of the data set; choose other groups")
        self._side = "left" if body.name == "mano_left" else "right"
        self._epoch_order = functools.lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_epoch_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._permutation)

    def block(
        self,
        stream: str,  # "train", or the name of a split
        number: int,
    ) -> Sample:
        """The people of one block; a split's last block may be smaller. Raises `UserError` past the end of a split."""
        positions = range(number * self.block_size, (number + 1) * self.block_size)
        if stream != "train":
            positions = range(positions.start, min(positions.stop, len(self)))
            if not positions:
                raise UserError(
                    f"split {stream!r} has {len(self)} people, and more are asked for; give evaluation.people="
                    f"{len(self)} or less"
                )
        people = [self._person(stream, position) for position in positions]
        if stream != "train" and self.full_mesh:
            for person in people:
                if person.record.pose is None and person.record.vertices is None:
                    raise person.record.error(f"no body is labelled, so split {stream!r} cannot be evaluated on it")
        generator = block_generator(self.seed if stream == "train" else 0, f"{stream}/heatmaps", number)
        occluders = None
        if stream == "train" and self._occluder_sampler.active:
            occluders = block_generator(self.seed, f"{stream}/front", number)
        return self._sample(people, torch.tensor(list(positions)), generator, occluders)

    # -- one person --------------------------------------------------------------------------------------------------

    def _permutation(self, epoch: int) -> np.ndarray:
        entropy = [self.seed % 2**32, self.seed >> 32, zlib.crc32(b"order"), epoch]
        return np.random.default_rng(entropy).permutation(len(self.numbers))

    def _person(self, stream: str, position: int) -> _Person:
        augmentation, number = NO_AUGMENTATION, position
        if stream == "train":
            epoch, rank = divmod(position, len(self))
            number = self._epoch_order(epoch)[rank]
            entropy = [self.seed % 2**32, self.seed >> 32, zlib.crc32(b"change"), position]
            augmentation = sample_augmentation(self.augment, np.random.default_rng(entropy))
        stored = self.store[int(self.numbers[number])]
        record = stored.record
        if record.body == "mano":  # MANO models one hand: the other is mirrored, and hands are not flipped otherwise
            augmentation = dataclasses.replace(augmentation, flip=record.hand is not None and record.hand != self._side)
        elif record.vertices is not None and record.pose is None:
            augmentation = dataclasses.replace(augmentation, flip=False)  # meshes are not mirror symmetric
        affine = crop_affine(record.center, record.side, augmentation)
        image = None if self.image_size is None else read_crop(stored, affine, self.image_size, augmentation)
        points, confidence = reorder_by_name(
            record.keypoints_2d, record.keypoints_2d_confidence, record.keypoint_names, self.names, 2
        )
        points = swap_left_right(map_points(points, affine), self.names, augmentation)
        depth = mask = None
        if self.map_size is not None:
            region = stored.region or (0.0, 0.0, 1.0, 1.0)
            depth = None if stored.depth is None else crop_depth(stored.depth, region, affine, self.map_size)
            mask = None if stored.mask is None else crop_mask(stored.mask, region, affine, self.map_size)
        confidence = swap_left_right(confidence, self.names, augmentation)
        return _Person(record, augmentation, affine, image, points, confidence, depth, mask)

    # -- a block -----------------------------------------------------------------------------------------------------

    def _sample(
        self,
        people: list[_Person],
        index: Tensor,
        generator: torch.Generator,  # for the heatmaps
        occluders: torch.Generator | None = None,  # for the occluders; None: no occluders
    ) -> Sample:
        n, joints = len(people), len(self.names)
        fields: dict[str, Tensor] = {
            "coarse_vertices": torch.zeros(n, len(self.bodies.coarse_ids), 3),
            "joints_3d": torch.zeros(n, self.body.num_joints, 3),
            "keypoints_3d": torch.zeros(n, joints, 3),
            "has_keypoints_3d": torch.zeros(n, joints, dtype=torch.bool),
            **{name: torch.zeros(n, dtype=torch.bool) for name in ("has_vertices", "has_perspective", "has_camera")},
            "pelvis": torch.zeros(n, 3),
            "focal": torch.zeros(n),
            "principal_point": torch.zeros(n, 2),
            "joints_2d": torch.from_numpy(np.stack([person.points for person in people])).float(),
            "joints_2d_confidence": torch.from_numpy(np.stack([person.confidence for person in people])).float(),
        }
        if self.full_mesh:
            fields["vertices"] = torch.zeros(n, self.body.num_vertices, 3)
        for rows, posed in self._pose_bodies(people):
            self._fill_bodies(fields, rows, posed)
        fields["has_joints_3d"] = fields["has_vertices"].clone()
        roots = fields.pop("root", torch.full((n, 3), torch.nan))
        for row, person in enumerate(people):
            root = self._fill_joints(fields, row, person)
            without_body = person.record.pose is None and person.record.vertices is None
            self._fill_camera(fields, row, person, root if without_body and root is not None else roots[row].numpy())
        self._fill_projections(fields)
        self._fill_weak_camera(fields)
        inside = (fields["joints_2d"].abs() <= 1).all(-1)
        labelled = fields["joints_2d_confidence"] > 0
        fields["visible"] = labelled & inside
        training_occluders = None
        occluded = torch.zeros_like(labelled)
        if occluders is not None:
            training_occluders = self._occluder_sampler(fields["joints_2d"], labelled, occluders, self.names)
            occluded = training_occluders.cover(fields["joints_2d"])
            fields["visible"] &= ~occluded
        if self.image_size is not None:
            pictures = np.stack([person.image for person in people])  # type: ignore[misc]
            fields["image"] = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
            if training_occluders is not None:
                fields["image"] = training_occluders.paint(fields["image"])
        if self.map_size is not None:
            fields |= map_fields([p.depth for p in people], [p.mask for p in people], self.map_size)
        if self.heatmaps != "none" and (self.names == HALPE26 or self.heatmaps != "faults"):  # made for bodies
            fields["heatmaps"], fields["heatmap_valid"] = self._heatmaps(people, fields, generator, occluded)
        return Sample(index=index, **fields)

    def _pose_bodies(self, people: list[_Person]) -> list[tuple[list[int], PosedBodies]]:
        """Pose the records that have body parameters, in one batch per body model."""
        rows_by_body: dict[str, list[int]] = {}
        for row, person in enumerate(people):
            if person.record.pose is not None:
                rows_by_body.setdefault(self.bodies.body_name(person.record), []).append(row)
            elif person.record.vertices is not None:
                self.bodies.body_name(person.record)
                rows_by_body.setdefault("", []).append(row)
        posed = []
        for key, rows in rows_by_body.items():
            group = [people[row] for row in rows]
            if key:
                names = self.body.joint_names
                poses = [augment_pose(p.record.pose, names[: len(p.record.pose)], p.augmentation) for p in group]  # type: ignore
                posed.append((rows, self.bodies.pose(key, poses, [p.record.betas for p in group])))  # type: ignore
            else:
                posed.append((rows, self.bodies.from_vertices(torch.stack([self._mesh(p) for p in group]))))
        return posed

    def _mesh(self, person: _Person) -> Tensor:  # (V, 3)
        vertices = person.record.vertices
        assert vertices is not None
        if len(vertices) != self.body.num_vertices:
            raise person.record.error(
                f"a mesh of {len(vertices)} vertices, and the model's body {self.body.name!r} has "
                f"{self.body.num_vertices}; give the body it is of"
            )
        return torch.from_numpy(augment_points(vertices, person.augmentation)).float()

    def _fill_bodies(self, fields: dict[str, Tensor], rows: list[int], posed: PosedBodies) -> None:
        fields["has_vertices"][rows] = True
        fields["coarse_vertices"][rows], fields["joints_3d"][rows] = posed.coarse, posed.joints
        if posed.vertices is not None:
            fields["vertices"][rows] = posed.vertices
        if posed.keypoints is not None:
            fields["keypoints_3d"][rows], fields["has_keypoints_3d"][rows] = posed.keypoints, True
        fields.setdefault("root", torch.full((len(fields["focal"]), 3), torch.nan))[rows] = posed.root

    def _fill_joints(self, fields: dict[str, Tensor], row: int, person: _Person) -> np.ndarray | None:
        """Fill 3D labels from named joints: keypoints, and the body's joints where all of them are named.

        Returns the root joint (3,) that they are relative to, in the camera frame; None where they were not used.
        """
        record, augmentation = person.record, person.augmentation
        if record.joints_3d is None or fields["has_keypoints_3d"][row].any():
            return None
        joints = augment_points(record.joints_3d.astype(np.float64), augmentation)
        labelled = np.ones(len(joints), bool) if record.joints_3d_valid is None else record.joints_3d_valid > 0
        positions = {name: joints[number] for number, name in enumerate(record.joint_names) if labelled[number]}
        root = next((positions[name] for name in ("pelvis", "mid_hip", "wrist") if name in positions), None)
        if root is None and {"left_hip", "right_hip"} <= positions.keys():
            root = (positions["left_hip"] + positions["right_hip"]) / 2
        if root is None:
            return None  # without a root joint they cannot be made relative
        known, valid = reorder_by_name(joints - root, labelled.astype(np.float64), record.joint_names, self.names, 3)
        fields["keypoints_3d"][row] = torch.from_numpy(swap_left_right(known, self.names, augmentation)).float()
        fields["has_keypoints_3d"][row] = torch.from_numpy(swap_left_right(valid, self.names, augmentation) > 0)
        names = self.body.joint_names
        if record.joint_names == names and not fields["has_vertices"][row] and labelled.all():
            fields["joints_3d"][row] = torch.from_numpy(swap_left_right(joints - root, names, augmentation)).float()
            fields["has_joints_3d"][row] = True
        return root

    def _fill_camera(self, fields: dict[str, Tensor], row: int, person: _Person, root: np.ndarray) -> None:
        """Pelvis position and intrinsics, where both are labelled."""
        record = person.record
        if record.intrinsics is None or not np.isfinite(root).all():
            return
        if record.pose is not None:
            if record.translation is None:
                return
            root = augment_points(root + record.translation, person.augmentation)
        if root[2] < _MIN_DEPTH:
            return
        focal, principal = crop_camera(record.intrinsics.astype(np.float64), person.affine)
        fields["pelvis"][row], fields["focal"][row] = torch.from_numpy(root).float(), focal
        fields["principal_point"][row], fields["has_perspective"][row] = torch.from_numpy(principal).float(), True

    def _fill_projections(self, fields: dict[str, Tensor]) -> None:
        """Project 2D keypoints for people without labelled ones."""
        unlabelled = ~(fields["joints_2d_confidence"] > 0).any(-1)
        rows = (unlabelled & fields["has_perspective"] & fields["has_keypoints_3d"].any(-1)).nonzero()[:, 0]
        if not len(rows):
            return
        points = fields["keypoints_3d"][rows] + fields["pelvis"][rows, None]
        points = torch.cat([points[..., :2], points[..., 2:].clamp_min(_MIN_DEPTH)], -1)
        projected = perspective_projection(points, fields["focal"][rows], fields["principal_point"][rows])
        fields["joints_2d"][rows] = projected
        fields["joints_2d_confidence"][rows] = fields["has_keypoints_3d"][rows].float()

    def _fill_weak_camera(self, fields: dict[str, Tensor]) -> None:
        has_perspective = fields["has_perspective"]
        z = torch.where(has_perspective, fields["pelvis"][:, 2], 1.0)
        scale = fields["focal"] / z
        camera = torch.cat([scale[:, None], fields["pelvis"][:, :2] * scale[:, None] + fields["principal_point"]], -1)
        weight = fields["joints_2d_confidence"] * fields["has_keypoints_3d"]
        fitted = weak_perspective_fit(fields["keypoints_3d"], fields["joints_2d"], weight)
        can_fit = ~has_perspective & ((weight > 0).sum(-1) >= _MIN_KEYPOINTS_TO_FIT)
        fields["camera"] = torch.where(has_perspective[:, None], camera, torch.where(can_fit[:, None], fitted, 0.0))
        fields["has_camera"] = has_perspective | can_fit

    def _heatmaps(
        self,
        people: list[_Person],
        fields: dict[str, Tensor],
        generator: torch.Generator,
        occluded: Tensor,  # (n, J) bool: behind an added occluder
    ) -> tuple[Tensor, Tensor]:  # (n, J, 64, 64), (n, J) bool
        points, confidence = fields["joints_2d"], fields["joints_2d_confidence"]
        if self.heatmaps == "labels":
            inside = (points.abs() <= 1).all(-1) & ~occluded
            return gaussian_heatmaps(points, confidence.clamp(max=1) * inside, _SIGMA), confidence > 0
        if self.heatmaps == "faults":
            labelled = confidence > 0
            face_visible = torch.ones_like(labelled)
            complete = fields["has_keypoints_3d"].all(-1)
            face_visible[complete] = face_visibility(fields["keypoints_3d"][complete])
            values, valid = estimate_heatmaps(points, labelled & ~occluded, face_visible, self.corruption, generator)
            return values * labelled[..., None, None], valid & labelled
        loaded = [read_heatmaps(Path(self.heatmaps), p.record, p.affine, p.augmentation) for p in people]
        values = torch.cat([values for values, _ in loaded])
        # Covered joints get no peak: files of heatmaps are assumed to come from an estimator that omits unseen joints.
        return torch.where(occluded[..., None, None], 0.0, values), torch.cat([valid for _, valid in loaded])
