"""Static meshes as binary glTF 2.0 (Khronos): a JSON header and one buffer. Animated bodies: `hmdiff.viz.animation`.

V vertices, F faces.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hmdiff.viz.renderer import vertex_normals

_MAGIC, _VERSION, _JSON, _BINARY = 0x46546C67, 2, 0x4E4F534A, 0x004E4942
_COMPONENTS = {"float32": 5126, "uint8": 5121, "uint16": 5123, "uint32": 5125}
_VERTICES, _INDICES = 34962, 34963  # purposes of buffer views


class Glb:
    """A scene to which meshes are added; `content` is the file."""

    def __init__(
        self,
        frame: str,  # description of units and axes, stored in the scene's extras
    ) -> None:
        self._buffer = bytearray()
        self._indices: list[tuple[Any, int, int]] = []  # faces, number of vertices, their accessor
        self._tree: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "hmdiff"},
            "scene": 0,
            "scenes": [{"nodes": [], "extras": {"frame": frame}}],
            "nodes": [],
            "meshes": [],
            "materials": [],
            "accessors": [],
            "bufferViews": [],
        }

    def add(
        self,
        name: str,
        vertices: np.ndarray,  # (V, 3) float32, viewer frame
        faces: ArrayLike | Tensor,  # (F, 3); an array that several meshes share is written once
        colour: np.ndarray | None = None,  # (3,) RGB 0..1: a matt material; (V, 4) uint8 RGBA: vertex colours
    ) -> None:
        """Add one node with its mesh and normals."""
        corners = torch.as_tensor(faces).long().cpu()
        normals = vertex_normals(torch.from_numpy(vertices)[None], corners)[0].numpy()
        limits = {"min": vertices.min(0).tolist(), "max": vertices.max(0).tolist()} if len(vertices) else {}
        attributes = {
            "POSITION": self._accessor(vertices, "VEC3", _VERTICES, **limits),
            "NORMAL": self._accessor(normals, "VEC3", _VERTICES),
        }
        primitive: dict[str, Any] = {"attributes": attributes, "indices": self._faces(faces, corners, len(vertices))}
        if colour is not None and colour.ndim == 1:
            rgba = [*map(float, colour.clip(0, 1)), 1.0]
            matt = {"baseColorFactor": rgba, "metallicFactor": 0.0, "roughnessFactor": 0.8}
            primitive["material"] = len(self._tree["materials"])
            self._tree["materials"].append({"pbrMetallicRoughness": matt, "doubleSided": False})
        elif colour is not None:
            attributes["COLOR_0"] = self._accessor(colour, "VEC4", _VERTICES, normalized=True)
        number = len(self._tree["nodes"])
        self._tree["meshes"].append({"name": name, "primitives": [primitive]})
        self._tree["nodes"].append({"name": name, "mesh": number})
        self._tree["scenes"][0]["nodes"].append(number)

    def content(self) -> bytes:
        tree = {name: value for name, value in self._tree.items() if value != []}
        tree["buffers"] = [{"byteLength": len(self._buffer)}]
        header = json.dumps(tree, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 4)
        chunks = struct.pack("<II", len(header), _JSON) + header
        chunks += struct.pack("<II", len(self._buffer), _BINARY) + bytes(self._buffer)
        return struct.pack("<III", _MAGIC, _VERSION, 12 + len(chunks)) + chunks

    def _faces(self, faces: Any, corners: Tensor, count: int) -> int:
        for other, vertices, accessor in self._indices:
            if other is faces and vertices == count:
                return accessor
        narrow = np.uint16 if count < 1 << 16 else np.uint32
        accessor = self._accessor(corners.numpy().astype(narrow).reshape(-1), "SCALAR", _INDICES)
        self._indices.append((faces, count, accessor))
        return accessor

    def _accessor(self, values: np.ndarray, kind: str, target: int, **more: Any) -> int:
        data = np.ascontiguousarray(values).tobytes()
        view = {"buffer": 0, "byteOffset": len(self._buffer), "byteLength": len(data), "target": target}
        self._buffer += data + b"\0" * (-len(data) % 4)
        self._tree["bufferViews"].append(view)
        self._tree["accessors"].append(
            {
                "bufferView": len(self._tree["bufferViews"]) - 1,
                "componentType": _COMPONENTS[values.dtype.name],
                "count": len(values),
                "type": kind,
                **more,
            }
        )
        return len(self._tree["accessors"]) - 1
