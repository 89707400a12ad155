"""hmdiff's own files and configs: bodies, pipelines, trainings, configs; and whole commands."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from PIL import Image
from safetensors.torch import save_file

from hmdiff.body.body import load_body
from hmdiff.build import build_pipeline
from hmdiff.config import load_config, save_config
from hmdiff.errors import UserError
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train import checkpoint
from tools.campaign.children import Wrong
from tools.campaign.family import SMALL, Family, finite

# ---- bodies ----


def _bodies(folder: Path) -> None:
    draw, vertices = np.random.default_rng(0), 60
    parents = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21])
    rows = draw.random((24, vertices))
    body = {
        "v_template": draw.normal(size=(vertices, 3)),
        "shapedirs": draw.normal(size=(vertices, 3, 10)),
        "posedirs": draw.normal(size=(vertices, 3, 207)),
        "weights": np.eye(24)[draw.integers(24, size=vertices)],
        "J_regressor": scipy.sparse.csc_matrix(rows / rows.sum(1, keepdims=True)),
        "kintree_table": np.stack([parents, np.arange(24)]),
        "f": draw.integers(vertices, size=(100, 3)).astype(np.uint32),
    }
    for protocol in (0, 2, 4):
        (folder / f"body{protocol}.pkl").write_bytes(pickle.dumps(body, protocol))
    np.savez(folder / "body.npz", **{**body, "J_regressor": body["J_regressor"].toarray()})  # type: ignore[arg-type]


def _read_body(folder: Path, name: str) -> None:
    body = load_body(folder / name)
    finite(body.v_template, body(torch.zeros(1, body.num_betas), torch.eye(3).expand(1, 24, 3, 3)).vertices)


# ---- pipelines ----

_PIPELINE = (
    "pipeline/hmdiff.json",
    "pipeline/model/config.json",
    "pipeline/model/diffusion_pytorch_model.safetensors",
    "pipeline/scheduler/scheduler_config.json",
)


def _pipeline(folder: Path) -> None:
    build_pipeline(load_config(None, SMALL)).save_pretrained(folder / "pipeline")


def _plain_pipeline(folder: Path) -> None:
    """A pipeline in the format before checksums, which would detect every change."""
    _pipeline(folder)
    path = folder / "pipeline" / "hmdiff.json"
    about = json.loads(path.read_text())
    del about["checksums"]
    path.write_text(json.dumps(about))


def _read_pipeline(folder: Path, name: str) -> None:
    finite(*HMDiffPipeline.from_pretrained(folder / "pipeline").model.parameters())


# ---- run folders ----


def _run_folder(folder: Path) -> None:
    place = folder / "checkpoints" / "step_00000005"
    part = checkpoint.begin(place)
    save_file({"weight": torch.arange(60.0)}, part / "model.safetensors")
    checkpoint.write_progress(part, checkpoint.Progress(5, 5, {"loss": 0.5}, 2))
    checkpoint.finish(part, place, 2)
    save_config(load_config(None, SMALL), folder / "config.yaml")


def _read_run_folder(folder: Path, name: str) -> None:
    load_config(folder / "config.yaml")
    (place,) = checkpoint.checkpoints_in(folder / "checkpoints")
    if checkpoint.read_progress(place).step != 5:
        raise Wrong("another step")


def _training(folder: Path) -> None:
    from tools.campaign.kill_scenarios import train

    train(folder / "run", steps=2)
    # In the format before checksums, which would detect every change.
    (folder / "run" / "checkpoints" / "step_00000002" / checkpoint.CHECKSUMS).unlink()


def _resume(folder: Path, name: str) -> None:
    from tools.campaign.kill_scenarios import train

    # The stored config names the folder that it was written in: write the same values anew.
    trainer = train(folder / "run", steps=2)
    finite(*trainer.plain.parameters(), *trainer.ema.shadow_params)


_TRAINING = tuple(
    f"run/checkpoints/step_00000002/{name}"
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "ema.safetensors", checkpoint.PROGRESS)
)

# ---- configs ----


def _config(folder: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "configs" / "hmdiff_small.yaml", folder / "config.yaml")


def _read_config(folder: Path, name: str) -> None:
    load_config(folder / name)


# ---- whole commands ----

_PHOTOS = 2


def _commands(folder: Path) -> None:
    from tools.campaign.kill_scenarios import write_photos

    _plain_pipeline(folder)
    write_photos(folder / "photos", _PHOTOS)
    Image.new("RGB", (320, 320)).save(folder / "other.jpg")


def _sample(folder: Path, name: str) -> None:
    """`hmdiff sample FOLDER`: exit code 0, or 2 with one stderr line per error; valid photos are still written."""
    from hmdiff.cli.main import main
    from tools.campaign.kill_scenarios import sample_words

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([*sample_words(folder / "photos", folder / "pipeline", folder / "out"), "--save", "npz"])
    errors = [line for line in said.getvalue().splitlines() if line.startswith("hmdiff: error: ")]
    if (code, len(errors)) not in ((0, 0), (2, 1)) or "Traceback" in said.getvalue():
        raise Wrong(f"exit {code} with {len(errors)} lines")
    if name.startswith("photos"):
        other = "photo_1" if "photo_0" in name else "photo_0"
        if not (folder / "out" / f"{other}.npz").is_file():
            raise Wrong(f"{other} was lost: {said.getvalue()[-200:]}")
    for path in (folder / "out").glob("*.npz"):
        with np.load(path) as arrays:
            finite(*(arrays[key] for key in ("vertices", "joints", "translation")))
    if code:
        raise UserError(errors[0])


_SAMPLE = ("photos/photo_0.json", "photos/photo_1.json", "photos/photo_0.jpg", *_PIPELINE)

FAMILIES = (
    Family("bodies", _bodies, _read_body, ("body0.pkl", "body2.pkl", "body4.pkl", "body.npz"), share=2),
    Family("pipelines", _pipeline, _read_pipeline, _PIPELINE, share=0.5),
    Family("pipelines without checksums", _plain_pipeline, _read_pipeline, _PIPELINE, share=2),
    Family(
        "run folders",
        _run_folder,
        _read_run_folder,
        (
            "config.yaml",
            *(f"checkpoints/step_00000005/{name}" for name in ("progress.json", "checksums.json", "model.safetensors")),
        ),
    ),
    Family("trainings without checksums", _training, _resume, _TRAINING, share=0.4, keeps=False),
    Family("configs", _config, _read_config, ("config.yaml",)),
    Family("hmdiff sample FOLDER", _commands, _sample, _SAMPLE, share=0.8),
)
