"""Which of a file's pictures is this photo: names compared as text, whatever system wrote them.

Both slashes separate folders; letters are compared in one Unicode form (NFC), since systems store é as one code or as
two; only a picture's suffix is a suffix, since names have dots of their own.
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
    """Folders and the file's name, in NFC."""
    text = unicodedata.normalize("NFC", str(name))
    return tuple(part for part in re.split(r"[\\/]+", text) if part not in ("", "."))


def stem_of(name: str) -> str:
    """The name without a picture's suffix."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in PICTURE_SUFFIXES if lower.endswith(suffix)), name)


def last_name(name: str | Path) -> str:
    """What two names of one picture share: the file's, without its suffix, its case and an id's leading zeros."""
    parts = parts_of(name)
    stem = stem_of(parts[-1]) if parts else ""
    return (stem.lstrip("0") if stem.isdigit() else stem).casefold()


def _rank(photo: tuple[str, ...], name: tuple[str, ...]) -> tuple[int, int]:
    """How well a name fits: exact file name over stem over stem in another case; then the folders that agree."""
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
    names: Sequence[tuple[Key, str]],  # of the file's pictures whose `last_name` is the photo's: key, name
    where: str,  # the file, for the error
) -> Key | None:
    """The picture whose path agrees with the photo's over the most folders; None where there is none.

    Raises:
        UserError: several agree alike.
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
