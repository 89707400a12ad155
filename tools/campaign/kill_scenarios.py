"""What is killed in `tools.campaign.kills`: how each is run in a folder, and what of it must not depend on kills."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hmdiff.build import build_pipeline
from hmdiff.config import load_config
from hmdiff.data.shards import PreparedShards, ShardWriter
from hmdiff.errors import UserError
from tools.campaign.families import SMALL, sample_record

STEPS, RECORDS, PHOTOS = 6, 60, 4


def train(folder: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from hmdiff.train.loop import Trainer

    torch.set_num_threads(1)
    values = (
        *SMALL,
        f"output={folder}",
        f"training.steps={STEPS}",
        "training.checkpoint_every=1",
        "training.log_every=2",
        "training.evaluate_every=100",
        "data.block_size=4",
        "training.batch_size=4",
        "training.warmup_steps=2",
        "evaluation.people=2",
        "evaluation.num_hypotheses=1",
        "evaluation.num_inference_steps=1",
        "evaluation.test_people=0",
        "training.picture_every=1000",
    )
    Trainer(load_config(None, values)).run()


def train_two(folder: Path) -> None:
    """The same in two processes that share the work."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    code = subprocess.run(
        [*words, "-m", "tools.campaign.kill_scenarios", str(folder)], env={**os.environ, "ACCELERATE_USE_CPU": "true"}
    ).returncode
    if code:
        raise RuntimeError(f"torchrun ended with {code}")


def prepare(folder: Path) -> None:
    writer = ShardWriter(folder, {"of": "the campaign"}, shard_records=4)
    for number in range(writer.records, RECORDS):
        writer.add(sample_record(number), None, None)
        time.sleep(0.002)
    writer.finish()


def sample(folder: Path) -> None:
    """`hmdiff sample FOLDER` of a few photos with keypoints, by a small pipeline that is not trained."""
    from hmdiff.cli.main import main

    torch.set_num_threads(1)
    photos, pipeline = folder.parent / "photos", folder.parent / "pipeline"
    if not pipeline.is_dir():
        build_pipeline(load_config(None, SMALL)).save_pretrained(pipeline)
        photos.mkdir(exist_ok=True)
        for number in range(PHOTOS):
            draw = np.random.default_rng(number)
            points = np.concatenate([draw.uniform(80, 240, (17, 2)), np.ones((17, 1))], 1)
            Image.new("RGB", (320, 320), (90, 110, 130)).save(photos / f"photo_{number}.jpg")
            about = {"keypoints": points.round(1).tolist(), "box_xyxy": [60, 60, 260, 260]}
            (photos / f"photo_{number}.json").write_text(json.dumps(about))
    words = [
        "sample",
        str(photos),
        "--checkpoint",
        str(pipeline),
        "--output",
        str(folder),
        "--num-hypotheses",
        "2",
        "--steps",
        "1",
        "--guidance",
        "none",
        "--device",
        "cpu",
    ]
    if main(words):
        raise UserError("hmdiff sample failed")


def trained(folder: Path) -> dict[str, Any]:
    place = folder / "checkpoints" / f"step_{STEPS:08d}"
    with open(folder / "log.csv", newline="") as handle:
        losses = [row["loss"] for row in csv.DictReader(handle) if row.get("loss")]
    names = ("model.safetensors", "ema.safetensors")
    state = torch.load(place / "optimizer.bin", weights_only=True)["state"]
    moments = {
        f"{parameter}.{name}": _bits(torch.as_tensor(value).numpy())
        for parameter, each in state.items()
        for name, value in each.items()
    }
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"losses": losses, "moments": moments, "kept": kept, **{n: (place / n).read_bytes() for n in names}}


def prepared(folder: Path) -> dict[str, Any]:
    PreparedShards(folder).verify()
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sampled(folder: Path) -> dict[str, Any]:
    """The arrays of every npz, the photos of results.jsonl; of other files that they are there and whole, hidden ones
    too. Not their bytes: photos are sampled in batches, and a matrix product rounds by the batch's size.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(io.BytesIO(content)) as arrays:
                # Millimetres as metres, so that rounding is one size.
                found[path.name] = {n: arrays[n] / 1000 if n.endswith("_mm") else arrays[n] for n in arrays.files}
        elif path.suffix == ".jsonl":
            found[path.name] = sorted(json.loads(line)["npz"] for line in content.splitlines())
        elif path.suffix == ".png":
            found[path.name] = Image.open(io.BytesIO(content)).convert("RGB").size
        else:
            found[path.name] = len(content) > 1000
    return found


def same(expected: Any, found: Any) -> bool:
    """Equal, arrays of fractions within rounding."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and list(expected) == list(found)
            and all(same(value, found[name]) for name, value in expected.items())
        )
    if isinstance(expected, np.ndarray):
        if expected.dtype.kind != "f":
            return np.array_equal(expected, found)
        return expected.shape == found.shape and np.allclose(expected, found, rtol=1e-3, atol=1e-3, equal_nan=True)
    return bool(expected == found)


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], str]:
    return str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Work that is killed and started again until it ends."""

    work: Callable[[Path], None]
    left: Callable[[Path], dict[str, Any]]  # what must not depend on kills
    ranks: int = 1  # more: one of so many processes is killed, and their parent then ends by itself


SCENARIOS: dict[str, Scenario] = {
    "training": Scenario(train, trained),
    "preparation": Scenario(prepare, prepared),
    "sampling": Scenario(sample, sampled),
    "two ranks": Scenario(train_two, trained, ranks=2),
}


if __name__ == "__main__":
    train(Path(sys.argv[1]))
