"""Errors of recovered meshes: pure, batched functions; metres in, millimetres out.

PVE: mean distance over the vertices; MPJPE: over the joints, both relative to a named root. PA-: after Procrustes
alignment by a similarity (proper rotation; Umeyama, PAMI 1991). With N hypotheses: the first, the mean mesh, and the
oracle, the smallest error of N for each metric separately, which needs the ground truth. The oracle rewards
miscalibration (Pierzchlewicz et al., arXiv 2210.11179), so it is reported with calibration error and coverage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmdiff.body.skeletons import joint_indices
from hmdiff.geometry import similarity_align

MILLIMETRES = 1000.0
# Maximum number of coordinates aligned at once: bounds the memory for any batch size.
_CHUNK = 1_000_000


def root_of(
    joints: Tensor,  # (..., J, 3)
    names: Sequence[str],
    root: str | Sequence[str] = "pelvis",
) -> Tensor:  # (..., 1, 3)
    """The root joint, or the mean of several, such as ("left_hip", "right_hip"). `KeyError`: an unknown name."""
    root_names = [root] if isinstance(root, str) else root
    return joints[..., joint_indices(root_names, names), :].mean(-2, keepdim=True)


def mean_distance(
    predicted: Tensor,  # (..., P, 3) metres
    target: Tensor,  # (..., P, 3) metres; leading dimensions broadcast
) -> Tensor:  # (...) mm
    """Mean Euclidean distance over the points, without alignment."""
    return (predicted - target).norm(dim=-1).mean(-1) * MILLIMETRES


def vertex_error(
    predicted: Tensor,  # (..., V, 3) metres
    target: Tensor,  # (..., V, 3)
    predicted_root: Tensor | None = None,  # (..., 1, 3); None: the vertices are already root-relative
    target_root: Tensor | None = None,  # (..., 1, 3)
) -> Tensor:  # (...) mm
    """PVE: mean distance over the vertices, each mesh relative to its own root."""
    predicted = predicted if predicted_root is None else predicted - predicted_root
    target = target if target_root is None else target - target_root
    return mean_distance(predicted, target)


def joint_error(
    predicted: Tensor,  # (..., J, 3) metres
    target: Tensor,  # (..., J, 3)
    names: Sequence[str],  # J joint names
    root: str | Sequence[str] = "pelvis",
    joints: Sequence[str] | None = None,  # the joints to average over; None: all
) -> Tensor:  # (...) mm
    """MPJPE: mean distance over the joints, each skeleton relative to its own root."""
    predicted = predicted - root_of(predicted, names, root)
    target = target - root_of(target, names, root)
    if joints is not None:
        chosen = joint_indices(joints, names)
        predicted, target = predicted[..., chosen, :], target[..., chosen, :]
    return mean_distance(predicted, target)


def procrustes_error(
    predicted: Tensor,  # (..., P, 3) metres
    target: Tensor,  # (..., P, 3); leading dimensions broadcast
) -> Tensor:  # (...) mm
    """PA-MPJPE or PA-PVE: mean distance after Procrustes alignment of each prediction to its target."""
    predicted, target = torch.broadcast_tensors(predicted, target)
    shape = predicted.shape[:-2]
    # A broadcast target stays a view: only chunks are copied.
    index = torch.arange(shape.numel(), device=predicted.device)
    where = torch.unravel_index(index, shape) if shape else ()
    step = max(1, _CHUNK // (3 * predicted.shape[-2]))
    errors = []
    for start in range(0, len(index), step):
        part = tuple(axis[start : start + step] for axis in where)
        source, goal = (predicted[part], target[part]) if shape else (predicted[None], target[None])
        errors.append(mean_distance(similarity_align(source, goal), goal))
    return torch.cat(errors).reshape(shape) if errors else predicted.new_zeros(shape)


def mesh_errors(
    vertices: Tensor,  # (..., V, 3) metres
    joints: Tensor,  # (..., J, 3)
    target_vertices: Tensor,  # (..., V, 3)
    target_joints: Tensor,  # (..., J, 3)
    names: Sequence[str],  # J joint names
    root: str | Sequence[str] = "pelvis",
) -> dict[str, Tensor]:  # "pve", "mpjpe", "pa_mpjpe", "pa_pve": (...) mm
    """All four errors; leading dimensions broadcast."""
    origin, target_origin = root_of(joints, names, root), root_of(target_joints, names, root)
    return {
        "pve": vertex_error(vertices, target_vertices, origin, target_origin),
        "mpjpe": joint_error(joints, target_joints, names, root),
        "pa_mpjpe": procrustes_error(joints, target_joints),
        "pa_pve": procrustes_error(vertices, target_vertices),
    }


def oracle_curve(
    errors: Tensor,  # (B, N) mm
    counts: Sequence[int] = (1, 5, 10, 25, 100),
) -> dict[int, Tensor]:  # count -> (B,) mm
    """The oracle of the first n hypotheses, for every n in `counts` up to N."""
    best = errors.cummin(1).values
    return {count: best[:, count - 1] for count in counts if count <= errors.shape[1]}


def bootstrap_interval(
    values: Tensor,  # (B,) one value per person
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its percentile-bootstrap interval over people (Efron 1979); NaN if empty."""
    values = values.detach().double().cpu().flatten()
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(100, samples - start), len(values)), generator=generator)].mean(1)
            for start in range(0, samples, 100)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)).tolist()
    return values.mean().item(), low, high


def inside_quantiles(
    samples: Tensor,  # (B, S, J, 3) metres, root-relative; 200 samples are usual
    target: Tensor,  # (B, J, 3)
    q: Tensor,  # (Q,) levels
) -> Tensor:  # (B, Q, J) 1 where the ball of level q about the median contains the ground truth
    """[quantile_q |m - x_s| > |m - x_gt|], with m the coordinate-wise median of the samples."""
    inside = []
    for drawn, truth in zip(samples, target, strict=True):  # torch.quantile takes at most 16 million numbers
        center = torch.quantile(drawn, 0.5, dim=0)
        radius = torch.quantile((drawn - center).norm(dim=-1), q, dim=0)
        inside.append((radius > (truth - center).norm(dim=-1)).to(drawn.dtype))
    return torch.stack(inside)


def calibration_levels(like: Tensor, levels: int = 21) -> Tensor:  # (Q,) from 0 to 1
    return torch.linspace(0, 1, levels, dtype=like.dtype, device=like.device)


def calibration_error(
    frequency: Tensor,  # (..., Q, J) how often the ball of level q contains the ground truth
    q: Tensor,  # (Q,)
) -> Tensor:  # (...)
    """mean over q of |median over joints of freq_j(q) - q|; 0 is perfect, 0.5 the worst."""
    return (torch.quantile(frequency, 0.5, dim=-1) - q).abs().mean(-1)


def expected_calibration_error(
    samples: Tensor,  # (B, S, J, 3) metres, root-relative
    target: Tensor,  # (B, J, 3)
) -> float:
    """ECE = mean over q of |median over joints of freq_j(q) - q|, q = 0, .05, ..., 1; 0 is perfect, 0.5 the worst."""
    q = calibration_levels(samples)
    return calibration_error(inside_quantiles(samples, target, q).mean(0), q).item()


def coverage(
    samples: Tensor,  # (B, S, J, 3) metres, root-relative
    target: Tensor,  # (B, J, 3)
    level: float = 0.9,
) -> Tensor:  # (J,) 0..1
    """How often the ball about the median that contains `level` of the samples contains the ground truth; `level` if
    calibrated."""
    return inside_quantiles(samples, target, samples.new_tensor([level])).mean(0)[0]
