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
from hmdiff.lab.comparison import check_same_people, other_numbers, put, settings_row
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
            found = self.cells[seed]["values"].get(metric)
            found = found.get(kind) if isinstance(found, dict) else found
            if found is None:
                return None
            rows.append(torch.tensor(found, dtype=torch.float64))
        return torch.stack(rows) if rows else None

    @property
    def tells_visibility(self) -> bool:
        """Whether visible fractions are stored: those of people with images or maps are."""
        return self.values("visible_fraction") is not None

    def mask(self, number: int, band: VisibilityBinning) -> Tensor:  # (P,) bool
        """Membership in a visibility bin. Raises `UserError` if the cells store no visibility."""
        fractions = self.values("visible_fraction")
        if fractions is None:
            raise UserError(
                f"row {self.row.label!r}: its people do not tell how much of them is visible; give them pictures "
                "(data.pictures=true) or maps (data.map_size=64)"
            )
        return band(fractions[0]) == number


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
    mine, theirs = (each.values(metric, kind or each.row.kind, seeds) for each in (cells, other))
    if mine is None or theirs is None:
        return None
    if mask is not None:
        mine, theirs = mine[:, mask], theirs[:, mask]
    if not mine.shape[1] or not theirs.any():
        return None
    apart = mine - theirs
    return Difference(
        interval(apart.mean(0)),
        ratio_interval(apart.mean(0), theirs.mean(0)),
        dict(zip(seeds, (apart.mean(1) / theirs.mean(1)).tolist(), strict=True)),
    )


def texts(
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
        found = number_of(cells, column.value)
        if found is not None and column.value == "parameters":
            return f"{found['value']:,.0f}"
        if found is not None and column.value not in ("ece", "coverage"):
            found = {"value": found["value"]}
        return interval_text(found, column.digits, column.scale)
    if column.against is None:
        return interval_text(mean_of(cells, column.value, column.kind), column.digits)
    apart = difference_of(cells, _other(cells.row, rows, column.against), column.value, column.kind)
    if apart is None:
        return NOTHING
    if column.by_seed:
        return " ".join(f"{100 * value:+.{column.digits}f}" for value in apart.by_seed.values())
    return difference_text(
        *((apart.relative, column.digits, 100) if column.relative else (apart.absolute, column.digits))
    )


def _other(row: Row, rows: Mapping[str, RowCells], against: str) -> RowCells | None:
    label = getattr(row, against)
    return None if label is None else rows.get(label)


def number_of(cells: RowCells, name: str) -> Number | None:
    """Values other than errors: cost, calibration, guidance statistics, rank correlation of RLE; means over seeds."""
    if cells.cost is not None and name in cells.cost:
        return {"value": cells.cost[name]}
    found = [numbers[name] for numbers in map(other_numbers, cells.cells.values()) if name in numbers]
    if len(found) > 1:
        return {"value": statistics.fmean(each["value"] for each in found)}
    return found[0] if found else None


def band_texts(
    rows: Sequence[RowCells],
    metric: str,  # or SPREAD
    kind: str = "mean",
    bands: Sequence[str] = VISIBILITY_BINS,
    band: VisibilityBinning = visibility_bin,
    relative: bool = False,  # show the relative difference to the reference instead
) -> tuple[list[str], list[list[str]]]:
    """One line per row, one column per bin; the titles give the number of people per bin."""
    with_people = [cells for cells in rows if cells.cells]
    counts = [int(with_people[0].mask(n, band).sum()) for n in range(len(bands))] if with_people else [0] * len(bands)
    by_label = {cells.row.label: cells for cells in rows}
    lines = []
    for cells in with_people:
        line = [cells.row.label]
        for number in range(len(bands)):
            mask = cells.mask(number, band)
            if relative:
                apart = difference_of(cells, _other(cells.row, by_label, "reference"), metric, kind, mask)
                line.append(difference_text(None if apart is None else apart.relative, scale=100))
            else:
                line.append(interval_text(mean_of(cells, metric, kind, mask)))
        lines.append(line)
    return ["visible", *(f"{name} ({count})" for name, count in zip(bands, counts, strict=True))], lines


def csv_rows(
    name: str,
    split: str,
    rows: Sequence[RowCells],
    mode: str = "diffusion",
    bands: Sequence[str] = (),  # also write a line for each bin
    band: VisibilityBinning = visibility_bin,
) -> Iterator[dict[str, Any]]:
    """Every number: a line for each row and, if `bands` are given, for each row and bin."""
    by_label = {cells.row.label: cells for cells in rows}
    for cells in filter(lambda each: each.cells, rows):
        for number, label in ((None, "all"), *enumerate(bands)):
            mask = None if number is None else cells.mask(number, band)
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
                    put(line, title, mean_of(cells, metric, kind, mask))
                    for against in ("reference", "builds_on"):
                        apart = difference_of(cells, _other(row, by_label, against), metric, kind, mask)
                        if apart is None:
                            continue
                        put(line, f"{title}_difference_{against}", apart.absolute)
                        put(line, f"{title}_share_{against}", apart.relative)
                        for seed, value in apart.by_seed.items():
                            line[f"{title}_share_{against}_seed_{seed}"] = value
            if mask is None:
                for other in dict.fromkeys(found for cell in cells.cells.values() for found in other_numbers(cell)):
                    put(line, other, number_of(cells, other))
                line |= cells.cost or {}
            yield line
