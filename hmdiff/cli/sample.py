"""`hmdiff sample`: photos with keypoints or heatmaps in; meshes, arrays and a picture of every person out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hmdiff.body.body import Body
    from hmdiff.cli.estimation import Estimation
    from hmdiff.cli.photos import Box, PhotoPeople
    from hmdiff.pipeline import HMDiffPipeline, MeshOutput

PEOPLE_AT_ONCE = 16  # bounds the memory of the meshes; changes no result
SHOWN = 5  # hypotheses of the picture
MODES = 5  # groups of hypotheses in the npz, at most


def add_parser(subparsers: Any) -> None:
    from hmdiff.cli.depth_maps import add_depth
    from hmdiff.cli.estimation import add_estimation

    parser = arguments.new_parser(
        subparsers,
        "sample",
        "recover 3D bodies of the people in photos",
        "hmdiff sample photo.jpg --keypoints photo.json",
        "For each person it writes NAME.npz (vertices, joints, keypoints, camera, spread, the number of the selected "
        "hypothesis, modes and their weights, and the pose and shape fitted to each hypothesis), NAME.obj (the mean "
        "body), NAME.glb (mean and hypotheses), NAME.png (a picture of them over the photo and from the side) and "
        "NAME_spread.png (the selected one, coloured by spread), and NAME.html (all of it, for a browser); NAME_0, "
        "NAME_1, ... where there are several people.",
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="jpg, png, webp, ...")
    parser.add_argument(
        "--keypoints", nargs="+", type=Path, default=[], metavar="FILE",
        help="COCO or OpenPose JSON, one a photo, or one COCO file about all (default: NAME.json beside the photo)",
    )  # fmt: skip
    parser.add_argument(
        "--heatmaps", nargs="+", type=Path, default=[], metavar="FILE",
        help="npz with heatmaps, center, side; they win over keypoints (default: NAME_heatmaps.npz beside the photo)",
    )  # fmt: skip
    parser.add_argument(
        "--box", type=arguments.box, action="append", metavar="X1,Y1,X2,Y2",
        help="the person's box in photo pixels; with --pose once for each person (default: the JSON's, or about the "
        "keypoints; with --pose the detector's)",
    )  # fmt: skip
    add_estimation(parser)
    add_depth(parser)
    arguments.add_checkpoint(parser)
    arguments.add_sampling(parser)
    arguments.add_guidance(parser)
    parser.add_argument(
        "--focal", type=arguments.number(0, above=True), metavar="PX", help="focal length (default: the diagonal)"
    )
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hmdiff.cli.depth_maps import check_depth, with_depth
    from hmdiff.cli.estimation import Estimation, needs_pose
    from hmdiff.cli.main import report
    from hmdiff.cli.photos import pair_files
    from hmdiff.files.storage import make_folder

    if options.box is not None and len(options.photos) > 1:
        raise UserError(f"--box is about one photo, {len(options.photos)} were given; sample them one by one")
    keypoints = pair_files("--keypoints", options.keypoints, options.photos)
    heatmaps = pair_files("--heatmaps", options.heatmaps, options.photos)
    needs_pose(options)
    check_depth(options)
    make_folder(options.output)

    estimate = None if options.pose is None else Estimation(options)
    failures: list[str] = []
    people: list[PhotoPeople] = []
    files = list(zip(options.photos, keypoints, heatmaps, strict=True))
    hidden = True if estimate is None else None  # reading is quick, estimating is not
    for photo, keypoint_file, heatmap_file in tqdm(files, "estimating", disable=hidden, leave=False, unit="photo"):
        try:
            people.append(_read(photo, keypoint_file, heatmap_file, options.box, estimate))
        except UserError as error:
            failures.append(_about(photo, error))
    if people:
        pipeline = arguments.load_pipeline(options.checkpoint, arguments.resolve_device(options.device))
        arguments.check_sampling(pipeline, options)
        people, without = with_depth(people, pipeline, options)
        failures += without
        if people:
            failures += sample_people(pipeline, people, options)
    for failure in failures:
        report(failure)
    return 2 if failures else 0


def _read(
    photo: Path,
    keypoints: Path | None,
    heatmaps: Path | None,
    boxes: list[Box] | None,
    estimate: Estimation | None,
) -> PhotoPeople:
    """One box also sets the crop of keypoints; several are people for the pose estimator."""
    from hmdiff.cli.photos import read_people

    if boxes is not None and len(boxes) > 1 and estimate is None:
        raise UserError(f"{len(boxes)} times --box, but only --pose MODEL takes several people's; give one")
    return read_people(photo, keypoints, heatmaps, boxes[0] if boxes else None, estimate, boxes)


def _about(photo: Path, error: UserError) -> str:
    return str(error) if str(photo) in str(error) else f"{photo}: {error}"


def sample_people(pipeline: HMDiffPipeline, people: Sequence[PhotoPeople], options: argparse.Namespace) -> list[str]:
    """Sample everyone in batches, write each as soon as their batch is done; returns what could not be written."""
    from tqdm import tqdm

    everyone = [(number, person) for number, photo in enumerate(people) for person in range(len(photo.heatmaps))]
    names = output_names(people)
    failures: dict[Path, str] = {}
    started = time.perf_counter()
    total = len(everyone) * options.num_hypotheses
    bar = tqdm(total=total, unit="body", desc="sampling", disable=None, leave=False)
    written = 0
    for first in range(0, len(everyone), PEOPLE_AT_ONCE):
        batch = everyone[first : first + PEOPLE_AT_ONCE]
        output = sample_batch(pipeline, people, batch, options, bar.update)
        distance = _distance(output, people, batch)
        for row, (number, person) in enumerate(batch):
            photo = people[number]
            bar.set_description(f"writing {names[number, person]}")
            try:
                stem = Path(options.output) / names[number, person]
                text = write_person(output, row, photo, person, stem, pipeline.body, distance)
            except UserError as error:
                failures[photo.photo] = _about(photo.photo, error)
                continue
            written += 1
            tqdm.write(text)
        bar.set_description("sampling")
    bar.close()
    seconds = time.perf_counter() - started
    what = f"{written} of {len(everyone)} people, {options.num_hypotheses} hypotheses each"
    print(f"{what}, written to {options.output}/ in {seconds:.1f} s")
    return list(failures.values())


def output_names(people: Sequence[PhotoPeople]) -> dict[tuple[int, int], str]:
    """(photo, person) -> a name of its own: the photo's, _i where there are several, -2 where it is taken."""
    names: dict[tuple[int, int], str] = {}
    for number, photo in enumerate(people):
        count = len(photo.heatmaps)
        for person in range(count):
            base = photo.photo.stem + (f"_{person}" if count > 1 else "")
            name, copy = base, 2
            while name in names.values():
                name, copy = f"{base}-{copy}", copy + 1
            names[number, person] = name
    return names


def sample_batch(
    pipeline: HMDiffPipeline,
    people: Sequence[PhotoPeople],
    batch: Sequence[tuple[int, int]],  # number of the photo, of the person in it
    options: argparse.Namespace,
    progress: Any = None,
) -> MeshOutput:
    """One call of the pipeline. A person's number in their photo seeds them, whoever else is in the batch."""
    import torch

    from hmdiff.cli.depth_maps import depth_crops
    from hmdiff.cli.photos import crops
    from hmdiff.heatmaps import concatenate_heatmaps
    from hmdiff.viz.canvas import read_picture

    images = None
    if pipeline.model.config.inputs != "heatmaps":
        pictures = {number: read_picture(people[number].photo) for number in {number for number, _ in batch}}
        size = pipeline.model.config.image_size
        images = torch.cat([crops(pictures[n], people[n].heatmaps[person], size) for n, person in batch])
    output: MeshOutput = pipeline(
        images,
        concatenate_heatmaps([people[number].heatmaps[person] for number, person in batch]),
        options.num_hypotheses,
        options.steps,
        options.seed,
        options.sampler,
        options.eta,
        photo_sizes=torch.tensor([people[number].size for number, _ in batch], dtype=torch.float32),
        focal=None if options.focal is None else torch.full((len(batch),), options.focal),
        people=[person for _, person in batch],
        progress=progress,
        guidance=arguments.guidance_of(options, pipeline),
        depth=depth_crops(people, batch) if pipeline.model.config.depth_map else None,
    )
    return output


def _distance(output: MeshOutput, people: Sequence[PhotoPeople], batch: Sequence[tuple[int, int]]) -> Tensor | None:
    """From the hypotheses' keypoints to the heatmaps' peaks, (B, N) pixels; None for a body without keypoints."""
    from hmdiff.heatmaps import concatenate_heatmaps
    from hmdiff.pipeline import keypoint_distance

    if output.keypoints is None:
        return None
    return keypoint_distance(output, concatenate_heatmaps([people[n].heatmaps[person] for n, person in batch]))


def fitted_parameters(
    body: Body,
    vertices: Tensor,  # (N, V, 3) the hypotheses
    mean: Tensor,  # (V, 3)
) -> dict[str, Any]:
    """Pose and shape of every hypothesis and of the mean, to animate them; translations are in the vertices' frame."""
    import torch

    from hmdiff.body.fitting import fit_parameters

    found = fit_parameters(body, torch.cat([vertices, mean[None]]))
    arrays: dict[str, Any] = {"body": body.name}
    for name, values in (("pose", found.pose), ("betas", found.betas), ("pose_translation", found.translation),
                         ("fit_error_mm", found.error_mm)):  # fmt: skip
        arrays |= {name: values[:-1], f"mean_{name}": values[-1]}
    return arrays


def write_person(
    output: MeshOutput,
    row: int,  # of the person in the output
    photo: PhotoPeople,
    person: int,  # number in the photo
    stem: Path,
    body: Body,
    distance: Tensor | None = None,  # (B, N) pixels
) -> str:
    """npz, obj, glb, png and html of one person; returns a line about them."""
    import numpy as np

    from hmdiff.viz.canvas import read_picture
    from hmdiff.viz.export import save_glb, save_npz, save_obj
    from hmdiff.viz.overlays import PALETTE, hypotheses_sheet, save_picture
    from hmdiff.viz.spread import spread_sheet
    from hmdiff.viz.viewer import save_viewer

    def path(suffix: str) -> Path:
        return stem.with_name(stem.name + suffix)  # with_suffix would cut a name like "2024.01"

    vertices, faces, mean = output.vertices[row].cpu(), output.faces.cpu(), output.mean_vertices[row].cpu()
    arrays: dict[str, Any] = {
        "vertices": vertices,
        "joints": output.joints[row],
        "camera": output.camera[row],
        "translation": output.translation[row],
        "focal": output.focal[row],
        "principal_point": output.principal_point[row],
        "faces": faces,
        "spread_mm": output.spread[row],
    }
    if output.guidance is not None:
        report = output.guidance
        arrays |= {"gap_before": report.gap_before[row], "gap_after": report.gap_after[row],
                   "guided": report.active[:, row], "fell_back": report.fell_back[row]}  # fmt: skip
    if output.keypoints is not None:
        arrays["keypoints"] = output.keypoints[row]
    selected, modes = int(output.selected[row]), output.modes(min(MODES, len(vertices)))
    arrays |= {"selected": output.selected[row], "modes": modes.index[row], "mode_weights": modes.weights[row]}
    fitted = fitted_parameters(body, vertices, mean)
    arrays |= {"joint_names": np.array(body.joint_names), "joint_parents": np.array(body.parents)}
    save_npz(path(".npz"), **arrays, **fitted, photo=np.array(str(photo.photo)))
    picture = read_picture(photo.photo)
    save_viewer(path(".html"), arrays, picture)
    save_obj(path(".obj"), mean, faces)
    meshes: dict[str, tuple[Any, Any]] = {"mean": (mean, faces)}
    colours: list[Any] = [(0.75, 0.75, 0.78)]
    for number, hypothesis in enumerate(vertices):
        meshes[f"hypothesis_{number + 1:02d}"] = (hypothesis, faces)
        colours.append(PALETTE[number % len(PALETTE)])
    save_glb(path(".glb"), meshes, colours)
    points, names = photo.points[person]
    sheet = hypotheses_sheet(
        picture, vertices, faces, output.translation[row].cpu(), float(output.focal[row]),
        output.principal_point[row].cpu(), min(SHOWN, len(vertices)), points, names,
    )  # fmt: skip
    save_picture(path(".png"), sheet)
    heat = spread_sheet(
        picture, vertices[selected], output.spread[row].cpu(), faces,
        output.translation[row, selected].cpu(), float(output.focal[row]), output.principal_point[row].cpu(),
    )  # fmt: skip
    save_picture(path("_spread.png"), heat)
    spread, fit = float(output.spread[row].mean()), ""
    if output.guidance is not None:
        before, after = (float(gap[row].mean()) for gap in (output.guidance.gap_before, output.guidance.gap_after))
        fit = f"gap {1000 * before:.2f} -> {1000 * after:.2f} e-3; "
    if distance is not None:
        away, side = float(distance[row].mean()), float(photo.heatmaps.side[person])
        fit += f"2D distance {away:.1f} px, {100 * away / side:.1f} % of the crop; "
    fit += f"parameters within {fitted['fit_error_mm'].mean():.0f} mm; "
    written = f"{stem}.npz .html .obj .glb .png _spread.png"
    return f"{photo.photo} -> {written}  ({fit}spread {spread:.0f} mm; from {photo.source})"
