"""Comparison of experiment cells: paired differences, the Pareto front, CSV rows. Our choice.

Errors in mm. All cells use the same people, and errors vary more between people than between cells. Differences are
therefore taken person by person, which gives narrower intervals than comparing the means of two cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hmdiff.errors import UserError
from hmdiff.evaluate.measured import interval
from hmdiff.evaluate.table import Number

UNGUIDED = "none"  # guidance name of a cell without guidance


def difference(
    result: dict[str, Any],
    reference: dict[str, Any],
    metric: str,
    kind: str = "mean",
    reference_kind: str | None = None,  # None: same as `kind`
) -> dict[str, float]:  # value, low, high in mm
    """How much larger an error is than the reference's, paired by person: the mean and its bootstrap interval.

    Raises:
        UserError: the two cells cover different people.
    """
    check_same_people(result, reference)
    errors = torch.tensor(result["values"][metric][kind], dtype=torch.float64)
    reference_errors = torch.tensor(reference["values"][metric][reference_kind or kind], dtype=torch.float64)
    return interval(errors - reference_errors)


def check_same_people(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """Raises `UserError` for two cells that are not paired: different people or different noise."""
    for name in ("split", "people", "seed"):
        value, reference_value = result["settings"][name], reference["settings"][name]
        if value != reference_value:
            raise UserError(
                f"cells to compare: {name} {value} and {reference_value}; only cells of the same people are paired"
            )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:  # (cost, error)
    """Points that are not dominated, by rising cost. A point with NaN is never on the front."""
    order = sorted((p for p in range(len(points)) if not any(map(math.isnan, points[p]))), key=lambda p: points[p])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def table_row(result: dict[str, Any], reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """A cell as a CSV row: settings, every error with its interval, calibration, gaps, time, paired differences."""
    row = settings_row(result["settings"])
    for metric, kinds in result["errors"].items():
        for kind, found in kinds.items():
            add_number(row, f"{metric}_{kind}", found)
            if reference is not None and kind in reference["errors"][metric]:
                add_number(row, f"{metric}_{kind}_difference", difference(result, reference, metric, kind))
    for name, found in other_values(result).items():
        add_number(row, name, found)
    times = result["time"]
    return row | {"batch": times["batch"], "device": times["device"], "threads": times["threads"]}


def settings_row(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a cell, one value per column."""
    names = ("model", "split", "people", "seed", "heatmaps", "sampler", "steps", "num_hypotheses", "eta")
    row = {name: settings[name] for name in names if name in settings}
    if "guidance" in settings:
        guidance = settings["guidance"] or {"mode": UNGUIDED}
        row |= {"guidance" if name == "mode" else name: value for name, value in guidance.items()}
    return row


def other_values(cell: Mapping[str, Any]) -> dict[str, Number]:
    """Values of a cell other than errors: calibration, guidance statistics, time, rank correlations of RLE."""
    values: dict[str, Number] = {}
    if "expected_calibration_error" in cell:
        error = {"value": cell["expected_calibration_error"], **cell["expected_calibration_error_interval"]}
        values |= {"ece": error, "coverage": cell["coverage"]}
    values |= cell.get("guidance", {})
    if (times := cell.get("time")) is not None:
        values["milliseconds"] = {"value": times["milliseconds_per_image"], "low": times["low"], "high": times["high"]}
    for name, (value, *_) in cell.get("correlation", {}).items():
        values["correlation" if name == "pooled" else f"correlation_{name}"] = {"value": value}
    return values


def add_number(row: dict[str, Any], name: str, found: Number | None) -> None:
    """Add a number and, if present, the ends of its interval, as separate columns."""
    if found is not None:
        row[name] = found["value"]
        row |= {f"{name}_{end}": found[end] for end in ("low", "high") if end in found}
