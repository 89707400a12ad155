"""The store of results: a JSON file each, kept with the settings and the hash of the model that it was computed with.

What is there with the same settings is not computed again; a damaged file counts as not there. Evaluation, sweeps and
ablations share it. Settings stand at the top of a report (`hmdiff evaluate`) or under "settings" (the lab's cells).
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
    settings: Mapping[str, Any],  # as JSON gives them back
    needs: Sequence[str] = ("errors",),  # keys without which a report is not whole
) -> dict[str, Any] | None:
    """The report that was written with the same settings; None where there is none, or it is damaged."""
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
    """Of anything that JSON takes, in hexadecimal digits: a part of a result's file name."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:digits]


def model_hash(folder: Path) -> str:
    """Of all files of a saved pipeline, names and bytes."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def guided_by(guidance: Guidance | None) -> dict[str, Any] | None:
    """What a report is kept with: None where nothing steers, as in reports that knew of no guidance."""
    return dataclasses.asdict(guidance) if guidance is not None and guidance.active else None


def suffix(guided: dict[str, Any] | None) -> str:
    """Of a report's file: guided and unguided ones stand beside each other."""
    return "" if guided is None else f"_{guided['mode']}"
