"""Meshes and arrays to files: npz for programs, obj, ply and glb for viewers. All writes are atomic.

The camera frame has y down and z forward; viewers use y up and look along -z. obj, ply and glb are therefore rotated by
half a turn about x, (x, y, z) -> (x, -y, -z): a proper rotation, so nothing is mirrored and the faces keep their
winding. Use ``y_up=False`` for a body in the canonical frame, which is y up already. npz keeps the arrays unchanged.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.files.storage import atomic_file
from hmdiff.viz.glb import Glb

Array = ArrayLike | Tensor
CAMERA_Y_UP = "x right, y up, z towards the viewer: the photo's camera after a half turn about x"
HALF_TURN = np.array([1.0, -1.0, -1.0])


def _numpy(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _turned(
    vertices: Array,  # (V, 3)
    y_up: bool,
) -> np.ndarray:  # (V, 3) float32
    points = _numpy(vertices).astype(np.float32)
    return points * HALF_TURN.astype(np.float32) if y_up else points


def _bytes(colours: Array, count: int) -> np.ndarray:  # (count, 4) uint8 RGBA
    rgb = np.broadcast_to((_numpy(colours).clip(0, 1) * 255 + 0.5).astype(np.uint8), (count, 3))
    return np.pad(rgb, ((0, 0), (0, 1)), constant_values=255)


def _write(path: str | Path, content: Any) -> None:
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def save_npz(
    path: str | Path,
    **arrays: Array,  # tensors or arrays, any frame
) -> None:
    """Arrays by name, compressed; read them with ``numpy.load(path, allow_pickle=False)``."""
    plain = {name: _numpy(values) for name, values in arrays.items()}
    for name, values in plain.items():
        if values.dtype.hasobject:
            raise TypeError(f"{name}: an array of objects cannot be saved without pickle")
    # As np.savez_compressed with a lower level: floats compress as well, in a quarter of the time.
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, values in plain.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as handle:
                np.lib.format.write_array(handle, np.asanyarray(values), allow_pickle=False)


def save_obj(
    path: str | Path,
    vertices: Array,  # (V, 3) metres, camera frame
    faces: Array,  # (F, 3)
    y_up: bool = True,  # rotate to the viewers' frame
) -> None:
    """One mesh as Wavefront obj, in vertex order, eight decimals."""
    points, corners = _turned(vertices, y_up).astype(np.float64), _numpy(faces) + 1
    text = f"# hmdiff: metres; {CAMERA_Y_UP if y_up else 'y up, as given'}\n"
    text += ("v %.8f %.8f %.8f\n" * len(points)) % tuple(points.ravel().tolist())
    text += ("f %d %d %d\n" * len(corners)) % tuple(corners.ravel().tolist())
    _write(path, text)


def save_ply(
    path: str | Path,
    vertices: Array,  # (V, 3) metres, camera frame
    faces: Array,  # (F, 3)
    colours: Array | None = None,  # (3,) or (V, 3) RGB 0..1
    y_up: bool = True,
) -> None:
    """One mesh as binary ply, optionally with colours."""
    from trimesh import Trimesh
    from trimesh.exchange.ply import export_ply

    points = _turned(vertices, y_up)
    tints = None if colours is None else _bytes(colours, len(points))
    # process=False: otherwise trimesh merges and reorders vertices.
    mesh = Trimesh(points, _numpy(faces), vertex_colors=tints, process=False)
    _write(path, export_ply(mesh, vertex_normal=False))


def save_glb(
    path: str | Path,
    meshes: Mapping[str, tuple[Array, Array]],  # name -> vertices (V, 3) metres in the camera frame, faces (F, 3)
    colours: Mapping[str, Array] | Sequence[Array] | None = None,  # by name or in order: (3,) or (V, 3) RGB 0..1
    y_up: bool = True,
    origin: str = "",  # description of the origin: the pelvis, or the camera
) -> None:
    """Several meshes in one binary glTF with normals, each a named node that a viewer can hide.

    A single colour becomes a matt material. The scene's `extras` describe the meshes' frame. Faces shared by several
    meshes are written once.
    """
    frame = CAMERA_Y_UP if y_up else "y up, as given"
    file = Glb(f"metres; {frame}{f'; {origin}' if origin else ''}")
    for position, (name, (vertices, faces)) in enumerate(meshes.items()):
        colour = None
        if colours is not None:
            colour = _numpy(colours[name] if isinstance(colours, Mapping) else colours[position])
        if colour is not None and colour.ndim > 1:
            colour = _bytes(colour, len(colour))
        file.add(name, _turned(vertices, y_up), faces, colour)
    _write(path, file.content())
