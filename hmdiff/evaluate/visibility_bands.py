"""Errors and spread in bands of how much of a person is visible, and both of hidden against visible vertices.

The visible fraction is the share of the body's silhouette in the crop that nothing covers (`Sample.visible_fraction`).
A vertex is *visible* when it is inside the crop with nothing in front of it, *hidden* when something in front of the
person covers it or the crop leaves it out, and *turned away* when only the body itself is in front of it: that one is
unseen but not unknown, so it counts as neither. Bands after JOTR's occlusion issue; the rest is our choice.

How much farther than visible vertices hidden ones should spread is not a matter of taste: the truth is as far from the
mean of the posterior's samples as they are, so the ratio of the spreads is to be that of the mean mesh's errors,
whatever that is. Both are reported.
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

EDGES = (0.8, 0.6, 0.4)  # a fraction on an edge belongs to the band below it: "over 80 %" is over
BANDS = ("over 80 %", "60-80 %", "40-60 %", "under 40 %")
GROUPS = ("visible", "turned away", "hidden")  # of vertices
METRICS = ("pve", "pa_mpjpe")
_NO_SPREAD = 0.01  # mm: a one-step model's hypotheses are one, up to rounding; nothing can be said of a ratio
KINDS = ("first", "mean", "oracle")


def band_of(
    visible_fraction: Tensor,  # (B,) 0..1
) -> Tensor:  # (B,) long: which of `BANDS`
    """The band of each person; an edge (0.8, 0.6, 0.4) is the upper end of the band below it.

    Raises:
        UserError: a fraction that is not one.
    """
    fraction = torch.as_tensor(visible_fraction, dtype=torch.float32)
    if not ((fraction >= 0) & (fraction <= 1)).all():
        worst = fraction[~((fraction >= 0) & (fraction <= 1))][0].item()
        raise UserError(f"visible fraction {worst:g}: a share from 0 to 1 is expected")
    return sum((fraction <= edge).long() for edge in EDGES) + torch.zeros_like(fraction, dtype=torch.long)


def vertex_groups(
    sample: Sample,  # of B people, with the full mesh and their camera
    faces: Tensor,  # (F, 3)
    size: int = 128,  # pixels a side of the drawing, where the sample has no map of what is in front
) -> Tensor:  # (B, V) long: which of `GROUPS` each true vertex is in
    """What can be seen of everybody's true mesh, by drawing it. Without `sample.occlusion` nothing is in front."""
    vertices, pelvis, focal, principal = sample.vertices, sample.pelvis, sample.focal, sample.principal_point
    if vertices is None or pelvis is None or focal is None or principal is None:
        raise UserError("which vertices are visible: the people have no full mesh with a camera; build such data")
    covered = sample.occlusion
    if covered is not None:
        covered, size = covered.to(vertices.device) > 0.5, covered.shape[-1]
    faces = faces.to(vertices.device)
    groups = []
    for person in range(len(vertices)):  # one at a time bounds the memory
        one = slice(person, person + 1)
        placed = vertices[one] + pelvis[one, None]
        drawn = rasterize(placed, faces, focal[one], principal[one], size)
        front = visible_vertices(drawn, placed, focal[one], principal[one])
        points, _ = screen_points(placed, focal[one], principal[one], size, size)
        # The pixel that `visible_vertices` looks at too.
        pixel = points.round().long()
        outside = ((points < -0.5) | (points >= size - 0.5)).any(-1)
        hidden = outside
        if covered is not None:
            column, row = pixel.clamp(0, size - 1).unbind(-1)
            hidden = outside | covered[one].flatten(1).gather(1, row * size + column)
        groups.append(torch.where(hidden, 2, torch.where(front, 0, 1)))
    return torch.cat(groups)


class BandWatch:
    """Looks on while people are measured, and remembers what the errors alone do not tell: `measure(observe=...)`."""

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
            # From the pelvis, as the spread is.
            wrong = output.mean_vertices - sample.vertices.to(output.vertices.device)
            self._errors.append(wrong.norm(dim=-1).cpu() * 1000)

    @property
    def visible_fraction(self) -> Tensor:  # (P,)
        return torch.cat(self._fractions)

    @property
    def spread(self) -> Tensor:  # (P, V) mm
        return torch.cat(self._spread)

    @property
    def groups(self) -> Tensor | None:  # (P, V) int8, which of `GROUPS`; None where it is not known of everybody
        return torch.cat(self._groups) if len(self._groups) == len(self._spread) and self._groups else None

    def report(self, measured: Measured) -> list[dict[str, Any]]:
        """One entry a band, then one of everybody."""
        groups = self.groups
        spread = None if groups is None else group_means(self.spread, groups)
        wrong = None if groups is None else group_means(torch.cat(self._errors), groups)
        return band_report(measured.errors, self.visible_fraction, self.spread.mean(-1), spread, wrong)


def group_means(
    values: Tensor,  # (P, V) mm, the vertices' spread or error
    groups: Tensor,  # (P, V) which of `GROUPS`
) -> Tensor:  # (P, 4) mm
    """Each person's mean over the vertices of each group, and fourth, what their hidden vertices would have had.

    Limbs spread more than the trunk, seen or not, so hidden and visible vertices of one person differ in what they
    are. The fourth number is fair: the mean over a person's hidden vertices of what the same vertices have where they
    are visible, on the average of all people. NaN where there is no such vertex.
    """
    columns = []
    for number in range(len(GROUPS)):
        mask = groups == number
        columns.append((values * mask).sum(-1) / mask.sum(-1))
    seen, hidden = groups == GROUPS.index("visible"), groups == GROUPS.index("hidden")
    usual = (values * seen).sum(0) / seen.sum(0)  # (V,) NaN: never seen
    known = hidden & usual.isfinite()
    columns.append((usual.nan_to_num() * known).sum(-1) / known.sum(-1))
    return torch.stack(columns, -1)


def band_report(
    errors: dict[str, dict[str, Tensor]],  # metric -> kind -> (P,) mm
    visible_fraction: Tensor,  # (P,)
    spread: Tensor,  # (P,) mm
    grouped_spread: Tensor | None = None,  # (P, 4) mm of `group_means`
    grouped_errors: Tensor | None = None,  # (P, 4) mm of `group_means`, of the mean mesh
) -> list[dict[str, Any]]:
    """Of each band, and of all: how many people, errors, spread, what the oracle gains over the mean; JSON.

    Intervals are 95 % percentile bootstraps over people. A band without people has `people: 0` and nothing else.
    """
    band = band_of(visible_fraction)
    everybody = torch.ones_like(band, dtype=torch.bool)
    masks = [(name, band == number) for number, name in enumerate(BANDS)] + [("all", everybody)]
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
    for grouped, of, prefix in ((grouped_spread, "spread_of", ""), (grouped_errors, "error_of", "error_")):
        if grouped is None:
            continue
        entry[of] = {}
        for number, group in enumerate(GROUPS):
            known = grouped[mask][:, number]
            known = known[known.isfinite()]
            entry[of][group] = interval(known) | {"people": len(known)} if len(known) else {"people": 0}
        for key, column in (("hidden_over_visible", GROUPS.index("visible")), ("hidden_over_same_vertices_visible", 3)):
            both = grouped[mask][:, [GROUPS.index("hidden"), column]]
            both = both[both.isfinite().all(-1)]
            if len(both) and both.mean() > _NO_SPREAD:
                entry[prefix + key] = ratio_interval(both[:, 0], both[:, 1]) | {"people": len(both)}
    return entry


def ratio_interval(
    above: Tensor,  # (P,)
    below: Tensor,  # (P,)
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Ratio of two means over the same people, with its 95 % percentile-bootstrap interval over them."""
    above, below = above.double(), below.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(above), (samples, len(above)), generator=generator)
    ratios = above[drawn].sum(1) / below[drawn].sum(1)
    # A resample may have nothing below: 0 / 0.
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return {"value": (above.sum() / below.sum()).item(), "low": low, "high": high}


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


def band_rows(report: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of a table with `COLUMNS`: three rows a band, one where nobody is in it."""
    rows = []
    for entry in report:
        name, people = entry["band"], str(entry["people"])
        if not entry["people"]:
            rows.append([name, people, *["-"] * (len(COLUMNS) - 2)])
            continue
        gain, groups = entry["oracle_gain"], entry.get("spread_of", {})
        gained = f"oracle gains {100 * gain['value']:.0f} %"
        spread = {"first": interval_text(entry["spread"], 0), "mean": "", "oracle": gained}
        of, ratio, wrong = (dict.fromkeys(KINDS, "") for _ in range(3))
        for kind, group in zip(KINDS, GROUPS, strict=True):
            if groups.get(group, {}).get("people"):
                of[kind] = f"{group} {interval_text(groups[group], 0)}"
        for kind, key, word in (
            ("first", "hidden_over_visible", "theirs"),
            ("mean", "hidden_over_same_vertices_visible", "the same"),
        ):
            for cells, prefix in ((ratio, ""), (wrong, "error_")):
                if prefix + key in entry:
                    cells[kind] = f"{word} {interval_text(entry[prefix + key], 2)}"
        for kind in KINDS:
            start = [name, people] if kind == "first" else ["", ""]
            errors = [interval_text(entry["errors"][metric].get(kind), 0) for metric in METRICS]
            rows.append([*start, kind, *errors, spread[kind], of[kind], ratio[kind], wrong[kind]])
    return rows
