"""Stress maps: an occluding patch slides over a person's crop, and the person is recovered at every position.

At each position a square patch hides part of the input. In the image it is grey, in a depth map unknown. In the
heatmaps, joints with their peak under the patch are removed, as by an estimator that does not report occluded joints
(the most common corruption in `hmdiff.data.synthetic.corruption`): their channels are zero and stay valid. The noise is
the same at every position, so any change is due to the patch. G positions per side, M = G * G positions, N hypotheses,
V vertices. After the occlusion sensitivity maps of Zeiler and Fergus (arXiv 1311.2901), applied to bodies; the measures
are our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import MESHES_AT_ONCE, ROOT
from hmdiff.evaluate.metrics import MILLIMETRES, root_of, vertex_error
from hmdiff.heatmaps import Heatmaps, heatmap_peaks
from hmdiff.output import MeshOutput
from hmdiff.pipeline import HMDiffPipeline

GREY = 0.5
_FAINT = 1e-6  # a person without any peak left still needs a valid heatmap: one faint pixel


@dataclasses.dataclass(frozen=True)
class StressMap:
    """Effect of a patch at each of the M positions. Millimetres; means over the vertices."""

    centres: Tensor  # (M, 2) crop coordinates, row-major
    half: float  # half the patch's side in crop coordinates = the patch's fraction of the crop's side
    displacement: Tensor  # (M,) distance of the mean mesh to the mean mesh without a patch
    spread: Tensor  # (M,) spread of the hypotheses about their mean, calibrated as in `MeshOutput.spread`
    removed_joints: Tensor  # (M, J) bool: joints removed from the heatmaps; all False without heatmaps
    unoccluded: MeshOutput  # without a patch, B = 1
    unoccluded_spread: float
    error: Tensor | None = None  # (M,) PVE of the mean mesh, aligned at the pelvis; None without ground truth
    unoccluded_error: float | None = None

    def map(
        self,
        values: Tensor,  # (M,)
    ) -> Tensor:  # (G, G)
        side = round(len(self.centres) ** 0.5)
        return values.reshape(side, side)


def patch_grid(
    positions: int,  # G
    half: float,  # half the patch's side, crop coordinates
) -> Tensor:  # (G * G, 2) centres in crop coordinates, row-major from the upper left
    """An even grid from one edge of the crop to the other, with the patch always inside.

    Raises:
        UserError: `positions` below 1, or a patch that does not fit into the crop.
    """
    if positions < 1:
        raise UserError(f"{positions} places of the patch a side: at least 1 is needed")
    if not 0 < half < 1:
        raise UserError(f"patch: {half:g} of the crop's side; a share above 0 and below 1 is expected")
    coordinates = torch.linspace(half - 1, 1 - half, positions) if positions > 1 else torch.zeros(1)
    y, x = torch.meshgrid(coordinates, coordinates, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def cover_image(
    image: Tensor,  # (1, 3, S, S) RGB 0..1
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
) -> Tensor:  # (M, 3, S, S)
    """A copy of the image for each position, grey where the patch covers a pixel's centre."""
    return torch.where(_covered_pixels(image.shape[-1], centres.to(image.device), half)[:, None], GREY, image)


def cover_depth(
    depth: Tensor,  # (1, S, S) any scale, NaN = unknown
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
) -> Tensor:  # (M, S, S)
    """A copy of the depth map for each position, NaN under the patch."""
    return torch.where(_covered_pixels(depth.shape[-1], centres.to(depth.device), half), torch.nan, depth)


def _covered_pixels(size: int, centres: Tensor, half: float) -> Tensor:  # (M, S, S) bool
    pixel = (torch.arange(size, device=centres.device) + 0.5) * (2 / size) - 1
    inside = (pixel - centres[..., None]).abs() <= half  # (M, 2, S)
    return inside[:, 1, :, None] & inside[:, 0, None, :]


def cover_heatmaps(
    heatmaps: Heatmaps,  # one person
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
) -> tuple[Heatmaps, Tensor]:  # for M people; (M, J) bool: joints removed by the patch
    """A copy of the heatmaps for each position, without the joints whose highest peak is under the patch."""
    count = len(centres)
    peaks, confidence = heatmap_peaks(heatmaps.values)  # (1, J, 2)
    covered = ((peaks - centres.to(peaks)[:, None]).abs() <= half).all(-1) & (confidence > 0)
    values = torch.where(covered[..., None, None], 0.0, heatmaps.values)
    empty = (values.flatten(1).amax(-1) <= 0).nonzero()[:, 0]
    values[empty, int(heatmaps.valid[0].int().argmax()), 0, 0] = _FAINT
    return Heatmaps(values, heatmaps.valid.expand(count, -1), heatmaps.crop.expand(count)), covered


@dataclasses.dataclass(frozen=True)
class Subject:
    """Input of the pipeline for one person. The image is needed only by a model that reads images."""

    heatmaps: Heatmaps | None  # B = 1
    image: Tensor | None = None  # (1, 3, S, S) RGB 0..1
    depth: Tensor | None = None  # (1, S, S) for a model that reads depth maps; None: unknown everywhere
    number: int = 0  # index in the data set; seeds the hypotheses
    photo_size: Tensor | None = None  # (1, 2)
    focal: Tensor | None = None  # (1,)
    vertices: Tensor | None = None  # (1, V, 3) ground truth, metres, if available
    keypoints: Tensor | None = None  # (1, J, 3)


def stress(
    pipeline: HMDiffPipeline,
    subject: Subject,
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,  # called with the number of positions done
    batch_size: int | None = None,  # positions per batch; None: as memory allows. Does not change results
) -> StressMap:
    """Recover the person without a patch, then with the patch at every position."""
    unoccluded = recover(pipeline, subject, sampling)
    reference = unoccluded.mean_vertices
    batch_size = batch_size or max(1, MESHES_AT_ONCE // sampling.num_hypotheses)
    displacement, spread, errors, removed_joints = [], [], [], []
    for batch in centres.split(batch_size):
        output, removed = recover_covered(pipeline, subject, batch, half, sampling)
        displacement.append((output.mean_vertices - reference).norm(dim=-1).mean(-1).cpu() * MILLIMETRES)
        spread.append(output.spread.mean(-1).cpu())
        removed_joints.append(removed.cpu())
        if subject.vertices is not None:
            errors.append(_error(output, subject))
        if progress is not None:
            progress(len(batch))
    return StressMap(
        centres,
        half,
        torch.cat(displacement),
        torch.cat(spread),
        torch.cat(removed_joints),
        unoccluded,
        float(unoccluded.spread.mean()),
        torch.cat(errors) if errors else None,
        float(_error(unoccluded, subject)) if errors else None,
    )


def recover_covered(
    pipeline: HMDiffPipeline,
    subject: Subject,
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
    sampling: SamplingConfig,
) -> tuple[MeshOutput, Tensor]:  # for M people; (M, J) bool: joints removed by the patch
    """The same person with the patch at each position, with the same noise throughout."""
    count = len(centres)
    heatmaps, removed = None, torch.zeros(count, len(HALPE26), dtype=torch.bool)
    if subject.heatmaps is not None:
        heatmaps, removed = cover_heatmaps(subject.heatmaps, centres, half)
    image = None if subject.image is None else cover_image(subject.image, centres, half)
    covered = dataclasses.replace(
        subject,
        heatmaps=heatmaps,
        image=image,
        depth=None if subject.depth is None else cover_depth(subject.depth, centres, half),
        photo_size=None if subject.photo_size is None else subject.photo_size.expand(count, -1),
        focal=None if subject.focal is None else subject.focal.expand(count),
    )
    return recover(pipeline, covered, sampling, count), removed


def recover(pipeline: HMDiffPipeline, subject: Subject, sampling: SamplingConfig, count: int = 1) -> MeshOutput:
    """One pipeline call on `count` copies of the person; all copies share the noise."""
    inputs = pipeline.model.config.inputs
    depth = None
    if pipeline.model.config.depth_map:
        depth = torch.full((count, 2, 2), torch.nan) if subject.depth is None else subject.depth
    output: MeshOutput = pipeline(
        None if inputs == "heatmaps" else subject.image,
        subject.heatmaps,
        sampling,
        photo_sizes=subject.photo_size,
        focal=subject.focal,
        people=[subject.number] * count,
        depth=depth,
    )
    return output


def _error(output: MeshOutput, subject: Subject) -> Tensor:  # (M,) mm
    assert output.keypoints is not None and subject.vertices is not None and subject.keypoints is not None
    vertices, keypoints = subject.vertices.to(output.vertices), subject.keypoints.to(output.vertices)
    mean_root = root_of(output.keypoints, HALPE26, ROOT).mean(1)  # linear: equals the mean of the roots
    return vertex_error(output.mean_vertices, vertices, mean_root, root_of(keypoints, HALPE26, ROOT)).cpu()
