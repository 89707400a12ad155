"""Ablations that train their models, as data: a row is a label and overrides of one base config.

All rows of a table have the same budget and seeds, and so the same people and, apart from what a row adds, the same
noise. To add a comparison, add an entry to TRAINED. The rows of D2A-HMR (arXiv 2403.09063) and JOTR (arXiv 2307.16377)
follow the tables of those papers; sizes, weights, splits and label noise are our choice.
"""

from __future__ import annotations

from hmdiff.lab.ablations import Column, Comparison, Row

_COLUMNS = (
    Column("seeds", "seeds"),
    Column("PVE", "pve"),
    Column("% of ref.", "pve", against="reference", relative=True),
    Column("each seed", "pve", against="reference", by_seed=True),
    Column("PA-MPJPE", "pa_mpjpe"),
    Column("PVE oracle", "pve", "oracle", modes=("diffusion",)),
    Column("spread", "spread", modes=("diffusion",)),
)
_WITH_STEP = (
    *_COLUMNS[:4],
    Column("% of the row it adds to", "pve", against="builds_on", relative=True),
    *_COLUMNS[4:],
)
_WITH_CONFIDENCE = (*_COLUMNS, Column("rank corr.", "correlation", digits=2))
COSTS = (
    Column("parameters", "parameters"),
    Column("ms/image", "milliseconds"),
    Column("ms/training step", "step_milliseconds"),
)

_DEGRADED = ("model.depth_map=true",)  # as from a depth estimator: with the data's default corruption
_DEPTH = (*_DEGRADED, "data.depth_faults.none=true")  # as rendered
# composite: the variant with a meaningful sigma
_RLE = ("model.rle=[joints,vertices]", "model.rle_variant=composite", "loss.rle=0.1")
_SILHOUETTE = ("model.silhouette=true", "loss.silhouette=0.1")
_MASKED = ("model.masked=0.3",)  # as METRO: at most 30 % of the tokens
_NOISY = ("data.label_noise=0.05",)
_HEATMAPS = ("model.inputs=both",)
_LIFTING = ("model.lifting=true", "loss.estimates=0.5")
_CONTRAST = ("loss.joint_contrast=0.1", "loss.non_joint_contrast=0.1")  # JOTR's; two thirds of the loss here
_HEATMAP_VOLUME = (*_LIFTING, "model.volume_width=32", "model.volume_size=6", "model.volume_exponent=1.0")
_JOTR_K = ("model.volume_exponent=3.0",)
_LESS_CONTRAST = ("loss.joint_contrast=0.01", "loss.non_joint_contrast=0.01")  # about a fifth of the loss

TRAINED: dict[str, Comparison] = {
    "depth_rle": Comparison(
        "depth x distribution (D2A-HMR's first ablation)",
        base="ablate_d2a",
        rows=(
            Row("neither"),
            Row("depth", _DEPTH, "neither"),
            Row("RLE", _RLE, "neither"),
            Row("both", _DEPTH + _RLE, "neither"),
        ),
        splits=("test", "test_occluded", "test_ood"),
        columns=_WITH_CONFIDENCE,
        note="depth is rendered, without faults; rank corr.: Spearman's of RLE's sigma and the error, over joints",
    ),
    "silhouette_masked": Comparison(
        "silhouette x masked modelling (D2A-HMR's second ablation)",
        base="ablate_d2a",
        rows=(
            Row("neither"),
            Row("silhouette", _SILHOUETTE, "neither"),
            Row("masked", _MASKED, "neither"),
            Row("both", _SILHOUETTE + _MASKED, "neither"),
        ),
        splits=("test", "test_occluded"),
        columns=_COLUMNS,
    ),
    "out_of_distribution": Comparison(
        "trained on the ordinary split, tested elsewhere",
        base="ablate_d2a",
        rows=(
            Row("plain"),
            Row("RLE", _RLE, "plain"),
            Row("plain, noisy labels", _NOISY, "plain"),
            Row("RLE, noisy labels", _RLE + _NOISY, "plain, noisy labels"),
        ),
        splits=("test", "test_ood", "test_blur"),
        columns=_WITH_CONFIDENCE,
        note="noisy labels: those of the training, displaced by 50 mm; the tests' are true",
    ),
    "rendered_depth": Comparison(
        "depth as rendered, and as an estimator would give it",
        base="ablate_d2a",
        rows=(
            Row("no depth"),
            Row("rendered", _DEPTH, "no depth"),
            Row("degraded", _DEGRADED, "no depth"),
            Row(
                "rendered, tested degraded", _DEPTH, "no depth", evaluation_overrides=("data.depth_faults.none=false",)
            ),
            Row(
                "degraded, tested rendered",
                _DEGRADED,
                "no depth",
                evaluation_overrides=("data.depth_faults.none=true",),
            ),
        ),
        splits=("test", "test_ood"),
        columns=_COLUMNS,
    ),
    "occlusion": Comparison(
        "2D-3D fusion and contrast under occlusion (JOTR)",
        base="ablate_jotr",
        rows=(
            Row("plain"),
            Row("+ heatmaps", _HEATMAPS, "plain"),
            Row("+ lifting", _HEATMAPS + _LIFTING, "plain", "+ heatmaps"),
            Row("+ contrast", _HEATMAPS + _LIFTING + _CONTRAST, "plain", "+ lifting"),
            Row("+ contrast, a tenth", _HEATMAPS + _LIFTING + _LESS_CONTRAST, "plain", "+ lifting"),
        ),
        splits=("test", "test_occluded"),
        columns=_WITH_STEP,
        by_visibility=True,
    ),
    "lifting": Comparison(
        "JOTR's parts under occlusion, added to a trained model: a volume of the heatmaps at z^k, contrast",
        base="ablate_d2a_trained",
        rows=(
            Row("plain"),
            Row("lifting", _HEATMAP_VOLUME, "plain"),
            Row("lifting, k = 3", _HEATMAP_VOLUME + _JOTR_K, "plain", "lifting"),
            Row("+ contrast, a tenth", _HEATMAP_VOLUME + _LESS_CONTRAST, "plain", "lifting"),
        ),
        splits=("test", "test_occluded"),
        columns=_WITH_STEP,
        by_visibility=True,
        note="no pictures: the heatmaps are what is lifted; k = 1 at the start but where a row says 3, JOTR's",
    ),
    "recorded_depth": Comparison(
        "recorded people with and without their depth maps (D2A-HMR)",
        base="ablate_d2a_trained",
        rows=(Row("no depth"), Row("depth", _DEGRADED, "no depth")),
        splits=("val",),
        columns=_COLUMNS,
        note="of --set data.kind=recorded data.map_size=64 data.sources=[...] data.splits.val=...",
    ),
}
