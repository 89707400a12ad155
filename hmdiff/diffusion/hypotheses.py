"""Statistics of the hypotheses of a person: heatmap likelihood, selection, weighted mean, modes, spread.

HMDiff (arXiv 2308.13369) aggregates by an MLP instead (`models/aggregation.py`). Pure functions; each person's result
is independent of the batch. B people, N hypotheses, J keypoints, K joints, V vertices.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.heatmaps.distribution import normalised

_BACKGROUND = 0.1  # fraction of the peak; lower values are the estimator's background
_SHARPNESS = 4.0  # exponent on U, as in DAT: the estimator's Gaussians are wider than its errors
_BLUR = 1.0  # sigma in heatmap pixels, after the exponent: keeps peaks between two pixels
_FLOOR = 0.2  # mixture weight of a uniform density: bounds the cost of a false detection
_LIKELIHOOD_WEIGHT = 0.25  # of the standardised likelihood against the standardised distance; best on `val`
_RLE_WEIGHT = 0.35  # the same for the RLE likelihood; not tuned
_REACH = 0.06  # fraction of the body height over which a keypoint's error weights the surface
_VERTEX_SCALE, _PERSON_SCALE = 0.01, 0.005  # error per factor e of the weight, in crop sides; best on `val`
_LARGEST_ERROR = 0.1  # crop sides


@dataclasses.dataclass(frozen=True)
class Modes:
    """C clusters of hypotheses, the largest first; surplus clusters are empty and have weight 0."""

    index: Tensor  # (B, C) long: the medoid of each cluster; for an empty one that of the first
    weights: Tensor  # (B, C) fraction of the hypotheses in it; rows sum to 1
    label: Tensor  # (B, N) long: cluster of each hypothesis

    def pick(
        self,
        values: Tensor,  # (B, N, ...) such as the vertices
    ) -> Tensor:  # (B, C, ...)
        """Values of the medoids."""
        return take(values, self.index)


def take(
    values: Tensor,  # (B, N, ...)
    index: Tensor,  # (B, ...) long, in 0..N-1
) -> Tensor:  # (B, ..., ...) shape of the index, then the trailing shape of the values
    """Select hypotheses of each person by index."""
    people = torch.arange(len(index), device=index.device).reshape(-1, *(1,) * (index.dim() - 1))
    return values[people, index]


def heatmap_log_likelihood(
    projected: Tensor,  # (B, N, J, 2) crop coordinates
    heatmaps: Tensor,  # (B, J, H, W) >= 0, the peak = confidence
) -> Tensor:  # (B, N) nats relative to the uniform density; 0 for a person without detected joints
    """sum_j c_j log((1 - f) U_j(x_j) + f), U_j the density of joint j over the crop, c_j its peak, f = `_FLOOR`.

    U_j is the heatmap less its background, raised to a power, blurred, and sampled bilinearly; 0 outside the crop.
    Joints with less heatmap mass than the threshold of `normalised` are left out.
    """
    people, joints = heatmaps.shape[:2]
    peak = heatmaps.flatten(2).amax(-1)
    seen = normalised(heatmaps).flatten(2).amax(-1) > 0
    relative = heatmaps / peak[..., None, None].clamp_min(1e-12)
    density = _blurred((relative - _BACKGROUND).clamp_min(0).pow(_SHARPNESS))
    density = density / density.mean((-2, -1), keepdim=True).clamp_min(1e-12)
    grid = projected.to(density).transpose(1, 2).flatten(0, 1)[:, None]  # (B*J, 1, N, 2)
    found = F.grid_sample(density.flatten(0, 1)[:, None], grid, padding_mode="zeros", align_corners=False)
    found = found[:, 0, 0].unflatten(0, (people, joints)).transpose(1, 2)  # (B, N, J)
    weight = (peak.clamp(max=1) * seen)[:, None]
    return (weight * ((1 - _FLOOR) * found + _FLOOR).log()).sum(-1)


def _blurred(values: Tensor) -> Tensor:  # (B, J, H, W)
    reach = round(3 * _BLUR)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=values.device) / _BLUR) ** 2).to(values)
    kernel = kernel / kernel.sum()
    flat = values.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, kernel[None, None, None], padding=(0, reach))
    return F.conv2d(flat, kernel[None, None, :, None], padding=(reach, 0))[:, 0].unflatten(0, values.shape[:2])


@dataclasses.dataclass(frozen=True)
class Reprojection:
    """Reprojection errors of the hypotheses against the heatmap peaks."""

    error: Tensor  # (B, N, J) in crop sides
    confidence: Tensor  # (B, J) 0..1 of the peaks
    nearness: Tensor  # (V, J) of vertices to keypoints; rows sum to 1 (`keypoint_nearness`)

    def first(self, count: int) -> Reprojection:
        """Keep the first `count` hypotheses."""
        return dataclasses.replace(self, error=self.error[:, :count])


def keypoint_nearness(
    vertices: Tensor,  # (V, 3) metres, rest pose
    keypoints: Tensor,  # (J, 3)
    reach: float = _REACH,  # fraction of the body's height: 10 cm for an adult, less for a hand
) -> Tensor:  # (V, J)
    """Softmax over keypoints of -distance / (reach * height)."""
    height = (vertices.amax(0) - vertices.amin(0)).amax()
    return (-torch.cdist(vertices, keypoints) / (reach * height)).softmax(-1)


def weighted_mean(
    points: Tensor,  # (B, N, V, 3) metres, such as root-relative vertices
    seen: Reprojection,  # of the same hypotheses
) -> Tensor:  # (B, V, 3)
    """Mean of the hypotheses weighted per vertex by reprojection error.

    The weights are a softmax over the hypotheses of minus the confidence-weighted error of the keypoints near the
    vertex, plus the hypothesis' mean error, which alone decides where no confident keypoint is near. Extends
    FMPose3D's reprojection-based aggregation from joints to vertices and confidences.
    """
    error = seen.error.clamp(max=_LARGEST_ERROR) * seen.confidence[:, None]  # a distant peak is a false detection
    of_person = error.sum(-1, keepdim=True) / seen.confidence.sum(-1)[:, None, None].clamp_min(1e-3)
    cost = error @ seen.nearness.mT / _VERTEX_SCALE + of_person / _PERSON_SCALE  # (B, N, V)
    return ((-cost).softmax(1)[..., None] * points).sum(1)


def select(
    vertices: Tensor,  # (B, N, V, 3) metres
    root: Tensor,  # (B, N, 3) metres: origin for the comparison
    log_likelihood: Tensor | None = None,  # (B, N) of the heatmaps, or of another observation
    rle_log_likelihood: Tensor | None = None,  # (B, N) of the model's RLE regression (`losses.rle`)
    seen: Reprojection | None = None,  # None: distance to the plain mean
) -> Tensor:  # (B,) long
    """Select one hypothesis without ground truth: near the weighted mean, and likely.

    The score is the mean vertex distance to the weighted mean minus weighted log-likelihoods, each standardised over
    the person's hypotheses. The posterior mean minimises the expected squared error, so a hypothesis near it has a
    small error. The 2D likelihood alone ignores depth and selects worse; joint distances are slightly worse than vertex
    distances (LOG.md).
    """
    relative = vertices - root[:, :, None]
    centre = relative.mean(1) if seen is None else weighted_mean(relative, seen)
    score = _standardised((relative - centre[:, None]).norm(dim=-1).mean(-1), 1e-6)
    if log_likelihood is not None:
        score = score - _LIKELIHOOD_WEIGHT * _standardised(log_likelihood, 1e-4)
    if rle_log_likelihood is not None:
        score = score - _RLE_WEIGHT * _standardised(rle_log_likelihood, 1e-4)
    return score.argmin(1)


def _standardised(values: Tensor, least: float) -> Tensor:  # (B, N)
    """Standardise over the hypotheses. Deviations up to `least` are rounding and give 0."""
    centred = values - values.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > least, centred / deviation.clamp_min(least), torch.zeros_like(centred))


def modes(
    joints: Tensor,  # (B, N, K, 3) metres; the first is the root
    count: int = 5,  # C
) -> Modes:
    """Cluster the hypotheses by their root-relative joints.

    Ward's method (JASA 1963) merges the two clusters that least raise the within-cluster sum of squares, the K-means
    objective, without random initialisation.

    Raises:
        UserError: a count below 1.
    """
    if count < 1:
        raise UserError(f"modes: {count} groups; at least 1 is needed")
    relative = (joints - joints[:, :, :1]).flatten(2).double().cpu()
    found = [_person_modes(person, count) for person in relative]
    index, weights, label = (torch.stack(part).to(joints.device) for part in zip(*found, strict=True))
    return Modes(index, weights.to(joints.dtype), label)


def _person_modes(points: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:  # (N, D) -> (C,), (C,), (N,)
    if len(points) == 1:
        groups = torch.ones(1, dtype=torch.long)
    else:
        from scipy.cluster.hierarchy import fcluster, linkage  # slow import

        tree = linkage(points.numpy(), "ward")
        # Copies of one mesh, which differ by rounding, form one mode: clusters nearer than 0.1 mm (RMS) are one.
        distinct = 1 + int((tree[:, 2] > 1e-4 * points.shape[1] ** 0.5).sum())
        groups = torch.from_numpy(fcluster(tree, min(count, distinct), "maxclust")).long()
    distance = (points[:, None] - points[None]).norm(dim=-1)
    members = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    # Ties are broken by the lowest hypothesis index.
    members.sort(key=lambda ids: (-len(ids), int(ids[0])))
    medoids = [int(ids[distance[ids][:, ids].sum(1).argmin()]) for ids in members]
    label = torch.empty(len(points), dtype=torch.long)
    for number, ids in enumerate(members):
        label[ids] = number
    missing = count - len(members)
    index = torch.tensor(medoids + medoids[:1] * missing)
    weights = torch.tensor([len(ids) / len(points) for ids in members] + [0.0] * missing, dtype=points.dtype)
    return index, weights, label


def apply_temperature(
    points: Tensor,  # (B, N, ..., 3)
    temperature: float | Tensor,  # scalar, or (B,)
) -> Tensor:  # (B, N, ..., 3)
    """Temperature scaling: multiply the deviations of the hypotheses from their mean; the mean is unchanged.

    Linear, so it commutes with joint regressors and root alignment. For calibration, not display: a scaled mesh is not
    a plausible body.
    """
    mean = points.mean(1, keepdim=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(points).reshape(-1, *[1] * (points.dim() - 1))
    return mean + temperature * (points - mean)


def spread(
    points: Tensor,  # (B, N, V, 3) metres
) -> Tensor:  # (B, V) metres
    """Mean distance of the hypotheses to their mean, per point."""
    return (points - points.mean(1, keepdim=True)).norm(dim=-1).mean(1)
