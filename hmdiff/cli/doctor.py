"""`hmdiff doctor`: what is installed, found and missing on this machine, and how to fix it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hmdiff.cli import arguments

NEEDED = (
    "torch",
    "accelerate",
    "diffusers",
    "timm",
    "numpy",
    "scipy",
    "cv2",
    "PIL",
    "safetensors",
    "omegaconf",
    "trimesh",
    "matplotlib",
    "rich",
    "tqdm",
    "tensorboard",
    "pyarrow",
)
OPTIONAL = {
    "numba": ("draws training people faster on a CPU", "pip install 'hmdiff[fast]'"),
    "mmpose": ("heatmaps from photos alone, without keypoints", "uv sync --extra mmpose"),
    "mmdet": ("finds the people in a photo, for --detector", "uv sync --extra mmpose"),
    "mmpretrain": ("only mmpose's ViTPose needs it", "pip install --no-deps mmpretrain"),
    "smplx": ("only the tests need it; SMPL files are read without", "pip install 'hmdiff[smplx]'"),
    "anny": ("only tools/build/body.py needs it", "pip install 'hmdiff[prepare]'"),
}
COMPANIONS = {"mmpose": ("mmcv", "mmengine", "xtcocotools", "mmdet"), "mmdet": ("mmcv", "mmengine")}
_DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "pillow"}
ASSETS = (
    "body.npz",
    "body_mesh.npz",
    "pose_prior.npz",
    "pose_prior_train.npz",
    "sample.jpg",
    "sample.json",
    "hmdiff_small",
)


class Finding(NamedTuple):
    state: str  # "ok", "-" for something optional that is missing, "MISSING" for something required
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
        print(f"{state:8} {what:26} {remark}")
        missing += state == "MISSING"
    if missing:
        print(f"{missing} missing: do what the lines say, then run hmdiff doctor again")
        return 2
    print("all that is needed is here; try: hmdiff demo")
    return 0


def findings() -> Iterator[Finding]:
    from hmdiff import __version__

    yield Finding("ok", "hmdiff", f"{__version__} on Python {platform.python_version()}, {platform.system()}")
    yield from (_package(name, "needed", "pip install -e . (or: uv sync)", True) for name in NEEDED)
    yield _device()
    yield from (_package(name, use, mend, False) for name, (use, mend) in OPTIONAL.items())
    yield from _bodies()
    yield from _regressors()
    yield from _datasets()
    yield from map(_asset, ASSETS)


def _package(name: str, use: str, mend: str, needed: bool) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding("MISSING" if needed else "-", name, f"not installed ({use}): {mend}")
    absent = [other for other in COMPANIONS.get(name, ()) if importlib.util.find_spec(other) is None]
    if absent:
        return Finding("-", name, f"does not work without {', '.join(absent)} ({use}): {mend}")
    try:
        version = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:  # installed by another distribution; opencv has several
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
    from hmdiff.body.files import FOLDER_VARIABLE, LICENSED, body_folder, find_body_file
    from hmdiff.errors import UserError

    folder = body_folder()
    if folder is None:
        words = f"{FOLDER_VARIABLE} is not set to the folder of your files; only for {', '.join(LICENSED)}"
        yield Finding("-", "licensed bodies", words)
        return
    if not folder.is_dir():
        yield Finding("-", "licensed bodies", f"{folder}: no such folder, and {FOLDER_VARIABLE} names it")
        return
    for kind in LICENSED:
        first, absent = None, []
        for gender in ("right", "left") if kind == "mano" else ("neutral", "female", "male"):
            try:
                path = find_body_file(kind, gender)
            except UserError as error:
                first = first or error
                absent.append(gender)
                continue
            mend = f"; hmdiff prepare licensed {folder} makes it an npz" if path.suffix.lower() == ".pkl" else ""
            yield Finding("ok", f"body {kind} {gender}", f"{path}{mend}")
        if first is not None:
            yield Finding("-", f"body {kind} {', '.join(absent)}", str(first))


def _regressors() -> Iterator[Finding]:
    from hmdiff.body.files import body_folder
    from hmdiff.body.regressors import REGRESSORS, load_regressor
    from hmdiff.errors import UserError

    if body_folder() is None:
        files = ", ".join(regressor.file for regressor in REGRESSORS.values())
        words = f"{files} are looked for beside the bodies; only protocols of SMPL and Human3.6M need them"
        yield Finding("-", "regressors", words)
        return
    for name, regressor in REGRESSORS.items():
        try:
            joints, vertices = load_regressor(name).shape
        except UserError as error:
            yield Finding("-", f"joints {name}", str(error))
        else:
            yield Finding("ok", f"joints {name}", f"{regressor.file}, {joints} joints of {vertices} vertices")


def _datasets() -> Iterator[Finding]:
    from hmdiff.cli.protocol_run import DATA_VARIABLE
    from hmdiff.data.readers import READERS

    mend = f"hmdiff prepare NAME SOURCE FOLDER, with {', '.join(READERS)}; synthetic people need none"
    root = os.environ.get(DATA_VARIABLE)
    if not root or not os.path.isdir(root):
        words = f"{DATA_VARIABLE} is not set" if not root else f"{root}: no such folder, and {DATA_VARIABLE} names it"
        yield Finding("-", "data sets", f"{words}; {mend}")
        return
    indices = sorted(Path(root).glob("*/index.json"))
    yield from map(_dataset, indices)
    if not indices:
        yield Finding("-", "data sets", f"none in {root} ({DATA_VARIABLE}); {mend}")


def _dataset(index: Path) -> Finding:
    import json

    what = f"data {index.parent.name}"
    try:
        about = json.loads(index.read_text())
        records, shards = int(about["records"]), about["shards"]
        changed = [s["file"] for s in shards if os.stat(index.parent / s["file"]).st_size != s["bytes"]]
        complete = bool(about["complete"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding("-", what, f"{index}: not a whole prepared data set ({error!r}); prepare it again")
    if changed:
        return Finding("-", what, f"{index.parent / changed[0]}: not of the size it was written with; prepare it again")
    if not complete:
        return Finding("-", what, f"{records} people so far: its preparation was stopped; the same command goes on")
    return Finding("ok", what, f"{records} people in {len(shards)} shards")


def _asset(name: str) -> Finding:
    from hmdiff.errors import UserError
    from hmdiff.files.resources import asset_path

    try:
        path = asset_path(name)
    except UserError as error:
        return Finding("MISSING", name, str(error))
    return Finding("ok", name, str(path))
