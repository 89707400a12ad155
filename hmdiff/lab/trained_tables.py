"""An ablation's tables from its cells: means over seeds, paired differences, bands of what is visible; text and CSV.

Errors in mm. A difference is taken person by person and seed by seed (seed i of a row against seed i of its reference:
the same people were drawn, with the same noise), and averaged over the seeds; it is given in percent of the reference's
error. Its interval is a bootstrap over people (95 %, percentile): it says what other people would give. What another
training would give is told by the seeds' own differences, which stand beside it: three are too few for an interval.
S seeds, P people. Our choice.
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
from hmdiff.evaluate.table import difference_text, interval_text
from hmdiff.evaluate.visibility_bands import BANDS, band_of, ratio_interval
from hmdiff.lab.trained_ablations import TrainedColumn, TrainedRow, TrainedTable
from hmdiff.names import METRICS

BandOf = Callable[[Tensor], Tensor]  # visible fractions (P,) -> number of the band (P,)
Number = dict[str, float]  # value, and perhaps low and high
_KINDS = ("first", "mean", "selected", "oracle")
SPREAD = "spread"


@dataclasses.dataclass(frozen=True)
class RowCells:
    """What is known of a row on one split: a cell of each seed that is trained, and its cost where it was measured."""

    row: TrainedRow
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
    kind: str = "mean",
    mask: Tensor | None = None,  # (P,) bool, whom it is about
) -> Number | None:
    """Mean over people and seeds, with its interval over people."""
    values = cells.values(metric, kind)
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
    kind: str = "mean",
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
        for name in ("split", "people", "seed"):
            first, second = (each.cells[seed]["settings"][name] for each in (cells, other))
            if first != second:
                raise UserError(f"rows to compare: {name} {first} and {second}; only the same people are paired")
    mine, theirs = cells.values(metric, kind, seeds), other.values(metric, kind, seeds)
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
    table: TrainedTable,
    rows: Sequence[RowCells],
    mode: str,
    columns: Sequence[TrainedColumn] | None = None,  # None: the table's
) -> tuple[list[str], list[list[str]]]:  # titles, and a line a row
    """The table as it is printed; "-" for what a row does not have."""
    shown = [column for column in columns or table.columns if mode in column.modes]
    by_label = {cells.row.label: cells for cells in rows}
    lines = [[cells.row.label, *(_text(column, cells, by_label) for column in shown)] for cells in rows]
    return ["", *(column.title for column in shown)], lines


def _text(column: TrainedColumn, cells: RowCells, rows: Mapping[str, RowCells]) -> str:
    if column.value == "seeds":
        return str(len(cells.cells))
    if column.value == "correlation":
        found = correlation_of(cells)
        return "-" if found is None else f"{found:.{column.digits}f}"
    if column.value in ("parameters", "milliseconds", "step_milliseconds"):
        if cells.cost is None:
            return "-"
        value = cells.cost[column.value]
        return f"{value:,.0f}" if column.value == "parameters" else f"{value:.{column.digits}f}"
    if column.against is None:
        return interval_text(mean_of(cells, column.value, column.kind), column.digits)
    apart = difference_of(cells, _other(cells.row, rows, column.against), column.value, column.kind)
    if apart is None:
        return "-"
    if column.by_seed:
        return " ".join(f"{100 * value:+.{column.digits}f}" for value in apart.by_seed.values())
    return difference_text(apart.relative, column.digits, 100)


def _other(row: TrainedRow, rows: Mapping[str, RowCells], against: str) -> RowCells | None:
    label = getattr(row, against)
    return None if label is None else rows.get(label)


def correlation_of(cells: RowCells, which: str = "pooled") -> float | None:
    """Mean over the seeds of the rank correlation of the model's uncertainty and its error."""
    found = [cell["correlation"][which][0] for cell in cells.cells.values() if "correlation" in cell]
    return statistics.fmean(found) if found else None


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
    mode: str,
    bands: Sequence[str] = (),  # lines of these too
    band: BandOf = band_of,
) -> Iterator[dict[str, Any]]:
    """Every number: a line for each row and, where bands are asked for, for each row and band."""
    by_label = {cells.row.label: cells for cells in rows}
    for cells in rows:
        for number, label in ((None, "all"), *enumerate(bands)):
            if not cells.cells:
                continue
            mask = None if number is None else cells.mask(number, band)
            line: dict[str, Any] = {
                "table": name,
                "split": split,
                "band": label,
                "row": cells.row.label,
                "mode": mode,
                "reference": cells.row.reference or "",
                "builds_on": cells.row.builds_on or "",
                "seeds": " ".join(map(str, sorted(cells.cells))),
            }
            first = next(iter(cells.cells.values()))["settings"]
            line["people"] = first["people"] if mask is None else int(mask.sum())
            line |= {key: first[key] for key in ("num_hypotheses", "steps")}
            for metric in (*METRICS, SPREAD):
                for kind in _KINDS if metric != SPREAD else ("mean",):
                    title = metric if metric == SPREAD else f"{metric}_{kind}"
                    _put(line, title, mean_of(cells, metric, kind, mask))
                    for against in ("reference", "builds_on"):
                        apart = difference_of(cells, _other(cells.row, by_label, against), metric, kind, mask)
                        if apart is None:
                            continue
                        _put(line, f"{title}_difference_{against}", apart.absolute)
                        _put(line, f"{title}_share_{against}", apart.relative)
                        for seed, value in apart.by_seed.items():
                            line[f"{title}_share_{against}_seed_{seed}"] = value
            if mask is None:
                for which in ("pooled", "within_joint", "by_person"):
                    found = correlation_of(cells, which)
                    if found is not None:
                        line[f"correlation_{which}"] = found
                line |= cells.cost or {}
            yield line


def _put(line: dict[str, Any], name: str, found: Number | None) -> None:
    if found is not None:
        line |= {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
