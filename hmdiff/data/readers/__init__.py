"""Readers of published data sets: each yields a data set's original files as `Record`s.

A reader is looked up by name and its module imported only then. Nothing is downloaded: every data set below has its own
licence and registration, and a reader reads the user's copy.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from hmdiff.errors import UserError

if TYPE_CHECKING:
    from hmdiff.data.record import Reader

_3DPW = "sequenceFiles/{train,validation,test}/*.pkl and imageFiles/SEQUENCE/image_00000.jpg ..."
_TABLE = "one or several label files *.npz (also in dataset_extras/), and the images that their imgname is relative to"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a reader is implemented, and what it reads."""

    function: str  # module:function of (folder, split) -> Reader
    splits: tuple[str, ...]  # the first is the default; empty: splits are named by the label files
    needs: str  # required content of the source folder


READERS: dict[str, Source] = {
    "3dpw": Source("threedpw:read", ("test", "train", "validation", "all", "3dpw_oc", "3dpw_pc", "3dpw_crowd"), _3DPW),
    "3dpw_oc": Source("threedpw:read", ("3dpw_oc",), f"{_3DPW} (the object-occluded sequences are taken)"),
    "3dpw_pc": Source("threedpw:read", ("3dpw_pc",), f"{_3DPW} (the person-occluded frames are taken)"),
    "3dpw_crowd": Source("threedpw:read", ("3dpw_crowd",), f"{_3DPW} (two crowded validation sequences are taken)"),
    "human36m": Source(
        "human36m:read",
        ("p2", "p1", "train"),
        "SPIN's h36m_*.npz and images/; or mmpose's annotation_body3d/{cameras.pkl,fps10/h36m_*.npz} and images/; or "
        "annotations/Human36M_subject*_{data,camera,joint_3d}.json and images/",
    ),
    "freihand": Source(
        "freihand:read",
        ("evaluation", "training"),
        "{training,evaluation}_{K,xyz}.json, training_mano.json, evaluation_verts.json and {training,evaluation}/rgb/",
    ),
    "spin": Source("spin:read", (), f"{_TABLE}, in the layout of SPIN"),
    "hmr2": Source("hmr2:read", (), f"{_TABLE}, in the layout of ProHMR and HMR 2.0"),
    "bedlam": Source(
        "bedlam:read",
        ("all",),
        "training_labels/all_npz_12_training/SCENE.npz and training_images/SCENE/png/SEQUENCE/*.png (or "
        "processed_labels/ and images/)",
    ),
    "coco": Source(
        "coco:read",
        ("val2017", "train2017", "val2014", "train2014"),
        "annotations/person_keypoints_SPLIT.json and SPLIT/*.jpg (or images/SPLIT/*.jpg)",
    ),
    "3doh": Source("threedoh:read", ("test", "train"), "{train,test}set/annots.json and {train,test}set/images/"),
    "sports": Source(
        "sports:read",
        ("test", "val", "train", "all"),
        "frames.csv in our own layout (see hmdiff/data/readers/sports.py) or a COCO file annotations.json; images/",
    ),
}


def open_reader(
    name: str,  # one of READERS
    source: str | Path,  # the folder of the data set
    split: str | None = None,  # None: the reader's default
) -> Reader:
    """Open a data set's folder.

    Raises:
        UserError: no such reader, folder or split; or a fault in the files that are read at once.
    """
    if name not in READERS:
        nearest = difflib.get_close_matches(name, READERS, 1, cutoff=0)[0]
        raise UserError(f"data set {name!r} has no reader; the nearest is {nearest!r}, of {', '.join(READERS)}")
    entry, folder = READERS[name], Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {name} is read from a folder with {entry.needs}")
    if split is None:
        split = entry.splits[0] if entry.splits else ""
    elif entry.splits and split not in entry.splits:
        raise UserError(f"split {split!r} of {name} is not known; choose one of {', '.join(entry.splits)}")
    module, _, function = entry.function.partition(":")
    reader: Reader = getattr(importlib.import_module(f"{__name__}.{module}"), function)(folder, split)
    return reader
