"""A protocol's reports as a table: the protocol's definition, all scored methods, published results."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any

from hmdiff.evaluate.protocols import Protocol
from hmdiff.evaluate.published import published_rows
from hmdiff.evaluate.table import WIDTH, Table, interval_text

SEEN = {"labels": "heatmaps of the data set's own 2D keypoints, which no estimator gives: say so with the number"}


def _cell(protocol: Protocol, metric: str, value: float | dict[str, float] | None) -> str:
    found = {"value": value} if isinstance(value, float | int) else value
    return interval_text(found, 3 if metric == "ece" or protocol.metrics[metric].unit == "share" else 1)


def print_protocol(protocol: Protocol, data: str, synthetic: bool, reports: list[dict[str, Any]]) -> None:
    """Print the protocol's definition, and a table of all scored methods and published results."""
    width = shutil.get_terminal_size((WIDTH, 40)).columns if sys.stdout.isatty() else WIDTH
    print(f"\nprotocol {protocol.title}: {protocol.citation}")
    for word in ("ground_truth", "joints", "root", "alignment"):
        print(
            textwrap.fill(
                f"{word.replace('_', ' ')}: {getattr(protocol, word)}",
                width,
                initial_indent="  ",
                subsequent_indent="    ",
            )
        )
    if synthetic:
        print("  here the ground truth is the synthetic people's own mesh, on the model's body")
    elif reports[0].get("heatmaps", "none") != "none":
        print(f"  the model sees: {SEEN.get(reports[0]['heatmaps'], reports[0]['heatmaps'])}")
    if guided := reports[0].get("guided_by"):
        print(f"  steered by those heatmaps: {guided['mode']}, strength {guided['strength']:g}")
    shown = [m for m in protocol.metrics if f"{protocol.title}/{m}" in reports[0]["errors"]]
    ece = f"{protocol.title}/ece"
    counted = f"{reports[0]['people']} people"
    if reports[0].get("of", reports[0]["people"]) != reports[0]["people"]:
        counted += f" of {reports[0]['of']}: no published number compares"
    with_ece = any(ece in report for report in reports)
    headers = [protocol.metrics[metric].header for metric in shown] + (["ECE"] if with_ece else [])
    lines: list[list[str]] = []
    for report in reports:
        for number, row in enumerate(next(iter(report["errors"].values()))):
            values = [_cell(protocol, metric, report["errors"][f"{protocol.title}/{metric}"][row]) for metric in shown]
            if with_ece:
                values.append("" if number else _cell(protocol, "ece", report.get(ece)))
            lines.append(["" if number else report["scored"], row, *values])
    rows = published_rows(protocol.name)
    for published in rows:
        values = [_cell(protocol, m, published.values.get(m)) for m in [*shown, *(["ece"] if with_ece else [])]]
        lines.append([f"{published.method} (published)", published.data, *values])
    Table(
        f"{protocol.title} on {data}, {counted}, mm (95 % interval)",
        ["scored", "hypothesis,\nor data", *(f"{protocol.name}\n{header}" for header in headers)],
        lines,
        ruled=True,
        names=2,
    ).print()
    if not rows:
        print(f"no published row is kept for {protocol.name}")
    elif synthetic:
        print("the published rows are of other data and of SMPL's mesh: nothing here compares with them")
    for published in rows:
        if published.note:
            print(f"  {published.method}, {published.data}: {published.source}; {published.note}")
