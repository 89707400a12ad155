"""Heatmaps on disk: npz with `heatmaps` (J, H, W) or (B, J, H, W), `joints` names, `center`, `side`.

`center` and `side` give the square crop in photo pixels; heatmap pixel (i, j) has its centre at center + ((j+.5)/W -
.5, (i+.5)/H - .5) * side. The other fields of a `Crop` (`rotation`, `photo_size`, `focal`, `principal_point`) are
optional. Nothing is unpickled.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import torch

from hmdiff.body.skeletons import JOINT_SETS
from hmdiff.errors import UserError
from hmdiff.files.reading import read_npz
from hmdiff.files.storage import atomic_file
from hmdiff.heatmaps.crop import Crop
from hmdiff.heatmaps.distribution import Heatmaps, heatmaps_from_values

MAX_BYTES = 1 << 30  # all arrays together: 200 people in a photo with 133 maps of 96 x 96 take 980 MB
_KEYS = ("heatmaps", "center", "side")
_CAMERA = ("rotation", "photo_size", "focal", "principal_point")  # optional fields of the crop
_MEND = "write it again with numpy.savez_compressed"
# Joint sets that their number of joints identifies; others need names.
_BY_COUNT = {17: "coco17", 25: "openpose25", 26: "halpe26"}


def load_heatmaps(path: str | Path) -> Heatmaps:
    """Read the heatmaps of one or several people, for any known joint set, resampled to 64 x 64.

    Raises:
        UserError: not an npz, a missing key, pickled arrays, wrong shapes, NaN, all zero, unknown joints.
    """
    path = Path(path)
    arrays = read_npz(path, (*_KEYS, *_CAMERA, "joints", "valid"), MAX_BYTES, _MEND)
    for key in _KEYS:
        if key not in arrays:
            found = ", ".join(arrays) or "none"
            raise UserError(f"{path}: no array {key!r} (found: {found}); it needs {', '.join(_KEYS)}")
        if arrays[key].dtype.kind not in "fiu":
            raise UserError(f"{path}: array {key!r} must hold numbers, {arrays[key].dtype} found")
    values = torch.from_numpy(arrays["heatmaps"].astype(np.float32))
    if values.dim() == 3:
        values = values[None]
    if values.dim() != 4 or values.shape[2] != values.shape[3] or 0 in values.shape:
        raise UserError(
            f"{path}: `heatmaps` has shape {arrays['heatmaps'].shape}; (J, S, S) or (B, J, S, S) expected, "
            "over a square crop"
        )
    batch, joints = values.shape[:2]
    names = _joint_names(path, arrays, joints)
    center, side = (torch.from_numpy(arrays[key].astype(np.float32)) for key in ("center", "side"))
    if center.numel() != 2 * batch or side.numel() != batch:
        raise UserError(
            f"{path}: `center` {tuple(center.shape)} and `side` {tuple(side.shape)} must hold 2 and 1 numbers "
            f"for each of {batch} people"
        )
    try:
        heatmaps = heatmaps_from_values(values, names, center.reshape(batch, 2), side.reshape(batch))
        crop = _crop(arrays, heatmaps.crop)
        if "valid" not in arrays:
            return Heatmaps(heatmaps.values, heatmaps.valid, crop, heatmaps.names)
        if arrays["valid"].shape != (batch, len(heatmaps.names)) or arrays["valid"].dtype != bool:
            raise UserError(f"`valid` must be a bool array of shape ({batch}, {len(heatmaps.names)})")
        valid = torch.from_numpy(arrays["valid"]) & heatmaps.valid
        return Heatmaps(heatmaps.values, valid, crop, heatmaps.names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _crop(arrays: dict[str, np.ndarray], crop: Crop) -> Crop:
    found = {}
    for name in _CAMERA:
        if name in arrays:
            wanted = tuple(getattr(crop, name).shape)
            if arrays[name].dtype.kind not in "fiu" or arrays[name].shape != wanted:
                raise UserError(f"`{name}` must hold numbers of shape {wanted}, {arrays[name].shape} found")
            found[name] = torch.from_numpy(arrays[name].astype(np.float32))
    return Crop.of(crop.center, crop.side, **found)


def _joint_names(path: Path, arrays: dict[str, np.ndarray], joints: int) -> tuple[str, ...]:
    if "joints" not in arrays:
        if joints not in _BY_COUNT:
            raise UserError(f"{path}: {joints} heatmaps without names; add an array `joints` with their names")
        return JOINT_SETS[_BY_COUNT[joints]]
    given = arrays["joints"]
    if given.dtype.kind != "U" or given.ndim != 1:
        raise UserError(f"{path}: `joints` must be a list of names, an array of {given.dtype} was found")
    names = tuple(str(name) for name in given)
    if len(names) != joints:
        raise UserError(f"{path}: {joints} heatmaps but {len(names)} joint names")
    known = sorted({name for names_of_set in JOINT_SETS.values() for name in names_of_set})
    for index, name in enumerate(names):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            raise UserError(f"{path}: joint {name!r} is unknown; the nearest known name is {nearest!r}")
        if name in names[:index]:
            raise UserError(f"{path}: joint {name!r} is named twice")
    return names


def save_heatmaps(path: str | Path, heatmaps: Heatmaps) -> None:
    """Write an npz that `load_heatmaps` reads back losslessly. Raises `UserError` if it cannot be written."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(
            handle,
            heatmaps=heatmaps.values.detach().cpu().numpy(),
            valid=heatmaps.valid.cpu().numpy(),
            joints=np.array(heatmaps.names),
            **{name: value.detach().cpu().numpy() for name, value in vars(heatmaps.crop).items()},
        )
