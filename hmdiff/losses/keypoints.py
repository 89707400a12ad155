"""L_2D and L_3D: keypoint losses, for data without mesh ground truth (COCO, MPII, mocap).

As in METRO (arXiv 2012.09760), FastMETRO (2207.13820) and D2A-HMR (arXiv 2403.09063, eq. 2: λ_2D, λ_3D), the labels
supervise both the keypoints regressed from the predicted mesh and the predicted joints that are keypoints. Both are of
x̂_0, with the noise-level weight of the point loss.
B people, M noise levels, J keypoints, C coarse vertices, K joints.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.config import LossConfig
from hmdiff.data.sample import Sample
from hmdiff.geometry import crop_rotation, perspective_projection, weak_perspective_projection

SAME_PLACE = 0.02  # metres on the template within which a joint and the keypoint of the same name are identified
_NEAREST = 0.1  # metres, near plane of the camera


@dataclasses.dataclass(frozen=True)
class KeypointMap:
    """From a coarse mesh and joints to the labelled keypoints."""

    regressor: Tensor  # (J, C) from the coarse mesh; rows sum to 1
    joints: Tensor  # (S,) long: body joints that are keypoints
    places: Tensor  # (S,) long: the corresponding keypoints
    root: Tensor  # (1 or 2,) long: 3D labels are relative to the mean of these keypoints

    @classmethod
    def of(
        cls,
        body: Body,
        regressor: Tensor,  # (J, C) as `MeshRecoveryModel.keypoint_regressor` gives it
    ) -> KeypointMap:
        """For a body with keypoints: HALPE26, relative to the mid-hip, or a hand's, relative to the wrist."""
        names = body.keypoint_names or ()
        template = body.keypoints(body.v_template)
        pairs = [
            (number, names.index(name))
            for number, name in enumerate(body.joint_names)
            if name in names and (body.joint_template[number] - template[names.index(name)]).norm() <= SAME_PLACE
        ]
        joints, places = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
        about = ("left_hip", "right_hip") if "left_hip" in names else ("wrist",)
        return cls(regressor, joints, places, torch.tensor([names.index(name) for name in about]))

    def to(self, device: torch.device | str) -> KeypointMap:
        return KeypointMap(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


def keypoint_terms(
    config: LossConfig,
    sample: Sample,  # with unlabelled entries zeroed
    keypoints: KeypointMap,
    coarse: Tensor,  # (B, M, C, 3) metres, of x̂_0, the model's frame
    joints: Tensor,  # (B, M, K, 3) metres
    camera: Tensor,  # (B, 3) of the camera head: scale (crop half-sides per metre), tx, ty
    weight: Tensor,  # (B, M) on an error of x̂_0
    frame: str = "camera",  # of coarse and joints: "camera", or "crop" (see `geometry.crop_rotation`)
    unit: float = 1.0,  # metres per unit of L_3D
    shares: dict[str, Tensor] | None = None,  # filled with the labelled fraction of the batch for each term
) -> dict[str, Tensor]:  # scalars, weighted
    """`keypoints_2d` and `keypoints_3d`, each a mean over the people with such labels; 0 without any."""
    terms: dict[str, Tensor] = {}
    regressed, chosen = keypoints.regressor @ coarse, joints[..., keypoints.joints, :]
    if config.keypoints_2d and sample.joints_2d is not None:
        found = torch.cat([regressed, chosen], -2)
        seen = project_to_crop(found, camera, sample.focal, sample.principal_point, sample.has_perspective, frame)
        known = sample.joints_2d_confidence
        known = torch.ones_like(sample.joints_2d[..., 0]) if known is None else known
        target = _with_joints(sample.joints_2d, keypoints)
        error = (seen - target[:, None]).abs().sum(-1)
        known = _with_joints(known, keypoints, -1)
        terms["keypoints_2d"] = config.keypoints_2d * labelled_mean(error, known, weight, "keypoints_2d", shares)
    if config.keypoints_3d and sample.keypoints_3d is not None:
        target, known = sample.keypoints_3d, sample.has_keypoints_3d
        known = torch.ones_like(target[..., 0], dtype=torch.bool) if known is None else known
        if frame == "crop" and sample.focal is not None and sample.principal_point is not None:
            target = target @ crop_rotation(sample.principal_point, sample.focal)
        # Data sets differ in their definition of the pelvis, but agree on the hips.
        rooted = known[:, keypoints.root].all(-1)
        origin = torch.where(rooted[:, None, None], target[:, keypoints.root].mean(1, keepdim=True), 0.0)
        own = torch.where(rooted[:, None, None, None], regressed[..., keypoints.root, :].mean(-2, keepdim=True), 0.0)
        found = torch.cat([regressed, chosen], -2) - own
        error = (found - _with_joints(target - origin, keypoints)[:, None]).abs().mean(-1) / unit
        known = _with_joints(known.to(error), keypoints, -1)
        terms["keypoints_3d"] = config.keypoints_3d * labelled_mean(error, known, weight, "keypoints_3d", shares)
    return terms


def project_to_crop(
    points: Tensor,  # (B, M, P, 3) metres, pelvis at 0, the model's frame
    camera: Tensor,  # (B, 3) scale, tx, ty
    focal: Tensor | None,  # (B,) crop half-sides
    principal_point: Tensor | None,  # (B, 2) crop coordinates
    known: Tensor | None,  # (B,) bool: focal and principal point are known; None: for all
    frame: str = "camera",
) -> Tensor:  # (B, M, P, 2) crop coordinates
    """Project by the predicted camera.

    With known intrinsics, as at inference: rotate from the crop's frame to the camera's, translate by the predicted
    camera (`geometry.weak_to_full_camera`), project by the pinhole. Otherwise weak perspective, along the z axis of the
    crop's frame.
    """
    weak = weak_perspective_projection(points, camera[:, None])
    if focal is None or principal_point is None:
        return weak
    known = torch.ones_like(focal, dtype=torch.bool) if known is None else known
    focal = torch.where(known, focal, 1.0)
    if frame == "crop":
        points = points @ crop_rotation(principal_point, focal)[:, None].mT
    depth = focal / camera[:, 0].clamp_min(1e-4)
    lateral = (camera[:, 1:] - principal_point) * (depth / focal)[:, None]
    placed = points + torch.cat([lateral, depth[:, None]], -1)[:, None, None]
    placed = torch.cat([placed[..., :2], placed[..., 2:].clamp_min(_NEAREST)], -1)
    seen = perspective_projection(placed, focal[:, None], principal_point[:, None])
    return torch.where(known[:, None, None, None], seen, weak)


def labelled_mean(
    error: Tensor,  # (B, M, P)
    confidence: Tensor,  # (B, P) >= 0, 0 = not labelled
    weight: Tensor,  # (B, M)
    name: str = "",  # of the term
    shares: dict[str, Tensor] | None = None,  # filled with the labelled fraction of the batch, see `processes`
) -> Tensor:  # ()
    """Confidence-weighted mean per person, then the mean over the people with any label."""
    confidence = confidence.to(error)
    error = torch.where(confidence[:, None] > 0, error, 0.0)
    total = confidence.sum(-1)
    labelled = total > 0
    if shares is not None:
        shares[name] = labelled.to(error).mean()
    each = (error * confidence[:, None]).sum(-1) / torch.where(labelled, total, 1.0)[:, None] * weight
    return (each.mean(-1) * labelled).sum() / labelled.sum().clamp_min(1)


def _with_joints(values: Tensor, keypoints: KeypointMap, dim: int = -2) -> Tensor:
    """Labels of the regressed keypoints, then of the predicted joints."""
    return torch.cat([values, values.index_select(dim, keypoints.places)], dim)
