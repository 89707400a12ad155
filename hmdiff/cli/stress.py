"""`hmdiff stress`: slides a patch over a person; maps how far the mesh moves and how much the hypotheses spread."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.cli.splits import people_for
from hmdiff.errors import UserError
from hmdiff.names import SPLITS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hmdiff.diffusion.sampling_config import SamplingConfig
    from hmdiff.heatmaps import Crop
    from hmdiff.lab.stress import StressMap, Subject
    from hmdiff.output import MeshOutput
    from hmdiff.pipeline import HMDiffPipeline

SHOWN = 420  # side of a displayed map, pixels
NUM_HYPOTHESES = 10


@dataclasses.dataclass(frozen=True)
class Shown:
    """A person to test, and the crop on which the maps are drawn."""

    name: str
    subject: Subject
    picture: np.ndarray  # (S, S, 3) uint8, the crop
    crop: Crop  # the crop's place in the photo, possibly rotated


def add_parser(subparsers: Any) -> None:
    from hmdiff.cli.estimation import add_estimation

    parser = arguments.new_parser(
        subparsers,
        "stress",
        "slide an occluding patch over a person: how far the mesh moves, how much the hypotheses spread",
        "hmdiff stress photo.jpg --keypoints photo.json\n  hmdiff stress --synthetic 4 --split test",
        "At every place of a grid the patch is grey in the image, the joints whose peak lies under it are taken out "
        "of the heatmaps, and the person is recovered again with the same seed. It writes NAME_stress.npz (maps in mm) "
        "and NAME_stress.png (the maps over the photo); NAME_0, NAME_1, ... where there are several people. On "
        "synthetic people, whose bodies are known, the error's map too.",
    )
    parser.add_argument("photo", nargs="?", type=Path, metavar="PHOTO", help="jpg, png, webp, ...")
    parser.add_argument(
        "--keypoints", type=Path, metavar="FILE", help="COCO or OpenPose JSON (default: NAME.json beside the photo)"
    )
    parser.add_argument(
        "--heatmaps",
        type=Path,
        metavar="FILE",
        help="npz with heatmaps, center, side; they win over keypoints (default: NAME_heatmaps.npz beside the photo)",
    )
    parser.add_argument(
        "--box", type=arguments.box, metavar="X1,Y1,X2,Y2", help="the person's box (default: about the keypoints)"
    )
    add_estimation(parser)
    group = parser.add_argument_group("in place of a photo")
    group.add_argument("--synthetic", type=arguments.whole(1), metavar="N", help="people of a split (default: none)")
    group.add_argument("--split", choices=SPLITS, default="test", metavar="SPLIT")
    group.add_argument("--first", type=arguments.whole(0), default=0, metavar="I", help="number of the first")
    parser.add_argument(
        "--patch",
        type=arguments.number(0, above=True),
        default=0.25,
        metavar="SHARE",
        help="the patch's side, of the crop's",
    )
    parser.add_argument("--places", type=arguments.whole(2), default=9, metavar="G", help="of the patch, a side")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="also draw the first person's hypotheses without a patch, and with it where they spread most "
        "(default: no picture)",
    )
    arguments.add_checkpoint(parser)
    arguments.add_sampling(parser)
    arguments.add_guidance(parser)
    parser.add_argument(
        "--focal", type=arguments.number(0, above=True), metavar="PX", help="focal length (default: the diagonal)"
    )
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER")
    # Many positions with few hypotheses; unguided, to show the behaviour of the model itself.
    parser.set_defaults(run=run, num_hypotheses=NUM_HYPOTHESES, guidance="none")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hmdiff.files.storage import make_folder
    from hmdiff.lab.stress import patch_grid, stress

    _check(options)
    centres = patch_grid(options.places, options.patch)
    make_folder(options.output)
    pipeline = arguments.load_pipeline(options.checkpoint, arguments.resolve_device(options.device))
    arguments.check_sampling(pipeline, options)
    if pipeline.body.keypoint_regressor is None:
        raise UserError(f"body {pipeline.body.name!r} has no keypoints, which heatmaps and crops are about")
    people = _synthetic(pipeline, options) if options.photo is None else _of_photo(pipeline, options)
    sampling = arguments.sampling_of(options, pipeline)
    with tqdm(total=len(people) * len(centres), unit="place", desc="stress", disable=None, leave=False) as bar:
        for number, person in enumerate(people):
            bar.set_description(person.name)
            found = stress(pipeline, person.subject, centres, options.patch, sampling, bar.update)
            tqdm.write(write(found, person, Path(options.output) / f"{person.name}_stress"))
            if number == 0 and options.picture is not None:
                tqdm.write(write_picture(pipeline, found, person, sampling, options.picture))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Validate the options before anything is loaded."""
    from hmdiff.cli.estimation import EMBEDDED, estimation_of

    if (options.photo is None) == (options.synthetic is None):
        found = "neither was" if options.photo is None else "both were"
        raise UserError(f"stress: {found} given, a photo and --synthetic; name a PHOTO, or give --synthetic N")
    if options.synthetic is not None:
        for name in ("keypoints", "heatmaps", "box", "pose", "focal"):
            if getattr(options, name) not in (None, EMBEDDED):
                raise UserError(f"--{name} is about a photo, and --synthetic people need none; leave it out")
    estimation_of(options)
    if options.picture is not None and options.picture.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{options.picture}: pictures are saved as .png or .jpg; change the suffix")


def _of_photo(pipeline: HMDiffPipeline, options: argparse.Namespace) -> list[Shown]:
    from hmdiff.cli.estimation import estimation_of
    from hmdiff.estimators.people import crops, read_people
    from hmdiff.heatmaps.cameras import PhotoCamera
    from hmdiff.lab.stress import Subject
    from hmdiff.viz.canvas import read_picture
    from hmdiff.viz.stress import cut_out

    source = estimation_of(options)
    boxes = None if options.box is None else [options.box]
    camera = PhotoCamera(options.focal)
    found = read_people(options.photo, options.keypoints, options.heatmaps, options.box, source, boxes, camera)
    picture = read_picture(options.photo)
    config = pipeline.model.config
    people = []
    for number in range(len(found.heatmaps)):
        heatmaps = found.heatmaps[number]
        image = None if config.inputs == "heatmaps" else crops(picture, heatmaps, config.image_size)
        subject = Subject(heatmaps, image, None, number)
        name = options.photo.stem + (f"_{number}" if len(found.heatmaps) > 1 else "")
        people.append(Shown(name, subject, cut_out(picture, heatmaps.crop, SHOWN), heatmaps.crop))
    return people


def _synthetic(pipeline: HMDiffPipeline, options: argparse.Namespace) -> list[Shown]:
    import torch

    from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments
    from hmdiff.heatmaps import Crop
    from hmdiff.lab.stress import Subject
    from hmdiff.viz.canvas import to_bytes
    from hmdiff.viz.stress import cut_out

    data = people_for(pipeline, picture=SHOWN)
    people = []
    for place in range(options.first, options.first + options.synthetic):
        block, row = divmod(place, data.block_size)
        if row == 0 or place == options.first:
            whole = data.block(options.split, block)
        sample = whole.map(lambda tensor, row=row: tensor[row : row + 1])  # type: ignore[misc]
        assert sample.image is not None
        heatmaps, photo = as_heatmaps(sample), camera_arguments(sample)
        assert heatmaps is not None
        subject = Subject(
            heatmaps,
            sample.image,
            sample.depth_input,
            place,
            photo["photo_sizes"],
            photo["focal"],
            sample.vertices,
            sample.keypoints_3d,
        )
        picture = to_bytes(sample.image[0].permute(1, 2, 0).numpy())
        whole_picture = Crop.of(torch.full((1, 2), len(picture) / 2), torch.tensor([float(len(picture))]))
        shown = cut_out(picture, whole_picture, SHOWN)
        people.append(Shown(f"{options.split}_{place:04d}", subject, shown, heatmaps.crop))
    return people


def write(found: StressMap, person: Shown, stem: Path) -> str:
    """Write one person's npz and png; returns a one-line summary."""
    from hmdiff.body.skeletons import HALPE26
    from hmdiff.evaluate.uncertainty_metrics import rank_correlation
    from hmdiff.viz.canvas import save_picture
    from hmdiff.viz.export import save_npz
    from hmdiff.viz.stress import stress_sheet

    arrays: dict[str, Any] = {
        "centres": found.centres,
        "patch": found.half,
        "moved_mm": found.map(found.displacement),
        "spread_mm": found.map(found.spread),
        "hidden": found.removed_joints,
        "joints": list(HALPE26),
        "clear_spread_mm": found.unoccluded_spread,
        "clear_vertices": found.unoccluded.vertices[0],
    }
    maps = [("the mesh moves", arrays["moved_mm"]), ("the hypotheses spread", arrays["spread_mm"])]
    worst = int(found.displacement.argmax())
    told = f"moved {float(found.displacement.mean()):.0f} mm, most {float(found.displacement[worst]):.0f} mm"
    told += f"{_joints(found, worst)}; spread {found.unoccluded_spread:.0f} mm, most {float(found.spread.max()):.0f} mm"
    if found.error is not None and found.unoccluded_error is not None:
        arrays |= {"error_mm": found.map(found.error), "clear_error_mm": found.unoccluded_error}
        maps.append(("error (PVE)", arrays["error_mm"]))
        told += f"; error {found.unoccluded_error:.0f} mm, most {float(found.error.max()):.0f} mm; rank correlation of "
        told += f"spread and error {rank_correlation(found.spread, found.error):.2f}"
    save_npz(stem.with_name(stem.name + ".npz"), **arrays)
    sheet = stress_sheet(person.picture, maps, found.half, found.centres[worst])
    save_picture(stem.with_name(stem.name + ".png"), sheet)
    return f"{person.name} -> {stem}.npz .png  ({told})"


def _joints(found: StressMap, place: int) -> str:
    """The joints hidden by the patch at that position, as text."""
    from hmdiff.body.skeletons import HALPE26

    names = [HALPE26[joint].replace("_", " ") for joint in found.removed_joints[place].nonzero()[:, 0].tolist()]
    if not names:
        return ""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" without {', '.join(names[:3])}{rest}"


def write_picture(
    pipeline: HMDiffPipeline, found: StressMap, person: Shown, sampling: SamplingConfig, path: Path
) -> str:
    """Draw the hypotheses without the patch, and with it at the position of the largest spread."""
    from hmdiff.lab.stress import recover_covered
    from hmdiff.viz.canvas import save_picture
    from hmdiff.viz.stress import draw_patch, hidden_sheet

    place = int(found.spread.argmax())
    centre = found.centres[place : place + 1]
    covered, _ = recover_covered(pipeline, person.subject, centre, found.half, sampling)

    crop = person.crop.to(found.unoccluded.focal).with_camera(
        None, found.unoccluded.focal, found.unoccluded.principal_point
    )
    turn, focal, principal = crop_camera(crop, SHOWN)

    def row(picture: np.ndarray, output: MeshOutput) -> tuple[Any, ...]:
        vertices, translation = output.vertices[0] @ turn, output.translation[0] @ turn
        return picture, vertices.cpu(), translation.cpu(), output.spread[0].cpu()

    rows = [row(person.picture, found.unoccluded), row(draw_patch(person.picture, centre[0], found.half), covered)]
    sheet = hidden_sheet(rows, found.unoccluded.faces.cpu(), focal, principal, ["unoccluded", "behind a patch"])
    save_picture(path, sheet)
    spreads = f"spread {found.unoccluded_spread:.0f} mm without, {float(found.spread[place]):.0f} mm behind the patch"
    return f"{path}: {person.name}, {spreads}{_joints(found, place)}"


def crop_camera(
    crop: Crop,  # one person
    size: int,  # side of the crop's picture, pixels
) -> tuple[Tensor, float, list[float]]:  # (3, 3), pixels, (2,) pixels
    """The camera that renders a crop's picture, rotated with it: ``x @ turn`` maps a point from the photo's camera
    frame to the crop's; focal length and principal point are in pixels of the picture."""
    upright = crop.upright()
    principal = (upright.from_photo(upright.principal_point[:, None])[0, 0] + 1) * size / 2
    return crop.turn_3d()[0], float(crop.focal[0] / crop.side[0]) * size, principal.tolist()
