"""YAML as plain values, without executing anything; errors for unknown keys, with the nearest known key."""

from __future__ import annotations

import difflib
import io
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from hmdiff.errors import UserError
from hmdiff.files.reading import read_bytes

_MAX_YAML = 1 << 17  # bytes
_MAX_BRACKETS = 50  # nesting depth: PyYAML's time grows with its square


def check_keys(
    given: Iterable[str],
    allowed: Iterable[str],
    where: str,
) -> None:
    """Raise a `UserError` for the first key that is not allowed, naming the nearest allowed one."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise UserError(f"{where}: there is no key {key!r}{_nearest(key, allowed)}")


def _nearest(key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(allowed)}"


def read_yaml(path: Path) -> Any:
    if not os.path.lexists(path):
        shipped = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config{_nearest(path.stem, shipped) if shipped else ''}")
    content = read_bytes(path, _MAX_YAML)
    try:
        text = content.decode("utf-8")
        depths = itertools.accumulate((letter in "[{") - (letter in "]}") for letter in text)
        if max(depths, default=0) > _MAX_BRACKETS:
            raise ValueError(f"more than {_MAX_BRACKETS} brackets within each other")
        # A dozen lines of nested aliases would expand to 10^12 values.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{path}: has YAML aliases (*name), which are not read; write the values out")
        values = OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    except Exception as error:  # YAML's errors have no common base class
        raise UserError(f"{path}: not valid YAML ({first_line(error)})") from None
    if not OmegaConf.is_dict(values):
        raise UserError(f"{path}: a config is a mapping of keys to values, such as 'seed: 0'")
    return values


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
