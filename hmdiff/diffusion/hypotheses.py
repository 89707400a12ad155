"""Many hypotheses of one person: how well each fits the heatmaps, the one to show, the modes among them, the spread.

HMDiff (arXiv 2308.13369) turns its hypotheses into one mesh by an MLP (`models/aggregation.py`); all of this is ours.
Pure functions, person by person: nobody's result depends on the batch. B people, N hypotheses, J keypoints, K joints.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.heatmaps.distribution import normalised

_BACKGROUND = 0.1  # of the peak: what lies below is an estimator's background, wide and meaningless
_SHARPNESS = 4.0  # power of U, as in DAT: an estimator's Gaussians are wider than its errors
_BLUR = 1.0  # heatmap pixels, after the power: a peak between two pixels is a peak
_FLOOR = 0.2  # share of a uniform density: a joint that the estimator misplaced costs so much and no more
_LIKELIHOOD_WEIGHT = 0.25  # of one standard deviation of the likelihood against one of the distance: best on `val`
_RLE_WEIGHT = 0.35  # the same of a regression's likelihood; not tuned
_REACH = 0.06  # of a body's height: how far a keypoint's error says something of the surface
_VERTEX_SCALE, _PERSON_SCALE = 0.01, 0.005  # of the crop's side: errors that cost a factor of e; best on `val`
_LARGEST_ERROR = 0.1  # of the crop's side


@dataclasses.dataclass(frozen=True)
class Modes:
    """Groups of hypotheses that look alike, the largest first. C groups; where there are fewer, the last weigh 0."""

    index: Tensor  # (B, C) long: the hypothesis in the middle of each group (its medoid); of an empty one the first's
    weights: Tensor  # (B, C) share of the hypotheses in it; a row sums to 1
    label: Tensor  # (B, N) long: the group of each hypothesis

    def pick(
        self,
        values: Tensor,  # (B, N, ...) such as the vertices
    ) -> Tensor:  # (B, C, ...)
        """What belongs to the representatives."""
        return take(values, self.index)


def take(
    values: Tensor,  # (B, N, ...)
    index: Tensor,  # (B, ...) long, each entry one of N
) -> Tensor:  # (B, ..., ...) the index's shape, then the values'
    """Of each person those hypotheses."""
    people = torch.arange(len(index), device=index.device).reshape(-1, *(1,) * (index.dim() - 1))
    return values[people, index]


def heatmap_log_likelihood(
    projected: Tensor,  # (B, N, J, 2) crop coordinates
    heatmaps: Tensor,  # (B, J, H, W) >= 0, the peak = confidence
) -> Tensor:  # (B, N) nats over the uniform density; 0 for a person of whom nothing was seen
    """sum_j c_j log((1 - f) U_j(x_j) + f), U_j a joint's density over the crop, c_j its peak, f the floor.

    U_j is the heatmap without its background, to a power, slightly blurred, and sampled bilinearly. Joints whose mass
    lies under the floor of `normalised` are left out; outside the crop the density is 0.
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
    """How far hypotheses project from the heatmaps' peaks, and which vertices that says something of."""

    error: Tensor  # (B, N, J) share of the crop's side
    confidence: Tensor  # (B, J) 0..1 of the peaks
    nearness: Tensor  # (V, J) of every vertex to every keypoint; a row sums to 1 (`keypoint_nearness`)

    def first(self, count: int) -> Reprojection:
        """Of the first hypotheses alone."""
        return dataclasses.replace(self, error=self.error[:, :count])


def keypoint_nearness(
    vertices: Tensor,  # (V, 3) metres, of the body at rest
    keypoints: Tensor,  # (J, 3)
    reach: float = _REACH,  # of the body's height: 10 cm of a person, and less of a hand
) -> Tensor:  # (V, J)
    """A softmax of minus the distance, in reaches."""
    height = (vertices.amax(0) - vertices.amin(0)).amax()
    return (-torch.cdist(vertices, keypoints) / (reach * height)).softmax(-1)


def weighted_mean(
    points: Tensor,  # (B, N, V, 3) metres, such as vertices about their root
    seen: Reprojection,  # of the same
) -> Tensor:  # (B, V, 3)
    """The mean of the hypotheses in which those that agree with the photo count more, vertex by vertex.

    The weight of a hypothesis at a vertex is a softmax of minus the error of the keypoints near it, times their
    confidence, and of the person's mean error: FMPose3D's aggregation by reprojection, of a mesh and with confidences
    (ours). What no confident keypoint is near has weights that differ by the person's error alone.
    """
    error = seen.error.clamp(max=_LARGEST_ERROR) * seen.confidence[:, None]  # one far peak is a false one
    of_person = error.sum(-1, keepdim=True) / seen.confidence.sum(-1)[:, None, None].clamp_min(1e-3)
    cost = error @ seen.nearness.mT / _VERTEX_SCALE + of_person / _PERSON_SCALE  # (B, N, V)
    return ((-cost).softmax(1)[..., None] * points).sum(1)


def select(
    vertices: Tensor,  # (B, N, V, 3) metres
    root: Tensor,  # (B, N, 3) metres: what they are compared about
    log_likelihood: Tensor | None = None,  # (B, N) of the heatmaps, or of anything else that was observed
    rle_log_likelihood: Tensor | None = None,  # (B, N) of the model's own regression (`losses.rle`), where it has one
    seen: Reprojection | None = None,  # None: close to the plain mean
) -> Tensor:  # (B,) long
    """The hypothesis to show, chosen without the ground truth: close to the weighted mean of all, and likely.

    The score is the mean distance of its vertices to that mean, less a share of its log-likelihoods, all in standard
    deviations over the person's hypotheses. Of a posterior the mean has the least expected error, so its neighbour has
    little; the likelihood alone knows nothing of depth and chooses worse, and joints a little worse than vertices
    (measured: LOG.md).
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
    """Over the hypotheses. What differs by less than `least` is rounding, and counts as equal."""
    centred = values - values.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > least, centred / deviation.clamp_min(least), torch.zeros_like(centred))


def modes(
    joints: Tensor,  # (B, N, K, 3) metres; the first is the root
    count: int = 5,  # C
) -> Modes:
    """Cluster the hypotheses by their root-relative joints.

    Ward's agglomeration (JASA 1963) joins the two groups that raise the within-group sum of squares, K-means' own
    measure, the least. It has no random start.

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
    # A tenth of a millimetre is no difference: copies of one mesh are one mode.
    points = (points * 1e4).round() / 1e4
    if len(points) == 1:
        groups = torch.ones(1, dtype=torch.long)
    else:
        from scipy.cluster.hierarchy import fcluster, linkage  # slow to import, and modes are asked for late if at all

        tree = linkage(points.numpy(), "ward")
        groups = torch.from_numpy(fcluster(tree, count, "maxclust")).long()
    distance = (points[:, None] - points[None]).norm(dim=-1)
    members = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    # The largest first; among equals the one whose first hypothesis was drawn first.
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
    temperature: float | Tensor,  # of all, or (B,)
) -> Tensor:  # (B, N, ..., 3)
    """The hypotheses' deviations from their mean, times the temperature; the mean stays. Linear, so that it commutes
    with joint regressors and with moving everybody to their root. Stretched far, meshes stop being people: this is for
    points that are to be calibrated, not for meshes to look at.
    """
    mean = points.mean(1, keepdim=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(points).reshape(-1, *[1] * (points.dim() - 1))
    return mean + temperature * (points - mean)


def spread(
    points: Tensor,  # (B, N, V, 3) metres
) -> Tensor:  # (B, V) metres
    """Mean distance of the hypotheses' point to their mean."""
    return (points - points.mean(1, keepdim=True)).norm(dim=-1).mean(1)
