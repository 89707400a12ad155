"""Opens images in the supported formats, up to a maximum number of pixels.

By default, Pillow detects any format it knows from the first bytes, whatever the file name: an EPS named photo.jpg
starts Ghostscript if installed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image

from hmdiff.errors import UserError
from hmdiff.files.reading import read_failure

# JPEG includes MPO, a jpg with a second image, as some phones write.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 110_000_000  # a phone's 108 megapixels; 330 MB as RGB bytes


@contextlib.contextmanager
def open_image(
    source: str | Path | IO[bytes],
    name: str | Path | None = None,  # for messages, if the source is not a path
) -> Iterator[Image.Image]:
    """Open an image without decoding it yet; decoding errors inside the block are reported too.

    Raises:
        UserError: missing, empty, truncated, of another format, or larger than `MAX_PIXELS`.
    """
    name = source if name is None and isinstance(source, str | Path) else name
    if isinstance(source, str | Path):
        _check_file(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size limit is a warning; ours is below
            opened = Image.open(source, formats=FORMATS)
        with opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{name}: {width} x {height} pixels, far too many for a photo; scale it down first")
            yield opened
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{name}: far too many pixels for a photo; scale it down first") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not a picture (expected jpg, png, webp, ...); give a photo") from None
    except OSError as error:
        if error.errno is not None:
            raise read_failure(str(name), error) from None
        raise UserError(f"{name}: a damaged picture ({error}); export or download it again") from None
    except Exception as error:  # each decoder raises its own type
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{name}: a damaged picture ({reason}); export or download it again") from None


def _check_file(path: str | Path) -> None:
    """Errors that Pillow would report in its own words."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture; check the name") from None
    except OSError as error:
        raise read_failure(path, error) from None
    except ValueError as error:  # a null character
        raise UserError(f"{str(path)[:150]!r}: not a file name ({error})") from None
    if stat.S_ISDIR(about.st_mode):
        raise UserError(f"{path}: is a folder; name a picture in it")
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{path}: is a device, a picture was expected")
    if about.st_size == 0:
        raise UserError(f"{path}: the file is empty; export or download the picture again")
