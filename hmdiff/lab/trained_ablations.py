"""Ablations whose models are trained for the table, as data: a row is a label and values over one base config.

All rows of a table have one budget and the same seeds, so that they see the same people and, but for what they add, the
same noise. A new comparison is a new entry of TRAINED. The rows of D2A-HMR (arXiv 2403.09063) and JOTR (arXiv
2307.16377) follow their papers' tables; sizes, weights, splits and the noise of labels are ours.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmdiff.config import Config, load_config
from hmdiff.errors import UserError
from hmdiff.evaluate.store import digest
from hmdiff.files.resources import config_path

MODES = ("diffusion", "direct")
_MAY_DIFFER = ("model.", "loss.", "data.")  # what a row may change: neither its budget nor its seed
# What makes a run another one, beside its budget and its seed; the number of drawing processes changes nothing.
_WHAT = ("body", "model", "diffusion", "data", "loss")
_SAME_DATA = ("workers",)
BUDGET = (
    "steps",
    "batch_size",
    "gradient_accumulation",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "gradient_clip",
    "ema_decay",
    "mixed_precision",
    "start_from",
)


@dataclasses.dataclass(frozen=True)
class TrainedRow:
    label: str
    overrides: tuple[str, ...] = ()  # key=value over the base: what this row's model is
    reference: str | None = None  # label of the row that it is compared with
    builds_on: str | None = None  # label of the row that it adds one part to, where that is another
    tested: tuple[str, ...] = ()  # data.key=value of its evaluation alone


@dataclasses.dataclass(frozen=True)
class TrainedColumn:
    title: str
    value: str  # a metric, "seeds", "spread", "correlation", "parameters", "milliseconds", "step_milliseconds"
    against: str | None = None  # "reference" or "builds_on": the paired difference to it, in percent of its error
    by_seed: bool = False  # of the difference: that of every seed
    kind: str = "mean"
    modes: tuple[str, ...] = MODES  # of the models that have it
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class TrainedTable:
    title: str
    base: str  # a config's file, or the name of a shipped one
    rows: tuple[TrainedRow, ...]
    splits: tuple[str, ...] = ("test",)  # SPLIT_blur: with motion blur
    columns: tuple[TrainedColumn, ...] = ()
    banded: bool = False  # also by the share of the body that is visible
    note: str = ""


_COLUMNS = (
    TrainedColumn("seeds", "seeds"),
    TrainedColumn("PVE", "pve"),
    TrainedColumn("% of ref.", "pve", "reference"),
    TrainedColumn("each seed", "pve", "reference", by_seed=True),
    TrainedColumn("PA-MPJPE", "pa_mpjpe"),
    TrainedColumn("PVE oracle", "pve", kind="oracle", modes=("diffusion",)),
    TrainedColumn("spread", "spread", modes=("diffusion",)),
)
_WITH_STEP = (*_COLUMNS[:4], TrainedColumn("% of the row it adds to", "pve", "builds_on"), *_COLUMNS[4:])
_WITH_CONFIDENCE = (*_COLUMNS, TrainedColumn("rank corr.", "correlation", digits=2))
COSTS = (
    TrainedColumn("parameters", "parameters"),
    TrainedColumn("ms/image", "milliseconds"),
    TrainedColumn("ms/training step", "step_milliseconds"),
)

_DEGRADED = ("model.depth_map=true",)  # as an estimator would give it: the faults that the data has by itself
_DEPTH = (*_DEGRADED, "data.depth_faults.none=true")  # as rendered
# composite: the variant whose sigma means something
_RLE = ("model.rle=[joints,vertices]", "model.rle_variant=composite", "loss.rle=0.1")
_SILHOUETTE = ("model.silhouette=true", "loss.silhouette=0.1")
_MASKED = ("model.masked=0.3",)  # as METRO's: at most 30 % of the tokens
_NOISY = ("data.label_noise=0.05",)
_HEATMAPS = ("model.inputs=both",)
_LIFTING = ("model.lifting=true", "loss.estimates=0.5")
_CONTRAST = ("loss.joint_contrast=0.1", "loss.non_joint_contrast=0.1")  # JOTR's weights; here two thirds of the loss
_HEATMAP_VOLUME = (*_LIFTING, "model.volume_width=32", "model.volume_size=6", "model.volume_exponent=1.0")
_JOTR_K = ("model.volume_exponent=3.0",)
_LESS_CONTRAST = ("loss.joint_contrast=0.01", "loss.non_joint_contrast=0.01")  # about a fifth

TRAINED: dict[str, TrainedTable] = {
    "depth_rle": TrainedTable(
        "depth x distribution (D2A-HMR's first ablation)",
        "ablate_d2a",
        (
            TrainedRow("neither"),
            TrainedRow("depth", _DEPTH, "neither"),
            TrainedRow("RLE", _RLE, "neither"),
            TrainedRow("both", _DEPTH + _RLE, "neither"),
        ),
        ("test", "test_occluded", "test_ood"),
        _WITH_CONFIDENCE,
        note="depth is rendered, without faults; rank corr.: Spearman's of RLE's sigma and the error, over joints",
    ),
    "silhouette_masked": TrainedTable(
        "silhouette x masked modelling (D2A-HMR's second ablation)",
        "ablate_d2a",
        (
            TrainedRow("neither"),
            TrainedRow("silhouette", _SILHOUETTE, "neither"),
            TrainedRow("masked", _MASKED, "neither"),
            TrainedRow("both", _SILHOUETTE + _MASKED, "neither"),
        ),
        ("test", "test_occluded"),
        _COLUMNS,
    ),
    "out_of_distribution": TrainedTable(
        "trained on the ordinary split, tested elsewhere",
        "ablate_d2a",
        (
            TrainedRow("plain"),
            TrainedRow("RLE", _RLE, "plain"),
            TrainedRow("plain, noisy labels", _NOISY, "plain"),
            TrainedRow("RLE, noisy labels", _RLE + _NOISY, "plain, noisy labels"),
        ),
        ("test", "test_ood", "test_blur"),
        _WITH_CONFIDENCE,
        note="noisy labels: those of the training, displaced by 50 mm; the tests' are true",
    ),
    "rendered_depth": TrainedTable(
        "depth as rendered, and as an estimator would give it",
        "ablate_d2a",
        (
            TrainedRow("no depth"),
            TrainedRow("rendered", _DEPTH, "no depth"),
            TrainedRow("degraded", _DEGRADED, "no depth"),
            TrainedRow("rendered, tested degraded", _DEPTH, "no depth", tested=("data.depth_faults.none=false",)),
            TrainedRow("degraded, tested rendered", _DEGRADED, "no depth", tested=("data.depth_faults.none=true",)),
        ),
        ("test", "test_ood"),
        _COLUMNS,
    ),
    "occlusion": TrainedTable(
        "2D-3D fusion and contrast under occlusion (JOTR)",
        "ablate_jotr",
        (
            TrainedRow("plain"),
            TrainedRow("+ heatmaps", _HEATMAPS, "plain"),
            TrainedRow("+ lifting", _HEATMAPS + _LIFTING, "plain", "+ heatmaps"),
            TrainedRow("+ contrast", _HEATMAPS + _LIFTING + _CONTRAST, "plain", "+ lifting"),
            TrainedRow("+ contrast, a tenth", _HEATMAPS + _LIFTING + _LESS_CONTRAST, "plain", "+ lifting"),
        ),
        ("test", "test_occluded"),
        _WITH_STEP,
        banded=True,
    ),
    "lifting": TrainedTable(
        "JOTR's parts under occlusion, added to a trained model: a volume of the heatmaps at z^k, contrast",
        "ablate_d2a_trained",
        (
            TrainedRow("plain"),
            TrainedRow("lifting", _HEATMAP_VOLUME, "plain"),
            TrainedRow("lifting, k = 3", _HEATMAP_VOLUME + _JOTR_K, "plain", "lifting"),
            TrainedRow("+ contrast, a tenth", _HEATMAP_VOLUME + _LESS_CONTRAST, "plain", "lifting"),
        ),
        ("test", "test_occluded"),
        _WITH_STEP,
        banded=True,
        note="no pictures: the heatmaps are what is lifted; k = 1 at the start but where a row says 3, JOTR's",
    ),
    "recorded_depth": TrainedTable(
        "recorded people with and without their depth maps (D2A-HMR)",
        "ablate_d2a_trained",
        (TrainedRow("no depth"), TrainedRow("depth", _DEGRADED, "no depth")),
        ("val",),
        _COLUMNS,
        note="of --set data.kind=recorded data.map_size=64 data.sources=[...] data.splits.val=...",
    ),
}


def find_trained(name: str) -> TrainedTable:
    if name not in TRAINED:
        raise UserError(f"table {name!r} is not known; choose one of {', '.join(TRAINED)}")
    return TRAINED[name]


def check_table(name: str, table: TrainedTable) -> None:
    """A table that cannot mean what it says is refused: labels, references, and values that a row may not change."""
    labels = [row.label for row in table.rows]
    if len(set(labels)) < len(labels):
        raise UserError(f"table {name!r}: two rows have the same label")
    for row in table.rows:
        for other in (row.reference, row.builds_on):
            if other is not None and (other not in labels or other == row.label):
                raise UserError(f"table {name!r}, row {row.label!r}: there is no other row {other!r} to compare with")
        for text in row.overrides:
            if not text.startswith(_MAY_DIFFER):
                raise UserError(
                    f"table {name!r}, row {row.label!r}: {text!r} is not of the model, the loss or the data; the "
                    "budget and the seed are the same for all rows"
                )
        for text in row.tested:
            if not text.startswith("data."):
                raise UserError(f"table {name!r}, row {row.label!r}: {text!r} is not of the data that it is tested on")


def row_config(
    table: TrainedTable,
    row: TrainedRow,
    seed: int,
    mode: str = "direct",
    steps: int | None = None,  # of training; None: the base's
    changes: Sequence[str] = (),  # key=value for all rows, under the row's own
    base: str | None = None,  # another base config
) -> Config:
    """What is trained for a row, but for its folder. The warm-up keeps its share of the steps.

    Raises:
        UserError: a mode or a base that is not known; a value that no config has.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    path = base_path(base or table.base)
    plain = load_config(path, changes)
    total = steps or plain.training.steps
    warmup = min(plain.training.warmup_steps, max(1, total - 1))
    if steps is not None and not any(text.startswith("training.warmup_steps=") for text in changes):
        warmup = round(plain.training.warmup_steps * total / plain.training.steps)
    fixed = [
        f"model.mode={mode}",
        f"seed={seed}",
        f"training.steps={total}",
        f"training.warmup_steps={warmup}",
        # Everything that is looked at is looked at when all are trained.
        f"training.evaluate_every={total}",
        f"training.picture_every={total + 1}",
        "evaluation.test_people=0",
    ]
    return load_config(path, [*changes, *fixed, *row.overrides])


def base_path(name: str) -> Path:
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    try:
        return config_path(path.stem + ".yaml")
    except UserError:
        return config_path("quickstart.yaml").with_name(path.stem + ".yaml")  # load_config names the nearest there is


def essence(config: Config) -> dict[str, Any]:
    """What a run is, without its budget, seed and place: the values that are not the defaults.

    So a new entry of the config, which is off by default, leaves the runs of yesterday what they were.
    """
    plain, found = Config(), {}
    for name in _WHAT:
        value, usual = getattr(config, name), getattr(plain, name)
        if isinstance(value, dict) or not dataclasses.is_dataclass(value):
            if value != usual:
                found[name] = value
            continue
        for field in dataclasses.fields(value):
            mine = getattr(value, field.name)
            if mine != getattr(usual, field.name) and not (name == "data" and field.name in _SAME_DATA):
                found[f"{name}.{field.name}"] = mine
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def budget(config: Config) -> dict[str, Any]:
    return {name: getattr(config.training, name) for name in BUDGET}


def run_name(config: Config, overrides: Sequence[str]) -> str:
    """The folder of a config's runs: the same for rows of several tables that are the same model."""
    told = sorted(text for text in overrides if not text.startswith("loss."))
    words = [re.sub(r"[^a-z0-9]+", "-", text.split(".", 1)[-1].lower()).strip("-") for text in told]
    words = [word.removesuffix("-true") for word in words]
    return "_".join([str(config.model["mode"]), *(words or ["base"]), digest(essence(config))])
