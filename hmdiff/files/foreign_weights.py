"""Third-party weights: .pth of torch, mmpose or torchvision, and .safetensors. Read as data; no pickle is executed."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.errors import UserError


class _Inert:
    """Replaces an object whose class is not loaded: accepts any state and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None: ...


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:  # weights, meta
    """The weights of a .pth or .safetensors file and its metadata (`dataset_meta`), on the CPU.

    For a .pth, torch's restricted unpickler builds tensors, containers and numpy arrays; everything else (such as a
    training history) becomes an inert object. For a .safetensors, `dataset_meta` is JSON in the header.

    Raises:
        UserError: another file type, damaged, or without weights.
    """
    path = Path(path)
    try:
        stored, meta = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
        stored = {name.removeprefix("module."): value for name, value in stored.items() if isinstance(value, Tensor)}
    except UserError:
        raise
    except Exception as error:  # torch, zipfile, safetensors and pickle raise various types
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); download or save it again") from None
    if not stored:
        raise UserError(f"{path}: no weights in it; give a checkpoint with a `state_dict`")
    return stored, meta


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        stored = {name: file.get_tensor(name) for name in file.keys()}
    return stored, {key: json.loads(text) for key, text in header.items() if key == "dataset_meta"}


def _read_pth(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import numpy as np

    arrays = {"_reconstruct": np.array(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    known: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bhilBHILefdSU"}]
    known += [(arrays[name], f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in arrays]
    with contextlib.suppress(ValueError):  # files in torch's format before 1.6 cannot be listed
        allowed = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}" for entry in known}
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known += [(type("_Inert", (_Inert,), {}), name) for name in names if name not in allowed]
    with warnings.catch_warnings(record=True), torch.serialization.safe_globals(known):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a checkpoint with a `state_dict` is expected")
    stored, meta = content.get("state_dict", content), content.get("meta", {})
    return dict(stored), meta if isinstance(meta, dict) else {}
