"""MLP that aggregates N hypotheses into one mesh, the last stage of HMDiff (arXiv 2308.13369).

The paper only states that it is an MLP. This one is permutation-invariant and accepts any N (DeepSets): with c_i the
coordinates of hypothesis i in the LBS basis (`hmdiff/body/lbs_basis.py`), h = mean_i f(c_i - c̄, c̄), and the mesh is the
mean of the hypotheses plus basis * g(h, c̄). g is zero-initialised: an untrained head returns the mean.
B people, N hypotheses, P points (coarse vertices, then joints), D = 12 J coordinates.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmdiff.errors import UserError
from hmdiff.files.reading import read_json
from hmdiff.models.saved import check_state

WEIGHTS, CONFIG = "aggregator.safetensors", "config.json"
_MEND = "train it again with hmdiff prepare aggregator"
_LARGEST = 4096  # bound on `hidden`


@dataclasses.dataclass(frozen=True)
class AggregatorSizes:
    """Sizes that determine the shapes of the weights."""

    num_points: int  # P
    num_joints: int  # J
    hidden: int = 256


class HypothesisAggregator(nn.Module):
    """The MLP. `basis` comes from the body (`set_basis`) and is not saved."""

    basis: Tensor

    def __init__(self, sizes: AggregatorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.fitted_on: dict[str, Any] = {}  # training settings and validation results
        coordinates, hidden = 12 * sizes.num_joints, sizes.hidden
        self.register_buffer("basis", torch.zeros(sizes.num_points, 4 * sizes.num_joints), persistent=False)
        self.each = nn.Sequential(nn.Linear(2 * coordinates, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.together = nn.Sequential(
            nn.Linear(hidden + coordinates, hidden), nn.GELU(), nn.Linear(hidden, coordinates)
        )
        last = self.together[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def set_basis(
        self,
        basis: Tensor,  # (P, 4 J) orthonormal
    ) -> None:
        self.basis.copy_(basis)

    def coordinates(
        self,
        points: Tensor,  # (..., P, 3)
    ) -> Tensor:  # (..., D)
        return (self.basis.mT @ points.float()).flatten(-2)

    def correction(
        self,
        coordinates: Tensor,  # (B, N, D)
    ) -> Tensor:  # (B, P, 3)
        """Correction added to the mean of the hypotheses."""
        mean = coordinates.mean(1, keepdim=True)
        seen = torch.cat([coordinates - mean, mean.expand_as(coordinates)], -1)
        summary = self.each(seen).mean(1)
        found = self.together(torch.cat([summary, mean[:, 0]], -1))
        return self.basis @ found.unflatten(-1, (-1, 3))

    def forward(
        self,
        points: Tensor,  # (B, N, P, 3) of the diffusion
    ) -> Tensor:  # (B, P, 3)
        return points.mean(1) + self.correction(self.coordinates(points))


def save_aggregator(aggregator: HypothesisAggregator, folder: Path) -> None:
    """Write sizes and `fitted_on` as JSON, weights as safetensors, into a new folder."""
    from safetensors.torch import save_file

    folder.mkdir()
    about = {**dataclasses.asdict(aggregator.sizes), "fitted_on": aggregator.fitted_on}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    state = {name: value.detach().cpu().contiguous() for name, value in aggregator.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load_aggregator(
    folder: Path,
    num_points: int,  # of the model that samples the hypotheses
    num_joints: int,
) -> HypothesisAggregator:
    """Raises `UserError` naming the file and the invalid value or weight."""
    about = read_json(folder / CONFIG, 1 << 20, _MEND)
    if not isinstance(about, dict):
        raise UserError(f"{folder / CONFIG}: a {type(about).__name__}, a mapping was expected; {_MEND}")
    wanted = {"num_points": (num_points, num_points), "num_joints": (num_joints, num_joints), "hidden": (1, _LARGEST)}
    for name, (least, most) in wanted.items():
        value = about.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            words = f"{least}" if least == most else f"{least} to {most}"
            raise UserError(f"{folder / CONFIG}: {name} is {value!r:.60}, {words} expected; {_MEND}")
    if not isinstance(about.get("fitted_on", {}), dict):
        raise UserError(f"{folder / CONFIG}: fitted_on is no mapping; {_MEND}")
    aggregator = HypothesisAggregator(AggregatorSizes(num_points, num_joints, about["hidden"]))
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; {_MEND}")
    try:
        from safetensors.torch import load_file

        state = load_file(path)
    except Exception as error:  # safetensors raises its own error types
        raise UserError(f"{path}: cannot be read ({str(error)[:120]}); {_MEND}") from None
    check_state(path, aggregator.state_dict(), state)
    aggregator.load_state_dict(state, strict=True)
    aggregator.fitted_on = dict(about.get("fitted_on", {}))
    return aggregator.eval()
