"""The self-check: does a result fit the evidence it was made from? Where it does not, one line says so.

Three measures, each against a limit that good results stay well under (our choice; docs/situations.md has both):
the keypoints' distance to the heatmaps' peaks, as a share of the crop; what DAT left of its gap; and how far the mesh
is from a body (the parameters that fit it best, and edges stretched or shrunk twofold).
V vertices.
"""

from __future__ import annotations

from torch import Tensor

DISTANCE = 0.06  # of the crop's side
FIT = 45.0  # mm
TORN = 0.12  # of all edges
TORN_FACTOR = 2.0  # of an edge's length, up or down
GAP = 0.01  # of the residual, crop coordinates squared


def torn_share(
    vertices: Tensor,  # (..., V, 3) metres
    template: Tensor,  # (V, 3)
    edges: Tensor,  # (E, 2), of `mesh_edges`
) -> Tensor:  # (...) share of the edges that are over twice or under half as long as the template's
    """A mesh that is no body has edges that no body has; of true bodies some armpits' and groins' are such too."""
    start, end = edges.unbind(-1)
    rest = (template[start] - template[end]).norm(dim=-1).clamp_min(1e-9)
    ratio = (vertices[..., start, :] - vertices[..., end, :]).norm(dim=-1) / rest
    return ((ratio > TORN_FACTOR) | (ratio < 1 / TORN_FACTOR)).float().mean(-1)


def doubts(
    distance: float | None,  # photo pixels, the mean of the hypotheses
    side: float,  # of the crop, photo pixels
    fit_mm: float,
    torn: float,
    gap: float | None,  # that guidance left
) -> str:
    """What speaks against the result, in words; empty where nothing does."""
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
