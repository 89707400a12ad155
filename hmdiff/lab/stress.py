"""Stress maps: a patch slides over a person's crop, and at every place the person is recovered again.

At each place a square patch hides a part of the input. In the image it is grey, in a depth map not known. In the
heatmaps the joints whose peak lies under it are gone, as of an estimator that does not report what it does not see
(which is what the synthetic estimator does most often, `hmdiff.data.synthetic.corruption`): their channels are zero
and stay valid. Noise is the same at every place, so what changes is due to the patch. G places a side, M = G * G
places, N hypotheses, V vertices. After the occlusion-sensitivity maps of Zeiler and Fergus (arXiv 1311.2901), applied
to bodies; the measures are our choice.
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
_FAINT = 1e-6  # somebody of whom nothing is left is still a person: one faint pixel says no more


@dataclasses.dataclass(frozen=True)
class Stress:
    """What a patch at each of the M places does. Millimetres; means over the vertices."""

    centres: Tensor  # (M, 2) crop coordinates, row by row
    half: float  # half the patch's side, crop coordinates: the share of the crop's side that it covers
    moved: Tensor  # (M,) distance of the mean mesh from the one without a patch
    spread: Tensor  # (M,) of the hypotheses about their mean, calibrated as `MeshOutput.spread`
    hidden: Tensor  # (M, J) bool: joints that the patch takes from the heatmaps; all False without heatmaps
    clear: MeshOutput  # without a patch, B = 1
    clear_spread: float
    error: Tensor | None = None  # (M,) PVE of the mean mesh, roots at the middle of the hips; where the truth is known
    clear_error: float | None = None

    def map(
        self,
        values: Tensor,  # (M,)
    ) -> Tensor:  # (G, G)
        side = round(len(self.centres) ** 0.5)
        return values.reshape(side, side)


def patch_grid(
    places: int,  # G
    half: float,  # half the patch's side, crop coordinates
) -> Tensor:  # (G * G, 2) centres in crop coordinates, row by row from the upper left
    """Evenly spaced, from one edge of the crop to the other, the patch always inside.

    Raises:
        UserError: no place, or a patch that does not fit into the crop.
    """
    if places < 1:
        raise UserError(f"{places} places of the patch a side: at least 1 is needed")
    if not 0 < half < 1:
        raise UserError(f"patch: {half:g} of the crop's side; a share above 0 and below 1 is expected")
    along = torch.linspace(half - 1, 1 - half, places) if places > 1 else torch.zeros(1)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def cover_image(
    image: Tensor,  # (1, 3, S, S) RGB 0..1
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
) -> Tensor:  # (M, 3, S, S)
    """The image once for each place, grey where the patch lies over a pixel's centre."""
    return torch.where(_under(image.shape[-1], centres.to(image.device), half)[:, None], GREY, image)


def cover_depth(
    depth: Tensor,  # (1, S, S) any scale, NaN = not known
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
) -> Tensor:  # (M, S, S)
    """The depth map once for each place, NaN under the patch."""
    return torch.where(_under(depth.shape[-1], centres.to(depth.device), half), torch.nan, depth)


def _under(size: int, centres: Tensor, half: float) -> Tensor:  # (M, S, S) bool
    pixel = (torch.arange(size, device=centres.device) + 0.5) * (2 / size) - 1
    inside = (pixel - centres[..., None]).abs() <= half  # (M, 2, S)
    return inside[:, 1, :, None] & inside[:, 0, None, :]


def cover_heatmaps(
    heatmaps: Heatmaps,  # of one person
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
) -> tuple[Heatmaps, Tensor]:  # of M people, (M, J) bool: which joints the patch took
    """The heatmaps once for each place, without the joints whose highest peak is under the patch."""
    count = len(centres)
    peaks, confidence = heatmap_peaks(heatmaps.values)  # (1, J, 2)
    under = ((peaks - centres.to(peaks)[:, None]).abs() <= half).all(-1) & (confidence > 0)
    values = torch.where(under[..., None, None], 0.0, heatmaps.values)
    empty = (values.flatten(1).amax(-1) <= 0).nonzero()[:, 0]
    values[empty, int(heatmaps.valid[0].int().argmax()), 0, 0] = _FAINT
    return Heatmaps(values, heatmaps.valid.expand(count, -1), heatmaps.crop.expand(count)), under


@dataclasses.dataclass(frozen=True)
class Subject:
    """One person as the pipeline reads them. An image is only needed by a model that reads images."""

    heatmaps: Heatmaps | None  # B = 1
    image: Tensor | None = None  # (1, 3, S, S) RGB 0..1
    depth: Tensor | None = None  # (1, S, S) for a model that reads depth maps; None: nowhere known
    number: int = 0  # among all: seeds the hypotheses
    photo_size: Tensor | None = None  # (1, 2)
    focal: Tensor | None = None  # (1,)
    vertices: Tensor | None = None  # (1, V, 3) the truth, metres, where it is known
    keypoints: Tensor | None = None  # (1, J, 3)


def stress(
    pipeline: HMDiffPipeline,
    subject: Subject,
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,  # told how many places are done
    at_once: int | None = None,  # places in one call; None: what memory allows. Changes no result
) -> Stress:
    """Recover the person without a patch, then with one at every place."""
    clear = recover(pipeline, subject, sampling)
    reference = clear.mean_vertices
    at_once = at_once or max(1, MESHES_AT_ONCE // sampling.num_hypotheses)
    moved, spread, errors, hidden = [], [], [], []
    for part in centres.split(at_once):
        output, taken = recover_covered(pipeline, subject, part, half, sampling)
        moved.append((output.mean_vertices - reference).norm(dim=-1).mean(-1).cpu() * MILLIMETRES)
        spread.append(output.spread.mean(-1).cpu())
        hidden.append(taken.cpu())
        if subject.vertices is not None:
            errors.append(_error(output, subject))
        if progress is not None:
            progress(len(part))
    return Stress(
        centres,
        half,
        torch.cat(moved),
        torch.cat(spread),
        torch.cat(hidden),
        clear,
        float(clear.spread.mean()),
        torch.cat(errors) if errors else None,
        float(_error(clear, subject)) if errors else None,
    )


def recover_covered(
    pipeline: HMDiffPipeline,
    subject: Subject,
    centres: Tensor,  # (M, 2) crop coordinates
    half: float,
    sampling: SamplingConfig,
) -> tuple[MeshOutput, Tensor]:  # of M people, (M, J) bool: which joints the patch took
    """The same person under the patch at each place, with the same noise everywhere."""
    count = len(centres)
    heatmaps, taken = None, torch.zeros(count, len(HALPE26), dtype=torch.bool)
    if subject.heatmaps is not None:
        heatmaps, taken = cover_heatmaps(subject.heatmaps, centres, half)
    image = None if subject.image is None else cover_image(subject.image, centres, half)
    covered = dataclasses.replace(
        subject,
        heatmaps=heatmaps,
        image=image,
        depth=None if subject.depth is None else cover_depth(subject.depth, centres, half),
        photo_size=None if subject.photo_size is None else subject.photo_size.expand(count, -1),
        focal=None if subject.focal is None else subject.focal.expand(count),
    )
    return recover(pipeline, covered, sampling, count), taken


def recover(pipeline: HMDiffPipeline, subject: Subject, sampling: SamplingConfig, count: int = 1) -> MeshOutput:
    """One call of the pipeline; all `count` rows of the subject are the same person, so they share the noise."""
    reads = pipeline.model.config.inputs
    depth = None
    if pipeline.model.config.depth_map:
        depth = torch.full((count, 2, 2), torch.nan) if subject.depth is None else subject.depth
    output: MeshOutput = pipeline(
        None if reads == "heatmaps" else subject.image,
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
    mean_root = root_of(output.keypoints, HALPE26, ROOT).mean(1)  # linear: the root of the mean is the mean of roots
    return vertex_error(output.mean_vertices, vertices, mean_root, root_of(keypoints, HALPE26, ROOT)).cpu()
