"""`hmdiff demo`: the shipped checkpoint on a photo without annotations; prints suggestions for next steps."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

from hmdiff.cli import arguments


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "demo",
        "recover 25 bodies of a real photo with the shipped checkpoint; needs nothing",
        "hmdiff demo",
        "Under a minute on two cores; no GPU, no download.",
    )
    arguments.add_checkpoint(parser)
    arguments.add_sampling(parser)
    arguments.add_guidance(parser)
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), metavar="FOLDER")
    parser.set_defaults(run=run)


def demo_photo() -> tuple[Path, Path | None]:
    """A real photo without keypoints (scikit-image's astronaut, public domain), else a rendered one with keypoints.

    Installed packages are located without importing them.
    """
    from hmdiff.estimators.landmark_files import installed
    from hmdiff.files.resources import asset_path

    found = importlib.util.find_spec("skimage") if installed() else None
    for place in (found.submodule_search_locations or []) if found is not None else []:
        photo = Path(place) / "data" / "astronaut.png"
        if photo.is_file():
            return photo, None
    return asset_path("sample.jpg"), asset_path("sample.json")


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    print(f"loading {options.checkpoint}", flush=True)
    from hmdiff.cli.main import report
    from hmdiff.cli.sample_people import sample_people
    from hmdiff.estimators.choose import load_source
    from hmdiff.estimators.people import read_people
    from hmdiff.files.storage import make_folder

    photo, keypoints = demo_photo()
    make_folder(options.output)
    people = [read_people(photo, keypoints, source=None if keypoints is not None else load_source())]
    pipeline = arguments.load_pipeline(options.checkpoint, arguments.resolve_device(options.device))
    arguments.check_sampling(pipeline, options)
    print(f"loaded {options.checkpoint} in {time.perf_counter() - started:.1f} s, on {pipeline.device}")
    failures = sample_people(pipeline, people, options)
    for failure in failures:
        report(failure)
    if failures:
        return 2
    stem = options.output / photo.stem
    print(f"\n{time.perf_counter() - started:.0f} s in all. Look at:")
    print(f"  {stem}.html   everything, in a browser")
    print(f"  {stem}.png    the photo, hypotheses over it, and from the side")
    print(f"  {stem}.glb    the mean body and every hypothesis, for any 3D viewer")
    print(f"  {stem}.npz    vertices (N, V, 3) in metres, joints, camera, spread")
    print("Next, a photo of yours:")
    print("  hmdiff sample photo.jpg")
    return 0
