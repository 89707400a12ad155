"""Errors and spread by visibility: in bins of the visible fraction of a person, and for hidden and visible vertices.

The visible fraction is the unoccluded share of the body's silhouette in the crop (`Sample.visible_fraction`). A vertex
is *visible* if it is inside the crop and nothing is in front of it, *hidden* if an occluder covers it or it is outside
the crop, and *turned away* if only the body itself is in front of it; such vertices are unseen but constrained, so they
are a separate group. The bins and groups are our choice.

Under a calibrated posterior the ground truth is as far from the samples' mean as the samples are. The spread of hidden
over visible vertices should therefore equal the same ratio of the mean mesh's errors. Both ratios are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hmdiff.data.sample import Sample
from hmdiff.errors import UserError
from hmdiff.evaluate.measured import Measured, interval
from hmdiff.evaluate.table import interval_text
from hmdiff.output import MeshOutput
from hmdiff.viz.renderer import rasterize, screen_points, visible_vertices

EDGES = (0.8, 0.6, 0.4)  # a fraction on an edge belongs to the bin below it
VISIBILITY_BINS = ("over 80 %", "60-80 %", "40-60 %", "under 40 %")
GROUPS = ("visible", "turned away", "hidden")  # of vertices
METRICS = ("pve", "pa_mpjpe")
_NO_SPREAD = 0.01  # mm: below, the hypotheses are equal up to rounding (one-step models), and ratios are meaningless
KINDS = ("first", "mean", "oracle")


def visibility_bin(
    visible_fraction: Tensor,  # (B,) 0..1
) -> Tensor:  # (B,) long, index into `VISIBILITY_BINS`
    """The visibility bin of each person; an edge (0.8, 0.6, 0.4) belongs to the bin below it.

    Raises:
        UserError: a fraction outside 0..1.
    """
    fraction = torch.as_tensor(visible_fraction, dtype=torch.float32)
    if not ((fraction >= 0) & (fraction <= 1)).all():
        worst = fraction[~((fraction >= 0) & (fraction <= 1))][0].item()
        raise UserError(f"visible fraction {worst:g}: a share from 0 to 1 is expected")
    return sum((fraction <= edge).long() for edge in EDGES) + torch.zeros_like(fraction, dtype=torch.long)


def vertex_groups(
    sample: Sample,  # of B people, with the full mesh and their camera
    faces: Tensor,  # (F, 3)
    size: int = 128,  # pixels, size of the rendering if the sample has no occlusion map
) -> Tensor:  # (B, V) long, index into `GROUPS`
    """The group of each ground truth vertex, by rendering. Without `sample.occlusion` there are no occluders."""
    vertices, pelvis, focal, principal = sample.vertices, sample.pelvis, sample.focal, sample.principal_point
    if vertices is None or pelvis is None or focal is None or principal is None:
        raise UserError("which vertices are visible: the people have no full mesh with a camera; build such data")
    occlusion = sample.occlusion
    if occlusion is not None:
        occlusion, size = occlusion.to(vertices.device) > 0.5, occlusion.shape[-1]
    faces = faces.to(vertices.device)
    groups = []
    for person in range(len(vertices)):  # one at a time to bound the memory
        one = slice(person, person + 1)
        camera_points = vertices[one] + pelvis[one, None]
        fragments = rasterize(camera_points, faces, focal[one], principal[one], size)
        visible = visible_vertices(fragments, camera_points, focal[one], principal[one])
        points, _ = screen_points(camera_points, focal[one], principal[one], size, size)
        # The same pixel as in `visible_vertices`.
        pixel = points.round().long()
        outside = ((points < -0.5) | (points >= size - 0.5)).any(-1)
        hidden = outside
        if occlusion is not None:
            column, row = pixel.clamp(0, size - 1).unbind(-1)
            hidden = outside | occlusion[one].flatten(1).gather(1, row * size + column)
        groups.append(torch.where(hidden, 2, torch.where(visible, 0, 1)))
    return torch.cat(groups)


class VisibilityCollector:
    """Callback for `measure(on_batch=...)` that collects visible fraction, spread and vertex groups."""

    def __init__(self) -> None:
        self._fractions: list[Tensor] = []
        self._spread: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._groups: list[Tensor] = []

    def __call__(self, sample: Sample, output: MeshOutput) -> None:
        if sample.visible_fraction is None:
            raise UserError(
                "bands of the visible fraction: these people do not carry one; give them pictures (data.pictures) or "
                "maps (data.map_size)"
            )
        self._fractions.append(sample.visible_fraction.detach().cpu())
        self._spread.append(output.spread.cpu())
        if sample.vertices is not None and sample.occlusion is not None:
            self._groups.append(vertex_groups(sample, output.faces).to("cpu", torch.int8))
            # Relative to the pelvis, as the spread.
            error = output.mean_vertices - sample.vertices.to(output.vertices.device)
            self._errors.append(error.norm(dim=-1).cpu() * 1000)

    @property
    def visible_fraction(self) -> Tensor:  # (P,)
        return torch.cat(self._fractions)

    @property
    def spread(self) -> Tensor:  # (P, V) mm
        return torch.cat(self._spread)

    @property
    def groups(self) -> Tensor | None:  # (P, V) int8, index into `GROUPS`; None unless known for all people
        return torch.cat(self._groups) if len(self._groups) == len(self._spread) and self._groups else None

    def report(self, measured: Measured) -> list[dict[str, Any]]:
        """One entry per bin, then one for all people."""
        groups = self.groups
        spread = None if groups is None else group_means(self.spread, groups)
        error = None if groups is None else group_means(torch.cat(self._errors), groups)
        return visibility_report(measured.errors, self.visible_fraction, self.spread.mean(-1), spread, error)


def group_means(
    values: Tensor,  # (P, V) mm, spread or error of the vertices
    groups: Tensor,  # (P, V) index into `GROUPS`
) -> Tensor:  # (P, 4) mm
    """Each person's mean over the vertices of each group, and, fourth, a reference for the hidden vertices.

    Limbs have more spread than the trunk, visible or not, so hidden and visible vertices of one person are not directly
    comparable. The reference is the mean over a person's hidden vertices of the average value of the same vertices in
    the people in whom they are visible. NaN if there is no such vertex.
    """
    columns = []
    for number in range(len(GROUPS)):
        mask = groups == number
        columns.append((values * mask).sum(-1) / mask.sum(-1))
    visible, hidden = groups == GROUPS.index("visible"), groups == GROUPS.index("hidden")
    mean_visible = (values * visible).sum(0) / visible.sum(0)  # (V,) NaN: never seen
    has_reference = hidden & mean_visible.isfinite()
    columns.append((mean_visible.nan_to_num() * has_reference).sum(-1) / has_reference.sum(-1))
    return torch.stack(columns, -1)


def visibility_report(
    errors: dict[str, dict[str, Tensor]],  # metric -> kind -> (P,) mm
    visible_fraction: Tensor,  # (P,)
    spread: Tensor,  # (P,) mm
    grouped_spread: Tensor | None = None,  # (P, 4) mm of `group_means`
    grouped_errors: Tensor | None = None,  # (P, 4) mm of `group_means`, of the mean mesh
) -> list[dict[str, Any]]:
    """For each bin and for all: number of people, errors, spread, relative gain of the oracle over the mean; JSON.

    Intervals are 95 % percentile bootstraps over people. An empty bin only has `people: 0`.
    """
    bin_index = visibility_bin(visible_fraction)
    everyone = torch.ones_like(bin_index, dtype=torch.bool)
    masks = [(name, bin_index == number) for number, name in enumerate(VISIBILITY_BINS)] + [("all", everyone)]
    return [
        _entry(name, mask, errors, visible_fraction, spread, grouped_spread, grouped_errors) for name, mask in masks
    ]


def _entry(
    name: str,
    mask: Tensor,  # (P,) bool
    errors: dict[str, dict[str, Tensor]],
    visible_fraction: Tensor,
    spread: Tensor,
    grouped_spread: Tensor | None,
    grouped_errors: Tensor | None,
) -> dict[str, Any]:
    entry: dict[str, Any] = {"band": name, "people": int(mask.sum())}
    if not entry["people"]:
        return entry
    entry["visible_fraction"] = float(visible_fraction[mask].mean())
    entry["errors"] = {
        metric: {kind: interval(errors[metric][kind][mask]) for kind in KINDS if kind in errors[metric]}
        for metric in METRICS
    }
    entry["spread"] = interval(spread[mask])
    pve = errors["pve"]
    entry["oracle_gain"] = ratio_interval((pve["mean"] - pve["oracle"])[mask], pve["mean"][mask])
    for grouped, section, prefix in ((grouped_spread, "spread_of", ""), (grouped_errors, "error_of", "error_")):
        if grouped is None:
            continue
        entry[section] = {}
        for number, group in enumerate(GROUPS):
            known = grouped[mask][:, number]
            known = known[known.isfinite()]
            entry[section][group] = interval(known) | {"people": len(known)} if len(known) else {"people": 0}
        for key, column in (("hidden_over_visible", GROUPS.index("visible")), ("hidden_over_same_vertices_visible", 3)):
            both = grouped[mask][:, [GROUPS.index("hidden"), column]]
            both = both[both.isfinite().all(-1)]
            if len(both) and both.mean() > _NO_SPREAD:
                entry[prefix + key] = ratio_interval(both[:, 0], both[:, 1]) | {"people": len(both)}
    return entry


def ratio_interval(
    numerator: Tensor,  # (P,)
    denominator: Tensor,  # (P,)
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Ratio of two means over the same people, with its 95 % percentile-bootstrap interval."""
    numerator, denominator = numerator.double(), denominator.double()
    generator = torch.Generator().manual_seed(seed)
    resamples = torch.randint(len(numerator), (samples, len(numerator)), generator=generator)
    ratios = numerator[resamples].sum(1) / denominator[resamples].sum(1)
    # A resample may be 0 / 0.
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return {"value": (numerator.sum() / denominator.sum()).item(), "low": low, "high": high}


COLUMNS = (
    "visible",
    "people",
    "hypothesis",
    "PVE",
    "PA-MPJPE",
    "spread",
    "of vertices",
    "hidden over visible",
    "in error",
)


def visibility_rows(report: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of a table with `COLUMNS`: three rows per bin, one for an empty bin."""
    rows = []
    for entry in report:
        name, people = entry["band"], str(entry["people"])
        if not entry["people"]:
            rows.append([name, people, *["-"] * (len(COLUMNS) - 2)])
            continue
        oracle_gain, groups = entry["oracle_gain"], entry.get("spread_of", {})
        oracle_text = f"oracle gains {100 * oracle_gain['value']:.0f} %"
        spread = {"first": interval_text(entry["spread"], 0), "mean": "", "oracle": oracle_text}
        group_cells, ratio_cells, error_ratio_cells = (dict.fromkeys(KINDS, "") for _ in range(3))
        for kind, group in zip(KINDS, GROUPS, strict=True):
            if groups.get(group, {}).get("people"):
                group_cells[kind] = f"{group} {interval_text(groups[group], 0)}"
        for kind, key, word in (
            ("first", "hidden_over_visible", "theirs"),
            ("mean", "hidden_over_same_vertices_visible", "the same"),
        ):
            for cells, prefix in ((ratio_cells, ""), (error_ratio_cells, "error_")):
                if prefix + key in entry:
                    cells[kind] = f"{word} {interval_text(entry[prefix + key], 2)}"
        for kind in KINDS:
            leading = [name, people] if kind == "first" else ["", ""]
            errors = [interval_text(entry["errors"][metric].get(kind), 0) for metric in METRICS]
            rows.append(
                [*leading, kind, *errors, spread[kind], group_cells[kind], ratio_cells[kind], error_ratio_cells[kind]]
            )
    return rows
