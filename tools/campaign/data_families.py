"""Data sets: prepared shards, and the label files of every reader in their original layouts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hmdiff.data.readers import open_reader
from hmdiff.data.readers.tables import Table
from hmdiff.data.record import Record
from hmdiff.data.shards import INDEX, PreparedShards, ShardWriter
from tools.campaign.family import Family, finite, support

support()
import standin_tables as tables  # noqa: E402
import standins as s  # noqa: E402

_SHARDS = ("data/shard_00000.arrow", "data/shard_00001.arrow")


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
    """Shards without record or shard checksums, so that Arrow's own reading is tested."""
    _shards(folder)
    path = folder / "data" / INDEX
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        del shard["crc32"]
    path.write_text(json.dumps(index))


def _read_shards(folder: Path, name: str) -> None:
    store = PreparedShards(folder / "data")
    store.groups()
    for number in range(len(store)):
        record = store[number].record
        finite(record.pose, record.center)


def _read_plain_shards(folder: Path, name: str) -> None:
    from hmdiff.data import shards

    checked, shards.verify_shard = shards.verify_shard, lambda path, shard: None  # type: ignore[assignment]
    try:
        _read_shards(folder, name)
    finally:
        shards.verify_shard = checked


def _table(folder: Path) -> None:
    draw = np.random.default_rng(0)
    columns = {
        "imgname": np.array(["a.jpg", "b.jpg"]),
        "center": draw.random((2, 2)),
        "scale": np.ones(2),
        "pose": draw.random((2, 72)),
        "part": np.array([[1.0], [2.0]], object),
    }
    np.savez(folder / "labels.npz", **columns)  # type: ignore[arg-type]


def _read_table(folder: Path, name: str) -> None:
    table = Table(folder / name)
    for key, shape in (("center", (2,)), ("scale", ()), ("pose", (72,)), ("part", ())):
        table.column(key, shape)


def _labels(reader: str, split: str | None = None) -> Callable[[Path, str], None]:
    """Reads every record of a data set folder."""

    def read(folder: Path, name: str) -> None:
        licensed = folder / "bodies"
        os.environ.pop("HMDIFF_BODY_DIR", None)
        if licensed.is_dir():
            os.environ["HMDIFF_BODY_DIR"] = str(licensed)
        with np.errstate(all="ignore"):
            for record in open_reader(reader, folder, split).records():
                finite(record.pose, record.betas, record.center, record.side)
                for points, certain in (
                    (record.joints_3d, record.joints_3d_valid),
                    (record.keypoints_2d, record.keypoints_2d_confidence),
                ):  # unlabelled joints may hold any value
                    finite(points if points is None or certain is None else points[np.nan_to_num(certain) > 0])

    return read


def _freihand(folder: Path) -> None:
    from hmdiff.body.body import load_body

    bodies = s.licensed_folder(folder / "bodies")
    s.make_freihand(folder, load_body(bodies / "MANO_RIGHT.pkl"))


def _bedlam(folder: Path) -> None:
    from hmdiff.body.body import load_body

    bodies = s.licensed_folder(folder / "bodies")
    tables.make_bedlam(folder, load_body(bodies / "SMPLX_NEUTRAL.npz"))


# Family: reader, split, writer, label files
_READERS: dict[str, tuple[str, str | None, Callable[[Path], Any], tuple[str, ...]]] = {
    "3DPW": ("3dpw", "test", s.make_3dpw, ("sequenceFiles/test/downtown_bus_00.pkl",)),
    "Human3.6M, SPIN's": (
        "human36m",
        None,
        lambda folder: tables.make_human36m(folder, "spin"),
        ("h36m_valid_protocol2.npz",),
    ),
    "Human3.6M, mmpose's": (
        "human36m",
        None,
        lambda folder: tables.make_human36m(folder, "mmpose"),
        ("annotation_body3d/cameras.pkl", "annotation_body3d/fps10/h36m_test.npz"),
    ),
    "Human3.6M, JSON": (
        "human36m",
        None,
        lambda folder: tables.make_human36m(folder, "json"),
        tuple(f"annotations/Human36M_subject9_{n}.json" for n in ("data", "camera", "joint_3d", "smpl_param")),
    ),
    "FreiHAND": ("freihand", None, _freihand, tuple(f"evaluation_{n}.json" for n in ("K", "xyz", "verts", "scale"))),
    "SPIN": ("spin", None, tables.make_spin, ("coco_2014_train.npz",)),
    "HMR 2.0": ("hmr2", None, tables.make_hmr2, ("3dpw_test.npz",)),
    "BEDLAM": ("bedlam", None, _bedlam, ("training_labels/all_npz_12_training/static_6fps.npz",)),
    "COCO": ("coco", None, tables.make_coco, ("annotations/person_keypoints_val2017.json",)),
    "3DOH": ("3doh", None, tables.make_3doh, ("testset/annots.json",)),
    "sports": ("sports", "all", tables.make_sports, ("frames.csv",)),
}

FAMILIES = (
    Family("shards", _shards, _read_shards, ("data/index.json", *_SHARDS)),
    Family("shards without checksums", _plain_shards, _read_plain_shards, _SHARDS[:1]),
    Family("label tables", _table, _read_table, ("labels.npz",)),
    *(
        Family(f"labels of {name}", make, _labels(reader, split), files)
        for name, (reader, split, make, files) in _READERS.items()
    ),
)
