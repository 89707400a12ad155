"""Safe loading of a saved model: config.json and safetensors, both untrusted.

The weights are checked against the model that the config describes: names, shapes, dtypes, finite values, and mesh
indices in range. Unchecked, a corrupt file could give a plausible but wrong body, or exhaust the memory.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.files.reading import read_json
from hmdiff.models.limits import check_hyperparameters
from hmdiff.models.recovery import MeshRecoveryModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
_MEND = "save or copy the checkpoint again"
_BACKBONE = re.compile(r"[\w.\-]{1,100}")  # timm names without a prefix such as hf-hub:, which would download
_SUM = 0.02  # tolerance on the sum of interpolation weights; half precision rounds it by 0.001


def load_model(folder: Path) -> MeshRecoveryModel:
    """The model in eval mode, on the CPU. Raises `UserError` naming the file and the invalid value or weight."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; the checkpoint is not whole, {_MEND}")
    config = _read_config(folder / CONFIG, (folder / WEIGHTS).stat().st_size)
    try:
        model = MeshRecoveryModel.from_config({**config, "pretrained": False})
        from safetensors.torch import load_file

        state = load_file(folder / WEIGHTS)
    except UserError:
        raise
    except Exception as error:  # safetensors, timm and torch raise their own error types
        reason = str(error).split("\n")[0][:160] or type(error).__name__
        raise UserError(f"{folder}: cannot be read as a model ({reason}); {_MEND}") from None
    check_state(folder / WEIGHTS, model.state_dict(), state)
    check_topology(folder / WEIGHTS, state, model.config.num_coarse)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _read_config(path: Path, size: int) -> dict[str, Any]:
    config = read_json(path, 1 << 20, _MEND)
    if not isinstance(config, dict) or config.get("_class_name") != "MeshRecoveryModel":
        kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: holds a {kind!r:.80}, not a MeshRecoveryModel of hmdiff")
    signature = inspect.signature(MeshRecoveryModel.__init__).parameters
    check_hyperparameters(config, str(path), {name: about.default for name, about in signature.items()})
    if not _BACKBONE.fullmatch(str(config.get("backbone", "joints"))):
        raise UserError(f"{path}: backbone {config['backbone']!r:.80} is not a name of timm's own; {_MEND}")
    # A lower bound on the size of such a model at one byte a weight, checked before building it.
    wide, deep = config.get("width", 0), config.get("depth", 0) * config.get("stack", 1)
    if 4 * (deep * wide**2 + config.get("encoder_depth", 0) * config.get("encoder_width", 0) ** 2) > size:
        raise UserError(f"{path}: describes a larger model than {WEIGHTS} holds ({size:,} bytes); {_MEND}")
    return config


def check_state(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises `UserError` naming the first weight that is missing, unknown, of a wrong shape or dtype, or not finite."""
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            what = "lacks" if name not in found else "has, and the model has not,"
            raise UserError(f"{path}: {what} the weight {name!r:.100}; {_MEND}")
    for name, value in found.items():
        mine = wanted[name]
        if value.shape != mine.shape:
            raise UserError(f"{path}: {name} is {tuple(value.shape)}, {tuple(mine.shape)} expected; {_MEND}")
        if _kind(value) != _kind(mine):
            raise UserError(f"{path}: {name} is of {value.dtype}, {_kind(mine)} expected; {_MEND}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: {name} holds values that are not finite; {_MEND}")


def _kind(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "truth values"
    return "floats" if value.is_floating_point() else "complex numbers" if value.is_complex() else "integers"


def check_topology(
    path: Path,
    state: dict[str, Tensor],
    num_coarse: int,  # C
) -> None:
    """Check that mesh indices are in range and use every coarse vertex. Raises `UserError` naming the first fault."""

    def refuse(name: str, what: str) -> UserError:
        return UserError(f"{path}: {name} {what}; {_MEND}")

    ids, index, weight = (state.get(name) for name in ("coarse_ids", "upsample_index", "upsample_weight"))
    if ids is not None and index is not None:
        if len(ids.unique()) != num_coarse or int(ids.min()) < 0 or int(ids.max()) >= len(index):
            raise refuse("coarse_ids", f"are not {num_coarse} different vertices of {len(index)}")
        if int(index.min()) < 0 or int(index.max()) >= num_coarse or len(index.unique()) != num_coarse:
            raise refuse("upsample_index", f"does not point to each of the {num_coarse} coarse vertices")
    if ids is not None and index is None and (len(ids.unique()) != num_coarse or int(ids.min()) < 0):
        raise refuse("coarse_ids", f"are not {num_coarse} different vertices")  # part tokens: no upsample_index
    if weight is not None and not bool(((weight.double().sum(-1) - 1).abs() < _SUM).all()):
        raise refuse("upsample_weight", "has rows that do not sum to 1")
    for name, value in state.items():
        if name.startswith("denoisers.") and name.endswith((".patches", ".place")):
            flat = value.flatten().long()
            if not torch.equal(flat.sort().values, torch.arange(num_coarse)):
                raise refuse(name, f"is not an order of the {num_coarse} coarse vertices")
            patches = state.get(name.removesuffix("place") + "patches")
            if name.endswith(".place") and patches is not None and not torch.equal(flat, patches.flatten().argsort()):
                raise refuse(name, "is not the order of its patches")
