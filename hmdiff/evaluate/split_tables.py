"""Tables of `hmdiff evaluate` on the synthetic splits, with notes on calibration and plausibility."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hmdiff.evaluate.evaluation import AGGREGATED, KINDS, WEIGHTED
from hmdiff.evaluate.table import Table, interval_text
from hmdiff.evaluate.visibility_bins import COLUMNS, visibility_rows
from hmdiff.names import METRICS


def split_tables(reports: Sequence[dict[str, Any]]) -> Iterator[tuple[Table, list[str]]]:
    """A table for each split, with notes on each of its checkpoints."""
    for split in dict.fromkeys(report["split"] for report in reports):
        split_reports = [report for report in reports if report["split"] == split]
        lines = [line for report in split_reports for line in _rows(report)]
        notes = []
        for report in split_reports:
            notes += [calibration_line(report)] if "coverage" in report else []
            notes += [plausibility_line(report)] if "bodies" in report else []
        title = f"{split}: {split_reports[0]['people']} people, mm (95 % interval)"
        yield Table(title, ["checkpoint", "hypothesis", *METRICS.values()], lines, ruled=True, names=2), notes


def _rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each way to reduce the hypotheses to one mesh."""
    errors = report["errors"]
    # One row for the mean mesh and for direct baselines, whose hypotheses are all equal.
    alone = all(len({json.dumps(value) for value in kinds.values()}) == 1 for kinds in errors.values())
    several = [*KINDS, *(kind for kind in (WEIGHTED, AGGREGATED) if kind in errors["pve"])]
    for number, kind in enumerate([next(iter(errors["pve"]))] if alone else several):
        name = "-" if alone else kind if kind == "first" else f"{kind} of {report['num_hypotheses']}"
        yield [
            "" if number else report["checkpoint"],
            name,
            *(interval_text(errors[metric][kind]) for metric in METRICS),
        ]


def calibration_line(report: dict[str, Any]) -> str:
    """Calibration error and coverage, without and with the temperature fitted for these sampling settings."""
    level = report["coverage"]["level"]

    def calibration(found: dict[str, Any]) -> str:
        error = {"value": found["expected_calibration_error"], **found["expected_calibration_error_interval"]}
        covered = f"{found['coverage']['value']:.0%} of the joints within {level:.0%} of the hypotheses"
        return f"{interval_text(error, 3)}, {covered}"

    line = f"{report['checkpoint']}: expected calibration error {calibration(report)}"
    if "tempered" in report:
        line += f"; with a temperature of {report['tempered']['temperature']:.2f} (median): "
        line += calibration(report["tempered"])
    return line


def plausibility_line(report: dict[str, Any]) -> str:
    """Plausibility: torn edges, joint limit violations, and distance of fitted bodies from the predicted vertices."""
    found = report["bodies"]
    line = f"{report['checkpoint']}: {found['torn_edges']['value']:.2%} of the edges off by more than a factor of 2"
    if "torn_edges_of_true_bodies" in found:
        line += f" (true bodies {found['torn_edges_of_true_bodies']['value']:.2%})"
    if "surface_distance_mm" in found:
        line += f"; skin and predicted vertices {found['surface_distance_mm']['value']:.1f} mm apart"
    if "beyond_limits_degrees" in found:
        line += f"; joints at most {found['beyond_limits_degrees']['largest']:.1f} degrees beyond their limits"
    return line


def visibility_tables(reports: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Errors and spread by visible fraction, for each report that has them."""
    for report in reports:
        if "bands" in report:
            title = f"{report['checkpoint']}, {report['split']}, by visible fraction: mm (95 % interval)"
            yield Table(title, COLUMNS, visibility_rows(report["bands"]), ruled=True, width=172)
