"""`--depth` of the commands that read photos: a map beside each photo, given files, or a depth network by name."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError
from hmdiff.estimators.people import PhotoPeople, pair_files

if TYPE_CHECKING:
    from torch import Tensor

    from hmdiff.pipeline import HMDiffPipeline

ESTIMATOR = "estimator:"
SIZE = 64  # side of a person's map in pixels; a model resizes it


def add_depth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--depth",
        nargs="+",
        default=[],
        metavar="FILE",
        help="of a model that reads depth: npy, npz or 16-bit png, one a photo, in any unit; or estimator:MODEL, a "
        "network of transformers by name or folder (default: NAME_depth.npz, .npy or .png beside the photo, else none)",
    )
    parser.add_argument(
        "--disparity", action="store_true", help="the maps of --depth are larger where it is nearer (default: farther)"
    )


def check_depth(options: argparse.Namespace) -> None:
    """Validate the options before any work is done."""
    if not options.depth:
        if options.disparity:
            raise UserError("--disparity says what the maps of --depth are, and none is given; add --depth FILE")
    elif any(name.startswith(ESTIMATOR) for name in options.depth):
        if len(options.depth) > 1:
            raise UserError("--depth: give one estimator:MODEL for all photos, or a file for each")
        if not options.depth[0].removeprefix(ESTIMATOR):
            raise UserError("--depth estimator: names no model; give estimator:NAME or estimator:FOLDER")
    else:
        pair_files("--depth", [Path(name) for name in options.depth], options.photos)


def with_depth(
    people: Sequence[PhotoPeople],
    pipeline: HMDiffPipeline,
    options: argparse.Namespace,
) -> tuple[list[PhotoPeople], list[str]]:  # photos whose map was found or is not needed; error messages for the others
    """Add depth maps to the photos. Raises `UserError` if depth is given to a model that does not read it."""
    if not pipeline.model.config.depth_map:
        if options.depth:
            raise UserError(f"--depth: checkpoint {options.checkpoint} reads no depth; leave --depth out")
        return list(people), []
    from tqdm import tqdm

    estimator = _estimator(options)
    files = pair_files("--depth", [] if estimator else [Path(name) for name in options.depth], options.photos)
    named = dict(zip(options.photos, files, strict=True))
    found, failures = [], []
    hidden = True if estimator is None else None  # show progress only for estimation, since reading is quick
    for photo in tqdm(people, "depth", disable=hidden, leave=False, unit="photo"):
        try:
            depth, source = _map_of(photo, estimator, named.get(photo.photo), options.disparity)
        except UserError as error:
            failures.append(str(error) if str(photo.photo) in str(error) else f"{photo.photo}: {error}")
            continue
        found.append(dataclasses.replace(photo, depth=depth, source=f"{photo.source}, {source}"))
    return found, failures


def depth_crops(
    people: Sequence[PhotoPeople],
    batch: Sequence[tuple[int, int]],  # (photo index, person index)
) -> Tensor:  # (B, S, S), NaN = unknown
    """The depth maps of a batch's people; all NaN for a photo without one."""
    import torch

    from hmdiff.estimators.depth_sources import crop_depth

    maps = []
    for number, person in batch:
        photo, own = people[number], people[number].heatmaps[person]
        if photo.depth is None:
            maps.append(torch.full((1, SIZE, SIZE), torch.nan))
        else:
            maps.append(crop_depth(photo.depth, photo.size, own.crop, SIZE))
    return torch.cat(maps)


def _estimator(options: argparse.Namespace) -> Any:
    if not options.depth or not options.depth[0].startswith(ESTIMATOR):
        return None
    from hmdiff.estimators.depth_network import EstimatedDepth

    gives = "disparity" if options.disparity else None
    return EstimatedDepth(options.depth[0].removeprefix(ESTIMATOR), arguments.resolve_device(options.device), gives)


def _map_of(photo: PhotoPeople, estimator: Any, file: Path | None, disparity: bool) -> tuple[Tensor | None, str]:
    from hmdiff.estimators.depth_sources import depth_file_beside, read_depth

    if estimator is not None:
        import torch

        from hmdiff.viz.canvas import read_picture

        picture = torch.from_numpy(read_picture(photo.photo)).permute(2, 0, 1)[None].float() / 255
        return estimator(picture)[0], f"depth of {estimator.name}"
    path = file or depth_file_beside(photo.photo)
    if path is None:
        return None, "no depth"
    return read_depth(path, photo.size, "disparity" if disparity else "depth"), f"depth of {path}"


def photo_depth(
    source: str | None,  # "files" beside the photos, a folder, or estimator:MODEL; None: no depth
    gives: str = "depth",  # content of the files: "depth" or "disparity"
) -> Callable[[Any, Path], Any] | None:  # maps pixels (H, W, 3) uint8 and path to (h, w), larger = farther, or None
    """The depth source of `hmdiff prepare DATASET --depth`. Raises `UserError` for an unknown source."""
    if source is None:
        return None
    import torch

    from hmdiff.estimators.depth_sources import SUFFIXES, depth_file_beside, read_depth

    if source.startswith(ESTIMATOR):
        from hmdiff.estimators.depth_network import EstimatedDepth

        network = EstimatedDepth(source.removeprefix(ESTIMATOR))

        def estimated(pixels: Any, path: Path) -> Any:
            return network(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0].numpy()

        return estimated
    if source != "files" and not Path(source).is_dir():
        raise UserError(f"--depth {source}: no such folder; give one, 'files' (beside the photos) or estimator:MODEL")

    def read(pixels: Any, path: Path) -> Any:
        places = [Path(source) / f"{path.stem}{suffix}" for suffix in SUFFIXES]
        found = (
            depth_file_beside(path) if source == "files" else next((place for place in places if place.is_file()), None)
        )
        return None if found is None else read_depth(found, (pixels.shape[1], pixels.shape[0]), gives).numpy()

    return read
