"""Body: shape and pose to vertices by linear blend skinning; and `load_body`.

Loper et al., SMPL, SIGGRAPH Asia 2015, eq. 2-10: v(beta, R) = sum_j w_j G_j(R, J(beta)) (T + S beta + P (R - I)). One
implementation serves the free body (without pose blend shapes P) and a user's SMPL, SMPL-X or MANO file, with any
number of vertices and joints. Frame: SMPL's (y up, facing +z, the left at +x), metres; the root rotation maps it to a
camera. Symbols: V vertices, J joints, B shape coefficients, K keypoints.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hmdiff.body.files import (
    FOLDER_VARIABLE,
    LICENSED,
    body_folder,
    files_by_name,
    find_body_file,
    licensed_kind,
    read_body_file,
)
from hmdiff.body.skeletons import SMPL24
from hmdiff.errors import UserError
from hmdiff.files.resources import asset_path

Array = np.ndarray | Tensor


class BodyOutput(NamedTuple):
    vertices: Tensor  # (..., V, 3) metres
    joints: Tensor  # (..., J, 3) metres


class Body(nn.Module):
    """A skinned body. Its arrays are non-persistent buffers: they follow `.to()` and are not saved with a model."""

    v_template: Tensor
    shapedirs: Tensor
    posedirs: Tensor | None
    lbs_weights: Tensor
    J_regressor: Tensor | None
    faces: Tensor | None
    keypoint_regressor: Tensor | None
    mean_pose: Tensor | None
    joint_template: Tensor
    joint_shapedirs: Tensor
    expression_dirs: Tensor | None
    joint_expression_dirs: Tensor | None
    _support: Tensor
    _support_weights: Tensor

    def __init__(
        self,
        name: str,
        v_template: Array,  # (V, 3) metres
        shapedirs: Array,  # (V, 3, B) metres per standard deviation
        lbs_weights: Array,  # (V, J) rows sum to 1
        parents: Sequence[int],  # J, -1 at the root; parents precede their children
        joint_names: Sequence[str],  # J
        J_regressor: Array | None = None,  # (J, V) rows sum to 1; may be None when the next two are given
        joint_template: Array | None = None,  # (J, 3) joints of the template
        joint_shapedirs: Array | None = None,  # (J, 3, B)
        posedirs: Array | None = None,  # (V, 3, 9 (J - 1))
        faces: Array | None = None,  # (F, 3)
        keypoint_names: Sequence[str] | None = None,  # K
        keypoint_regressor: Array | None = None,  # (K, V) rows sum to 1
        mean_pose: Array | None = None,  # (J, 3) axis-angles added to published labels (hands of MANO, SMPL-X)
        expression_dirs: Array | None = None,  # (V, 3, E) metres per unit, SMPL-X's facial expressions
        joint_expression_dirs: Array | None = None,  # (J, 3, E); None: from J_regressor
    ) -> None:
        super().__init__()
        self.name = name
        self.parents = tuple(int(parent) for parent in parents)
        self.joint_names = tuple(joint_names)
        self.keypoint_names = None if keypoint_names is None else tuple(keypoint_names)
        for key, value in (
            ("v_template", v_template),
            ("shapedirs", shapedirs),
            ("lbs_weights", lbs_weights),
            ("J_regressor", J_regressor),
            ("posedirs", posedirs),
            ("keypoint_regressor", keypoint_regressor),
            ("mean_pose", mean_pose),
            ("expression_dirs", expression_dirs),
        ):
            self.register_buffer(key, None if value is None else _floating(value), persistent=False)
        self.register_buffer("faces", None if faces is None else torch.as_tensor(faces).long(), persistent=False)
        self._check_shapes()
        if joint_template is None or joint_shapedirs is None:
            if self.J_regressor is None:
                raise UserError(f"body {name!r}: give J_regressor, or joint_template and joint_shapedirs")
            joint_template = self.J_regressor @ self.v_template
            joint_shapedirs = torch.einsum("jv,vcb->jcb", self.J_regressor, self.shapedirs)
        if self.expression_dirs is not None and joint_expression_dirs is None:
            joint_expression_dirs = torch.einsum("jv,vce->jce", self.J_regressor, self.expression_dirs)
        found = None if joint_expression_dirs is None else _floating(joint_expression_dirs)
        self.register_buffer("joint_expression_dirs", found, persistent=False)
        self.register_buffer("joint_template", _floating(joint_template), persistent=False)
        self.register_buffer("joint_shapedirs", _floating(joint_shapedirs), persistent=False)
        # Joints of equal depth are processed together: forward kinematics takes as many steps as the tree is deep.
        self._levels = _depth_levels(self.parents)
        if self.keypoint_regressor is not None:
            support = self.keypoint_regressor.ne(0).any(0).nonzero()[:, 0]
            self.register_buffer("_support", support, persistent=False)
            self.register_buffer("_support_weights", self.keypoint_regressor[:, support], persistent=False)

    def _check_shapes(self) -> None:
        vertices, joints, betas = len(self.v_template), len(self.parents), self.shapedirs.shape[-1]
        expected: dict[str, tuple[int, ...]] = {
            "v_template": (vertices, 3),
            "shapedirs": (vertices, 3, betas),
            "lbs_weights": (vertices, joints),
            "J_regressor": (joints, vertices),
            "posedirs": (vertices, 3, 9 * (joints - 1)),
            "keypoint_regressor": (len(self.keypoint_names or ()), vertices),
            "mean_pose": (joints, 3),
            "expression_dirs": (vertices, 3, self.num_expressions),
        }
        for key, shape in expected.items():
            value = getattr(self, key)
            if value is not None and tuple(value.shape) != shape:
                raise UserError(f"body {self.name!r}: {key} is {tuple(value.shape)}, expected {shape}")
        if len(self.joint_names) != joints:
            raise UserError(f"body {self.name!r}: {len(self.joint_names)} joint names for {joints} joints")
        if self.parents[0] != -1 or any(not 0 <= parent < joint for joint, parent in enumerate(self.parents) if joint):
            raise UserError(f"body {self.name!r}: parents start with -1 and name earlier joints, got {self.parents}")

    @property
    def num_betas(self) -> int:
        return self.shapedirs.shape[-1]

    @property
    def num_expressions(self) -> int:
        """E of SMPL-X; 0 for other bodies."""
        return 0 if self.expression_dirs is None else self.expression_dirs.shape[-1]

    @property
    def num_joints(self) -> int:
        return len(self.parents)

    @property
    def num_vertices(self) -> int:
        return len(self.v_template)

    def forward(
        self,
        betas: Tensor,  # (..., B) in standard deviations
        rotations: Tensor,  # (..., J, 3, 3) relative to the parent; the root's first
        translation: Tensor | None = None,  # (..., 3) metres
        expression: Tensor | None = None,  # (..., E) for SMPL-X; None: 0
    ) -> BodyOutput:
        """Vertices and joints of the posed body; leading dimensions broadcast. The root rotates about its joint."""
        if betas.shape[-1] != self.num_betas or rotations.shape[-3:] != (self.num_joints, 3, 3):
            raise UserError(
                f"body {self.name!r}: betas {tuple(betas.shape)} and rotations {tuple(rotations.shape)}, expected "
                f"(..., {self.num_betas}) and (..., {self.num_joints}, 3, 3)"
            )
        face = () if expression is None else expression.shape[:-1]
        batch = np.broadcast_shapes(betas.shape[:-1], rotations.shape[:-3], face)
        betas = betas.expand(*batch, -1).reshape(-1, self.num_betas)
        rotations = rotations.expand(*batch, -1, -1, -1).reshape(-1, self.num_joints, 3, 3)
        shaped = torch.addmm(self.v_template.flatten(), betas, self.shapedirs.flatten(0, 1).mT)
        joints = torch.addmm(self.joint_template.flatten(), betas, self.joint_shapedirs.flatten(0, 1).mT)
        if expression is not None:
            if expression.shape[-1] != self.num_expressions or self.expression_dirs is None:
                raise UserError(
                    f"body {self.name!r}: expression {tuple(expression.shape)}, expected (..., {self.num_expressions})"
                    + ("" if self.num_expressions else ": only SMPL-X has expressions")
                )
            assert self.joint_expression_dirs is not None
            expression = expression.expand(*batch, -1).reshape(-1, self.num_expressions)
            shaped = torch.addmm(shaped, expression, self.expression_dirs.flatten(0, 1).mT)
            joints = torch.addmm(joints, expression, self.joint_expression_dirs.flatten(0, 1).mT)
        if self.posedirs is not None:
            identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
            feature = (rotations[:, 1:] - identity).flatten(1)
            shaped = torch.addmm(shaped, feature, self.posedirs.flatten(0, 1).mT)
        posed_joints, columns = self._chain(rotations, joints.unflatten(-1, (-1, 3)))
        first, second, third, vertices = (self.lbs_weights @ columns.flatten(2)).unflatten(-1, (4, 3)).unbind(-2)
        # Fused multiply-adds: on a CPU skinning is memory-bound, and temporaries took half of its time.
        for column, coordinate in zip((first, second, third), shaped.unflatten(-1, (-1, 3)).split(1, -1), strict=True):
            vertices = torch.addcmul(vertices, column, coordinate)
        vertices = vertices.reshape(*batch, self.num_vertices, 3)
        posed_joints = posed_joints.reshape(*batch, self.num_joints, 3)
        if translation is not None:
            vertices, posed_joints = vertices + translation[..., None, :], posed_joints + translation[..., None, :]
        return BodyOutput(vertices, posed_joints)

    def _chain(
        self,
        rotations: Tensor,  # (N, J, 3, 3)
        joints: Tensor,  # (N, J, 3) rest pose
    ) -> tuple[Tensor, Tensor]:  # posed joints (N, J, 3); G (N, J, 4, 3): columns of the rotation, translation
        turned, placed = [rotations[:, :1]], [joints[:, :1]]
        for children, parent_rows, parents in self._levels:
            turn = turned[-1][:, parent_rows]
            offset = (joints[:, children] - joints[:, parents])[..., None]
            placed.append(placed[-1][:, parent_rows] + (turn @ offset)[..., 0])
            turned.append(turn @ rotations[:, children])
        order = [0, *(joint for children, _, _ in self._levels for joint in children)]
        back = sorted(range(len(order)), key=order.__getitem__)
        turn, posed = torch.cat(turned, 1)[:, back], torch.cat(placed, 1)[:, back]
        shift = posed - (turn @ joints[..., None])[..., 0]
        return posed, torch.cat([turn.mT, shift[..., None, :]], -2)

    def keypoints(
        self,
        vertices: Tensor,  # (..., V, 3)
    ) -> Tensor:  # (..., K, 3)
        """The keypoints of a posed mesh, in the order of `keypoint_names`."""
        support = self.keypoint_support()
        return self._support_weights.to(vertices.dtype) @ vertices[..., support, :]

    def keypoint_support(self) -> Tensor:  # (S,) int64, ascending
        """The vertices with nonzero weight in the keypoint regressor."""
        if self.keypoint_regressor is None:
            raise UserError(f"body {self.name!r} has no keypoint regressor; use the free body, or its joints")
        return self._support

    @property
    def support_weights(self) -> Tensor:  # (K, S)
        """The keypoint regressor restricted to those vertices."""
        self.keypoint_support()
        return self._support_weights

    def select(
        self,
        vertex_ids: Sequence[int] | Tensor,  # (M,)
    ) -> Body:
        """The same body with only these vertices, in this order: its joints stay exact, its faces are dropped.

        The keypoint regressor is kept if all vertices of its support are included.
        """
        ids = torch.as_tensor(vertex_ids, dtype=torch.long, device=self.v_template.device)
        regressor = None
        if self.keypoint_regressor is not None and torch.isin(self.keypoint_support(), ids).all():
            # A duplicated vertex must count once.
            first = torch.zeros_like(ids, dtype=torch.bool)
            first[np.unique(ids.cpu().numpy(), return_index=True)[1]] = True
            regressor = self.keypoint_regressor[:, ids] * first
        return Body(
            name=self.name,
            v_template=self.v_template[ids],
            shapedirs=self.shapedirs[ids],
            lbs_weights=self.lbs_weights[ids],
            parents=self.parents,
            joint_names=self.joint_names,
            joint_template=self.joint_template,
            joint_shapedirs=self.joint_shapedirs,
            posedirs=None if self.posedirs is None else self.posedirs[ids],
            keypoint_names=None if regressor is None else self.keypoint_names,
            keypoint_regressor=regressor,
            mean_pose=self.mean_pose,
            expression_dirs=None if self.expression_dirs is None else self.expression_dirs[ids],
            joint_expression_dirs=self.joint_expression_dirs,
        )

    def from_smpl(
        self,
        rotations: Tensor,  # (..., 24, 3, 3) of SMPL's joints
    ) -> Tensor:  # (..., J, 3, 3) of this body's joints
        """A pose of SMPL's 24 joints for this body. SMPL-X's jaw, eyes and fingers rest; SMPL's hands are dropped.

        Raises:
            UserError: this body lacks SMPL's joints (a hand).
        """
        if self.joint_names == SMPL24:
            return rotations
        if self.joint_names[:22] != SMPL24[:22] or rotations.shape[-3] != len(SMPL24):
            raise UserError(
                f"body {self.name!r}: {self.num_joints} joints that are not SMPL's cannot take a pose of "
                f"{rotations.shape[-3]}; use a body of SMPL's joints, such as free, smpl or smplx"
            )
        rest = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
        rest = rest.expand(*rotations.shape[:-3], self.num_joints - 22, 3, 3)
        return torch.cat([rotations[..., :22, :, :], rest], -3)


def _floating(value: Array) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _depth_levels(parents: Sequence[int]) -> list[tuple[list[int], list[int], list[int]]]:
    """For each depth below the root: its joints, the rows of their parents in the depth above, and the parents."""
    levels, above = [], [0]
    while children := [joint for joint, parent in enumerate(parents) if joint and parent in above]:
        owners = [parents[joint] for joint in children]
        levels.append((children, [above.index(owner) for owner in owners], owners))
        above = children
    return levels


def load_body(
    name_or_path: str | Path = "free",  # free, smpl, smpl_female, smplx, mano_left, ..., or a path of a .npz or .pkl
    gender: str = "neutral",  # if a named SMPL or SMPL-X has none; right or left for MANO
) -> Body:
    """Load a body in float32. Named bodies other than the free one are searched for in HMDIFF_BODY_DIR and below.

    The body's `name` is the requested name (or the path's stem), so that a checkpoint can refer to it without storing
    it; a file of that name in HMDIFF_BODY_DIR is then found.

    Raises:
        UserError: no such file; names the file, where to register for it and where to put it.
    """
    name = str(name_or_path)
    named = None if name != "free" and os.path.isfile(name) else _named_body(name, gender)
    return named or Body(name=Path(name).stem, **read_body_file(name))


def load_named_body(name: str) -> Body:
    """The body named in a checkpoint: a name of `load_body`, or of a file in HMDIFF_BODY_DIR; never a path.

    Checkpoints are untrusted: they must not choose which file of this machine is read.

    Raises:
        UserError: a path, or a body that is not installed.
    """
    if not name or name != Path(name).name or "\\" in name or "\0" in name:
        raise UserError(f"the checkpoint's body {name!r:.80} is not a name; give body=load_body(PATH)")
    body = _named_body(name, "neutral")
    if body is None:
        raise UserError(
            f"the checkpoint's body {name!r:.80} is not here; put {name[:80]}.npz in the folder {FOLDER_VARIABLE}, or "
            "give body=load_body(PATH)"
        )
    return body


def _named_body(name: str, gender: str) -> Body | None:
    if name == "free":
        return Body(name=name, **read_body_file(asset_path("body.npz")))
    folder, licensed = body_folder(), licensed_kind(name)
    if folder is not None and name not in LICENSED and len(Path(name).parts) == 1:
        there = files_by_name(folder)
        for file in (name, f"{name}.npz", f"{name}.pkl"):
            if (path := there.get(file.lower())) is not None and path.suffix != ".npy":
                return Body(name=path.stem if licensed is None else name, **read_body_file(path))
    if licensed is not None:
        kind, gender = licensed if name not in LICENSED else (name, gender)
        full_name = kind if gender == "neutral" else f"{kind}_{gender}"
        return Body(name=full_name, **read_body_file(find_body_file(kind, gender)))
    return None
