"""Losses over several processes: the gradient that DDP averages is that of one process with the whole batch.

A term that is a mean over labelled people needs how many all processes have of them, not how many its own batch has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as distributed
from torch import Tensor

# Every term that is such a mean, in one order for all processes: which of them a batch has depends on its data.
LABELLED_TERMS = (
    *("points", "vertices", "joints_3d", "camera", "edges", "projection", "silhouette", "estimates", "mesh_estimates"),
    *("rle_joints", "rle_vertices", "rle_joints_2d", "keypoints_2d", "keypoints_3d"),
)


def processes() -> tuple[int, int]:  # rank, count
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def over_processes(
    terms: Mapping[str, Tensor],  # scalars, means over this process's labelled people
    shares: Mapping[str, Tensor],  # of its batch that has the label, 0..1, of every such term
) -> dict[str, Tensor]:
    """Weighted so that their mean over the processes is the mean over everybody's labelled people.

    Every process must call it in every step; a term that one of them has not counts as nobody labelled there.
    """
    if processes()[1] == 1:
        return dict(terms)
    unknown = shares.keys() - set(LABELLED_TERMS)
    assert not unknown, unknown
    like = next(iter(terms.values()))
    everybody = torch.stack([shares.get(name, like.new_zeros(())).detach().to(like) for name in LABELLED_TERMS])
    distributed.all_reduce(everybody)
    everybody = everybody / processes()[1]
    found = dict(terms)
    for name, share in zip(LABELLED_TERMS, everybody, strict=True):
        if name in shares and name in found:
            found[name] = found[name] * (shares[name] / torch.where(share > 0, share, 1.0))
    return found
