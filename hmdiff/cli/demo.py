"""`hmdiff demo`: the shipped checkpoint on the shipped sample; says what to try next."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from hmdiff.cli import arguments


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "demo",
        "recover 25 bodies of the shipped sample with the shipped checkpoint; needs nothing",
        "hmdiff demo",
        "Under a minute on two cores; no GPU, no download.",
    )
    arguments.add_checkpoint(parser)
    arguments.add_sampling(parser)
    arguments.add_guidance(parser)
    arguments.add_device(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), metavar="FOLDER", help="(default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    from hmdiff.cli.main import report
    from hmdiff.cli.sample import sample_people
    from hmdiff.estimators.people import read_people
    from hmdiff.files.resources import asset_path
    from hmdiff.files.storage import make_folder

    photo, keypoints = asset_path("sample.jpg"), asset_path("sample.json")
    make_folder(options.output)
    people = [read_people(photo, keypoints)]
    pipeline = arguments.load_pipeline(options.checkpoint, arguments.resolve_device(options.device))
    arguments.check_sampling(pipeline, options)
    print(f"loaded {options.checkpoint} in {time.perf_counter() - started:.1f} s, on {pipeline.device}")
    failures = sample_people(pipeline, people, options)
    for failure in failures:
        report(failure)
    if failures:
        return 2
    print(f"\n{time.perf_counter() - started:.0f} s in all. Look at:")
    print(f"  {options.output / 'sample.png'}   the photo, hypotheses over it, and all of them from the side")
    print(f"  {options.output / 'sample.html'}  all of it to turn and compare, in a browser")
    print(f"  {options.output / 'sample.glb'}   the mean body and every hypothesis, for any 3D viewer")
    print(f"  {options.output / 'sample.npz'}   the arrays: vertices (N, V, 3) in metres, joints, camera, spread")
    print("Next, a photo of yours, with COCO or OpenPose keypoints of it:")
    print("  hmdiff sample photo.jpg --keypoints photo.json")
    return 0
