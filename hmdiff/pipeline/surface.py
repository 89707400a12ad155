"""From predicted coarse meshes to full meshes: the nearest bodies, or upsampled vertices."""

from __future__ import annotations

from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.fitting import FittedBodies, fit_coarse
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.models.recovery import MeshRecoveryModel

SURFACES = ("body", "vertices")


def nearest_bodies(
    body: Body,
    model: MeshRecoveryModel,
    coarse: Tensor,  # (B, N, C, 3) metres, the camera's axes
    translation: Tensor,  # (B, N, 3) metres, pelvis in the camera's frame
) -> tuple[Tensor, Tensor, FittedBodies]:  # vertices (B, N, V, 3), joints (B, N, K, 3), fit (B, N, ...)
    """Fit a body to the coarse mesh of each hypothesis; the pelvis is at the origin."""
    people, hypotheses = coarse.shape[:2]
    # The direct baseline's hypotheses are equal: fit one.
    alone = 1 if model.config.mode == "direct" else hypotheses
    rows, place = coarse[:, :alone].flatten(0, 1), translation[:, :alone].flatten(0, 1)
    regressor = None if body.keypoint_regressor is None else model.keypoint_regressor(body)
    found = fit_coarse(body, model.coarse_ids, rows, keypoints=regressor, translation=place)
    posed = body(found.betas, axis_angle_to_matrix(found.pose))
    shift = -posed.joints[:, 0]
    found = found._replace(translation=shift)

    def grouped(value: Tensor) -> Tensor:
        return value.unflatten(0, (people, -1)).expand(-1, hypotheses, *value.shape[1:])

    fitted = FittedBodies(*map(grouped, found))
    return grouped(posed.vertices + shift[:, None]), grouped(posed.joints + shift[:, None]), fitted
