"""Shared setup of mmpose and mmdet: imports, model aliases, weights. Our choice.

mmcv-lite has no compiled operators, but mmpose's modules import them: a stand-in module provides them. A .py config is
a program that mmengine executes: use only trusted configs. Checkpoints are read as data and never executed.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmdiff.errors import UserError
from hmdiff.files.foreign_weights import read_checkpoint

INSTALL = "uv sync --extra mmpose"
# Options that provide a model's files. The scope is mmengine's name of a package.
OPTIONS = {
    "mmpose": ("--pose", "--pose-checkpoint"),
    "mmdet": ("--detector", "--detector-checkpoint"),
    "mmseg": ("--masks", "--masks-checkpoint"),
}


def _nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """mmcv's operator through torchvision; `offset` 1 includes both end pixels of a box."""
    from torchvision.ops import nms

    kept: Tensor = nms(torch.cat([bboxes[:, :2], bboxes[:, 2:] + offset], 1), scores, iou_threshold)
    return kept


def _missing_operator(name: str) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> Any:
        raise UserError(
            f"this model needs {name!r} of the full mmcv build, which mmcv-lite lacks; install mmcv 2.1 in its place, "
            "or take a model without it (HRNet, ResNet, RTMPose; RTMDet to detect)"
        )

    return refuse


class _StandIn(types.ModuleType):
    """Replaces `mmcv._ext` during import: provides every operator, most of which raise an error when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nms if name == "nms" else _missing_operator(name)


@functools.cache
def import_openmmlab(name: str) -> types.ModuleType:
    """Import a module such as `mmpose.apis`; takes seconds the first time.

    Raises:
        UserError: the module or one of its dependencies is not installed.
    """
    try:
        with quiet():
            import mmcv

            extension = f"{mmcv.__name__}._ext"
            if importlib.util.find_spec(extension) is not None:
                return importlib.import_module(name)
            sys.modules[extension] = _StandIn(extension)
            try:
                return importlib.import_module(name)
            finally:
                # mmengine takes this module's presence for the full mmcv build.
                sys.modules.pop(extension, None)
    except ImportError as error:
        package, missing = name.split(".")[0], error.name or str(error)
        extra = f"{INSTALL} --extra mmseg" if package == "mmseg" else INSTALL
        how = f"install the extra {extra.split()[-1]}: {extra}" if package in OPTIONS else "install it"
        raise UserError(f"{package}: {missing} is not installed; {how}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and logs that these packages emit in normal use."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Record instead of filtering: these packages install warning filters of their own.
        with warnings.catch_warnings(record=True):
            yield
    finally:
        logging.disable(previous)


# ---- configs ----


def find_model(
    name: str | Path,  # a config file, an alias such as "human", or the name of a shipped config
    scope: str,  # "mmpose", "mmdet" or "mmseg"
) -> tuple[Path, str | None]:  # the config, and where its weights can be downloaded
    """The config file, given directly or by mmpose's model list. Raises `UserError` with the nearest names."""
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{name}: is a folder; name the config in it")
    if path.is_file():
        return path, None
    if path.suffix in (".py", ".json", ".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"{name}: no such config; give a config of {scope}, or one of its aliases such as 'human'")
    import_openmmlab(f"{scope}.apis")
    models, aliases = _models(scope)
    if scope == "mmdet" and str(name) == "human":
        from mmpose.apis.inferencers.utils.default_det_models import default_det_models

        return Path(default_det_models["human"]["model"]), default_det_models["human"]["weights"]
    full = aliases.get(str(name), str(name))
    if full not in models:
        near = difflib.get_close_matches(str(name), [*aliases, *models], 1, cutoff=0)[0]
        raise UserError(f"{name}: neither a config file nor a model that {scope} knows; did you mean {near!r}?")
    return models[full]


@functools.cache
def _models(scope: str) -> tuple[dict[str, tuple[Path, str | None]], dict[str, str]]:
    """Every model with its config and weights, and every alias with its model, as listed by the package."""
    from mmengine.infer import BaseInferencer

    folder = BaseInferencer._get_repo_or_mim_dir(scope)
    models: dict[str, tuple[Path, str | None]] = {}
    aliases: dict[str, str] = {}
    for entry in BaseInferencer._get_models_from_metafile(folder):
        if "Config" not in entry:
            continue
        # Some packages list another config folder than the shipped `configs`.
        models[entry["Name"]] = Path(folder, entry["Config"]), entry.get("Weights")
        alias = entry.get("Alias", [])
        aliases.update(dict.fromkeys([alias] if isinstance(alias, str) else alias, entry["Name"]))
    return models, aliases


def read_config(path: str | Path) -> Any:
    """An mmengine `Config` from .py, .json or .yaml. Raises `UserError` if it is damaged or incomplete."""
    from mmengine.config import Config

    try:
        with quiet():
            return Config.fromfile(str(path))
    except ImportError as error:
        raise UserError(f"{path}: needs what is not installed ({error}); install it, or take another config") from None
    except Exception as error:  # a config is a program and may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be read as a config ({reason}); give one of mmpose or mmdet") from None


# ---- weights ----


def find_checkpoint(
    model: str,  # the user's name of the model
    checkpoint: str | Path | None,  # a file, a URL, or None
    weights: str | None,  # the package's URL
    scope: str,
) -> Path:
    """The weights file; a URL is downloaded to torch's cache.

    Raises:
        UserError: no such file, no known URL, or a failed download; names the file and the option to pass it.
    """
    option = OPTIONS[scope][1]
    if checkpoint is not None and "://" not in str(checkpoint):
        if not Path(checkpoint).is_file():
            raise UserError(f"{checkpoint}: no such checkpoint; give the weights of {model} by {option} FILE")
        return Path(checkpoint)
    address = weights if checkpoint is None else str(checkpoint)
    if address is None:
        raise UserError(f"{model}: a config without weights; give its .pth or .safetensors by {option} FILE")
    place = Path(torch.hub.get_dir(), "checkpoints", address.rsplit("/", 1)[-1])
    if place.is_file():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # File names end with the start of the content's SHA-256 (OpenMMLab's convention).
        torch.hub.download_url_to_file(address, str(place), progress=sys.stderr.isatty())
    except Exception as error:  # socket, HTTP, TLS or disk errors
        raise UserError(
            f"{model}: its weights could not be downloaded from {address} ({error}); download {place.name} where there "
            f"is a network and give it by {option} FILE, or put it into {place.parent}"
        ) from None
    return place


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:  # the checkpoint's meta
    """Load a checkpoint's weights into a model.

    Raises:
        UserError: the file is damaged, or its weights belong to another model.
    """
    stored, meta = read_checkpoint(path)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    try:
        with quiet():
            missing = [
                name
                for name in model.load_state_dict(stored, strict=False).missing_keys
                if not name.endswith("num_batches_tracked")
            ]
    except RuntimeError:  # sizes differ
        wrong = [name for name, value in stored.items() if name in wanted and wanted[name] != value.shape]
        missing = wrong or list(wanted)
    if missing:
        raise UserError(
            f"{path}: not the weights of this config: {len(missing)} of {len(wanted)} are missing or of another size, "
            f"such as {missing[0]}; give the checkpoint that was trained with it"
        )
    return meta
