"""Cells of an experiment beside each other: paired differences, the Pareto front, rows of CSV. Our choice.

Errors in mm. The people are the same in every cell and differ much more from each other than the cells do, so that a
difference is taken person by person: its interval tells what two overlapping intervals of means do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hmdiff.errors import UserError
from hmdiff.evaluate.metrics import bootstrap_interval

UNGUIDED = "none"  # the guidance of a cell without any


def difference(
    result: dict[str, Any],
    reference: dict[str, Any],
    metric: str,
    kind: str = "mean",
    reference_kind: str | None = None,  # None: the same
) -> dict[str, float]:  # value, low, high in mm
    """How much larger an error is than the reference's, person by person: the mean and its paired bootstrap interval.

    Raises:
        UserError: the two cells are of other people.
    """
    for name in ("split", "people", "seed"):
        mine, other = result["settings"][name], reference["settings"][name]
        if mine != other:
            raise UserError(f"cells to compare: {name} {mine} and {other}; only cells of the same people are paired")
    mine = torch.tensor(result["values"][metric][kind], dtype=torch.float64)
    other = torch.tensor(reference["values"][metric][reference_kind or kind], dtype=torch.float64)
    value, low, high = bootstrap_interval(mine - other)
    return {"value": value, "low": low, "high": high}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:  # (cost, error)
    """The points that no other beats in one without losing in the other, by rising cost. NaN is never on it."""
    order = sorted((p for p in range(len(points)) if not any(map(math.isnan, points[p]))), key=lambda p: points[p])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def table_row(result: dict[str, Any], reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """A cell as a row of CSV: settings, every error with its interval, calibration, gaps, time, paired differences."""
    settings = dict(result["settings"])
    row: dict[str, Any] = {
        name: settings[name]
        for name in ("model", "split", "people", "seed", "heatmaps", "sampler", "steps", "num_hypotheses", "eta")
    }
    guidance = settings["guidance"] or {"mode": UNGUIDED}
    row |= {"guidance" if name == "mode" else name: value for name, value in guidance.items()}

    def put(name: str, found: dict[str, float]) -> None:
        row[name], row[f"{name}_low"], row[f"{name}_high"] = found["value"], found["low"], found["high"]

    for metric, kinds in result["errors"].items():
        for kind, found in kinds.items():
            put(f"{metric}_{kind}", found)
            if reference is not None and kind in reference["errors"][metric]:
                put(f"{metric}_{kind}_difference", difference(result, reference, metric, kind))
    if "expected_calibration_error" in result:
        put("ece", {"value": result["expected_calibration_error"], **result["expected_calibration_error_interval"]})
        put("coverage", result["coverage"])
    for name, found in result.get("guidance", {}).items():
        put(name, found)
    times = result["time"]
    put("milliseconds", {"value": times["milliseconds_per_image"], "low": times["low"], "high": times["high"]})
    return row | {"batch": times["batch"], "device": times["device"], "threads": times["threads"]}
