"""The photos that a command reads (files, folders, patterns), and the log of results, `results.jsonl`.

One line of JSON per person, or per photo without a result, written once their files are. Interrupted runs resume from
it, and programs can read one file instead of many.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmdiff.errors import UserError
from hmdiff.files.reading import read_bytes

RESULTS = "results.jsonl"
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def photos_of(places: Sequence[Path]) -> tuple[list[Path], bool]:  # photos; whether a folder or pattern was given
    """Every photo and video once, in order; those of a folder by name.

    Raises:
        UserError: a folder without photos, a pattern without matches.
    """
    from hmdiff.video.reading import is_clip

    found: list[Path] = []
    many = False
    for place in places:
        if place.is_dir():
            inside = sorted(p for p in place.iterdir() if (p.suffix.lower() in _PICTURES or is_clip(p)) and p.is_file())
            inside = [path for path in inside if not _written_by_us(path)]
            if not inside:
                raise UserError(
                    f"{place}: no pictures or videos in it ({', '.join(_PICTURES)}, mp4, ...); name another"
                )
            found += inside
            many = True
        elif not place.exists() and any(sign in str(place) for sign in "*?["):
            inside = [path for path in map(Path, sorted(glob.glob(str(place), recursive=True))) if path.is_file()]
            if not inside:
                raise UserError(f"{place}: no file fits this pattern; check it")
            found += inside
            many = True
        else:
            found.append(place)
    return list(dict.fromkeys(found)) if many else found, many


def _written_by_us(path: Path) -> bool:
    """Whether it is a picture or overlay of an earlier result in the same folder."""
    from hmdiff.files.outputs import OVERLAY, is_ours, tracks_of

    if path.name.endswith(OVERLAY):
        return bool(tracks_of(path.parent, path.name.removesuffix(OVERLAY)))
    return any(path.name.endswith(suffix) and is_ours(path, suffix) for suffix in ("_spread.png", ".png"))


@dataclasses.dataclass
class Results:
    """The lines of one output folder's `results.jsonl`."""

    path: Path
    settings: dict[str, Any]  # of this run; lines with other settings do not count as done
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    whole: bool = True  # whether the file holds exactly these lines

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> Results:
        """Read the existing lines, without a truncated last one."""
        results = cls(folder / RESULTS, settings)
        if results.path.is_file():
            content = read_bytes(results.path, 1 << 32)
            for line in content.decode("utf-8", "replace").splitlines():
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(found, dict) and isinstance(found.get("photo"), str):
                    results.lines.append(found)
            # Rewrite a file with a truncated line, so that the next one is not appended to it.
            results.whole = content == "".join(map(_line, results.lines)).encode()
        return results

    def done(self, photo: Path) -> bool:
        """Whether every person of the photo was written with these settings and the files still exist."""
        mine = [each for each in self.lines if each["photo"] == str(photo)]
        if not mine or any("error" in each or each.get("settings") != self.settings for each in mine):
            return False
        files = [self.path.parent / str(each.get("npz")) for each in mine]
        return len(mine) == mine[0].get("people") and all(path.is_file() for path in files)

    def restart(self, photos: Sequence[Path]) -> None:
        """Remove the lines of photos that will be redone."""
        from hmdiff.files.storage import atomic_file

        names = {str(photo) for photo in photos}
        kept = [each for each in self.lines if each["photo"] not in names]
        if len(kept) == len(self.lines) and self.whole:
            return
        self.lines, self.whole = kept, True
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(map(_line, self.lines)), encoding="utf-8")

    def add(self, photo: Path, **values: Any) -> None:
        line = {"photo": str(photo), **values, "settings": self.settings}
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(_line(line))

    @property
    def names(self) -> set[str]:
        """Names used by people of other photos."""
        return {Path(str(each["npz"])).stem for each in self.lines if "npz" in each}


def _line(values: dict[str, Any]) -> str:
    """A line of JSON. File names that are not UTF-8 are escaped."""
    text = json.dumps(values, ensure_ascii=False) + "\n"
    return json.dumps(values) + "\n" if _LONE.search(text) else text


_LONE = re.compile("[\ud800-\udfff]")
