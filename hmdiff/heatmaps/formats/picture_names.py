"""Finds a photo among a file's image names, which may come from any operating system.

Both slashes separate folders. Names are compared in NFC, since systems store é as one code point or as two. Only image
suffixes are removed, since names may contain dots.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TypeVar

from hmdiff.errors import UserError

PICTURE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".ppm",
)
Key = TypeVar("Key", bound=Hashable)


def parts_of(name: str | Path) -> tuple[str, ...]:
    """Folders and file name, in NFC."""
    text = unicodedata.normalize("NFC", str(name))
    return tuple(part for part in re.split(r"[\\/]+", text) if part not in ("", "."))


def stem_of(name: str) -> str:
    """The name without an image suffix."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in PICTURE_SUFFIXES if lower.endswith(suffix)), name)


def last_name(name: str | Path) -> str:
    """The key of an image's name: the file name without its suffix, case and an id's leading zeros."""
    parts = parts_of(name)
    stem = stem_of(parts[-1]) if parts else ""
    return (stem.lstrip("0") if stem.isdigit() else stem).casefold()


def _rank(photo: tuple[str, ...], name: tuple[str, ...]) -> tuple[int, int]:
    """Quality of a match: exact file name, same stem, same stem in another case; then the number of equal folders."""
    own, other = photo[-1], name[-1]
    if own == other:
        exact = 3
    elif stem_of(own) == stem_of(other):
        exact = 2
    else:
        exact = 1
    folders = 0
    for a, b in zip(reversed(photo[:-1]), reversed(name[:-1]), strict=False):
        if a != b:
            break
        folders += 1
    return folders, exact


def find_picture(
    photo: str | Path,
    names: Sequence[tuple[Key, str]],  # the file's images whose `last_name` is the photo's: key, name
    where: str,  # the file, for the error
) -> Key | None:
    """The image whose path shares the most trailing folders with the photo's; None without a match.

    Raises:
        UserError: several match equally well.
    """
    path = Path(photo)
    own = parts_of(path if path.is_absolute() or len(path.parts) > 1 else path.absolute())
    ranked = [(_rank(own, parts_of(name)), key, name) for key, name in names]
    if not ranked:
        return None
    best = max(rank for rank, _, _ in ranked)
    found = {key: name for rank, key, name in ranked if rank == best}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise UserError(
            f"{where}: {photo} may be its {first} or its {second}; give the photo by the folders that the file names"
        )
    return next(iter(found))
