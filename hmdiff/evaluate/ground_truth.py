"""Ground truth bodies of labelled people for a protocol:

    gendered   the record's pose and shape on the SMPL model of its gender, which the user must provide
    neutral    the same pose and shape on the neutral SMPL
    labelled   the model's own body; for MANO the data set's vertices and joints

For data sets without bodies (Human3.6M's motion capture), protocols that allow it use the measured joints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.files import licensed_kind
from hmdiff.body.regressors import load_regressor
from hmdiff.data.labelled_bodies import LabelledBodies
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.evaluate.protocol_errors import Bodies
from hmdiff.evaluate.protocols import Protocol


def body_kind(body: Body) -> str:
    """smpl, smplx, mano, or the name of another body."""
    licensed = licensed_kind(body.name)
    return body.name if licensed is None else licensed[0]


def check_body(protocol: Protocol, body: Body, same_body: bool = False) -> None:
    """Raises `UserError` if the protocol is defined for another kind of body than the model's."""
    kind = body_kind(body)
    if protocol.kind != "any" and kind != protocol.kind and not same_body:
        raise UserError(
            f"protocol {protocol.title} is about {protocol.kind.upper()}'s mesh, and the body here is {kind!r}; give a "
            f"checkpoint or predictions on {protocol.kind}, or another protocol, such as emdb or synthetic"
        )


def protocol_regressors(protocol: Protocol, body: Body) -> dict[str, Tensor]:  # (J, V) each
    """The protocol's joint regressors. Raises `UserError` if a file that the user must provide is missing."""
    regressors = {}
    for name in protocol.needs_regressors():
        if name == "body":
            if body.J_regressor is None or body.joint_names[: len(protocol.skeleton)] != protocol.skeleton:
                if protocol.regressor == "body":
                    raise UserError(f"body {body.name!r} has not SMPL's 24 joints, which {protocol.title} compares")
            assert body.J_regressor is not None
            regressors[name] = body.J_regressor
        elif name == "keypoints":
            if body.keypoint_regressor is None or body.keypoint_names != protocol.skeleton:
                raise UserError(f"body {body.name!r} has not the keypoints that protocol {protocol.title} compares")
            regressors[name] = body.keypoint_regressor
        else:
            regressors[name] = load_regressor(name, body.num_vertices)
    return regressors


class GroundTruth:
    """Ground truth bodies of records, for one protocol."""

    def __init__(
        self,
        protocol: Protocol,
        body: Body,  # the model's
        same_body: bool = False,  # treat records as labelled on the model's body (stand-in data)
    ) -> None:
        check_body(protocol, body, same_body)
        self.protocol, self.body, self.same_body = protocol, body, same_body
        self.bodies = LabelledBodies(body, torch.zeros(1, dtype=torch.long), full_mesh=True, same_body=same_body)
        self.measured: bool | None = None  # True: measured joints without bodies; must be the same for all records

    def __call__(self, records: Sequence[Record]) -> Bodies:  # (B, ...)
        """Raises `UserError` naming the record whose label is missing."""
        measured = [record.pose is None and record.vertices is None for record in records]
        self.measured = measured[0] if self.measured is None else self.measured
        for record, without in zip(records, measured, strict=True):
            if without != self.measured:
                found, others = ("no body", "a body") if without else ("a body", "no body")
                raise record.error(f"{found} is labelled, and the people before have {others}; score them apart")
        return self._measured_joints(records) if self.measured else self._meshes(records)

    def _measured_joints(self, records: Sequence[Record]) -> Bodies:
        if not self.protocol.motion_capture and self.protocol.name != "emdb":
            raise records[0].error(f"no body is labelled, and protocol {self.protocol.title} needs one")
        return Bodies(None, torch.stack([named_joints(r, self.protocol.needed) for r in records]), self.protocol.needed)

    def _meshes(self, records: Sequence[Record]) -> Bodies:
        with_joints = self.protocol.kind == "mano" and all(record.joints_3d is not None for record in records)
        vertices, own = self._labelled_meshes(records) if records[0].pose is None else self._posed_meshes(records)
        if with_joints:
            joints = torch.stack([named_joints(record, self.protocol.skeleton) for record in records])
            return Bodies(vertices, joints, self.protocol.skeleton)
        if self.protocol.mesh_joints or own is None:
            return Bodies(vertices)
        return Bodies(vertices, own, self.body.joint_names)

    def _labelled_meshes(self, records: Sequence[Record]) -> tuple[Tensor, None]:
        for record in records:
            if record.vertices is None or len(record.vertices) != self.body.num_vertices:
                found = "none" if record.vertices is None else len(record.vertices)
                raise record.error(f"vertices: {found}, and the body {self.body.name!r} has {self.body.num_vertices}")
            self._check_hand(record)
        return torch.stack([torch.from_numpy(np.asarray(record.vertices)).float() for record in records]), None

    def _posed_meshes(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        vertices = torch.zeros(len(records), self.body.num_vertices, 3)
        joints = torch.zeros(len(records), self.body.num_joints, 3)
        by_key: dict[str, list[int]] = {}
        for row, record in enumerate(records):
            self._check_hand(record)
            by_key.setdefault(self._body_name(record), []).append(row)
        for key, rows in by_key.items():
            poses, betas = [], []
            for row in rows:
                pose, shape = records[row].pose, records[row].betas
                if pose is None or shape is None:
                    raise records[row].error("no pose is labelled, and the people before have one; score them apart")
                poses.append(pose)
                betas.append(shape)
            posed = self.bodies.pose(key, poses, betas)
            assert posed.vertices is not None
            # `pose` returns meshes relative to the root joint; raw SMPL output has it at its rest position.
            root = torch.zeros_like(posed.root) if self.protocol.centre else posed.root
            vertices[rows], joints[rows] = posed.vertices + root[:, None], posed.joints + root[:, None]
        return vertices, joints

    def _body_name(self, record: Record) -> str:
        """Name, for `load_body`, of the body that this record's ground truth is posed on."""
        gender = "neutral" if self.protocol.mesh == "neutral" else record.gender
        if record.body != "smpl" or self.same_body or body_kind(self.body) != "smpl":
            return self.bodies.body_name(record)  # or raises `UserError`
        name = "smpl" if gender == "neutral" else f"smpl_{gender}"
        return self.body.name if licensed_kind(self.body.name) == ("smpl", gender) else name

    def _check_hand(self, record: Record) -> None:
        side = "left" if self.body.name == "mano_left" else "right"
        if record.body == "mano" and record.hand not in (None, side):
            raise record.error(f"a {record.hand} hand, and the body {self.body.name!r} is a {side} one")


def named_joints(record: Record, names: Sequence[str]) -> Tensor:  # (J, 3)
    """Labelled 3D joints by name. Raises `UserError` naming the record and the first missing joint."""
    if record.joints_3d is None:
        raise record.error("no 3D joints are labelled")
    labelled = np.ones(len(record.joints_3d), bool) if record.joints_3d_valid is None else record.joints_3d_valid > 0
    row_of = {name: row for row, name in enumerate(record.joint_names) if labelled[row]}
    for name in names:
        if name not in row_of:
            raise record.error(f"its 3D joint {name!r} is not labelled, and the protocol needs it")
    return torch.from_numpy(np.asarray(record.joints_3d)[[row_of[name] for name in names]]).float()


def raw_placement(protocol: Protocol, body: Body) -> Tensor:  # (3,) metres
    """Offset for root-relative meshes: the rest pose's root if the protocol does not align roots, else zero."""
    return torch.zeros(3) if protocol.centre else body.joint_template[0].float()
