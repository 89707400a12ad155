"""The papers' tables as data: rows are models, columns are errors. To add a comparison, add an entry to TABLES.

HMDiff (arXiv 2308.13369) compares diffusion with two baselines without diffusion, A = the same network in one step from
a constant and B = the same network stacked; and it compares sampling without DAT, with the gap at x_k ("disrupted") and
with DAT. The step counts are our choice; the hypothesis counts are those common in the literature. All tables are
computed on our own splits. Tables whose models are trained for the comparison are in `trained_ablations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.hypothesis_rows import COUNTS
from hmdiff.lab.comparison import UNGUIDED
from hmdiff.lab.sweep import Setting
from hmdiff.names import METRICS

if TYPE_CHECKING:
    from hmdiff.diffusion.guidance import Guidance

# Roles of the given checkpoints; each is an option of `hmdiff ablate`.
ROLES = {
    "checkpoint": "the diffusion model",
    "direct": "baseline A: the same network in one step",
    "stacked": "baseline B: the same network stacked",
}
MODES = ("diffusion", "direct")
TRAINABLE_OVERRIDES = ("model.", "loss.", "data.")  # what a trained row may change: not its budget, not its seed
Guide = Callable[[str], "Guidance | None"]  # mode -> guidance with the requested strength and threshold


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and its sampling settings: either a given checkpoint, by role, or a model trained for the table."""

    label: str
    overrides: tuple[str, ...] = ()  # trained rows: key=value over the base config
    reference: str | None = None  # label of the row that this row is compared with
    builds_on: str | None = None  # label of the row that this row extends by one component, if different
    evaluation_overrides: tuple[str, ...] = ()  # trained rows: data.key=value that apply to evaluation only
    kind: str = "mean"  # hypothesis kind for columns that do not set one
    role: str = "checkpoint"  # given checkpoints: one of ROLES
    num_hypotheses: int | None = None  # given checkpoints; None: as requested
    steps: int | None = None  # given checkpoints; None: as requested
    mode: str = UNGUIDED  # given checkpoints: guidance mode


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    value: str  # a metric, "spread", "seeds", or a name known to `table_rows.number_of`
    kind: str | None = None  # hypothesis kind of a metric; None: the row's
    against: str | None = None  # "reference" or "builds_on": show the paired difference to that row instead
    relative: bool = False  # show the difference in percent of the other row's error
    by_seed: bool = False  # show the difference for each seed
    modes: tuple[str, ...] = MODES  # modes of the models that have this value
    scale: float = 1.0
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = ()
    note: str = ""
    base: str | None = None  # trained tables: a config file or the name of a shipped config
    splits: tuple[str, ...] = ("test",)  # trained tables; SPLIT_blur adds motion blur
    by_visibility: bool = False  # trained tables: also report errors by visibility bin


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
                Row(f"diffusion, {kind}", kind=kind, reference="A: one step")
                for kind in ("first", "mean", "selected", "oracle")
            ),
        ),
        (
            *(Column(title, metric) for metric, title in METRICS.items()),
            Column("PVE - A's", "pve", against="reference"),
            _TIME,
        ),
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
            Column("- none's", "pve", against="reference"),
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


def check_table(name: str, table: Comparison) -> None:
    """Raises `UserError` for duplicate labels, unknown references, or overrides that a row may not change."""
    labels = [row.label for row in table.rows]
    if len(set(labels)) < len(labels):
        raise UserError(f"table {name!r}: two rows have the same label")
    for row in table.rows:
        for other in (row.reference, row.builds_on):
            if other is not None and (other not in labels or other == row.label):
                raise UserError(f"table {name!r}, row {row.label!r}: there is no other row {other!r} to compare with")
        for text in row.overrides:
            if not text.startswith(TRAINABLE_OVERRIDES):
                raise UserError(
                    f"table {name!r}, row {row.label!r}: {text!r} is not of the model, the loss or the data; the "
                    "budget and the seed are the same for all rows"
                )
        for text in row.evaluation_overrides:
            if not text.startswith("data."):
                raise UserError(f"table {name!r}, row {row.label!r}: {text!r} is not of the data that it is tested on")


def settings_of(
    rows: Sequence[Row],
    roles: Mapping[str, str],  # role -> model label
    guide: Guide,
    sampling: SamplingConfig,  # defaults for what the rows leave open
) -> list[Setting]:
    """A cell setting for each row; `guide` builds the guidance of a row's mode."""
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
