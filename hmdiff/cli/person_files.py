"""The files of one recovered person: npz, obj, glb and pictures, and the lines that the user reads about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from hmdiff.body.body import Body
    from hmdiff.body.fitting import FittedBodies
    from hmdiff.estimators.people import PhotoPeople
    from hmdiff.pipeline import MeshOutput

SHOWN = 5  # bodies of the picture
MODES = 5  # groups of hypotheses in the npz, at most


@dataclasses.dataclass(frozen=True)
class Report:
    """What is said of one person."""

    line: str
    warning: str  # empty where the result fits its evidence


def fitted_parameters(
    body: Body,
    vertices: Tensor,  # (N, V, 3) the hypotheses
    mean: Tensor,  # (V, 3)
    known: FittedBodies | None = None,  # of the hypotheses, where the pipeline has them
) -> dict[str, Any]:
    """Pose and shape of every hypothesis and of the mean, to animate them; translations are in the vertices' frame."""
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
    row: int,  # of the person in the output
    photo: PhotoPeople,
    person: int,  # number in the photo
) -> dict[str, Any]:
    """Everything about one person that does not need the body fitted: the npz of `hmdiff sample`."""
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
        "focal_from": photo.focal_from,
        "faces": output.faces.cpu(),
        "spread_mm": output.spread[row],
        "temperature": output.temperature,
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
        arrays |= {"gap_before": report.gap_before[row], "gap_after": report.gap_after[row],
                   "guided": report.active[:, row], "fell_back": report.fell_back[row]}  # fmt: skip
    if output.keypoints is not None:
        arrays |= {"keypoints": output.keypoints[row], "keypoint_names": list(HALPE26)}
    modes = output.modes(min(MODES, len(vertices)))
    arrays |= {"selected": output.selected[row], "modes": modes.index[row], "mode_weights": modes.weights[row]}
    return arrays


def write_person(
    output: MeshOutput,
    row: int,  # of the person in the output
    photo: PhotoPeople,
    person: int,  # number in the photo
    stem: Path,
    body: Body,
    distance: Tensor | None = None,  # (B, N) pixels
    more: dict[str, Any] | None = None,  # for the npz: seed, settings
) -> Report:
    """npz, html, obj, glb and png of one person."""
    import numpy as np

    from hmdiff.evidence import doubts, torn_share
    from hmdiff.viz.canvas import read_picture, save_picture
    from hmdiff.viz.export import save_glb, save_npz, save_obj
    from hmdiff.viz.overlays import PALETTE
    from hmdiff.viz.sheets import MEAN_COLOUR, hypotheses_sheet
    from hmdiff.viz.spread import spread_sheet
    from hmdiff.viz.viewer import save_viewer

    def path(suffix: str) -> Path:
        return stem.with_name(stem.name + suffix)  # with_suffix would cut a name like "2024.01"

    vertices, faces, mean = output.vertices[row].cpu(), output.faces.cpu(), output.mean_vertices[row].cpu()
    selected = int(output.selected[row])
    known = None if output.fitted is None else type(output.fitted)(*(each[row].cpu() for each in output.fitted))
    fitted = fitted_parameters(body, vertices, mean, known)
    away = None if distance is None else float(distance[row].mean())
    side = float(photo.heatmaps.side[person])
    gap = None if output.guidance is None else float(output.guidance.gap_after[row].mean())
    warning = doubts(away, side, float(fitted["fit_error_mm"].mean()), float(torn_share(body, vertices).mean()), gap)
    said = {"warning": warning} if away is None else {"warning": warning, "keypoint_distance_px": distance[row]}  # type: ignore[index]
    arrays = person_arrays(output, row, photo, person)
    arrays |= {"joint_names": np.array(body.joint_names), "joint_parents": np.array(body.parents)}
    save_npz(path(".npz"), **arrays, **fitted, **said, **(more or {}))
    picture = read_picture(photo.photo)
    save_viewer(path(".html"), arrays | said, picture)
    save_obj(path(".obj"), mean, faces)
    meshes: dict[str, tuple[Any, Any]] = {"mean": (mean, faces)}
    colours: list[Any] = [MEAN_COLOUR]
    for number, hypothesis in enumerate(vertices):
        meshes[f"hypothesis_{number:02d}"] = (hypothesis, faces)
        colours.append(PALETTE[number % len(PALETTE)])
    save_glb(path(".glb"), meshes, colours)
    points, names = photo.points[person]
    sheet = hypotheses_sheet(
        picture, vertices, faces, output.translation[row].cpu(), float(output.focal[row]),
        output.principal_point[row].cpu(), SHOWN, points, names, selected,
    )  # fmt: skip
    save_picture(path(".png"), sheet)
    heat = spread_sheet(
        picture, vertices[selected], output.spread[row].cpu(), faces,
        output.translation[row, selected].cpu(), float(output.focal[row]), output.principal_point[row].cpu(),
        float(arrays["confidence"]) if "confidence" in arrays else None,
    )  # fmt: skip
    save_picture(path("_spread.png"), heat)
    return Report(_line(output, row, photo, person, stem, away, side), warning)


def _line(
    output: MeshOutput, row: int, photo: PhotoPeople, person: int, stem: Path, away: float | None, side: float
) -> str:
    spread = float(output.spread[row].mean())
    many = f", person {person}" if len(photo.heatmaps) > 1 else ""
    known = "".join(f", {kind} {value}" for kind, value in photo.identity(person).items())
    fits = "" if away is None else f"keypoints fit within {away:.1f} px ({100 * away / side:.1f} % of the crop), "
    sure = output.within(100)
    share = "" if sure is None else f", {float(sure.person[row]):.0%} of the surface expected within 100 mm"
    return (
        f"{photo.photo}{many}{known} -> {stem}.npz\n    {fits}hypotheses spread {spread:.0f} mm{share}; "
        f"from {photo.source}"
    )
