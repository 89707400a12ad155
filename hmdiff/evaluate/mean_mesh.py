"""Baseline: the errors of predicting the mean mesh for everyone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, J14, joint_indices
from hmdiff.data.sample import PeopleSource, concatenate
from hmdiff.evaluate.evaluation import ROOT, split_batches
from hmdiff.evaluate.measured import interval
from hmdiff.evaluate.metrics import mesh_errors
from hmdiff.names import METRICS

_J14 = joint_indices(J14, HALPE26)


@functools.lru_cache(maxsize=4)
def _mean_person(data: PeopleSource, people: int, split: str) -> tuple[Tensor, Tensor]:  # (V, 3), (J, 3)
    sample = concatenate(list(split_batches(data, "train", people)))
    if sample.has_vertices is not None and not sample.has_vertices.any():  # the training data has no meshes
        sample = data.block(split, 0)
    assert sample.vertices is not None and sample.keypoints_3d is not None
    labelled = slice(None) if sample.has_vertices is None else sample.has_vertices
    return sample.vertices[labelled].mean(0), sample.keypoints_3d[labelled].mean(0)


def mean_mesh_errors(
    data: PeopleSource,
    split: str,
    people: int,
    training_people: int = 512,
) -> dict[str, dict[str, float]]:  # metric -> {value, low, high} mm
    """Errors of predicting the mean mesh of the training people, in the camera's frame, for everyone.

    If none of them has a mesh, the mean mesh of the split's first block is used.
    """
    vertices, keypoints = _mean_person(data, training_people, split)
    collected: dict[str, list[Tensor]] = {metric: [] for metric in METRICS}
    for sample in split_batches(data, split, people):
        assert sample.vertices is not None and sample.keypoints_3d is not None
        errors = mesh_errors(
            vertices.expand_as(sample.vertices),
            keypoints[_J14].expand(len(sample.vertices), -1, -1),
            sample.vertices,
            sample.keypoints_3d[:, _J14],
            J14,
            ROOT,
        )
        for metric, values in errors.items():
            collected[metric].append(values)
    return {metric: interval(torch.cat(parts)) for metric, parts in collected.items()}


def mean_mesh_error(data: PeopleSource, split: str, people: int) -> float:
    """PVE of the mean mesh, mm."""
    return mean_mesh_errors(data, split, people)["pve"]["value"]
