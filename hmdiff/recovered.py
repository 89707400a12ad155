"""`RecoveredPerson`: one person of a `MeshOutput` with camera, projection, SMPL parameters and files.

Frames: `vertices` and `joints` have the pelvis at the origin and the axes of the photo's camera (x right, y down,
z forward); `camera_vertices` are in the camera's frame, metres, and project to the photo by ``K @ camera_vertices.T``.
N hypotheses, V vertices, K body joints, J keypoints.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hmdiff.errors import UserError

if TYPE_CHECKING:
    from hmdiff.body.body import Body


@dataclasses.dataclass(frozen=True)
class RecoveredPerson:
    """A view of one row of an output, without copies."""

    output: Any  # a `MeshOutput`; its type here would be a circular import
    row: int

    @property
    def vertices(self) -> Tensor:  # (N, V, 3) metres, the pelvis at the origin
        return self.output.vertices[self.row]

    @property
    def mean_vertices(self) -> Tensor:  # (V, 3)
        return self.output.mean_vertices[self.row]

    @property
    def joints(self) -> Tensor:  # (N, K, 3) metres
        return self.output.joints[self.row]

    @property
    def keypoints(self) -> Tensor | None:  # (N, J, 3) metres, HALPE26
        return None if self.output.keypoints is None else self.output.keypoints[self.row]

    @property
    def translation(self) -> Tensor:  # (N, 3) metres, pelvis in the camera's frame
        return self.output.translation[self.row]

    @property
    def camera_vertices(self) -> Tensor:  # (N, V, 3) metres, the camera's frame
        return self.vertices + self.translation[:, None]

    @property
    def intrinsics(self) -> Tensor:  # (3, 3)
        """Camera matrix K of the full photo, in pixels."""
        focal, (x, y) = self.output.focal[self.row], self.output.principal_point[self.row]
        matrix = torch.eye(3, dtype=focal.dtype, device=focal.device)
        matrix[0, 0] = matrix[1, 1] = focal
        matrix[0, 2], matrix[1, 2] = x, y
        return matrix

    def project(
        self,
        points: Tensor,  # (..., 3) metres, the camera's frame
    ) -> Tensor:  # (..., 2) photo pixels
        homogeneous = points @ self.intrinsics.mT
        return homogeneous[..., :2] / homogeneous[..., 2:].clamp_min(1e-6)

    @property
    def pixels(self) -> Tensor:  # (N, V, 2) vertices in photo pixels
        return self.project(self.camera_vertices)

    @property
    def spread(self) -> Tensor:  # (V,) millimetres
        return self.output.spread[self.row]

    @property
    def selected(self) -> int:
        """Index of the best hypothesis, selected without ground truth."""
        return int(self.output.selected[self.row])

    def to_smpl(self, body: Body | None = None) -> dict[str, Tensor]:
        """Pose and shape of every hypothesis under SMPL's names: `global_orient` (N, 3), `body_pose` (N, J - 1, 3),
        `betas` (N, B), `transl` (N, 3) metres in the camera's frame, as ``body(betas, pose, transl)`` takes them.

        Args:
            body: an SMPL or SMPL-X body to retarget to (`hmdiff.body.body.load_body`); None: the pipeline's body, with
                SMPL's 24 joints but its own shape space.

        Raises:
            UserError: the output has no bodies (surface="vertices").
        """
        fitted = self.output.fitted
        if fitted is None or self.output.body is None:
            raise UserError('this output has no bodies: call the pipeline with surface="body"')
        pose, betas = fitted.pose[self.row], fitted.betas[self.row]
        place = fitted.translation[self.row] + self.translation
        if body is not None:
            from hmdiff.body.retarget import retarget

            own = self.output.body
            parts = [retarget(own, body, pose[i : i + 1], betas[i], place[i : i + 1]) for i in range(len(pose))]
            pose, place = torch.cat([part.pose for part in parts]), torch.cat([part.translation for part in parts])
            betas = torch.stack([part.betas for part in parts])
        return {"global_orient": pose[:, 0], "body_pose": pose[:, 1:], "betas": betas, "transl": place}

    def save(self, stem: str | Path) -> None:
        """Write STEM.npz, .html, .obj, .glb, .png and _spread.png, as `hmdiff sample` does."""
        from hmdiff.viz.person_files import write_person

        photo, number = self._photo()
        write_person(self.output, self.row, photo, number, Path(stem), self._body())

    def _body(self) -> Body:
        if self.output.body is None:
            raise UserError("this output does not know its body; call a pipeline to get one that does")
        return self.output.body

    def _photo(self) -> tuple[Any, int]:
        if not self.output.photos:
            raise UserError('save needs the photo: call the pipeline with it, as in pipe("photo.jpg")')
        return self.output.photos[self.row]
