"""Multi-process losses: DDP's averaged gradient equals that of one process with the whole batch.

A mean over labelled people must be normalised by their number in all processes, not in the local batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as distributed
from torch import Tensor

# All such terms, in a fixed order: which of them are present depends on each process's data.
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
    shares: Mapping[str, Tensor],  # 0..1, labelled fraction of this process's batch, for each such term
) -> dict[str, Tensor]:
    """Reweight the terms so that their mean over processes is the mean over all labelled people.

    A collective: every process must call it in every step. A missing term counts as no labelled people.
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
