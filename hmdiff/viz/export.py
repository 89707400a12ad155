"""Meshes and arrays to files: npz for programs, obj, ply and glb for viewers. All writes are atomic.

The camera frame has y down and z forward; viewers have y up and look along -z. obj, ply and glb are therefore written
after a half turn about x, (x, y, z) -> (x, -y, -z): a proper rotation, so nothing is mirrored and the faces keep their
winding. A body in the canonical frame (y up already) is written with ``y_up=False``. npz keeps the arrays as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.files.storage import atomic_file

if TYPE_CHECKING:
    import trimesh

Array = ArrayLike | Tensor
CAMERA_Y_UP = "x right, y up, z towards the viewer: the photo's camera after a half turn about x"
HALF_TURN = np.array([1.0, -1.0, -1.0])


def _numpy(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _mesh(
    vertices: Array,  # (V, 3)
    faces: Array,  # (F, 3)
    colours: Array | None,  # (3,) or (V, 3) RGB 0..1
    y_up: bool,
    material: bool = False,  # one colour as a matt material, which viewers show alike
) -> trimesh.Trimesh:
    import trimesh

    points = _numpy(vertices).astype(np.float64)
    # process=False: trimesh would merge and reorder vertices, and index i would no longer be vertex i.
    mesh = trimesh.Trimesh(points * HALF_TURN if y_up else points, _numpy(faces), process=False)
    if colours is not None and material and _numpy(colours).ndim == 1:
        from trimesh.visual.material import PBRMaterial

        rgba = [*map(float, _numpy(colours).clip(0, 1)), 1.0]
        matt = PBRMaterial(baseColorFactor=rgba, metallicFactor=0.0, roughnessFactor=0.8, doubleSided=False)
        mesh.visual = trimesh.visual.TextureVisuals(material=matt)
    elif colours is not None:
        rgb = np.broadcast_to((_numpy(colours).clip(0, 1) * 255 + 0.5).astype(np.uint8), (len(points), 3))
        mesh.visual = trimesh.visual.ColorVisuals(
            mesh, vertex_colors=np.pad(rgb, ((0, 0), (0, 1)), constant_values=255)
        )
    return mesh


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
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **plain)


def save_obj(
    path: str | Path,
    vertices: Array,  # (V, 3) metres, camera frame
    faces: Array,  # (F, 3)
    y_up: bool = True,  # turn to the viewers' frame
) -> None:
    """One mesh as Wavefront obj, vertices in their order, eight decimals."""
    from trimesh.exchange.obj import export_obj

    text = export_obj(_mesh(vertices, faces, None, y_up), include_normals=False, write_texture=False, digits=8)
    _write(path, f"# hmdiff: metres; {CAMERA_Y_UP if y_up else 'y up, as given'}\n{text}")


def save_ply(
    path: str | Path,
    vertices: Array,  # (V, 3) metres, camera frame
    faces: Array,  # (F, 3)
    colours: Array | None = None,  # (3,) or (V, 3) RGB 0..1
    y_up: bool = True,
) -> None:
    """One mesh as binary ply, with colours when given."""
    from trimesh.exchange.ply import export_ply

    _write(path, export_ply(_mesh(vertices, faces, colours, y_up), vertex_normal=False))


def save_glb(
    path: str | Path,
    meshes: Mapping[str, tuple[Array, Array]],  # name -> vertices (V, 3) metres in the camera frame, faces (F, 3)
    colours: Mapping[str, Array] | Sequence[Array] | None = None,  # by name or in order: (3,) or (V, 3) RGB 0..1
    y_up: bool = True,
    origin: str = "",  # in words: the pelvis, or the camera
) -> None:
    """Several meshes in one binary glTF with normals, each a node of its own name that a viewer can switch off.

    One colour becomes a matt material. The scene's `extras` say in which frame the meshes are.
    """
    import trimesh

    frame = CAMERA_Y_UP if y_up else "y up, as given"
    scene = trimesh.Scene(metadata={"frame": f"metres; {frame}{f'; {origin}' if origin else ''}"})
    for position, (name, (vertices, faces)) in enumerate(meshes.items()):
        if colours is None:
            colour = None
        else:
            colour = colours[name] if isinstance(colours, Mapping) else colours[position]
        scene.add_geometry(_mesh(vertices, faces, colour, y_up, True), node_name=name, geom_name=name)
    _write(path, scene.export(file_type="glb", include_normals=True))
