"""Plausibility of hypotheses: torn edges, joint limit violations, distance of the fitted body from the prediction.

Torn edges of the full mesh are defined in `hmdiff.evidence`; ground truth bodies have some too (armpits, groins), so
their share is reported for comparison. Joint limits: `hmdiff/body/anatomy.py`. The metrics are our choice.
B people, N hypotheses, V vertices, E edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmdiff.body.anatomy import joint_limit_violation
from hmdiff.body.body import Body
from hmdiff.body.skeletons import SMPL24
from hmdiff.body.surface import mesh_edges
from hmdiff.data.sample import Sample
from hmdiff.evaluate.measured import interval
from hmdiff.evidence import torn_share
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.output import MeshOutput


class PlausibilityCollector:
    """Callback of an evaluation that collects these metrics for every person."""

    def __init__(self, body: Body) -> None:
        assert body.faces is not None
        self.template, self.edges = body.v_template, mesh_edges(body.faces)
        self.limited = body.joint_names == SMPL24
        self.values: dict[str, list[Tensor]] = {}

    def __call__(self, sample: Sample, output: MeshOutput) -> None:
        self._add("torn_edges", torch.stack([self._torn_share(person).mean() for person in output.vertices]))
        if sample.vertices is not None:
            self._add("torn_edges_of_true_bodies", self._torn_share(sample.vertices))
        if output.fitted is not None:
            self._add("surface_distance_mm", output.fitted.error_mm.mean(1))
            if self.limited:
                rotations = axis_angle_to_matrix(output.fitted.pose)
                self._add("beyond_limits_degrees", joint_limit_violation(rotations).amax(1))

    def _torn_share(self, vertices: Tensor) -> Tensor:  # (M, V, 3) -> (M,)
        return torn_share(vertices.to(self.template), self.template, self.edges)

    def _add(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.float().cpu())

    def report(self) -> dict[str, Any]:
        """Means over people with intervals, and the largest joint limit violation of all hypotheses."""
        joined = {name: torch.cat(parts) for name, parts in self.values.items()}
        report: dict[str, Any] = {name: interval(values) for name, values in joined.items()}
        if "beyond_limits_degrees" in joined:
            report["beyond_limits_degrees"]["largest"] = joined["beyond_limits_degrees"].max().item()
        return report
