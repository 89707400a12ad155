"""Self-check of a result against its input: one line of warnings if they do not agree.

Three measures with thresholds well above good results (our choice, see docs/situations.md): distance of the projected
keypoints to the heatmaps' peaks, relative to the crop; DAT's remaining gap; deviation of the mesh from a body (residual
of the best fitting body, and edges stretched or compressed more than twofold). V vertices.
"""

from __future__ import annotations

from torch import Tensor

DISTANCE = 0.06  # of the crop's side
FIT = 45.0  # mm
TORN = 0.12  # of all edges
TORN_FACTOR = 2.0  # of an edge's length, longer or shorter
GAP = 0.01  # crop coordinates squared


def torn_share(
    vertices: Tensor,  # (..., V, 3) metres
    template: Tensor,  # (V, 3)
    edges: Tensor,  # (E, 2), of `mesh_edges`
) -> Tensor:  # (...) 0..1
    """Share of edges more than twice or less than half as long as the template's. True bodies have a few, in armpits
    and groins."""
    start, end = edges.unbind(-1)
    rest = (template[start] - template[end]).norm(dim=-1).clamp_min(1e-9)
    ratio = (vertices[..., start, :] - vertices[..., end, :]).norm(dim=-1) / rest
    return ((ratio > TORN_FACTOR) | (ratio < 1 / TORN_FACTOR)).float().mean(-1)


def doubts(
    distance: float | None,  # photo pixels, the mean of the hypotheses
    side: float,  # of the crop, photo pixels
    fit_mm: float,
    torn: float,
    gap: float | None,  # remaining after guidance
) -> str:
    """Warnings about the result as text; empty if there are none."""
    found = []
    if distance is not None and distance > DISTANCE * side:
        share = 100 * distance / side
        found.append(f"its keypoints are {distance:.0f} px from the photo's ({share:.0f} % of the crop)")
    if fit_mm > FIT:
        found.append(f"no body comes nearer than {fit_mm:.0f} mm to its mesh")
    if torn > TORN:
        found.append(f"{100 * torn:.0f} % of the mesh's edges are torn or folded")
    if gap is not None and gap > GAP:
        found.append(f"guidance left a gap of {1000 * gap:.0f} e-3")
    return "; ".join(found)
