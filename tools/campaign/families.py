"""The files that a mutant campaign damages: how to write good ones, and how they are read by the package."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from PIL import Image

from hmdiff.body.body import load_body
from hmdiff.build import build_pipeline
from hmdiff.config import load_config, save_config
from hmdiff.data.readers import threedpw
from hmdiff.data.readers.tables import Table
from hmdiff.data.record import Record
from hmdiff.data.shards import INDEX, PreparedShards, ShardWriter
from hmdiff.estimators.depth_sources import read_depth
from hmdiff.estimators.people import read_people
from hmdiff.files.resources import asset_path
from hmdiff.heatmaps.arrays import load_heatmaps
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train import checkpoint
from hmdiff.viz.canvas import read_picture
from tools.campaign.children import Wrong
from tools.campaign.mutations import mutate_bytes, mutate_json, mutate_text

Mutate = Callable[[bytes, random.Random], bytes]
SMALL = (
    "model.width=32",
    "model.heads=2",
    "model.depth=1",
    "model.encoder_width=32",
    "model.encoder_depth=1",
    "model.encoder_heads=2",
    "model.patch_size=16",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Good files in a folder, and the reading of them; each file may be the one that is damaged."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], None]  # raises UserError, or Wrong
    files: tuple[str, ...]  # relative names; of several one is drawn

    def mutate(self, folder: Path, draw: random.Random) -> str:
        """Damage one file; its name."""
        name = draw.choice(self.files)
        path = folder / name
        kinds: dict[str, Mutate] = {".json": mutate_json, ".yaml": mutate_text}
        kind = kinds.get(path.suffix, mutate_bytes)
        path.write_bytes(kind(path.read_bytes(), draw))
        return name


def _finite(*values: Any) -> None:
    for value in values:
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Wrong("a result that is not finite")


def _smpl(folder: Path) -> None:
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


def _read_bodies(folder: Path) -> None:
    for path in sorted(folder.glob("body*")):
        body = load_body(path)
        _finite(body.v_template, body(torch.zeros(1, body.num_betas), torch.eye(3).expand(1, 24, 3, 3)).vertices)


def _photo(folder: Path) -> None:
    picture = Image.open(asset_path("sample.jpg")).resize((320, 240))
    picture.save(folder / "photo.jpg")
    picture.save(folder / "photo.png")
    picture.convert("P").save(folder / "photo.gif")
    picture.save(folder / "photo.webp")


def _read_photos(folder: Path) -> None:
    for path in sorted(folder.glob("photo.*")):
        if read_picture(path).ndim != 3:
            raise Wrong("not a picture")


def _keypoints(folder: Path) -> None:
    Image.new("RGB", (640, 480)).save(folder / "photo.jpg")
    draw = np.random.default_rng(0)

    def points(count: int) -> list[float]:
        xy = draw.uniform(100, 380, (count, 2))
        return np.concatenate([xy, np.ones((count, 1))], 1).ravel().round(2).tolist()

    person = {"image_id": 1, "category_id": 1, "keypoints": points(17), "score": 0.9, "bbox": [90, 90, 300, 300]}
    files: dict[str, Any] = {
        "coco": {
            "images": [{"id": 1, "file_name": "photo.jpg", "width": 640, "height": 480}],
            "annotations": [{**person, "id": 1, "num_keypoints": 17, "area": 9e4, "iscrowd": 0}],
            "categories": [{"id": 1, "name": "person"}],
        },
        "results": [person],
        "openpose": {"version": 1.3, "people": [{"pose_keypoints_2d": points(25)}]},
        "mmpose": {
            "meta_info": {},
            "instance_info": [
                {
                    "frame_id": 0,
                    "instances": [
                        {
                            "keypoints": np.reshape(points(17), (17, 3))[:, :2].tolist(),
                            "keypoint_scores": [0.9] * 17,
                            "bbox": [[90, 90, 390, 390]],
                        }
                    ],
                }
            ],
        },
        "plain": {"keypoints": np.reshape(points(17), (17, 3)).tolist(), "box_xyxy": [90, 90, 390, 390]},
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def _read_keypoints(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        found = read_people(folder / "photo.jpg", keypoints=folder / f"{name}.json")
        crop = found.heatmaps.crop
        _finite(found.heatmaps.values, crop.center, crop.side, crop.focal, crop.photo_size)

    return read


def _heatmaps(folder: Path) -> None:
    values = np.random.default_rng(0).random((17, 32, 32)).astype(np.float32)
    arrays = {"heatmaps": values, "center": np.array([320.0, 240.0]), "side": np.array(300.0)}
    np.savez(folder / "stored.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(folder / "packed.npz", **arrays)  # type: ignore[arg-type]


def _read_heatmaps(folder: Path) -> None:
    for path in sorted(folder.glob("*.npz")):
        _finite(load_heatmaps(path).values)


def _depth(folder: Path) -> None:
    depth = np.random.default_rng(0).uniform(1, 5, (24, 32)).astype(np.float32)
    np.save(folder / "map.npy", depth)
    np.savez(folder / "map.npz", depth=depth)
    Image.fromarray((depth * 1000).astype(np.uint16)).save(folder / "map.png")


def _read_depth(folder: Path) -> None:
    for path in sorted(folder.glob("map.*")):
        if np.isinf(np.asarray(read_depth(path))).any():
            raise Wrong("an infinite depth")


def _pipeline(folder: Path) -> None:
    build_pipeline(load_config(None, SMALL)).save_pretrained(folder / "pipeline")


def _plain_pipeline(folder: Path) -> None:
    """As one of before there were checksums, which would find every change at once."""
    _pipeline(folder)
    path = folder / "pipeline" / "hmdiff.json"
    about = json.loads(path.read_text())
    del about["checksums"]
    path.write_text(json.dumps(about))


def _read_pipeline(folder: Path) -> None:
    pipeline = HMDiffPipeline.from_pretrained(folder / "pipeline")
    _finite(*pipeline.model.parameters())


_PIPELINE = (
    "pipeline/hmdiff.json",
    "pipeline/model/config.json",
    "pipeline/model/diffusion_pytorch_model.safetensors",
    "pipeline/scheduler/scheduler_config.json",
)


def _run_folder(folder: Path) -> None:
    place = folder / "checkpoints" / "step_00000005"
    part = checkpoint.begin(place)
    (part / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    checkpoint.write_progress(part, checkpoint.Progress(5, 5, {"loss": 0.5}, 2))
    checkpoint.finish(part, place, 2)
    save_config(load_config(None, SMALL), folder / "config.yaml")


def _read_run_folder(folder: Path) -> None:
    load_config(folder / "config.yaml")
    (place,) = checkpoint.checkpoints_in(folder / "checkpoints")
    if checkpoint.read_progress(place).step != 5:
        raise Wrong("another step")


def _config(folder: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "configs" / "hmdiff_small.yaml", folder / "config.yaml")


def _read_config(folder: Path) -> None:
    load_config(folder / "config.yaml")


def sample_record(number: int) -> Record:
    draw = np.random.default_rng(number)
    return Record(
        name=f"campaign/{number}",
        center=np.array([100.0, 90.0]),
        side=80.0,
        source=f"row {number}",
        group="a",
        pose=draw.normal(size=(24, 3)),
        betas=draw.normal(size=10),
        keypoints_2d=draw.uniform(0, 200, (3, 2)),
        keypoints_2d_confidence=np.ones(3),
        keypoint_names=("nose", "left_hip", "right_hip"),
    )


def _shards(folder: Path) -> None:
    writer = ShardWriter(folder / "data", {"of": "the campaign"}, shard_records=3)
    for number in range(5):
        writer.add(sample_record(number), None, None)
    writer.finish()


def _plain_shards(folder: Path) -> None:
    """Of which neither the checksums of records nor those of shards are asked: Arrow's own reading is what is tried."""
    _shards(folder)
    path = folder / "data" / INDEX
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        del shard["crc32"]
    path.write_text(json.dumps(index))


def _read_shards(folder: Path) -> None:
    store = PreparedShards(folder / "data")
    for number in range(len(store)):
        record = store[number].record
        _finite(record.pose, record.center)


def _read_plain_shards(folder: Path) -> None:
    from hmdiff.data import shards

    shards.verify_shard = lambda path, shard: None  # type: ignore[assignment]  # in the child alone
    _read_shards(folder)


def _labels(folder: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {
        "imgname": np.array(["a.jpg", "b.jpg"]),
        "center": draw.random((2, 2)),
        "scale": np.ones(2),
        "pose": draw.random((2, 72)),
        "part": np.array([[1.0], [2.0]], object),
    }
    np.savez(folder / "labels.npz", **columns)  # type: ignore[arg-type]


def _read_labels(folder: Path) -> None:
    table = Table(folder / "labels.npz")
    for key, shape in (("center", (2,)), ("scale", ()), ("pose", (72,)), ("part", ())):
        table.column(key, shape)


def _sequences(folder: Path) -> None:
    draw, frames = np.random.default_rng(0), 2
    camera = np.tile(np.eye(4), (frames, 1, 1))
    points = np.ones((frames, 3, 18))
    points[:, :2] = draw.uniform(100, 300, (frames, 2, 18))
    data = {
        "poses": [draw.normal(size=(frames, 72))],
        "betas": [draw.normal(size=10)],
        "poses2d": [points],
        "genders": ["m"],
        "trans": [draw.normal(size=(frames, 3))],
        "jointPositions": [draw.normal(size=(frames, 72))],
        "campose_valid": [np.ones(frames)],
        "cam_poses": camera,
        "cam_intrinsics": np.diag([500.0, 500, 1]),
        "sequence": "walk",
        "img_frame_ids": np.arange(frames),
    }
    place = folder / "sequenceFiles" / "test" / "walk.pkl"
    place.parent.mkdir(parents=True)
    place.write_bytes(pickle.dumps(data, 2))
    for frame in range(frames):
        image = folder / "imageFiles" / "walk" / f"image_{frame:05d}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (400, 400)).save(image)


def _read_sequences(folder: Path) -> None:
    for record in threedpw.read(folder, "test").records():
        _finite(record.pose, record.center, record.side)


FAMILIES: tuple[Family, ...] = (
    Family("bodies", _smpl, _read_bodies, ("body0.pkl", "body2.pkl", "body4.pkl", "body.npz")),
    Family("photos", _photo, _read_photos, ("photo.jpg", "photo.png", "photo.gif", "photo.webp")),
    *(
        Family(f"keypoints {name}", _keypoints, _read_keypoints(name), (f"{name}.json",))
        for name in ("coco", "results", "openpose", "mmpose", "plain")
    ),
    Family("heatmaps", _heatmaps, _read_heatmaps, ("stored.npz", "packed.npz")),
    Family("depth maps", _depth, _read_depth, ("map.npy", "map.npz", "map.png")),
    Family("pipelines", _pipeline, _read_pipeline, _PIPELINE),
    Family("pipelines without checksums", _plain_pipeline, _read_pipeline, _PIPELINE),
    Family(
        "run folders",
        _run_folder,
        _read_run_folder,
        (
            "config.yaml",
            *(f"checkpoints/step_00000005/{name}" for name in ("progress.json", "checksums.json", "model.safetensors")),
        ),
    ),
    Family("configs", _config, _read_config, ("config.yaml",)),
    Family("shards", _shards, _read_shards, ("data/index.json", "data/shard_00000.arrow", "data/shard_00001.arrow")),
    Family("shards without checksums", _plain_shards, _read_plain_shards, ("data/shard_00000.arrow",)),
    Family("label tables", _labels, _read_labels, ("labels.npz",)),
    Family("label sequences", _sequences, _read_sequences, ("sequenceFiles/test/walk.pkl",)),
)
