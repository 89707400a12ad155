"""Camera options for photos and videos: --focal, --principal-point, --intrinsics."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hmdiff.cli import arguments

if TYPE_CHECKING:
    from hmdiff.heatmaps.cameras import PhotoCamera


def add_camera(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--focal",
        type=arguments.number(0, above=True),
        metavar="PX",
        help="focal length in pixels of the photo (default: EXIF's where there is one, else the photo's diagonal)",
    )
    parser.add_argument(
        "--principal-point",
        type=arguments.pair,
        metavar="CX,CY",
        help="where the optical axis meets the photo, in pixels: needed for a photo that was cropped (default: the "
        "photo's centre)",
    )
    parser.add_argument(
        "--intrinsics",
        type=Path,
        metavar="FILE",
        help="JSON or npz with K, or fx, fy, cx, cy; of all photos, or of each by its name (default: none)",
    )


def cameras(options: argparse.Namespace) -> Callable[[Path], PhotoCamera]:
    """The camera of each photo; --focal and --principal-point take precedence over a file."""
    from hmdiff.heatmaps.cameras import PhotoCamera, read_intrinsics

    # Out of range is one line, and not one of each photo.
    PhotoCamera(options.focal, source="--focal")
    PhotoCamera(None, options.principal_point, "--principal-point")

    def camera(photo: Path) -> PhotoCamera:
        known = PhotoCamera() if options.intrinsics is None else read_intrinsics(options.intrinsics, photo)
        return PhotoCamera(
            known.focal if options.focal is None else options.focal,
            known.principal_point if options.principal_point is None else options.principal_point,
            known.source if options.focal is None else "--focal",
        )

    return camera
