"""Type and size limits of a model's hyperparameters.

Configs come from untrusted checkpoints and YAML files: a depth of 10^9 would exhaust the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hmdiff.errors import UserError

# Upper bounds, by the last part of the name.
_LARGEST = {
    "stack": 16,
    "depth": 64,
    "encoder_depth": 64,
    "depth_layers": 64,
    "heads": 64,
    "encoder_heads": 64,
    "width": 4096,
    "encoder_width": 4096,
    "image_size": 2048,
    "heatmap_size": 512,
    "depth_size": 1024,
    "num_keypoints": 1024,
    "num_vertices": 200_000,
    "num_coarse": 8192,
    "num_joints": 512,
    "patch_size": 8192,
    "upsample_neighbours": 256,
    "volume_width": 1024,
    "volume_size": 64,
}
_MAY_BE_ZERO = {"depth", "encoder_depth", "depth_layers"}
_ABSURD = 1e6  # bound on any other number
_NESTED = 8
_KINDS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


def check_hyperparameters(
    found: Mapping[str, Any],
    where: str,  # for the message: a file, or a section of a config
    defaults: Mapping[str, Any],  # of the constructor; values must have their types
) -> None:
    """Raises `UserError` naming the first value of a wrong type or out of range."""
    for name, value in found.items():
        default = defaults.get(name)
        kinds = _KINDS.get(type(default))
        if name == "pretrained" or name.startswith("_"):
            continue
        if kinds is not None and not (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
            raise UserError(f"{where}: {name} is {value!r:.80}, {type(default).__name__} expected")
        if isinstance(default, list | tuple) and not isinstance(value, list | tuple):
            raise UserError(f"{where}: {name} is {value!r:.80}, a list is expected")
        _check_size(where, name, value, 0)


def _check_size(where: str, name: str, value: Any, nested: int) -> None:
    if nested > _NESTED:
        raise UserError(f"{where}: {name:.80} is nested too deeply")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_size(where, str(key), item, nested + 1)
    elif isinstance(value, list | tuple):
        if len(value) > 1000:
            raise UserError(f"{where}: {name:.80} has {len(value)} entries, at most 1000 are possible")
        for item in value:
            _check_size(where, name, item, nested + 1)
    elif isinstance(value, int) and not isinstance(value, bool) and name in _LARGEST:
        least = 0 if name in _MAY_BE_ZERO else 1
        if not least <= value <= _LARGEST[name]:
            raise UserError(f"{where}: {name} {value}; {least} to {_LARGEST[name]:,} is possible")
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= _ABSURD):
        raise UserError(f"{where}: {name:.80} {value:g}; a number up to {_ABSURD:g} is expected")
    elif isinstance(value, str) and len(value) > 1000:
        raise UserError(f"{where}: {name:.80} is a text of {len(value)} characters")
