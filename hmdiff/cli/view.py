"""`hmdiff view`: open a result's page in the browser; creates it from the npz if missing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "view",
        "look at a result in the browser: the photo, every hypothesis, modes, spread, from any side",
        "hmdiff view outputs/photo.npz",
        "The page NAME.html is one file that needs no network: send it to anybody. Without a display its path is "
        "printed.",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="a folder of `hmdiff sample`, or one NAME.npz or NAME.html in it"
    )
    parser.add_argument(
        "--photo", type=Path, metavar="FILE", help="the photo, to make the page anew (default: the one in the npz)"
    )
    parser.add_argument("--no-open", action="store_true", help="write the page and print its path; open no browser")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import webbrowser

    pages = []
    for result in results_in(options.output):
        page = result.with_name(result.stem + ".html")
        if options.photo is not None or not page.exists():
            write_page(result, page, options.photo)
        pages.append(page)
        print(f"{page}  ({page.stat().st_size / 1e6:.1f} MB)")
    if not options.no_open:
        webbrowser.open(pages[0].resolve().as_uri())
    return 0


def results_in(output: Path) -> list[Path]:
    """The npz files to view; all of them for a folder. Raises `UserError` if there are none."""
    if output.is_dir():
        found = [path for path in sorted(output.glob("*.npz")) if _has_page(path)]
        if not found:
            raise UserError(f"{output}: no result in it; give the folder that hmdiff sample wrote, such as outputs")
        return found
    result = output.with_name(output.stem + ".npz") if output.suffix == ".html" else output
    if result.suffix != ".npz":
        raise UserError(f"{output}: no result of hmdiff sample; give NAME.npz, NAME.html or their folder")
    if not result.exists():
        raise UserError(f"{result}: no such file; give the NAME.npz that hmdiff sample wrote")
    return [result]


def write_page(result: Path, page: Path, photo: Path | None) -> None:
    from hmdiff.viz.viewer import read_result, save_viewer

    arrays = read_result(result)
    if photo is None:
        if "photo" not in arrays:
            raise UserError(f"{result}: it does not name its photo; give --photo FILE")
        photo = Path(str(arrays["photo"]))
        if not photo.exists():
            raise UserError(f"{result}: its photo {photo} is not there any more; give --photo FILE")
    save_viewer(page, arrays, photo)


def _has_page(path: Path) -> bool:
    """Whether a result has a page: excludes heatmaps, a video's tracks and an export's parameters, which may lie beside
    results. A damaged file passes here and is reported when it is read."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return "vertices.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return True
