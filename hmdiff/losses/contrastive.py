"""JOTR's contrastive losses (arXiv 2307.16377) on the 3D features of joints.

InfoNCE on cosines: for an anchor a, each positive p and the negatives n, -log[e^{a·p/τ} / (e^{a·p/τ} + Σ_n e^{a·n/τ})],
then the mean over anchors and positives. `joint_to_joint` contrasts a joint, in all images, with other joints;
`joint_to_non_joint` contrasts joints with voxels without a joint. A joint whose ground truth lies outside the crop is
not a positive (infonce.py's validity mask): the volume has only border values there.

The pool spans all processes and only people with 3D labels. If the generators are in the same state in all processes,
P processes of B people give the value, and after DDP's averaging the gradient, of one process with their P·B people in
rank order. Sampling without replacement, or taking all if there are fewer, is ours. All processes need the same B.

B people, K joints, V channels, L voxels.
"""

from __future__ import annotations

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

from hmdiff.losses.processes import processes


def joint_to_joint(
    predicted: Tensor,  # (B, K, V) features at the predicted joints: anchors and negatives
    truth: Tensor,  # (B, K, V) features at the ground-truth joints: positives
    has_joints: Tensor | None,  # (B,) bool, 3D labels; None = all
    generator: torch.Generator,  # on the CPU, in the same state in every process
    anchors: int = 100,
    positives: int = 128,  # of the anchor's joint, in any image
    negatives: int = 256,  # of other joints, in any image
    temperature: float = 0.07,
    valid: Tensor | None = None,  # (B, K) bool: the ground truth is inside the crop; None = all
) -> Tensor:  # ()
    """Anchor joints against ground-truth features of the same joint and predicted ones of others; 0 without labels."""
    people = _labelled(predicted, has_joints)
    rows = _rows(people, predicted.shape[1])
    joint = rows % predicted.shape[1]
    found, true = _take(predicted, rows), _take(truth, rows)  # (n*K, V)
    anchor = torch.randperm(len(rows), generator=generator)[:anchors]
    alike = joint[anchor, None] == joint
    same, drawn = _draw(alike & _valid(valid, people, rows), positives, generator)
    other, _ = _draw(~alike, negatives, generator)
    queries = found[anchor.to(found.device)]
    positive = _cosines(queries, true).gather(1, same.to(found.device))
    negative = _cosines(queries, found).gather(1, other.to(found.device))
    return _info_nce(positive, negative, temperature, drawn)


def joint_to_non_joint(
    predicted: Tensor,  # (B, K, V) features at the predicted joints: anchors and positives
    voxels: Tensor,  # (B, L, V) features of the voxels
    away: Tensor,  # (B, L) or (B, D, H, W) bool, voxels away from predicted joints: negatives
    has_joints: Tensor | None,  # (B,) bool, 3D labels; None = all
    generator: torch.Generator,  # on the CPU, in the same state in every process
    anchors: int = 100,
    positives: int = 1024,  # other predicted joints, of any kind
    negatives: int = 2048,
    temperature: float = 0.07,
    valid: Tensor | None = None,  # (B, K) bool: the ground truth is inside the crop; None = all
) -> Tensor:  # ()
    """Anchor joints against other joints and voxels without a joint; 0 without labels. 100 anchors are ours."""
    people = _labelled(predicted, has_joints)
    rows = _rows(people, predicted.shape[1])
    found = _take(predicted, rows)
    anchor = torch.randperm(len(rows), generator=generator)[:anchors]
    allowed = (anchor[:, None] != torch.arange(len(rows))) & _valid(valid, people, rows)
    others, drawn = _draw(allowed, positives, generator)
    empty = _gather(away.flatten(1))[people]  # (n, L)
    person, voxel = empty.nonzero().unbind(-1)
    places = people[person] * empty.shape[1] + voxel
    nothing = _take(voxels, places[torch.randperm(len(places), generator=generator)[:negatives]])
    queries = found[anchor.to(found.device)]
    positive = _cosines(queries, found).gather(1, others.to(found.device))
    return _info_nce(positive, _cosines(queries, nothing), temperature, drawn)


def _info_nce(
    positive: Tensor,  # (A, P) cosines
    negative: Tensor,  # (A, N)
    temperature: float,
    drawn: Tensor,  # (A, P) bool: the positives that count
) -> Tensor:  # ()
    if not positive.numel() or not negative.numel() or not drawn.any():
        return positive.sum() * 0 + negative.sum() * 0  # keeps the graph connected for DDP
    error = F.softplus((negative / temperature).logsumexp(1, keepdim=True) - positive / temperature)
    return error.mean() if drawn.all() else error[drawn.to(error.device)].mean()


def _cosines(
    first: Tensor,  # (A, V) unit length
    second: Tensor,  # (R, V)
) -> Tensor:  # (A, R)
    with torch.autocast(first.device.type, enabled=False):  # bf16 gives an error of 0.05 after division by τ
        return first @ second.mT


def _draw(
    allowed: Tensor,  # (A, R) bool
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # (A, at most count) long, and bool: False where a row has fewer
    """Per row, draw up to `count` allowed columns without replacement."""
    most = int(allowed.sum(1).max()) if len(allowed) else 0
    value, index = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1).topk(min(count, most))
    return index, value >= 0


def _valid(
    valid: Tensor | None,  # (B, K) bool
    people: Tensor,  # (n,)
    rows: Tensor,  # (n*K,)
) -> Tensor:  # (n*K,) bool, on the CPU
    return torch.ones(len(rows), dtype=torch.bool) if valid is None else _gather(valid)[people].flatten()


def _gather(
    mask: Tensor,  # (B, ...) bool
) -> Tensor:  # (P*B, ...) bool, on the CPU
    """Gather from all processes, in rank order."""
    _, count = processes()
    if count > 1:
        parts = [torch.empty_like(mask, dtype=torch.uint8) for _ in range(count)]
        distributed.all_gather(parts, mask.to(torch.uint8).contiguous())
        mask = torch.cat(parts) > 0
    return mask.cpu()


def _labelled(predicted: Tensor, has_joints: Tensor | None) -> Tensor:  # (n,) long, on the CPU
    """Indices in the pool of people with 3D labels."""
    if has_joints is None:
        has_joints = torch.ones(len(predicted), dtype=torch.bool, device=predicted.device)
    return _gather(has_joints).nonzero()[:, 0]


def _rows(people: Tensor, joints: int) -> Tensor:  # (n,), K -> (n*K,)
    return (people[:, None] * joints + torch.arange(joints)).flatten()


def _take(
    features: Tensor,  # (B, R, V) of this process
    index: Tensor,  # (n,) rows of the pool (P*B*R, V), on the CPU, the same in every process
) -> Tensor:  # (n, V) float32 or float64, unit length
    """Rows of the pool as unit vectors. Gradients flow only into a process's own rows, times P since DDP averages.

    Only the drawn rows are communicated, not the pool.
    """
    own = features.flatten(0, 1)
    rank, count = processes()
    index = index - rank * len(own)
    here = ((index >= 0) & (index < len(own))).nonzero()[:, 0]
    mine = own[index[here].to(own.device)]
    mine = mine.to(torch.promote_types(mine.dtype, torch.float32))
    mine = F.normalize(mine, dim=-1, eps=1e-4)  # eps bounds the gradient at a zero feature
    if count == 1:
        return mine
    rows = mine.new_zeros(len(index), mine.shape[1])
    here = here.to(own.device)
    everyone = rows.index_copy(0, here, mine.detach())
    distributed.all_reduce(everyone)
    return everyone.index_copy(0, here, mine.detach() + count * (mine - mine.detach()))
