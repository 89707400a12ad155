"""Published joint regressors for SMPL's mesh: the user's files, found by name and validated, never shipped.

h36m: `J_regressor_h36m.npy` of HMR and SPIN (arXiv 1909.12828), rows in the order of `skeletons.SPIN_H36M17`.
h36m_correct: `J_regressor_h36m_correct.npy` of METRO (arXiv 2012.09760), in the order of `skeletons.H36M17`.
extra: `J_regressor_extra.npy` of SPIN, nine joints of LSP, MPII and Human3.6M.
The first two are not interchangeable: each belongs to the joint maps of its protocol (`hmdiff.evaluate.protocols`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.files import FOLDER_VARIABLE, body_folder, files_by_name
from hmdiff.errors import UserError
from hmdiff.files.reading import ArrayArchive

SMPL_VERTICES = 6890


class Regressor(NamedTuple):
    file: str
    joints: int
    source: str  # where its authors publish it


REGRESSORS = {
    "h36m": Regressor("J_regressor_h36m.npy", 17, "the data of SPIN (github.com/nkolot/SPIN, fetch_data.sh)"),
    "h36m_correct": Regressor(
        "J_regressor_h36m_correct.npy",
        17,
        "METRO or Mesh Graphormer (github.com/microsoft/MeshTransformer, metro/modeling/data)",
    ),
    "extra": Regressor("J_regressor_extra.npy", 9, "the data of SPIN (github.com/nkolot/SPIN, fetch_data.sh)"),
}


def find_regressor_file(
    name: str,  # h36m, h36m_correct or extra
) -> Path:
    """The user's file in or below HMDIFF_BODY_DIR.

    Raises:
        UserError: an unknown name, or the file is not there; says where to get it and where to put it.
    """
    if name not in REGRESSORS:
        raise UserError(f"regressor {name!r} is not known; there are {', '.join(REGRESSORS)}")
    wanted, folder = REGRESSORS[name], body_folder()
    if folder is not None and (found := files_by_name(folder).get(wanted.file.lower())):
        return found
    where = f"not in {folder} ({FOLDER_VARIABLE})" if folder else f"{FOLDER_VARIABLE} is not set"
    raise UserError(
        f"{wanted.file} not found: {where}; it comes with {wanted.source}: put it at "
        f"{Path(folder or '<folder>') / wanted.file} and set {FOLDER_VARIABLE}={folder or '<folder>'}"
    )


def load_regressor(
    name: str,  # h36m, h36m_correct or extra
    num_vertices: int = SMPL_VERTICES,  # of the target mesh
) -> Tensor:  # (J, V) float32: joints = regressor @ vertices
    """A published regressor from the user's file.

    Raises:
        UserError: missing, not an npy file of numbers, or not of the published shape.
    """
    path = find_regressor_file(name)
    archive = ArrayArchive(path, mend="download it again")
    if not archive.single:
        raise UserError(f"{path}: an npz archive found, an npy file expected; download it again")
    values, expected = archive.read(""), (REGRESSORS[name].joints, num_vertices)
    if values.dtype.kind not in "fiu" or values.shape != expected:
        found = f"{values.dtype} {values.shape}"
        raise UserError(f"{path}: {found} found, numbers of shape {expected} expected; download it again")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: it holds values that are not finite; download it again")
    return torch.from_numpy(values.astype(np.float32))
