"""Plots of a sweep: error against steps and against milliseconds, with a labelled Pareto front. Our choice.

matplotlib is imported lazily and needs no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmdiff.files.storage import atomic_file
from hmdiff.lab.comparison import UNGUIDED, difference, pareto_front
from hmdiff.names import METRICS

ECE = "calibration"
RESOLUTION = 130  # dpi
_UNGUIDED = "unguided"
_MARKERS = "osD^vP*Xph"
_NAMES = {
    "first": "{} of the first hypothesis, mm",
    "mean": "{} of the mean, mm",
    "selected": "{} of the selected hypothesis, mm",
    "oracle": "{} of the best hypothesis (oracle), mm",
    ECE: "expected calibration error",
}


def plot_sweep(
    results: Sequence[dict[str, Any]],  # cells of `sweep.run_cells`
    path: str | Path,  # .png, .svg or .pdf
    metric: str = "pve",
    kinds: Sequence[str] = ("mean", "oracle", ECE),  # one row of plots each; kinds that no cell has are left out
    reference: dict[str, Any] | None = None,  # for paired error bars; None: no bars
    title: str = "",
) -> None:
    """Rows: kinds of error. Left: against steps. Right: against milliseconds per image, with the Pareto front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in kinds if any(error_of(result, metric, kind) is not None for result in results)]
    figure = Figure(figsize=(12, 3.6 * len(kinds) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    series = group_series(results)
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharey="row")
    for row, kind in zip(panels, kinds, strict=True):
        for number, (name, cells) in enumerate(series.items()):
            shown = [result for result in cells if error_of(result, metric, kind) is not None]
            style: dict[str, Any] = {
                "color": f"C{number % 10}",
                "marker": _MARKERS[number % len(_MARKERS)],
                "markersize": 5,
                "linewidth": 1.2,
                "capsize": 2,
                "elinewidth": 0.8,
            }
            errors = [error_of(result, metric, kind) for result in shown]
            bars = _error_bars(shown, reference, metric, kind)
            steps = [result["settings"]["steps"] for result in shown]
            row[0].errorbar(steps, errors, bars, label=name, **style)
            row[1].errorbar(_milliseconds(shown), errors, **{**style, "linestyle": ":"})
        _draw_front(row[1], results, metric, kind)
        _mark_reference(row, reference, metric, kind)
        row[0].set_ylabel(_NAMES[kind].format(METRICS[metric]))
        for axis in row:
            axis.set_xscale("log")
            axis.grid(True, which="both", alpha=0.25)
            axis.margins(x=0.08, y=0.14)
    every = sorted({result["settings"]["steps"] for result in results})
    for row in panels:
        row[0].set_xticks(every, [str(step) for step in every])
        row[0].minorticks_off()
        row[1].xaxis.set_major_formatter("{x:g}")
        row[1].xaxis.set_minor_formatter(_minor_tick_label)
    panels[0][1].set_title("grey: the Pareto front, labelled with its steps", fontsize=9)
    panels[-1][0].set_xlabel("denoising steps")
    panels[-1][1].set_xlabel(_time_label(results))
    handles, names = panels[0][0].get_legend_handles_labels()
    columns = max(1, min(4, len(names), 150 // (max(map(len, names)) + 8)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9)
    first = results[0]["settings"]
    note = f"{first['split']}, {first['people']} people"
    if reference is not None:
        note += "; bars: 95 % interval of the paired difference to the ringed cell"
    figure.suptitle(f"{title}\n{note}".strip(), fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=RESOLUTION)


def error_of(result: dict[str, Any], metric: str, kind: str) -> float | None:
    """The value on the vertical axis; None if the cell has no such error."""
    if kind == ECE:
        return result.get("expected_calibration_error")
    found = result["errors"][metric].get(kind)
    return None if found is None else found["value"]


def group_series(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group cells that differ only in their steps, sorted by steps. Keys name the settings that vary between groups."""
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(_setting_labels(result["settings"]).items()), []).append(result)
    all_labels = [dict(key) for key in groups]
    guided_labels = [labels for labels in all_labels if labels["mode"] != _UNGUIDED]
    names = list(dict.fromkeys(name for labels in all_labels for name in labels))
    # Guidance settings distinguish only the guided series; the mode separates those from the rest.
    candidates = {
        name: all_labels if name in ("model", "sampler", "eta", "N", "mode") else guided_labels for name in names
    }
    varying = [name for name in names if len({labels.get(name) for labels in candidates[name]}) > 1] or [
        "model",
        "sampler",
    ]
    return {
        ", ".join(value for name, value in key if name in varying): sorted(cells, key=lambda r: r["settings"]["steps"])
        for key, cells in groups.items()
    }


def _setting_labels(settings: dict[str, Any]) -> dict[str, str]:
    labels = {"model": settings["model"], "sampler": settings["sampler"]}
    if settings["eta"]:
        labels["eta"] = f"eta {settings['eta']:g}"
    labels["N"] = f"N {settings['num_hypotheses']}"
    guidance = settings["guidance"] or {"mode": UNGUIDED}
    labels["mode"] = _UNGUIDED if guidance["mode"] == UNGUIDED else guidance["mode"]
    for name, value in guidance.items():
        if name != "mode" and value is not None:
            labels[name] = f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
    return labels


def _milliseconds(results: Sequence[dict[str, Any]]) -> list[float]:
    return [result["time"]["milliseconds_per_image"] for result in results]


def _error_bars(
    results: Sequence[dict[str, Any]], reference: dict[str, Any] | None, metric: str, kind: str
) -> list[list[float]] | None:
    if reference is None or kind not in reference["values"][metric]:
        return None
    found = [difference(result, reference, metric, kind) for result in results]
    return [[each["value"] - each["low"] for each in found], [each["high"] - each["value"] for each in found]]


def _draw_front(axis: Any, results: Sequence[dict[str, Any]], metric: str, kind: str) -> None:
    shown = [result for result in results if error_of(result, metric, kind) is not None]
    points = [
        (milliseconds, error_of(result, metric, kind) or 0.0)
        for milliseconds, result in zip(_milliseconds(shown), shown, strict=True)
    ]
    front = pareto_front(points)
    line = {"color": "black", "alpha": 0.3, "zorder": 1, "marker": "o", "markersize": 11, "linewidth": 2.5}
    axis.plot(*zip(*[points[i] for i in front], strict=True), **line)
    names = {id(cell): number for number, cells in enumerate(group_series(results).values()) for cell in cells}
    for place, i in enumerate(front):  # alternate labels go above their points, since neighbours may be close
        steps = shown[i]["settings"]["steps"]
        axis.annotate(
            f"{steps} step{'' if steps == 1 else 's'}",
            points[i],
            xytext=(0, 9 if place % 2 else -16),
            ha="center",
            textcoords="offset points",
            fontsize=8,
            color=f"C{names[id(shown[i])] % 10}",
        )


def _mark_reference(row: Any, reference: dict[str, Any] | None, metric: str, kind: str) -> None:
    if reference is None or (error := error_of(reference, metric, kind)) is None:
        return
    for axis, place in zip(row, (reference["settings"]["steps"], *_milliseconds([reference])), strict=True):
        axis.plot([place], [error], "o", markersize=12, markerfacecolor="none", markeredgecolor="black")


def _time_label(results: Sequence[dict[str, Any]]) -> str:
    time = results[0]["time"]
    on = time["device"] if time["device"] != "cpu" else f"{time['threads']} processor thread(s)"
    return f"milliseconds an image, on {on} (median of calls)"


def _minor_tick_label(value: float, _: int) -> str:
    """Label a log axis's minor ticks only at 2 and 5 of each decade."""
    digit = int(f"{value:e}"[0])
    return f"{value:g}" if digit in (2, 5) else ""
