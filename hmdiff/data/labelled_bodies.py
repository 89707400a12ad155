"""The posed body of a record: the model's own, or the gendered variant of the same topology.

C coarse vertices, V vertices, K joints, J keypoints (HALPE26).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body, load_body
from hmdiff.body.files import licensed_kind
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix


@dataclasses.dataclass(frozen=True)
class PosedBodies:
    """Bodies of n records, relative to the root joint."""

    vertices: Tensor | None  # (n, V, 3), with `full_mesh` only
    coarse: Tensor  # (n, C, 3)
    joints: Tensor  # (n, K, 3)
    keypoints: Tensor | None  # (n, J, 3); None for a body without a keypoint regressor
    root: Tensor  # (n, 3) the root joint in the frame of the record's translation, before the augmentation


class LabelledBodies:
    """Poses records. Loads a gendered body when the first record needs it."""

    def __init__(
        self,
        body: Body,  # the model's body
        coarse_ids: Tensor,  # (C,)
        full_mesh: bool = False,
        same_body: bool = False,  # treat records as labels of the model's body, whatever body they name (stand-in data)
    ) -> None:
        self.body, self.coarse_ids, self.full_mesh, self.same_body = body, coarse_ids, full_mesh, same_body
        self.has_keypoints = body.keypoint_regressor is not None
        self._coarse = coarse_ids if full_mesh else torch.arange(len(coarse_ids))
        self._loaded: dict[str, Body] = {}

    def body_name(self, record: Record) -> str:
        """The name, for `load_body`, of a record's body. Raises `UserError` if its topology is not the model's."""
        licensed = licensed_kind(self.body.name)
        model_body = self.body.name
        if self.same_body:
            return model_body
        if licensed is None or licensed[0] != record.body:
            raise record.error(
                f"its labels are of the body {record.body!r}, and the model's is {model_body!r}; "
                f"give body={record.body}, or, if the labels were made with the model's own body, same_body: true for "
                "this source"
            )
        if record.body == "mano" or record.gender == licensed[1]:  # hands are mirrored to the model's side
            return model_body
        return record.body if record.gender == "neutral" else f"{record.body}_{record.gender}"

    def pose(
        self,
        body_name: str,
        poses: Sequence[np.ndarray],  # n of (J, 3) axis-angle, already augmented
        betas: Sequence[np.ndarray],  # n of (B,); cropped or padded with 0 to the body's number of betas
    ) -> PosedBodies:
        body = self._body(body_name)
        rotations = axis_angle_to_matrix(torch.from_numpy(np.stack([self._full_pose(body, pose) for pose in poses])))
        shape = np.zeros((len(betas), body.num_betas), np.float32)
        for row, beta in zip(shape, betas, strict=True):
            count = min(len(beta), body.num_betas)
            row[:count] = beta[:count]
        output = body(torch.from_numpy(shape), rotations)
        root = output.joints[:, :1]
        vertices = output.vertices - root
        return PosedBodies(
            vertices if self.full_mesh else None,
            vertices[:, self._coarse],
            output.joints - root,
            body.keypoints(vertices) if body.keypoint_regressor is not None else None,
            root[:, 0],
        )

    def from_vertices(
        self,
        vertices: Tensor,  # (n, V, 3) metres, camera frame
    ) -> PosedBodies:
        """Bodies from meshes of a data set; their joints are regressed."""
        regressor = self.body.J_regressor
        if regressor is None:
            raise UserError(f"body {self.body.name!r} has no joint regressor, so joints of given meshes are unknown")
        joints = regressor @ vertices
        root = joints[:, :1]
        keypoints = self.body.keypoints(vertices - root) if self.has_keypoints else None
        root_relative = vertices - root
        return PosedBodies(
            root_relative if self.full_mesh else None,
            root_relative[:, self.coarse_ids],
            joints - root,
            keypoints,
            root[:, 0],
        )

    def _full_pose(self, body: Body, pose: np.ndarray) -> np.ndarray:  # (K, 3) float32
        if len(pose) > body.num_joints:
            raise UserError(f"body {body.name!r}: a pose of {len(pose)} joints for its {body.num_joints}")
        full = np.zeros((body.num_joints, 3), np.float32)
        full[: len(pose)] = pose
        if body.mean_pose is not None and body.num_joints == 16:  # MANO labels are relative to the mean hand
            full += body.mean_pose.numpy()
        return full

    def _body(self, body_name: str) -> Body:
        if body_name not in self._loaded:
            body = self.body if body_name == self.body.name else load_body(body_name)
            if body.num_vertices != self.body.num_vertices:
                raise UserError(
                    f"body {body_name!r} has {body.num_vertices} vertices, the model's {self.body.name!r} "
                    f"{self.body.num_vertices}: labels of one cannot train the other"
                )
            if not self.full_mesh:
                support = [body.keypoint_support()] if body.keypoint_regressor is not None else []
                body = body.select(torch.cat([self.coarse_ids, *support]))
            self._loaded[body_name] = body
        return self._loaded[body_name]
