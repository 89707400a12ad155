"""Predictions of other methods from files, to be scored by the protocols: FOLDER/*.npz, any number of files, each with

    names        (M,)             names of the people, as in the data set's records
    vertices     (M, V, 3)        metres, camera frame (x right, y down, z forward); or (M, N, V, 3), N hypotheses
    joints       (M, J, 3)        instead of vertices, or in addition; or (M, N, J, 3)
    joint_names  (J,)             required with joints
    selected     (M,)             optional: index of the hypothesis that the method selects without ground truth

The files together must contain each scored person once. Nothing is unpickled. Translation only matters for humaniflow,
which compares raw SMPL output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.evaluate.protocol_errors import Bodies
from hmdiff.files.reading import ArrayArchive

_ARRAYS = ("vertices", "joints")


class PredictionBatch(NamedTuple):
    bodies: Bodies  # (B, N, ...)
    selected: Tensor | None  # (B,) long


class PredictionFiles:
    """A folder of predictions; the constructor only reads names and shapes.

    Raises:
        UserError: no such folder, no file, a file of another layout, or a person who is predicted twice.
    """

    def __init__(
        self,
        folder: str | Path,
        num_vertices: int,  # of the scored body
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--predictions {self.folder}: no such folder; give one of npz files")
        self.files = sorted(self.folder.glob("*.npz"))
        if not self.files:
            raise UserError(
                f"--predictions {self.folder}: no npz file in it; hmdiff/evaluate/predictions.py says what they hold"
            )
        self.num_vertices = num_vertices
        self.row_of: dict[str, tuple[int, int]] = {}
        self.joint_names: tuple[str, ...] = ()
        self._layout: tuple[tuple[str, ...], int] | None = None
        for number, path in enumerate(self.files):
            self._index_file(number, path)
        self._read = functools.lru_cache(maxsize=2)(self._arrays)

    @property
    def num_hypotheses(self) -> int:
        assert self._layout is not None
        return self._layout[1]

    def fingerprint(self) -> list[list[object]]:
        """Name, size and modification time of each file, to detect changes between runs."""
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]

    def check_names(
        self,
        wanted: Sequence[str],  # people to score
        known: Sequence[str] | None = None,  # all people of the data set; None: `wanted`
    ) -> None:
        """Raises `UserError` naming the first person without a prediction, or the first unknown name."""
        missing = [name for name in wanted if name not in self.row_of]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(wanted)} people have no prediction, the first is "
                f"{missing[0]!r}; predict all of them, or score fewer with --people"
            )
        known_names = set(wanted if known is None else known)
        for name, (file, _) in self.row_of.items():
            if name not in known_names:
                raise UserError(f"{self.files[file]}: {name!r} is nobody of this data; is it the right split?")

    def take(self, names: Sequence[str]) -> PredictionBatch:
        """The predictions for these people. Raises `UserError` naming the first with non-finite values."""
        rows = []
        for name in names:
            file, row = self.row_of[name]
            arrays = self._read(file)
            values = {key: np.asarray(value[row], np.float32) for key, value in arrays.items() if key in _ARRAYS}
            for key, value in values.items():
                if not np.isfinite(value).all():
                    raise UserError(f"{self.files[file]}: {key} of {name!r} hold NaN or infinity; predict it again")
            if "selected" in arrays:
                values["selected"] = arrays["selected"][row]
            rows.append(values)
        stacked: dict[str, Tensor] = {}
        for key in rows[0]:
            stacked[key] = torch.from_numpy(np.stack([values[key] for values in rows]))
            if key in _ARRAYS and stacked[key].dim() == 3:
                stacked[key] = stacked[key][:, None]
        selected = stacked["selected"].long() if "selected" in stacked else None
        return PredictionBatch(Bodies(stacked.get("vertices"), stacked.get("joints"), self.joint_names), selected)

    # -- one file ----------------------------------------------------------------------------------------------------

    def _index_file(self, number: int, path: Path) -> None:
        shapes = _shapes(path)
        if "names" not in shapes:
            raise UserError(f"{path}: no array 'names' in it; found {', '.join(shapes) or 'nothing'}")
        if not set(_ARRAYS) & set(shapes):
            raise UserError(f"{path}: neither vertices nor joints in it; found {', '.join(shapes)}")
        metadata = _load(path, [key for key in ("names", "joint_names", "selected") if key in shapes])
        if metadata["names"].ndim != 1 or metadata["names"].dtype.kind not in "US":
            found = f"{metadata['names'].dtype} {metadata['names'].shape}"
            raise UserError(f"{path}: names: {found} found, text of shape (M,) is expected")
        count = self._check_arrays(path, shapes, len(metadata["names"]))
        self._check_joint_names(path, shapes, metadata)
        layout = (tuple(key for key in (*_ARRAYS, "selected") if key in shapes), count)
        if self._layout not in (None, layout):
            raise UserError(
                f"{path}: {_describe_layout(layout)}, and {self.files[0]} has {_describe_layout(self._layout)}; "
                "all must agree"
            )
        self._layout = layout
        if "selected" in metadata:
            selected = metadata["selected"]
            valid = selected.dtype.kind in "iu" and selected.shape == metadata["names"].shape
            if not valid or (selected < 0).any() or (selected >= count).any():
                raise UserError(f"{path}: selected: whole numbers (M,) from 0 to {count - 1} are expected")
        for row, raw in enumerate(metadata["names"]):
            name = raw.decode() if isinstance(raw, bytes) else str(raw)
            if name in self.row_of:
                file, before = self.row_of[name]
                other = f"{self.files[file]}, row {before}"
                raise UserError(f"{path}, row {row}: {name!r} is predicted twice, also in {other}")
            self.row_of[name] = (number, row)

    def _check_arrays(self, path: Path, shapes: dict[str, tuple[int, ...]], people: int) -> int:
        counts = {}
        for key in _ARRAYS:
            if key not in shapes:
                continue
            shape = shapes[key]
            if len(shape) not in (3, 4) or shape[0] != people or shape[-1] != 3:
                raise UserError(
                    f"{path}: {key} {shape}; (M, P, 3) or (M, N, P, 3) is expected, M = {people} as in names"
                )
            counts[key] = shape[1] if len(shape) == 4 else 1
            if key == "vertices" and shape[-2] != self.num_vertices:
                raise UserError(
                    f"{path}: vertices of {shape[-2]} a mesh, and the body that is scored has {self.num_vertices}; "
                    "give the meshes of that body"
                )
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise UserError(f"{path}: hypotheses: {counts}; vertices and joints need the same number, at least 1")
        return next(iter(counts.values()))

    def _check_joint_names(
        self, path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, np.ndarray]
    ) -> None:
        if "joints" not in shapes:
            return
        if "joint_names" not in metadata or metadata["joint_names"].shape != (shapes["joints"][-2],):
            found = metadata["joint_names"].shape if "joint_names" in metadata else "none"
            raise UserError(f"{path}: joint_names: {found}; {shapes['joints'][-2]} names are expected")
        names = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in metadata["joint_names"])
        if self.joint_names not in ((), names):
            raise UserError(f"{path}: its joint_names are not those of {self.files[0]}; all files must agree")
        self.joint_names = names

    def _arrays(self, file: int) -> dict[str, np.ndarray]:
        assert self._layout is not None
        return _load(self.files[file], list(self._layout[0]))


def _describe_layout(layout: tuple[tuple[str, ...], int] | None) -> str:
    assert layout is not None
    return f"{', '.join(layout[0])} of {layout[1]} hypotheses"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an npz file, read from their headers."""
    archive = ArrayArchive(path)
    return {name: archive.shape(name) for name in archive.names}


def _load(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    archive = ArrayArchive(path)
    return {key: archive.read(key) for key in keys}
