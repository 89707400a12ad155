"""Rows of a comparison table from its cells: means over seeds, paired differences, visibility bins; text and CSV.

Errors in mm. Differences are taken per person and seed (seed i of a row against seed i of its reference, with the same
people and noise) and averaged over the seeds; they are given in mm or in percent of the reference's error. The 95 %
interval is a percentile bootstrap over people: it covers the variation between people only. The variation between
trainings shows in the differences per seed, listed separately: three seeds are too few for an interval. A given
checkpoint has one cell, for the noise seed. S seeds, P people. Our choice.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.evaluate.measured import interval
from hmdiff.evaluate.table import NOTHING, Number, difference_text, interval_text
from hmdiff.evaluate.visibility_bins import VISIBILITY_BINS, ratio_interval, visibility_bin
from hmdiff.lab.ablations import Column, Comparison, Row
from hmdiff.lab.comparison import add_number, check_same_people, other_values, settings_row
from hmdiff.names import METRICS

VisibilityBinning = Callable[[Tensor], Tensor]  # visible fraction (P,) -> bin index (P,)
_KINDS = ("first", "mean", "selected", "oracle")
SPREAD = "spread"


@dataclasses.dataclass(frozen=True)
class RowCells:
    """The results of a row on one split: one cell per trained seed, and the cost if measured."""

    row: Row
    cells: Mapping[int, dict[str, Any]]  # seed -> cell
    cost: Mapping[str, float] | None = None

    def values(
        self,
        metric: str,
        kind: str = "mean",
        seeds: Sequence[int] | None = None,  # None: all
    ) -> Tensor | None:  # (S, P); None if no cell has the value
        rows = []
        for seed in sorted(self.cells) if seeds is None else seeds:
            values_of_cell = self.cells[seed]["values"].get(metric)
            values_of_cell = values_of_cell.get(kind) if isinstance(values_of_cell, dict) else values_of_cell
            if values_of_cell is None:
                return None
            rows.append(torch.tensor(values_of_cell, dtype=torch.float64))
        return torch.stack(rows) if rows else None

    @property
    def has_visibility(self) -> bool:
        """Whether visible fractions are stored: those of people with images or maps are."""
        return self.values("visible_fraction") is not None

    def mask(self, number: int, bin_of: VisibilityBinning) -> Tensor:  # (P,) bool
        """Membership in a visibility bin. Raises `UserError` if the cells store no visibility."""
        fractions = self.values("visible_fraction")
        if fractions is None:
            raise UserError(
                f"row {self.row.label!r}: its people do not tell how much of them is visible; give them pictures "
                "(data.pictures=true) or maps (data.map_size=64)"
            )
        return bin_of(fractions[0]) == number


def mean_of(
    cells: RowCells,
    metric: str,
    kind: str | None = None,  # None: the row's
    mask: Tensor | None = None,  # (P,) bool, selects people
) -> Number | None:
    """Mean over people and seeds, with its interval over people."""
    values = cells.values(metric, kind or cells.row.kind)
    if values is None:
        return None
    each = values.mean(0) if mask is None else values.mean(0)[mask]
    return interval(each) if len(each) else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of a row to another, in mm and relative to the other row's error."""

    absolute: Number
    relative: Number
    by_seed: dict[int, float]  # relative


def difference_of(
    cells: RowCells,
    other: RowCells | None,
    metric: str,
    kind: str | None = None,  # of both rows; None: each row's own
    mask: Tensor | None = None,
) -> Difference | None:
    """None if there is nothing to compare: no other row, or no common seed.

    Raises:
        UserError: the cells cover different people or noise.
    """
    if other is None:
        return None
    seeds = sorted(cells.cells.keys() & other.cells.keys())
    for seed in seeds:
        check_same_people(cells.cells[seed], other.cells[seed])
    errors, reference_errors = (each.values(metric, kind or each.row.kind, seeds) for each in (cells, other))
    if errors is None or reference_errors is None:
        return None
    if mask is not None:
        errors, reference_errors = errors[:, mask], reference_errors[:, mask]
    if not errors.shape[1] or not reference_errors.any():
        return None
    differences = errors - reference_errors
    return Difference(
        interval(differences.mean(0)),
        ratio_interval(differences.mean(0), reference_errors.mean(0)),
        dict(zip(seeds, (differences.mean(1) / reference_errors.mean(1)).tolist(), strict=True)),
    )


def table_cells(
    table: Comparison,
    rows: Sequence[RowCells],
    mode: str = "diffusion",
    columns: Sequence[Column] | None = None,  # None: the table's
) -> tuple[list[str], list[list[str]]]:  # titles, and one line per row
    """The table as printed: value and 95 % interval; "-" for missing values."""
    shown = [column for column in columns or table.columns if mode in column.modes]
    by_label = {cells.row.label: cells for cells in rows}
    lines = [[cells.row.label, *(_text(column, cells, by_label) for column in shown)] for cells in rows]
    return ["", *(column.title for column in shown)], lines


def _text(column: Column, cells: RowCells, rows: Mapping[str, RowCells]) -> str:
    if column.value == "seeds":
        return str(len(cells.cells))
    if column.value not in (*METRICS, SPREAD):
        value = other_value(cells, column.value)
        if value is not None and column.value == "parameters":
            return f"{value['value']:,.0f}"
        if value is not None and column.value not in ("ece", "coverage"):
            value = {"value": value["value"]}
        return interval_text(value, column.digits, column.scale)
    if column.against is None:
        return interval_text(mean_of(cells, column.value, column.kind), column.digits)
    difference = difference_of(cells, _reference_cells(cells.row, rows, column.against), column.value, column.kind)
    if difference is None:
        return NOTHING
    if column.by_seed:
        return " ".join(f"{100 * value:+.{column.digits}f}" for value in difference.by_seed.values())
    return difference_text(
        *((difference.relative, column.digits, 100) if column.relative else (difference.absolute, column.digits))
    )


def _reference_cells(row: Row, rows: Mapping[str, RowCells], against: str) -> RowCells | None:
    label = getattr(row, against)
    return None if label is None else rows.get(label)


def other_value(cells: RowCells, name: str) -> Number | None:
    """Values other than errors: cost, calibration, guidance statistics, rank correlation of RLE; means over seeds."""
    if cells.cost is not None and name in cells.cost:
        return {"value": cells.cost[name]}
    values = [numbers[name] for numbers in map(other_values, cells.cells.values()) if name in numbers]
    if len(values) > 1:
        return {"value": statistics.fmean(each["value"] for each in values)}
    return values[0] if values else None


def visibility_table_cells(
    rows: Sequence[RowCells],
    metric: str,  # or SPREAD
    kind: str = "mean",
    bins: Sequence[str] = VISIBILITY_BINS,
    bin_of: VisibilityBinning = visibility_bin,
    relative: bool = False,  # show the relative difference to the reference instead
) -> tuple[list[str], list[list[str]]]:
    """One line per row, one column per bin; the titles give the number of people per bin."""
    with_people = [cells for cells in rows if cells.cells]
    counts = [int(with_people[0].mask(n, bin_of).sum()) for n in range(len(bins))] if with_people else [0] * len(bins)
    by_label = {cells.row.label: cells for cells in rows}
    lines = []
    for cells in with_people:
        line = [cells.row.label]
        for number in range(len(bins)):
            mask = cells.mask(number, bin_of)
            if relative:
                difference = difference_of(
                    cells, _reference_cells(cells.row, by_label, "reference"), metric, kind, mask
                )
                line.append(difference_text(None if difference is None else difference.relative, scale=100))
            else:
                line.append(interval_text(mean_of(cells, metric, kind, mask)))
        lines.append(line)
    return ["visible", *(f"{name} ({count})" for name, count in zip(bins, counts, strict=True))], lines


def csv_rows(
    name: str,
    split: str,
    rows: Sequence[RowCells],
    mode: str = "diffusion",
    bins: Sequence[str] = (),  # also write a line for each bin
    bin_of: VisibilityBinning = visibility_bin,
) -> Iterator[dict[str, Any]]:
    """Every number: a line for each row and, if `bins` are given, for each row and bin."""
    by_label = {cells.row.label: cells for cells in rows}
    for cells in filter(lambda each: each.cells, rows):
        for number, label in ((None, "all"), *enumerate(bins)):
            mask = None if number is None else cells.mask(number, bin_of)
            row = cells.row
            line: dict[str, Any] = {"table": name, "split": split, "band": label, "row": row.label, "mode": mode}
            line |= {"kind": row.kind, "reference": row.reference or "", "builds_on": row.builds_on or ""}
            line["seeds"] = " ".join(map(str, sorted(cells.cells)))
            line |= settings_row(next(iter(cells.cells.values()))["settings"])
            if mask is not None:
                line["people"] = int(mask.sum())
            for metric in (*METRICS, SPREAD):
                for kind in _KINDS if metric != SPREAD else ("mean",):
                    title = metric if metric == SPREAD else f"{metric}_{kind}"
                    add_number(line, title, mean_of(cells, metric, kind, mask))
                    for against in ("reference", "builds_on"):
                        difference = difference_of(cells, _reference_cells(row, by_label, against), metric, kind, mask)
                        if difference is None:
                            continue
                        add_number(line, f"{title}_difference_{against}", difference.absolute)
                        add_number(line, f"{title}_share_{against}", difference.relative)
                        for seed, value in difference.by_seed.items():
                            line[f"{title}_share_{against}_seed_{seed}"] = value
            if mask is None:
                for other in dict.fromkeys(found for cell in cells.cells.values() for found in other_values(cell)):
                    add_number(line, other, other_value(cells, other))
                line |= cells.cost or {}
            yield line
