"""Convert a user's SMPL, SMPL-X and MANO files to plain npz once: pickles are read once, and loading takes a tenth.

`hmdiff prepare licensed SOURCE`. The npz has the arrays for skinning under their published names, in float32, with the
shape components that `load_body` uses, so that other programs can read it. Regressors are copied next to it. Nothing
else writes a licensed body to disk.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.body.body import Body, load_body
from hmdiff.body.files import (
    FOLDER_VARIABLE,
    LICENSED,
    body_folder,
    files_by_name,
    licensed_kind,
    own_name,
    published_rank,
    raw_arrays,
)
from hmdiff.body.mesh_cache import LEVELS, load_hierarchy
from hmdiff.body.regressors import REGRESSORS
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file, make_folder

_NEEDED = ("v_template", "shapedirs", "posedirs", "weights", "J_regressor")
_MARK = "converted_from"  # key in converted files: the name of the original file
_HANDS = ("hands_mean", "hands_meanl", "hands_meanr", "hands_components", "hands_componentsl", "hands_componentsr")


def prepare_licensed(
    source: str | Path,  # a body file, a folder of them, or a zip archive as published
    output: str | Path | None = None,  # None: the folder HMDIFF_BODY_DIR
    tell: Callable[[str], None] = print,  # called for each finished file
) -> dict[str, str]:  # written name -> source
    """Convert every licensed body and copy every regressor in the source; decimate each body's mesh and cache it.

    An npz that was not written by this function belongs to the user, and is never overwritten.

    Raises:
        UserError: nothing found, a file is damaged, or the output cannot be written.
    """
    source, output = Path(source), Path(output) if output is not None else body_folder()
    if output is None:
        raise UserError(f"no place to write to: give --output FOLDER, or set {FOLDER_VARIABLE}")
    with tempfile.TemporaryDirectory() as scratch:
        files = _licensed_files(source, Path(scratch))
        make_folder(output)
        written = {}
        for name, path in files.items():
            if name.endswith(".npy"):
                _copy(path, output / name)
                tell(f"{path.name} -> {output / name}")
                written[name] = path.name
                continue
            if not _may_write(output / name):
                tell(f"{output / name}: is an npz already, left as it is")
                continue
            body = convert_body(path, output / name)
            hierarchy = load_hierarchy(body)
            levels = " -> ".join(map(str, (body.num_vertices, *LEVELS.get(body.num_vertices, ()))))
            written[name] = path.name
            tell(f"{path.name} -> {output / name}: {levels} vertices (least {hierarchy.num_minimal})")
    return written


def convert_body(
    source: Path,  # .pkl or .npz as published
    output: Path,  # .npz
) -> Body:
    """Convert one file; returns the body loaded from the result. Raises `UserError` for a file that is not a body."""
    body = load_body(source)  # validated before anything is written
    data = raw_arrays(source)
    arrays: dict[str, Any] = {name: np.asarray(data[name], np.float32) for name in _NEEDED if name in data}
    arrays["shapedirs"] = arrays["shapedirs"][:, :, : body.num_betas]
    if body.expression_dirs is not None:
        arrays["expressiondirs"] = body.expression_dirs.cpu().numpy()
    arrays["kintree_table"] = np.asarray(data["kintree_table"], np.int64)
    arrays["f"] = np.asarray(data["f"], np.int64).astype(np.uint32)
    arrays |= {name: np.asarray(data[name], np.float32) for name in _HANDS if name in data}
    arrays[_MARK] = np.array(source.name)
    with atomic_file(output) as temporary:
        np.savez(temporary, **arrays)
    return load_body(output)


def _may_write(output: Path) -> bool:
    if not output.exists():
        return True
    try:
        with np.load(output, allow_pickle=False) as archive:
            return _MARK in archive.files and Path(str(archive[_MARK])).suffix.lower() == ".pkl"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False


def _licensed_files(source: Path, scratch: Path) -> dict[str, Path]:  # name to write -> file
    if source.is_dir():
        there = files_by_name(source)
    elif source.suffix.lower() == ".zip":
        there = _unpack(source, scratch)
    elif source.is_file():
        there = {source.name.lower(): source}
    else:
        raise UserError(f"{source}: no such file or folder; give a body file, a folder of them, or a published zip")
    found: dict[str, Path] = {}
    for name, path in sorted(there.items()):
        if name in _regressor_files():
            found[_regressor_files()[name]] = path
        elif (licensed := licensed_kind(name)) is not None and path.suffix.lower() in (".npz", ".pkl"):
            new = own_name(*licensed)
            if new not in found or published_rank(*licensed, name) < published_rank(*licensed, found[new].name):
                found[new] = path
    if not found:
        raise UserError(
            f"{source}: no body and no regressor under a published name, such as SMPL_NEUTRAL.pkl, "
            f"basicModel_f_lbs_10_207_0_v1.0.0.pkl, SMPLX_MALE.npz or MANO_RIGHT.pkl ({', '.join(LICENSED)})"
        )
    return found


def _regressor_files() -> dict[str, str]:
    return {regressor.file.lower(): regressor.file for regressor in REGRESSORS.values()}


def _unpack(source: Path, scratch: Path) -> dict[str, Path]:
    """Extracts only files of known names, each under that name: paths in the archive are not followed."""
    found = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                name = Path(member.filename).name
                if member.is_dir() or (licensed_kind(name) is None and name.lower() not in _regressor_files()):
                    continue
                with archive.open(member) as content, open(scratch / name, "wb") as target:
                    shutil.copyfileobj(content, target)
                found[name.lower()] = scratch / name
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
        raise UserError(f"{source}: not a readable zip archive ({error}); download it again") from None
    return found


def _copy(source: Path, output: Path) -> None:
    if output.exists() and output.samefile(source):
        return
    with atomic_file(output) as temporary:
        shutil.copyfile(source, temporary)
