"""The README's result images: `python -m tools.build.pictures`.

Output of `hmdiff demo` for scikit-image's astronaut (public domain), resized: assets/demo.jpg, the hypotheses, and
assets/spread.jpg, their spread. Run again for every new checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from hmdiff.cli.demo import demo_photo
from hmdiff.cli.main import main as hmdiff
from hmdiff.files.storage import atomic_file

ASSETS = Path(__file__).resolve().parents[2] / "assets"
PICTURES = {".png": ("demo.jpg", 1400), "_spread.png": ("spread.jpg", 1200)}  # name and width in pixels
_QUALITY = 85


def shrink(picture: Path, path: Path, width: int) -> None:
    with Image.open(picture) as opened:
        height = round(opened.height * width / opened.width)
        small = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    with atomic_file(path) as temporary:
        small.save(temporary, "JPEG", quality=_QUALITY, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="hmdiff_small")
    parser.add_argument("--output", type=Path, default=Path("outputs/readme"), metavar="FOLDER")
    parser.add_argument("--assets", type=Path, default=ASSETS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    photo, keypoints = demo_photo()
    if keypoints is not None:
        parser.error('the demo has no bare photo here: pip install "hmdiff[photo]" first')
    code = hmdiff(["demo", "--checkpoint", options.checkpoint, "--output", str(options.output)])
    if code == 0:
        for ending, (name, width) in PICTURES.items():
            shrink(options.output / f"{photo.stem}{ending}", options.assets / name, width)
            print(options.assets / name)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
