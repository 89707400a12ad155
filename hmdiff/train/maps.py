"""Does the data have what D2A-HMR's parts read and learn? A model that is called so must not be trained without.

`depth_input` (hmdiff prepare DATASET --depth) is the depth path's input, `silhouette` (a data set's own masks) the
silhouette decoder's label.
"""

from __future__ import annotations

from hmdiff.config import Config
from hmdiff.data.mixture import Mixture, WithSplits
from hmdiff.data.sample import PeopleSource
from hmdiff.errors import UserError


def check_maps(config: Config, source: PeopleSource) -> list[str]:
    """Lines about sources without maps that others have. Looks at the first block of each; synthetic people have all.

    Raises:
        UserError: a part is on, and nobody has what it needs.
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
        inner = source.train if isinstance(source, WithSplits) else getattr(source, "source", None)
        if inner is None:
            return [source]
        source = inner
    return list(source.sources)


def _has(source: PeopleSource, field: str) -> bool:
    value = getattr(source.block("train", 0), field)
    return value is not None and bool(value.isfinite().any())
