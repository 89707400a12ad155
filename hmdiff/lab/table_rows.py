"""A comparison's rows from their cells: means over seeds, paired differences, bands of what is visible; text and CSV.

Errors in mm. A difference is taken person by person and seed by seed (seed i of a row against seed i of its reference:
the same people were drawn, with the same noise), and averaged over the seeds; it is given in mm, or in percent of the
reference's error. Its interval is a bootstrap over people (95 %, percentile): it says what other people would give.
What another training would give is told by the seeds' own differences, which stand beside it: three are too few for an
interval. A given checkpoint has one cell, that of the noise's seed. S seeds, P people. Our choice.
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
from hmdiff.evaluate.visibility_bands import BANDS, band_of, ratio_interval
from hmdiff.lab.ablations import Column, Comparison, Row
from hmdiff.lab.comparison import check_same_people, other_numbers, put, settings_row
from hmdiff.names import METRICS

BandOf = Callable[[Tensor], Tensor]  # visible fractions (P,) -> number of the band (P,)
_KINDS = ("first", "mean", "selected", "oracle")
SPREAD = "spread"


@dataclasses.dataclass(frozen=True)
class RowCells:
    """What is known of a row on one split: a cell of each seed that is trained, and its cost where it was measured."""

    row: Row
    cells: Mapping[int, dict[str, Any]]  # seed -> cell
    cost: Mapping[str, float] | None = None

    def values(
        self,
        metric: str,
        kind: str = "mean",
        seeds: Sequence[int] | None = None,  # None: all
    ) -> Tensor | None:  # (S, P); None where no cell has it
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
        """Whether its people carry how much of them is visible: those with pictures or maps do."""
        return self.values("visible_fraction") is not None

    def mask(self, number: int, band: BandOf) -> Tensor:  # (P,) bool
        """Who is in a band. Raises `UserError` where the cells do not tell."""
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
    mask: Tensor | None = None,  # (P,) bool, whom it is about
) -> Number | None:
    """Mean over people and seeds, with its interval over people."""
    values = cells.values(metric, kind or cells.row.kind)
    if values is None:
        return None
    each = values.mean(0) if mask is None else values.mean(0)[mask]
    return interval(each) if len(each) else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a row to another. In mm, and as a share of the other's error."""

    absolute: Number
    relative: Number
    by_seed: dict[int, float]  # share


def difference_of(
    cells: RowCells,
    other: RowCells | None,
    metric: str,
    kind: str | None = None,  # of both; None: each row's own
    mask: Tensor | None = None,
) -> Difference | None:
    """None where there is nothing to compare: no other row, no seed that both have.

    Raises:
        UserError: the cells are of other people, or other noise.
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
) -> tuple[list[str], list[list[str]]]:  # titles, and a line a row
    """The table as it is printed: value and 95 % interval; "-" for what a row does not have."""
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
    """What is no error: a cost, the calibration, what guidance reports, RLE's rank correlation; of seeds the mean."""
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
    bands: Sequence[str] = BANDS,
    band: BandOf = band_of,
    relative: bool = False,  # the difference to the reference instead
) -> tuple[list[str], list[list[str]]]:
    """A line a row, a column a band, how many people are in it in the titles."""
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
    bands: Sequence[str] = (),  # lines of these too
    band: BandOf = band_of,
) -> Iterator[dict[str, Any]]:
    """Every number: a line for each row and, where bands are asked for, for each row and band."""
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
