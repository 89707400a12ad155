"""`MeshOutput`: the pipeline's result, with summaries of its hypotheses.

B people, N hypotheses, V vertices, K body joints, J keypoints (HALPE26).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.fitting import FittedBodies
from hmdiff.diffusion.confidence import RADII, Confidence, Within
from hmdiff.diffusion.dat import GuidanceReport
from hmdiff.diffusion.hypotheses import (
    Modes,
    Reprojection,
    apply_temperature,
    heatmap_log_likelihood,
    modes,
    select,
    spread,
    take,
    weighted_mean,
)
from hmdiff.errors import UserError
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Heatmaps, heatmap_peaks
from hmdiff.recovered import RecoveredPerson


@dataclasses.dataclass(frozen=True)
class MeshOutput:
    """Recovered people. Meshes have the camera's axes (x right, y down, z forward) and the pelvis at the origin."""

    vertices: Tensor  # (B, N, V, 3) metres
    joints: Tensor  # (B, N, K, 3) metres, the body's own joints
    keypoints: Tensor | None  # (B, N, J, 3) metres, HALPE26 regressed from the mesh; None for a body without them
    camera: Tensor  # (B, 3) weak perspective in the crop: scale (half-sides per metre), tx, ty
    translation: Tensor  # (B, N, 3) metres, pelvis of each hypothesis in the frame of the full photo's camera
    focal: Tensor  # (B,) pixels, of the full photo's camera
    principal_point: Tensor  # (B, 2) pixels
    faces: Tensor  # (F, 3) long
    guidance: GuidanceReport | None = None  # DAT's report, for guided sampling
    log_likelihood: Tensor | None = None  # (B, N) nats, of each hypothesis under the heatmaps; None without them
    temperature: Tensor = dataclasses.field(default_factory=lambda: torch.ones(1))  # (B,) 1 if none was fitted
    calibration: Confidence | None = None  # for these sampling settings; None if none was fitted
    confidence: Tensor | None = None  # (B, K) 0..1 of the joints, from RLE's σ̂ (D2A-HMR); None without RLE
    joint_scale: Tensor | None = None  # (B, K, 3) metres, RLE's σ̂ of the joints, in the model's frame (camera or crop)
    rle_log_likelihood: Tensor | None = None  # (B, N) nats, of each hypothesis under RLE's density; None without RLE
    # (B, N, ...) pose, betas and translation of the fitted bodies, and their distance from the predicted coarse
    # vertices; None for surface="vertices"
    fitted: FittedBodies | None = None
    calibrated_spread: bool = False  # whether a temperature was fitted for these sampling settings
    reprojection: Reprojection | None = None  # distance of projected keypoints from the heatmaps' peaks
    evidence: Tensor | None = None  # (B, 3) image evidence for the spread, see `diffusion/image_evidence.py`
    body: Body | None = None  # the body model of `vertices`
    photos: tuple[tuple[Any, int], ...] = ()  # per person: the photo (`PhotoPeople`) and the person's index in it
    aggregated_vertices: Tensor | None = None  # (B, V, 3) metres, one mesh from all hypotheses, by the aggregation MLP

    @property
    def people(self) -> list[RecoveredPerson]:
        """The people one by one, with camera, projection, parameters and files."""
        return [RecoveredPerson(self, row) for row in range(len(self.vertices))]

    def save(self, folder: str | Path) -> list[Path]:
        """Write the files of all people as `hmdiff sample` does; returns the npz paths.

        Raises:
            UserError: the output is not of photos; a file would replace an input, or one not written by hmdiff.
        """
        from hmdiff.files.outputs import output_names, protect_inputs

        photos: list[Any] = []
        for photo, _ in self.photos:
            if not any(photo is other for other in photos):
                photos.append(photo)
        protect_inputs(Path(folder), [photo.photo for photo in photos], [photo.photo for photo in photos])
        names = output_names([photo.photo for photo in photos], [len(photo.heatmaps) for photo in photos])
        written = []
        for person, (photo, number) in zip(self.people, self.photos, strict=bool(self.photos)):
            index = next(i for i, other in enumerate(photos) if other is photo)
            person.save(Path(folder) / names[index, number])
            written.append(Path(folder) / f"{names[index, number]}.npz")
        return written

    def to_smpl(self, body: Body | None = None) -> list[dict[str, Tensor]]:
        """`RecoveredPerson.to_smpl` of each person."""
        return [person.to_smpl(body) for person in self.people]

    @property
    def mean_vertices(self) -> Tensor:  # (B, V, 3)
        """The mean of the hypotheses: the estimate with the least expected squared error."""
        return self.vertices.mean(1)

    @property
    def weighted_vertices(self) -> Tensor:  # (B, V, 3)
        """Mean weighted by each hypothesis' agreement with the photo, see `hypotheses.weighted_mean`."""
        return self.mean_vertices if self.reprojection is None else weighted_mean(self.vertices, self.reprojection)

    @property
    def mean_joints(self) -> Tensor:  # (B, K, 3)
        return self.joints.mean(1)

    @property
    def selected(self) -> Tensor:  # (B,) long
        """Index of the best hypothesis, selected without ground truth (`hypotheses.select`)."""
        likely = self.log_likelihood, self.rle_log_likelihood
        return select(self.vertices, self.joints[:, :, 0], *likely, self.reprojection)

    @property
    def selected_vertices(self) -> Tensor:  # (B, V, 3)
        return take(self.vertices, self.selected)

    def modes(self, count: int = 5) -> Modes:
        """Clusters of hypotheses, with their weights: `modes(3).pick(output.vertices)` is (B, 3, V, 3)."""
        return modes(self.joints, count)

    @property
    def spread(self) -> Tensor:  # (B, V) millimetres
        """Mean distance of each vertex from its mean over hypotheses, times the temperature: the uncertainty.

        The vertices themselves are not scaled by the temperature, since that would distort the mesh. `calibrated`
        scales points for which this does not matter, such as joints.
        """
        return spread(self.vertices) * self.temperature[:, None].to(self.vertices) * 1000

    @property
    def joint_spread(self) -> Tensor:  # (B, K) millimetres
        """`spread` of the body's joints."""
        return spread(self.joints) * self.temperature[:, None].to(self.joints) * 1000

    def within(
        self,
        radius: int = 50,  # mm: 50 or 100
    ) -> Within | None:
        """Probability that each joint and vertex of the mean body is within the radius of the ground truth, relative to
        the pelvis, and the expected share of such vertices; None for uncalibrated sampling settings.
        """
        return None if self.calibration is None else self.calibration.within(radius, self.joint_spread, self.spread)

    def confidences(
        self,
        row: int,  # a person
    ) -> dict[str, Tensor]:
        """`within` as stored in files: "confidence" () of the person within 100 mm, and for each radius
        "confidence_50mm" (V,) and "joint_confidence_50mm" (K,); empty for uncalibrated sampling settings.
        """
        found: dict[str, Tensor] = {}
        for radius in RADII:
            within = self.within(radius)
            if within is not None:
                found[f"confidence_{radius}mm"] = within.vertices[row]
                found[f"joint_confidence_{radius}mm"] = within.joints[row]
                found["confidence"] = within.person[row]
        return found

    def calibrated(
        self,
        points: Tensor,  # (B, N, ..., 3) of the hypotheses, such as the joints
    ) -> Tensor:
        """The points with their deviations from the mean scaled by the temperature."""
        return apply_temperature(points, self.temperature)


def projected_keypoints(
    keypoints: Tensor,  # (B, N, J, 3) metres, relative to the pelvis
    translation: Tensor,  # (B, N, 3)
    focal: Tensor,  # (B,)
    principal_point: Tensor,  # (B, 2)
) -> Tensor:  # (B, N, J, 2) photo pixels
    """Projection of the hypotheses' keypoints into the photo."""
    return perspective_projection(keypoints + translation[:, :, None], focal[:, None], principal_point[:, None])


def log_likelihood(
    keypoints: Tensor,  # (B, N, J, 3) metres, relative to the pelvis
    translation: Tensor,  # (B, N, 3)
    focal: Tensor,  # (B,)
    principal_point: Tensor,  # (B, 2)
    heatmaps: Heatmaps,  # of the same B people
) -> Tensor:  # (B, N) nats
    """Log-likelihood of each hypothesis' projected keypoints under the heatmaps."""
    pixels = projected_keypoints(keypoints, translation, focal, principal_point)
    return heatmap_log_likelihood(heatmaps.crop.from_photo(pixels), heatmaps.values.to(pixels))


def keypoint_distance(
    output: MeshOutput,
    heatmaps: Heatmaps,  # of the same B people
    least_confidence: float = 0.1,  # of a peak
) -> Tensor:  # (B, N) photo pixels
    """Reprojection error: mean distance of each hypothesis' projected keypoints from the heatmaps' peaks.

    Peaks below `least_confidence` are ignored, unless a person has no others.
    """
    if output.keypoints is None:
        raise UserError("this body has no keypoints to compare with the heatmaps")
    projected = projected_keypoints(output.keypoints, output.translation, output.focal, output.principal_point)
    peaks, confidence = heatmap_peaks(heatmaps.values.to(projected))
    seen = heatmaps.crop.to_photo(peaks)
    distance = (projected - seen[:, None]).norm(dim=-1)
    counted = confidence >= least_confidence
    counted = torch.where(counted.any(-1, keepdim=True), counted, confidence > 0)[:, None]
    return (distance * counted).sum(-1) / counted.sum(-1).clamp_min(1)
