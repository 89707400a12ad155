"""The store of results: one JSON file per result, with the settings and the model hash that it was computed with.

Results with the same settings are not recomputed; damaged files are ignored. Shared by evaluation, sweeps and
ablations. Settings are top-level keys of a report (`hmdiff evaluate`), or under "settings" (the lab).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.files.storage import atomic_file

if TYPE_CHECKING:
    from hmdiff.diffusion.dat import Guidance


def stored(
    path: Path,
    settings: Mapping[str, Any],  # JSON types only
    needs: Sequence[str] = ("errors",),  # required keys of a complete report
) -> dict[str, Any] | None:
    """The stored report with the same settings; None if there is none, or it is damaged."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        found = report.get("settings", report)
        same = all(found.get(key) == value for key, value in settings.items()) and set(needs) <= report.keys()
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return report if same else None


def save_report(report: dict[str, Any], path: str | Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def digest(values: Any, digits: int = 10) -> str:
    """Hexadecimal hash of any JSON value, used in file names of results."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:digits]


def model_hash(folder: Path) -> str:
    """Hash of all files of a saved pipeline, names and contents."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hasher.update(str(path.relative_to(folder)).encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def guided_by(guidance: Guidance | None) -> dict[str, Any] | None:
    """Guidance settings stored in a report; None if unguided, as in reports from before guidance existed."""
    return dataclasses.asdict(guidance) if guidance is not None and guidance.active else None


def suffix(guided: dict[str, Any] | None) -> str:
    """Suffix of a report's file name, so that guided and unguided reports do not overwrite each other."""
    return "" if guided is None else f"_{guided['mode']}"
