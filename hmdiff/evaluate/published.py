"""Published results for comparison, each with its source. None of them was reproduced by us.

The protocol of a row is that of the paper's code, or of the other rows in the paper's table; a note marks rows whose
protocol is unknown. Millimetres; `ece` is a share.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    protocol: str  # of `hmdiff.evaluate.protocols`
    method: str
    data: str
    values: dict[str, float]  # metric -> value in the paper
    source: str
    note: str = ""


_HMDIFF = "Foo et al., ICCV 2023, arXiv 2308.13369"
_D2A = "D2A-HMR, arXiv 2403.09063"
_JOTR, _DPMESH = "Li et al., ICCV 2023, arXiv 2307.16377", "Zhu et al., CVPR 2024, arXiv 2404.01424"
_UNSAID = "the paper does not say which protocol"
_LINEAGE = "in one table with METRO's lineage; the paper does not say which protocol"


def _row(
    protocol: str,
    method: str,
    data: str,
    source: str,
    pve: float | None,
    mpjpe: float | None,
    pa: float | None,
    note: str = "",
) -> Published:
    values = {"pve": pve, "mpjpe": mpjpe, "pa_mpjpe": pa}
    return Published(
        protocol, method, data, {name: value for name, value in values.items() if value is not None}, source, note
    )


PUBLISHED: tuple[Published, ...] = (
    _row("metro", "HMDiff", "3DPW", _HMDIFF, 82.4, 72.7, 44.5, _LINEAGE),
    _row("metro", "HMDiff", "Human3.6M P2", _HMDIFF, None, 49.3, 32.4, _LINEAGE),
    _row("metro", "FastMETRO", "3DPW", "Cho et al., ECCV 2022, arXiv 2207.13820", 84.1, 73.5, 44.6),
    _row("metro", "FastMETRO", "Human3.6M P2", "Cho et al., ECCV 2022, arXiv 2207.13820", None, 52.2, 33.7),
    _row("metro", "Mesh Graphormer", "3DPW", "Lin et al., ICCV 2021, arXiv 2104.00272", 87.7, 74.7, 45.6),
    _row("metro", "Mesh Graphormer", "Human3.6M P2", "Lin et al., ICCV 2021, arXiv 2104.00272", None, 51.2, 34.5),
    _row("metro", "D2A-HMR", "3DPW", _D2A, None, 80.5, 48.4, _UNSAID),
    _row("metro", "D2A-HMR", "Human3.6M P2", _D2A, None, 53.8, 36.2, _UNSAID),
    _row(
        "metro",
        "D2A-HMR without depth or without distribution (a)",
        "3DPW",
        _D2A,
        None,
        92.7,
        61.8,
        f"{_UNSAID}; which of the two is left out is not legible",
    ),
    _row(
        "metro",
        "D2A-HMR without depth or without distribution (b)",
        "3DPW",
        _D2A,
        None,
        90.0,
        56.9,
        f"{_UNSAID}; which of the two is left out is not legible",
    ),
    _row("metro", "D2A-HMR without silhouette", "3DPW", _D2A, None, 89.5, 62.2, _UNSAID),
    _row("metro", "D2A-HMR without masked modelling", "3DPW", _D2A, None, 84.7, 51.4, _UNSAID),
    _row("jotr", "JOTR", "3DPW-OC", _JOTR, 92.6, 75.7, 52.2),
    _row("jotr", "JOTR", "3DPW-PC", _JOTR, 109.7, 86.5, 58.3),
    _row("jotr", "JOTR", "3DOH", _JOTR, 104.8, 98.7, 59.3),
    _row("jotr", "JOTR", "3DPW-Crowd", _JOTR, 103.4, 82.4, 52.0),
    _row("jotr", "DPMesh", "3DPW-OC", _DPMESH, 88.0, 70.9, 48.0),
    _row("jotr", "DPMesh", "3DPW-PC", _DPMESH, 105.4, 82.2, 56.6),
    _row("jotr", "DPMesh", "3DOH", _DPMESH, 106.4, 97.1, 59.0),
    _row("jotr", "DPMesh", "3DPW-Crowd", _DPMESH, 101.5, 79.9, 51.1),
    _row("min_of_n", "HUMR, oracle of 100", "3DPW", "HUMR, as its paper reports", 54.4, 46.2, 29.8),
    _row("min_of_n", "ADHMR, oracle of 100", "3DPW", "ADHMR, as its paper reports", None, 57.2, 33.5),
    _row("min_of_n", "ScoreHypo, oracle of 100", "3DPW", "ScoreHypo, as its paper reports", 73.4, 63.0, 37.6),
    _row("min_of_n", "MEGA, oracle of 25", "3DPW", "MEGA, as its paper reports", 75.1, 63.6, 40.4),
    _row("min_of_n", "ProHMR, oracle of 25", "3DPW", "Kolotouros et al., arXiv 2108.11944", None, 84.0, 52.4),
    Published(
        "min_of_n",
        "conditional flow, better calibrated",
        "not said here",
        {"mpjpe": 53.0, "ece": 0.08},
        "Pierzchlewicz et al., arXiv 2210.11179",
        "the oracle rewards miscalibration: see the next row",
    ),
    Published(
        "min_of_n",
        "conditional flow, worse calibrated",
        "not said here",
        {"mpjpe": 48.5, "ece": 0.23},
        "Pierzchlewicz et al., arXiv 2210.11179",
    ),
)


def published_rows(protocol: str) -> list[Published]:
    """All rows of a protocol; the name is without its base."""
    return [row for row in PUBLISHED if row.protocol == protocol]
