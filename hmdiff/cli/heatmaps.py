"""`hmdiff heatmaps`: heatmaps by mmpose for every person in a photo, as an npz, with a picture for checking."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hmdiff.heatmaps import Heatmaps


def add_parser(subparsers: Any) -> None:
    from hmdiff.cli.estimation import add_estimation

    parser = arguments.new_parser(
        subparsers,
        "heatmaps",
        "run a pose estimator on photos and keep its heatmaps",
        "hmdiff heatmaps photo.jpg",
        "For each photo it writes NAME_heatmaps.npz, everybody's heatmaps, and NAME_heatmaps.png, which shows boxes, "
        "heat and peaks over the photo. `hmdiff sample` finds the npz by itself where it lies beside the photo, and "
        "takes it by --heatmaps from anywhere.",
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="jpg, png, webp, ...")
    add_estimation(parser)
    parser.add_argument(
        "--box",
        type=arguments.box,
        action="append",
        metavar="X1,Y1,X2,Y2",
        help="a person's box in photo pixels, once for each person of one photo (default: the detector's)",
    )
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="FOLDER")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hmdiff.cli.estimation import estimation_of
    from hmdiff.cli.main import report
    from hmdiff.cli.sample_people import about, one_photo_s
    from hmdiff.files.outputs import photo_names, protect_inputs
    from hmdiff.files.storage import make_folder
    from hmdiff.heatmaps import save_heatmaps
    from hmdiff.viz.canvas import read_picture, save_picture

    if options.box is not None and len(options.photos) > 1:
        raise UserError(f"--box is about one photo, {len(options.photos)} were given; give them one by one")
    source, names = estimation_of(options), photo_names(options.photos)
    if source is None:
        raise UserError("--pose none: nothing to run; name an estimator, such as embedded")
    protect_inputs(options.output, options.photos, options.photos, ("_heatmaps.npz", "_heatmaps.png"))
    make_folder(options.output)
    failures = people = 0
    bar = tqdm(options.photos, unit="photo", desc="loading models", disable=None, leave=False)
    for photo, name in zip(bar, names, strict=True):
        try:
            picture = read_picture(photo)
            seen = source.estimate(picture, options.box)
            maps, boxes = seen.heatmaps, seen.boxes
            path = options.output / f"{name}_heatmaps.npz"
            save_heatmaps(path, maps)
            save_picture(path.with_suffix(".png"), heat_picture(picture, maps, boxes))
        except (UserError, OSError) as error:
            report(about(photo, one_photo_s(error)))
            failures += 1
            continue
        finally:
            bar.set_description("estimating")
        people += len(maps)
        tqdm.write(f"{photo} -> {path} and .png  ({len(maps)} people, {int(maps.valid[0].sum())} joints each)")
    print(f"{people} people in {len(options.photos) - failures} of {len(options.photos)} photos, in {options.output}/")
    return 2 if failures else 0


def heat_picture(
    photo: np.ndarray,  # (H, W, 3) uint8
    heatmaps: Heatmaps,  # for P people
    boxes: Tensor,  # (P, 4) x1, y1, x2, y2 photo pixels
) -> np.ndarray:  # (H, W, 3) uint8
    """The maximum over joints per pixel, the peaks as keypoints, and the boxes."""
    import cv2
    import numpy as np

    from hmdiff.estimators.people import peaks
    from hmdiff.heatmaps import HEATMAP_SIZE
    from hmdiff.viz.canvas import draw_keypoints, heat_colours

    height, width = photo.shape[:2]
    heat = np.zeros((height, width), np.float32)
    for index, person in enumerate(heatmaps.values):
        # Photo pixel index to heatmap index. Here both count from the centre of the first pixel.
        place = np.array(heatmaps.crop.affine(index, HEATMAP_SIZE))
        place[:, 2] += place[:, :2] @ [0.5, 0.5] - 0.5
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        strongest = person.amax(0).clamp(0, 1).numpy()
        heat = np.maximum(heat, cv2.warpAffine(strongest, place, (width, height), flags=flags))
    share = 0.8 * np.sqrt(heat)[..., None]
    picture = (photo * (1 - share) + 255 * heat_colours(heat, 0, 1) * share).astype(np.uint8)
    thick = max(1, round(max(height, width) / 400))
    for box in boxes.round().int().tolist():
        cv2.rectangle(picture, box[:2], box[2:], (250, 250, 250), thick)
    for points, names in peaks(heatmaps):
        picture = draw_keypoints(picture, points, names)
    return picture
