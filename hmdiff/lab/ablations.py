"""The tables of the paper as data: rows of settings, columns of errors. A new comparison is a new entry of TABLES.

HMDiff (arXiv 2308.13369) compares diffusion with two baselines without it, A = the same network in one step from a
constant and B = the same stacked; and sampling without DAT, with the gap at x_k ("disrupted") and with DAT. The numbers
of steps and of hypotheses are ours, the latter those that the literature reports. All on our own splits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.hypothesis_rows import COUNTS
from hmdiff.evaluate.table import difference_text, interval_text
from hmdiff.lab.comparison import UNGUIDED, difference, table_row
from hmdiff.lab.sweep import Setting
from hmdiff.names import METRICS

if TYPE_CHECKING:
    from hmdiff.diffusion.guidance import Guidance

# What a row's model is to the tables: an option of `hmdiff ablate` each.
ROLES = {
    "checkpoint": "the diffusion model",
    "direct": "baseline A: the same network in one step",
    "stacked": "baseline B: the same network stacked",
}
Guide = Callable[[str], "Guidance | None"]  # mode -> guidance with the strength and threshold asked for


@dataclasses.dataclass(frozen=True)
class Row:
    label: str
    kind: str = "mean"  # of the columns that name none
    role: str = "checkpoint"
    num_hypotheses: int | None = None  # None: as asked for
    steps: int | None = None  # None: as asked for
    mode: str = UNGUIDED
    reference: str | None = None  # label of the row that it is compared with


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    value: str  # a metric, "ece", "coverage", "milliseconds", or what guidance tells
    kind: str | None = None  # of a metric; None: the row's
    paired: bool = False  # the paired difference to the row's reference instead
    scale: float = 1.0
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    note: str = ""


_ERRORS = tuple(Column(title, metric) for metric, title in METRICS.items())
_CALIBRATION = (Column("ECE", "ece", digits=2), Column("cover .9", "coverage", digits=2))
_TIME = Column("ms/image", "milliseconds")
_DAT_STEPS = (5, 10, 20, 40)

TABLES: dict[str, Comparison] = {
    "diffusion": Comparison(
        "diffusion against the same network without it",
        (
            Row("A: one step", role="direct"),
            Row("B: stacked", role="stacked", reference="A: one step"),
            *(
                Row(f"diffusion, {kind}", kind, reference="A: one step")
                for kind in ("first", "mean", "selected", "oracle")
            ),
        ),
        (*_ERRORS, Column("PVE - A's", "pve", paired=True), _TIME),
        "oracle: the best of the hypotheses, which needs the ground truth; compare the mean, or the selected one",
    ),
    "dat": Comparison(
        "no guidance, disrupted, DAT",
        tuple(
            Row(
                f"{mode}, {steps}",
                steps=steps,
                mode=mode,
                reference=None if mode == UNGUIDED else f"{UNGUIDED}, {steps}",
            )
            for steps in _DAT_STEPS
            for mode in (UNGUIDED, "disrupted", "dat")
        ),
        (
            Column("PVE mean", "pve"),
            Column("- none's", "pve", paired=True),
            Column("PA-MPJPE mean", "pa_mpjpe"),
            Column("PVE oracle", "pve", "oracle"),
            Column("ECE", "ece", digits=2),
            Column("gap before", "gap_before", digits=3),
            Column("after", "gap_after", digits=3),
            Column("on %", "active", scale=100, digits=0),
            Column("back %", "fell_back", scale=100, digits=0),
            _TIME,
        ),
        "rows: mode, steps; on: share of the steps with guidance on; back: share of the hypotheses that fell back",
    ),
    "hypotheses": Comparison(
        "how many hypotheses",
        tuple(Row(f"N = {count}", num_hypotheses=count) for count in COUNTS),
        (
            *(Column(f"PVE {kind}", "pve", kind) for kind in ("oracle", "mean", "selected")),
            *(Column(f"PA-MPJPE {kind}", "pa_mpjpe", kind) for kind in ("oracle", "mean", "selected")),
            *_CALIBRATION,
        ),
        "the first N of the same hypotheses; few hypotheses bias the ECE upwards",
    ),
}


def find_table(name: str) -> Comparison:
    if name not in TABLES:
        raise UserError(f"table {name!r} is not known; choose one of {', '.join(TABLES)}")
    return TABLES[name]


def rows_of(
    table: Comparison,
    roles: Mapping[str, str],  # role -> label of the model; a row whose role is not there is left out
) -> list[Row]:
    return [row for row in table.rows if row.role in roles]


def settings_of(
    rows: Sequence[Row],
    roles: Mapping[str, str],
    guide: Guide,
    sampling: SamplingConfig,  # where the rows do not say
) -> list[Setting]:
    """A cell for each row; `guide` gives the guidance of a row's mode."""
    return [
        Setting(
            roles[row.role],
            sampling.but(
                num_hypotheses=row.num_hypotheses or sampling.num_hypotheses,
                num_inference_steps=row.steps or sampling.num_inference_steps,
                guidance=None if row.mode == UNGUIDED else guide(row.mode),
            ),
        )
        for row in rows
    ]


def texts(
    table: Comparison,
    rows: Sequence[Row],
    results: Sequence[dict[str, Any]],  # one a row
) -> list[list[str]]:
    """The table as it is printed: value and 95 % interval; "-" for what a row does not have."""
    references = _references(rows, results)
    return [
        [row.label, *(_text(column, row, result, references[i]) for column in table.columns)]
        for i, (row, result) in enumerate(zip(rows, results, strict=True))
    ]


def csv_rows(name: str, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with every number of its cells, and the paired differences of each row's kind to its reference's."""
    lines = []
    for row, result, found in zip(rows, results, _references(rows, results), strict=True):
        line: dict[str, Any] = {"table": name, "row": row.label, "kind": row.kind, "reference": row.reference or ""}
        if found is not None:
            for metric in METRICS:
                each = _paired(metric, row.kind, row, result, found)
                if each is not None:
                    name_of = f"{metric}_difference"
                    line |= {name_of: each["value"], f"{name_of}_low": each["low"], f"{name_of}_high": each["high"]}
        lines.append(line | table_row(result))
    return lines


Found = tuple[Row, dict[str, Any]]


def _references(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[Found | None]:
    by_label = {row.label: (row, result) for row, result in zip(rows, results, strict=True)}
    return [None if row.reference is None else by_label.get(row.reference) for row in rows]


def _paired(metric: str, kind: str, row: Row, result: dict[str, Any], found: Found) -> dict[str, float] | None:
    other, reference = found
    # A column that names its kind compares like with like; otherwise each row's own kind.
    other_kind = other.kind if kind == row.kind else kind
    if kind not in result["values"][metric] or other_kind not in reference["values"][metric]:
        return None
    return difference(result, reference, metric, kind, other_kind)


def _text(column: Column, row: Row, result: dict[str, Any], found: Found | None) -> str:
    kind = column.kind or row.kind
    value: dict[str, float] | None
    if column.value in METRICS:
        if column.paired:
            value = None if found is None else _paired(column.value, kind, row, result, found)
        else:
            value = result["errors"][column.value].get(kind)
    elif column.value == "ece":
        one = result.get("expected_calibration_error")
        value = None if one is None else {"value": one, **result["expected_calibration_error_interval"]}
    elif column.value == "coverage":
        value = result.get("coverage")
    elif column.value == "milliseconds":
        value = {"value": result["time"]["milliseconds_per_image"]}
    else:
        value = result.get("guidance", {}).get(column.value)
        if value is not None:
            value = {"value": value["value"]}
    write = difference_text if column.paired else interval_text
    return write(value, column.digits, column.scale)
