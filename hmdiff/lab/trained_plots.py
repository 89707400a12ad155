"""Plots of an ablation: each row's difference to its reference, and errors by visibility bin. Our choice.

matplotlib is imported lazily and needs no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmdiff.evaluate.visibility_bins import VISIBILITY_BINS, visibility_bin
from hmdiff.files.storage import atomic_file
from hmdiff.lab.table_rows import SPREAD, RowCells, VisibilityBinning, difference_of, mean_of

RESOLUTION = 130  # dpi


def plot_differences(
    splits: Mapping[str, Sequence[RowCells]],  # split -> rows
    path: str | Path,  # .png, .svg or .pdf
    metric: str = "pve",
    title: str = "",
) -> bool:  # False: nothing to draw, no file written
    """One panel per split: the paired difference in percent with its interval, and a small dot for each seed."""
    panels: dict[str, list[tuple[str, Any]]] = {}
    for split, rows in splits.items():
        by_label = {cells.row.label: cells for cells in rows}
        for cells in rows:
            reference = cells.row.reference
            difference = None if reference is None else difference_of(cells, by_label.get(reference), metric)
            if difference is not None:
                panels.setdefault(split, []).append((f"{cells.row.label}\nagainst {reference}", difference))
    if not panels:
        return False
    most = max(map(len, panels.values()))
    figure = _figure(1.5 + 3.6 * len(panels), 1.4 + 0.55 * most)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (split, found) in zip(axes, panels.items(), strict=True):
        for place, (_, difference) in enumerate(found):
            low, value, high = (100 * difference.relative[name] for name in ("low", "value", "high"))
            axis.errorbar([value], [place], xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3)
            seeds = [100 * each for each in difference.by_seed.values()]
            axis.plot(seeds, [place + 0.22] * len(seeds), ".", color="0.5", markersize=5)
        axis.set_yticks(range(len(found)), [label for label, _ in found], fontsize=8)
        axis.set_ylim(most - 0.4, -0.6)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.grid(axis="x", alpha=0.25)
        axis.set_title(split, fontsize=10)
        axis.set_xlabel(f"{metric.upper().replace('_', '-')}, % of the reference's", fontsize=9)
    figure.suptitle(f"{title}\nbars: 95 % over people; grey: each seed".strip(), fontsize=10)
    _save(figure, path)
    return True


def plot_visibility_bins(
    splits: Mapping[str, Sequence[RowCells]],
    path: str | Path,
    metric: str = "pve",
    bins: Sequence[str] = VISIBILITY_BINS,
    bin_of: VisibilityBinning = visibility_bin,
    title: str = "",
) -> bool:
    """One column per split: error of the mean and, if stored, the spread, against the visible fraction."""
    splits = {split: [cells for cells in rows if cells.cells] for split, rows in splits.items()}
    splits = {split: rows for split, rows in splits.items() if rows}
    if not splits:
        return False
    every = [cells for rows in splits.values() for cells in rows]
    shown = [metric, SPREAD] if any(cells.values(SPREAD) is not None for cells in every) else [metric]
    figure = _figure(1 + 4.6 * len(splits), 1.2 + 3.2 * len(shown))
    panels = figure.subplots(len(shown), len(splits), squeeze=False, sharey="row")
    for line, what in zip(panels, shown, strict=True):
        for axis, (split, rows) in zip(line, splits.items(), strict=True):
            for number, cells in enumerate(rows):
                means = [mean_of(cells, what, "mean", cells.mask(n, bin_of)) for n in range(len(bins))]
                present = [(n, each) for n, each in enumerate(means) if each is not None]
                if not present:
                    continue
                # Offset rows horizontally, so that the intervals do not overlap.
                positions = [n + 0.07 * (number - (len(rows) - 1) / 2) for n, _ in present]
                values = [each["value"] for _, each in present]
                bars = [
                    [each["value"] - each["low"] for _, each in present],
                    [each["high"] - each["value"] for _, each in present],
                ]
                axis.errorbar(
                    positions,
                    values,
                    bars,
                    label=cells.row.label,
                    color=f"C{number % 10}",
                    marker="o",
                    markersize=4,
                    capsize=2,
                    linewidth=1.2,
                )
            counts = [int(rows[0].mask(n, bin_of).sum()) for n in range(len(bins))]
            axis.set_xticks(
                range(len(bins)), [f"{name}\n{count}" for name, count in zip(bins, counts, strict=True)], fontsize=8
            )
            axis.grid(alpha=0.25)
            axis.set_title(split, fontsize=10)
        line[0].set_ylabel("spread, mm" if what == SPREAD else f"{what.upper().replace('_', '-')} of the mean, mm")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{title}\nvisible part of the body, and people; bars: 95 % over people".strip(), fontsize=10)
    _save(figure, path)
    return True


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=RESOLUTION)
