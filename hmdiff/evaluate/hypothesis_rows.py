"""Rows of a protocol's report: one row of errors per way to reduce N hypotheses to one.

A single estimate: `estimate`. Several hypotheses: `first`, `mean of N`, `oracle of N`, `selected of N`, and, with an
aggregation MLP (HMDiff, arXiv 2308.13369), `aggregated of N`. min_of_n: the same for each N that the literature
reports, `aggregated` only for all. biggs: `pick of n of N`, see `protocols.MANY`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from hmdiff.evaluate.measured import MIN_HYPOTHESES_TO_CALIBRATE
from hmdiff.evaluate.metrics import calibration_levels, inside_quantiles, root_of
from hmdiff.evaluate.protocol_errors import HIPS, Bodies, Errors
from hmdiff.evaluate.protocols import Protocol

COUNTS = (1, 5, 10, 25, 100)  # numbers of hypotheses that the literature reports
REPRESENTATIVES = (5, 10, 25)
Choose = Callable[[int], Tensor | None]  # count -> (B,) index among the first `count`; None: no selection


@dataclasses.dataclass(frozen=True)
class BlockScores:
    """Rows of one block of people."""

    rows: dict[str, Errors]  # row -> metric -> (B,)
    inside: Tensor | None = None  # (B, Q, J) for the calibration error, see `metrics.inside_quantiles`


def no_selection(count: int) -> None:
    """No selection."""


def score_hypotheses(
    protocol: Protocol,
    predicted: Bodies,  # (B, N, ...)
    target: Bodies,  # (B, ...)
    regressors: Mapping[str, Tensor] | None = None,
    choose: Choose = no_selection,
    aggregated: Bodies | None = None,  # (B, ...) one body from all hypotheses
) -> BlockScores:
    """All rows of the protocol for these people."""
    regressors = regressors or {}
    aggregated_bodies = None if aggregated is None else protocol.both(aggregated, target, regressors)
    predicted, target = protocol.both(predicted, target, regressors)
    assert predicted.joints is not None
    total = predicted.joints.shape[1]
    each = protocol.score(predicted, target.map(lambda points: points[:, None]), regressors)
    if total == 1:
        return BlockScores({"estimate": {metric: errors[:, 0] for metric, errors in each.items()}})
    rows = {"first": {metric: errors[:, 0] for metric, errors in each.items()}}
    if protocol.name == "biggs":
        joints = _about_root(protocol, predicted)
        for count in REPRESENTATIVES:
            if count < total:
                rows[f"pick of {count} of {total}"] = _best_representative(each, joints, count)
        return BlockScores(rows)
    counts = {count for count in (COUNTS if protocol.name == "min_of_n" else ()) if 1 < count <= total}

    def mean_of(count: int) -> Errors:
        first = predicted.map(lambda points: points[:, :count])
        return protocol.score(protocol.mean(first, regressors), target, regressors)

    higher = {metric for metric, each in protocol.metrics.items() if each.higher_is_better}
    for count in sorted({*counts, total}):
        reduced = reduce_hypotheses(each, count, mean_of, choose, higher)
        rows |= {f"{kind} of {count}": errors for kind, errors in reduced.items() if kind != "first"}
    if aggregated_bodies is not None:
        rows[f"aggregated of {total}"] = protocol.score(*aggregated_bodies, regressors)
    inside = None
    if protocol.name == "min_of_n" and total >= MIN_HYPOTHESES_TO_CALIBRATE:
        samples, truth = _about_root(protocol, predicted), _about_root(protocol, target)
        inside = inside_quantiles(samples, truth, calibration_levels(samples))
    return BlockScores(rows, inside)


def reduce_hypotheses(
    per_hypothesis: Errors,  # metric -> (B, N), every hypothesis
    count: int,  # use the first `count` hypotheses
    mean_of: Callable[[int], Errors],  # count -> metric -> (B,), of the mean mesh
    choose: Choose = no_selection,
    higher: Collection[str] = (),  # metrics for which higher is better
) -> dict[str, Errors]:  # kind -> metric -> (B,)
    """first, mean, oracle (best hypothesis for each metric separately) and, if `choose` returns one, selected."""
    rows = {"first": {metric: errors[:, 0] for metric, errors in per_hypothesis.items()}, "mean": mean_of(count)}
    rows["oracle"] = {
        metric: errors[:, :count].amax(1) if metric in higher else errors[:, :count].amin(1)
        for metric, errors in per_hypothesis.items()
    }
    chosen = choose(count)
    if chosen is not None:
        rows["selected"] = {
            metric: errors.gather(1, chosen.to(errors.device)[:, None])[:, 0]
            for metric, errors in per_hypothesis.items()
        }
    return rows


def _about_root(protocol: Protocol, bodies: Bodies) -> Tensor:  # (..., J, 3)
    """The protocol's joints relative to its root, or to mid-hip if the protocol does not align roots."""
    centre = protocol.centre or HIPS
    return bodies.named(protocol.needed) - root_of(bodies.named(centre), centre, centre)


def _best_representative(
    per_hypothesis: Errors, joints: Tensor, count: int
) -> Errors:  # (B, N) each, (B, N, J, 3) -> (B,) each
    indices = []
    for person in range(len(joints)):
        chosen = torch.from_numpy(cluster_representatives(joints[person], count)).to(joints.device)
        indices.append(chosen[per_hypothesis["mpjpe"][person, chosen].argmin()])
    index = torch.stack(indices)[:, None]
    return {metric: errors.gather(1, index)[:, 0] for metric, errors in per_hypothesis.items()}


def cluster_representatives(
    joints: Tensor,  # (N, J, 3) metres, root-relative
    count: int,
) -> np.ndarray:  # (<= count,) ascending indices
    """The hypothesis nearest to each K-means centre (scipy, seeded); duplicates are removed."""
    points = joints.detach().double().cpu().flatten(1).numpy()
    if (points == points[0]).all():
        return np.zeros(1, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about empty clusters, which keep their last centre
        centres, _ = kmeans2(points, count, iter=20, minit="++", seed=np.random.default_rng(0))
    distance = np.linalg.norm(points[:, None] - centres[None], axis=-1)
    return np.unique(distance.argmin(0))
