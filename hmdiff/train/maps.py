"""Checks that the data has the depth maps and silhouettes that D2A-HMR's modules need.

`depth_input` (hmdiff prepare DATASET --depth) is the input of the depth module, `silhouette` (a data set's own masks)
the label of the silhouette decoder.
"""

from __future__ import annotations

from hmdiff.config import Config
from hmdiff.data.mixture import Mixture, NamedSplits
from hmdiff.data.sample import PeopleSource
from hmdiff.errors import UserError


def check_maps(config: Config, source: PeopleSource) -> list[str]:
    """Warnings about sources that lack maps which others have. Reads the first block of each; synthetic data has all.

    Raises:
        UserError: a module is enabled and no source has its maps.
    """
    if config.data.kind == "synthetic":
        return []
    parts = {
        "model.depth_map": ("depth_input", bool(config.model.get("depth_map")), "depth map", "--depth SOURCE"),
        "model.silhouette": ("silhouette", bool(config.model.get("silhouette")), "mask", "a set that has masks"),
    }
    lines = []
    for option, (field, on, what, mend) in parts.items():
        if not on:
            continue
        there = [_has(part, field) for part in _parts(source)]
        if not any(there):
            raise UserError(
                f"{option} is on, and nobody in data.sources has a {what}: nothing of it would be trained, and this "
                f"would not be D2A-HMR; prepare with {mend}, or give {option}=false"
            )
        lines += [f"data.sources[{number}]: nobody has a {what}" for number, found in enumerate(there) if not found]
    return lines


def _parts(source: PeopleSource) -> list[PeopleSource]:
    while not isinstance(source, Mixture):
        inner = source.train if isinstance(source, NamedSplits) else getattr(source, "source", None)
        if inner is None:
            return [source]
        source = inner
    return list(source.sources)


def _has(source: PeopleSource, field: str) -> bool:
    value = getattr(source.block("train", 0), field)
    return value is not None and bool(value.isfinite().any())
