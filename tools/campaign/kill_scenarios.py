"""The scenarios of `tools.campaign.kills`: how each runs in a folder, and which results must not depend on kills."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from hmdiff.build import build_pipeline
from hmdiff.config import load_config
from hmdiff.data.shards import PreparedShards, ShardWriter
from hmdiff.errors import UserError
from tools.campaign.data_families import sample_record
from tools.campaign.family import SMALL

STEPS, RECORDS, PHOTOS = 6, 60, 4


def train(folder: Path, steps: int = STEPS) -> Any:
    """Train in this process; returns the `Trainer`."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from hmdiff.train import loop

    torch.set_num_threads(1)
    values = (
        *SMALL,
        f"output={folder}",
        f"training.steps={steps}",
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
    # The log's mean mesh error over 512 people would take longer than the training.
    loop.mean_mesh_error = lambda *about: 0.0
    trainer = loop.Trainer(load_config(None, values))
    trainer.run()
    return trainer


def train_two(folder: Path) -> None:
    """The same training in two processes; if one fails the other is terminated, as torchrun does."""
    import hmdiff.train.loop  # noqa: F401  import once, before forking

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: dict[int, int] = {}  # by process id
    for rank in range(2):
        if (process := os.fork()) == 0:
            _be_rank(rank, port, folder)
        ranks[process] = rank
    codes = []
    while ranks:
        process, status = os.wait()
        del ranks[process]
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    if any(codes):
        raise RuntimeError(f"the ranks ended with {codes}")


def _be_rank(rank: int, port: int, folder: Path) -> NoReturn:
    code = 1
    try:
        Path("/proc/self/comm").write_text(f"rank{rank}")  # so that the campaign can find the process
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
        train(folder)
        code = 0
    except BaseException as error:
        print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def prepare(folder: Path) -> None:
    writer = ShardWriter(folder, {"of": "the campaign"}, shard_records=4)
    for number in range(writer.records, RECORDS):
        writer.add(sample_record(number), None, None)
        time.sleep(0.002)
    writer.finish()


def sample(folder: Path) -> None:
    """`hmdiff sample FOLDER` for a few photos with keypoints, with a small untrained pipeline."""
    from hmdiff.cli.main import main

    torch.set_num_threads(1)
    photos, pipeline = folder.parent / "photos", folder.parent / "pipeline"
    if not pipeline.is_dir():
        write_photos(photos, PHOTOS)
        build_pipeline(load_config(None, SMALL)).save_pretrained(pipeline)
    if main(sample_words(photos, pipeline, folder)):
        raise UserError("hmdiff sample failed")


def write_photos(folder: Path, count: int) -> None:
    """Grey photos, each with a person's keypoints beside it."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        points = np.concatenate([draw.uniform(80, 240, (17, 2)), np.ones((17, 1))], 1)
        Image.new("RGB", (320, 320), (90, 110, 130)).save(folder / f"photo_{number}.jpg")
        about = {"keypoints": points.round(1).tolist(), "box_xyxy": [60, 60, 260, 260]}
        (folder / f"photo_{number}.json").write_text(json.dumps(about))


def sample_words(photos: Path, pipeline: Path, output: Path) -> list[str]:
    """The cheapest command: two hypotheses in one step."""
    given = ["sample", str(photos), "--checkpoint", str(pipeline), "--output", str(output)]
    return [*given, *"--num-hypotheses 2 --steps 1 --guidance none --device cpu".split()]


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
    """The arrays of every npz and the photos of results.jsonl; of other files, including hidden ones, that they exist
    and are complete. Not their bytes: photos are sampled in batches, and rounding depends on the batch size."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(io.BytesIO(content)) as arrays:
                # Millimetres to metres, so that one rounding tolerance fits all.
                found[path.name] = {
                    n: np.asarray(arrays[n] / 1000) if n.endswith("_mm") else arrays[n] for n in arrays.files
                }
        elif path.suffix == ".jsonl":
            found[path.name] = sorted(json.loads(line)["npz"] for line in content.splitlines())
        elif path.suffix == ".png":
            found[path.name] = Image.open(io.BytesIO(content)).convert("RGB").size
        else:
            found[path.name] = len(content) > 1000
    return found


def same(expected: Any, found: Any, name: str = "") -> bool:
    """Equal, float arrays up to rounding.

    A photo sampled alone after the kill instead of in a batch is rounded differently; the untrained network's crumpled
    meshes are ill-conditioned, and even more so their positions in a photo.
    """
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and list(expected) == list(found)
            and all(same(value, found[key], key) for key, value in expected.items())
        )
    if isinstance(expected, np.ndarray):
        if expected.dtype.kind != "f":
            return np.array_equal(expected, found)
        off = 1.0 if name == "keypoints_2d" else 1e-3  # pixels; otherwise metres
        return expected.shape == found.shape and np.allclose(expected, found, rtol=1e-3, atol=off, equal_nan=True)
    return bool(expected == found)


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], str]:
    return str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Work that is killed and restarted until it completes."""

    work: Callable[[Path], None]
    left: Callable[[Path], dict[str, Any]]  # results that must not depend on kills
    ranks: int = 1  # number of processes; if more than one, one is killed and their parent then exits


SCENARIOS: dict[str, Scenario] = {
    "training": Scenario(train, trained),
    "preparation": Scenario(prepare, prepared),
    "sampling": Scenario(sample, sampled),
    "two ranks": Scenario(train_two, trained, ranks=2),
}
