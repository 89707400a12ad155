"""One person's result as a self-contained web page: photo, hypotheses, modes, heat maps, values on hover.

The page is `viewer.html` with `viewer.js`, drawn by three.js (MIT), which is inlined from trimesh, so that nothing is
downloaded. All bodies share one topology: the faces and the mean are stored once, and each hypothesis as its difference
from the mean, in tenths of a millimetre (int16), deflated.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hmdiff.diffusion.confidence import RADII
from hmdiff.errors import UserError
from hmdiff.files.reading import naming, read_npz
from hmdiff.files.storage import atomic_file
from hmdiff.viz.canvas import HEAT, as_tensor, read_picture
from hmdiff.viz.overlays import PALETTE, person_crop
from hmdiff.viz.spread import SCALE

UNIT = 1e-4  # metres; larger only for bodies beyond 3.2 m
PHOTO_HEIGHT = 720  # maximum height of the photo's crop in pixels
LARGEST = 1e6  # bound on every number in a result: metres, millimetres or pixels
NEEDED = (
    "vertices",
    "joints",
    "faces",
    "translation",
    "focal",
    "principal_point",
    "spread_mm",
    "selected",
    "modes",
    "mode_weights",
)


def read_result(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays that `hmdiff sample` wrote for one person.

    Raises:
        UserError: not such a file; names what is missing.
    """
    path = Path(path)
    arrays = read_npz(path, mend="run hmdiff sample again")
    missing = [name for name in (*NEEDED, "joint_names", "joint_parents") if name not in arrays]
    if missing:
        raise UserError(f"{path}: no result of hmdiff sample: it lacks {', '.join(missing)}; run hmdiff sample again")
    with naming(path, "run hmdiff sample again"):
        _check(arrays)
    return arrays


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `ValueError` naming an array whose shape does not match N hypotheses of V vertices and K joints."""
    count, vertices = arrays["vertices"].shape[0], arrays["vertices"].shape[1]
    joints, faces = arrays["joints"].shape[1], len(arrays["faces"])
    shapes: dict[str, list[tuple[int, ...]]] = {
        "vertices": [(count, vertices, 3)],
        "joints": [(count, joints, 3)],
        "faces": [(faces, 3)],
        "translation": [(count, 3), (3,)],
        "focal": [()],
        "principal_point": [(2,)],
        "spread_mm": [(vertices,)],
        "selected": [()],
        "modes": [(len(arrays["modes"]),)],
        "mode_weights": [(len(arrays["modes"]),)],
        "joint_names": [(joints,)],
        "joint_parents": [(joints,)],
        **{name: [(vertices,)] for radius in RADII if (name := f"confidence_{radius}mm") in arrays},
        **({"confidence": [()]} if "confidence" in arrays else {}),
    }
    indices = {"faces": (0, vertices), "joint_parents": (-1, joints), "selected": (0, count), "modes": (0, count)}
    for name, allowed in shapes.items():
        found = arrays[name]
        kinds = "US" if name == "joint_names" else "iu" if name in indices else "fiu"
        if found.shape not in allowed or found.dtype.kind not in kinds or 0 in found.shape:
            raise ValueError(f"{name} is {found.dtype} of shape {found.shape}")
        if name in indices:
            lowest, beyond = indices[name]
            if int(found.min()) < lowest or int(found.max()) >= beyond:
                raise ValueError(f"{name} has indices beyond {lowest} to {beyond - 1}")
        elif (
            found.dtype.kind != "U" and kinds == "fiu" and not bool((np.abs(found.astype(np.float64)) < LARGEST).all())
        ):
            raise ValueError(f"{name} holds numbers that are not finite, or huge")
    if not float(arrays["focal"]) > 0:
        raise ValueError("a focal length that is not above 0")


def viewer_page(
    result: Mapping[str, Any],  # one person's arrays, named as in the npz: see `read_result`
    photo: np.ndarray,  # (H, W, 3) uint8
    title: str,
) -> str:  # HTML
    """The page of one person: under 3 MB with 25 hypotheses of 12,410 vertices."""
    arrays = {name: _numpy(values) for name, values in result.items()}
    vertices = arrays["vertices"].astype(np.float64)  # (N, V, 3)
    joints = arrays["joints"].astype(np.float64)  # (N, K, 3)
    shifts = np.broadcast_to(arrays["translation"].astype(np.float64), (len(vertices), 3))
    mean, shift = vertices.mean(0), shifts.mean(0)
    unit = UNIT * max(1, math.ceil(float(np.abs(vertices).max()) / (32767 * UNIT)))
    whole = np.round(mean / unit)
    maps, extra = _maps(arrays)
    data = {
        "mean": whole.astype("<i2"),
        "delta": (np.round(vertices / unit) - whole).astype("<i2"),
        "joints": np.round(np.concatenate([joints.mean(0, keepdims=True), joints]) / unit).astype("<i2"),
        "faces": arrays["faces"].astype("<u2" if len(mean) < 1 << 16 else "<u4"),
        **extra,
    }
    crop, centre, scale, _ = person_crop(
        photo,
        as_tensor(vertices + shifts[:, None]).float(),
        float(arrays["focal"]),
        arrays["principal_point"],
        min(PHOTO_HEIGHT, len(photo)),
    )
    person = {
        "arrays": {name: {"dtype": values.dtype.name, "data": _packed(values)} for name, values in data.items()},
        "unit": unit,
        "translation": np.concatenate([shift[None], shifts]).tolist(),
        "crop": {
            "size": [crop.shape[1], crop.shape[0]],
            "principal_point": list(map(float, centre)),
            "focal": float(arrays["focal"]) * scale,
        },
        "photo": "data:image/jpeg;base64," + _jpeg(crop),
        "parents": arrays["joint_parents"].tolist(),
        "joint_names": [str(name) for name in arrays["joint_names"]],
        "selected": int(arrays["selected"]),
        "modes": [
            {"hypothesis": int(index), "weight": float(weight)}
            for index, weight in zip(arrays["modes"], arrays["mode_weights"], strict=True)
            if weight > 0
        ],
        "maps": maps,
        "heat": HEAT.tolist(),
        "palette": PALETTE,
        "about": _about(arrays),
    }
    page = Template(_resource("viewer.html"))
    # "</" could end the script that contains the JSON.
    text = json.dumps(person, separators=(",", ":")).replace("</", "<\\/")
    return page.substitute(TITLE=html.escape(title), PERSON=text, THREE=three_js(), VIEWER=_resource("viewer.js"))


def save_viewer(path: str | Path, result: Mapping[str, Any], photo: np.ndarray | Path, title: str = "") -> None:
    """Write `viewer_page` to a file, atomically."""
    picture = photo if isinstance(photo, np.ndarray) else read_picture(photo)
    text = viewer_page(result, picture, title or Path(path).stem)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _maps(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Quantities for colouring vertices: label, unit and scale, and the values as integers times `scale`."""
    spread = arrays["spread_mm"]
    maps = {
        "spread": {
            "label": "spread of the hypotheses",
            "unit": "mm",
            "array": "spread",
            "scale": 0.1,
            "digits": 0,
            "lowest": 0,
            "highest": SCALE,
        }
    }
    values = {"spread": np.round(spread * 10).clip(0, 65535).astype("<u2")}
    for radius in RADII:
        if (name := f"confidence_{radius}mm") in arrays:
            values[name] = np.round(arrays[name] * 200).astype(np.uint8)
            maps[name] = {
                "label": f"confidence within {radius} mm",
                "unit": "%",
                "array": name,
                "scale": 0.5,
                "digits": 0,
                "lowest": 100,
                "highest": 0,  # dark means uncertain, as for a large spread
            }
    return maps, values


def _about(arrays: Mapping[str, np.ndarray]) -> str:
    about = f"{len(arrays['vertices'])} hypotheses, mean spread {arrays['spread_mm'].mean():.0f} mm"
    if "confidence" in arrays:
        about += f"; {float(arrays['confidence']):.0%} of the surface expected within 100 mm of the truth"
    if warning := str(arrays.get("warning", "")):
        about += f". Doubtful: {warning}"
    return about


@lru_cache(maxsize=1)
def three_js() -> str:
    """three.js with its TrackballControls, from trimesh's bundled viewer (`trimesh.viewer.notebook`).

    Raises:
        UserError: this trimesh has no viewer, or another one.
    """
    place = importlib.util.find_spec("trimesh")  # locate trimesh without importing it, which is slow
    end = "THREE.TrackballControls=TrackballControls;})();"
    try:
        assert place is not None and place.origin is not None
        with zipfile.ZipFile(Path(place.origin).parent / "resources" / "templates" / "viewer.zip") as archive:
            template = archive.read("viewer.html.template").decode()
        first, last = template.index("<script>") + len("<script>"), template.index(end) + len(end)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise UserError(
            f"trimesh {version('trimesh')} ships no viewer with three.js as 4.9 to 5.2 do; install trimesh==5.2.0"
        ) from None
    return template[first:last]


def _resource(name: str) -> str:
    return (files("hmdiff.viz") / name).read_text(encoding="utf-8")


def _packed(values: np.ndarray) -> str:
    """Deflate with bytes grouped by significance: the high bytes of small differences compress well."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode()


def _jpeg(picture: np.ndarray) -> str:
    handle = io.BytesIO()
    Image.fromarray(picture).save(handle, "JPEG", quality=85)
    return base64.b64encode(handle.getvalue()).decode()


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
