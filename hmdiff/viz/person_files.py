"""The output files of one person: npz, obj, glb and images, and the summary lines for the user."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.names import SAVED

if TYPE_CHECKING:
    from torch import Tensor

    from hmdiff.body.body import Body
    from hmdiff.body.fitting import FittedBodies
    from hmdiff.estimators.people import PhotoPeople

MeshOutput = Any  # hmdiff.output.MeshOutput, whose save method uses this module: importing it would be circular
SHOWN = 5  # number of bodies in the image
MODES = 5  # maximum number of hypothesis clusters in the npz


@dataclasses.dataclass(frozen=True)
class Report:
    """Summary of one person's result."""

    line: str
    warning: str  # empty if the result fits the heatmaps
    values: dict[str, Any]  # fields of a line of results.jsonl


class Scene:
    """Everybody in a photo in the camera frame, as mean bodies at their positions."""

    def __init__(self) -> None:
        self._meshes: dict[str, tuple[Any, Any]] = {}

    def add(self, output: MeshOutput, row: int, person: int) -> None:
        place = output.translation[row].mean(0)
        self._meshes[f"person_{person}"] = ((output.mean_vertices[row] + place).cpu(), output.faces.cpu())

    def save(self, path: Path) -> None:
        from hmdiff.viz.export import save_glb
        from hmdiff.viz.overlays import PALETTE

        colours = [PALETTE[index % len(PALETTE)] for index in range(len(self._meshes))]
        save_glb(path, self._meshes, colours, origin="the camera at the origin")


def fitted_parameters(
    body: Body,
    vertices: Tensor,  # (N, V, 3) the hypotheses
    mean: Tensor,  # (V, 3)
    known: FittedBodies | None = None,  # fits of the hypotheses, if the pipeline has them
) -> dict[str, Any]:
    """Pose and shape of every hypothesis and of the mean, for animation; translations are in the vertices' frame."""
    import torch

    from hmdiff.body.fitting import fit_parameters

    found = fit_parameters(body, mean[None] if known is not None else torch.cat([mean[None], vertices]))
    names = {"pose": "pose", "betas": "betas", "translation": "pose_translation", "error_mm": "fit_error_mm"}
    arrays: dict[str, Any] = {"body": body.name}
    for field, name in names.items():
        values = getattr(found, field)
        arrays |= {f"mean_{name}": values[0], name: values[1:] if known is None else getattr(known, field)}
    return arrays


def person_arrays(
    output: MeshOutput,
    row: int,  # index in the output
    photo: PhotoPeople,
    person: int,  # index in the photo
) -> dict[str, Any]:
    """All arrays of a person that need no body fitting: the npz of `hmdiff sample`."""
    from hmdiff.body.skeletons import HALPE26

    vertices = output.vertices[row].cpu()
    translation, crop = output.translation[row].cpu(), photo.heatmaps.crop[[person]]
    arrays: dict[str, Any] = {
        "vertices": vertices,
        "joints": output.joints[row],
        "camera": output.camera[row],
        "translation": translation,
        "focal": output.focal[row],
        "principal_point": output.principal_point[row],
        "intrinsics": crop.intrinsics[0],
        "frame": "x right, y down, z forward; metres; pelvis at 0, camera at 0 once translation is added",
        "focal_from": photo.focal_from,
        "faces": output.faces.cpu(),
        "spread_mm": output.spread[row],
        "temperature": output.temperature[row],
        "spread_calibrated": output.calibrated_spread,
        "photo": str(photo.photo),
        "photo_size": photo.size,
        "source": photo.source,
        "person": person,
        "crop_center": crop.center[0],
        "crop_side": crop.side[0],
        "crop_rotation": crop.rotation[0],
    }
    arrays |= output.confidences(row)
    arrays |= {f"id_{kind}": value for kind, value in photo.identity(person).items()}
    if output.guidance is not None:
        report = output.guidance
        arrays |= {
            "gap_before": report.gap_before[row],
            "gap_after": report.gap_after[row],
            "guided": report.active[:, row],
            "fell_back": report.fell_back[row],
        }
    if output.keypoints is not None:
        arrays |= {"keypoints": output.keypoints[row], "keypoint_names": list(HALPE26)}
        seen = output.people[row]
        arrays["keypoints_2d"] = seen.project(output.keypoints[row] + output.translation[row][:, None])
    if output.aggregated_vertices is not None:
        arrays["aggregated_vertices"] = output.aggregated_vertices[row]
    modes = output.modes(min(MODES, len(vertices)))
    arrays |= {"selected": output.selected[row], "modes": modes.index[row], "mode_weights": modes.weights[row]}
    return arrays


def write_person(
    output: MeshOutput,
    row: int,  # index in the output
    photo: PhotoPeople,
    person: int,  # index in the photo
    stem: Path,
    body: Body,
    distance: Tensor | None = None,  # (B, N) pixels
    more: dict[str, Any] | None = None,  # additional npz entries: seed, settings
    kinds: Collection[str] = SAVED,  # which files; the npz is always written
) -> Report:
    """Write npz, html, obj, glb and png of one person."""
    import numpy as np

    from hmdiff.body.surface import mesh_edges
    from hmdiff.evidence import doubts, torn_share
    from hmdiff.viz.export import save_npz

    def path(suffix: str) -> Path:
        return stem.with_name(stem.name + suffix)  # with_suffix would truncate a name like "2024.01"

    vertices, faces, mean = output.vertices[row].cpu(), output.faces.cpu(), output.mean_vertices[row].cpu()
    selected = int(output.selected[row])
    known = None if output.fitted is None else type(output.fitted)(*(each[row].cpu() for each in output.fitted))
    fitted = fitted_parameters(body, vertices, mean, known)
    away = None if distance is None else float(distance[row].mean())
    side = float(photo.heatmaps.side[person])
    gap = None if output.guidance is None else float(output.guidance.gap_after[row].mean())
    torn = torn_share(vertices, body.v_template.to(vertices), mesh_edges(faces))
    warning = doubts(away, side, float(fitted["fit_error_mm"].mean()), float(torn.mean()), gap)
    said = {"warning": warning} if away is None else {"warning": warning, "keypoint_distance_px": distance[row]}  # type: ignore[index]
    arrays = person_arrays(output, row, photo, person)
    arrays |= {"joint_names": np.array(body.joint_names), "joint_parents": np.array(body.parents)}
    save_npz(path(".npz"), **arrays, **fitted, **said, **(more or {}))
    picture = photo.pixels() if {"html", "png"} & set(kinds) else None
    if picture is not None and "html" in kinds:
        from hmdiff.viz.viewer import save_viewer

        save_viewer(path(".html"), arrays | said, picture)
    if "obj" in kinds:
        from hmdiff.viz.export import save_obj

        save_obj(path(".obj"), mean, faces)
    if "glb" in kinds:
        _save_glb(path(".glb"), mean, vertices, faces)
    if picture is not None and "png" in kinds:
        _save_pictures(path, output, row, photo, person, picture, float(arrays.get("confidence", math.nan)))
    values = {
        "selected": selected,
        "spread_mm": round(float(output.spread[row].mean()), 1),
        "spread_calibrated": output.calibrated_spread,
        "confidence": round(float(arrays["confidence"]), 3) if "confidence" in arrays else None,
        "keypoint_distance_px": None if away is None else round(away, 2),
        "fit_mm": round(float(fitted["fit_error_mm"].mean()), 1),
        "warning": warning,
        "source": photo.source,
        "translation": [round(float(value), 4) for value in output.translation[row, selected]],
        "focal": round(float(output.focal[row]), 2),
        **photo.identity(person),
    }
    return Report(_line(output, row, photo, person, stem, away, side), warning, values)


def _save_glb(path: Path, mean: Tensor, vertices: Tensor, faces: Tensor) -> None:
    from hmdiff.viz.export import save_glb
    from hmdiff.viz.overlays import PALETTE
    from hmdiff.viz.sheets import MEAN_COLOUR

    meshes: dict[str, tuple[Any, Any]] = {"mean": (mean, faces)}
    colours: list[Any] = [MEAN_COLOUR]
    for number, hypothesis in enumerate(vertices):
        meshes[f"hypothesis_{number:02d}"] = (hypothesis, faces)
        colours.append(PALETTE[number % len(PALETTE)])
    save_glb(path, meshes, colours, origin="the pelvis at the origin")


def _save_pictures(
    path: Callable[[str], Path],
    output: MeshOutput,
    row: int,
    photo: PhotoPeople,
    person: int,
    picture: Any,
    confidence: float,  # NaN: unknown
) -> None:
    from hmdiff.viz.canvas import save_picture
    from hmdiff.viz.sheets import hypotheses_sheet
    from hmdiff.viz.spread import spread_sheet

    vertices, faces, selected = output.vertices[row].cpu(), output.faces.cpu(), int(output.selected[row])
    place, focal, centre = output.translation[row].cpu(), float(output.focal[row]), output.principal_point[row].cpu()
    points, names = photo.points[person]
    sheet = hypotheses_sheet(picture, vertices, faces, place, focal, centre, SHOWN, points, names, selected)
    save_picture(path(".png"), sheet)
    heat = spread_sheet(
        picture,
        vertices[selected],
        output.spread[row].cpu(),
        faces,
        place[selected],
        focal,
        centre,
        None if math.isnan(confidence) else confidence,
    )
    save_picture(path("_spread.png"), heat)


def _line(
    output: MeshOutput, row: int, photo: PhotoPeople, person: int, stem: Path, away: float | None, side: float
) -> str:
    spread = float(output.spread[row].mean())
    many = f", person {person}" if len(photo.heatmaps) > 1 else ""
    known = "".join(f", {kind} {value}" for kind, value in photo.identity(person).items())
    fits = "" if away is None else f"keypoints fit within {away:.1f} px ({100 * away / side:.1f} % of the crop), "
    sure = output.within(100)
    share = "" if sure is None else f", {float(sure.person[row]):.0%} of the surface expected within 100 mm"
    share += "" if output.calibrated_spread else " (uncalibrated)"
    return (
        f"{photo.photo}{many}{known} -> {stem}.npz\n    {fits}hypotheses spread {spread:.0f} mm{share}; "
        f"from {photo.source}"
    )
