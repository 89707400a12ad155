"""Records: one labelled person in one image, before any crop, as yielded by the reader of a real data set.

A label that a data set does not have is None. Units are photo pixels (the first pixel's centre is at 0.5, 0.5) and
metres in the camera frame (x right, y down, z forward). J joints of the pose, B betas, V vertices, K named 3D joints, P
named 2D keypoints. `hmdiff.data.shards` stores records, `hmdiff.data.recorded` makes samples from them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hmdiff.errors import UserError

BODIES = ("smpl", "smplx", "mano")
GENDERS = ("neutral", "male", "female")
HANDS = ("left", "right")
LARGEST = 1e6  # limit on any number in a record: larger metres or pixels overflow later on

# Shape of every array of a record; a letter is a length that must be the same wherever it occurs.
SHAPES: dict[str, tuple[int | str, ...]] = {
    "center": (2,),
    "pose": ("J", 3),
    "betas": ("B",),
    "translation": (3,),
    "vertices": ("V", 3),
    "joints_3d": ("K", 3),
    "joints_3d_valid": ("K",),
    "keypoints_2d": ("P", 2),
    "keypoints_2d_confidence": ("P",),
    "intrinsics": (3, 3),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One labelled person in one image."""

    name: str  # unique and stable: data set/sequence/frame/person
    center: np.ndarray  # (2,) photo pixels: the middle of the square crop
    side: float  # photo pixels, of the square crop, padding applied
    source: str  # file and row, for error messages
    image: Path | None = None
    group: str = ""  # the sequence, by which named sub-splits are chosen
    gender: str = "neutral"
    body: str = "smpl"  # the body model of pose, betas and vertices
    hand: str | None = None  # left or right, for a MANO record
    pose: np.ndarray | None = None  # (J, 3) axis-angle; the root's rotation is in the camera frame
    betas: np.ndarray | None = None  # (B,)
    translation: np.ndarray | None = None  # (3,) metres, of the body model's output, camera frame
    vertices: np.ndarray | None = None  # (V, 3) metres, camera frame, where a data set has meshes
    joints_3d: np.ndarray | None = None  # (K, 3) metres, camera frame
    joints_3d_valid: np.ndarray | None = None  # (K,) bool; None: all
    joint_names: tuple[str, ...] = ()  # K
    keypoints_2d: np.ndarray | None = None  # (P, 2) photo pixels
    keypoints_2d_confidence: np.ndarray | None = None  # (P,) 0..1, 0 = not labelled; None: all 1
    keypoint_names: tuple[str, ...] = ()  # P
    intrinsics: np.ndarray | None = None  # (3, 3) of the photo's camera
    mask: Any = None  # the data set's mask: COCO polygons or RLE, or an image path; not in prepared records

    def check(self) -> Record:
        """The record itself if it is valid. Raises `UserError` naming `source` and the field."""
        self._check_words()
        lengths: dict[str, int] = {}
        for field, shape in SHAPES.items():
            value = getattr(self, field)
            if value is not None:
                self._check_array(field, np.asarray(value), shape, lengths)
        if not (isinstance(self.side, float | int | np.number) and 0 < self.side <= LARGEST):
            raise self.error(f"a crop of side {self.side}, expected more than 0 pixels; mend its box, or leave it out")
        for field, names, length in (
            ("joints_3d", self.joint_names, lengths.get("K", 0)),
            ("keypoints_2d", self.keypoint_names, lengths.get("P", 0)),
        ):
            if len(names) != length:
                raise self.error(f"{field} has {length} points and {len(names)} names; the reader must name each")
        if self.keypoints_2d_confidence is not None and (np.asarray(self.keypoints_2d_confidence) < 0).any():
            raise self.error("a confidence below 0; expected 0..1, 0 for a keypoint that is not labelled")
        if (self.pose is None) != (self.betas is None):
            raise self.error("pose and betas go together; one of them is missing")
        if self.image is not None and not os.path.isfile(self.image):  # False for an impossible name too
            raise self.error(f"its image {self.image!s:.400} is missing; complete the data set's images")
        return self

    def _check_words(self) -> None:
        for field, value, known in (
            ("body", self.body, BODIES),
            ("gender", self.gender, GENDERS),
            ("hand", self.hand, (None, *HANDS)),
        ):
            if value not in known:
                raise self.error(f"{field} is {value!r}, expected one of {', '.join(str(word) for word in known)}")
        if not self.name:
            raise self.error("a record without a name")
        if ".." in self.name.split("/") or self.name.startswith("/"):  # the name becomes a file name
            raise self.error(f"a record of the name {self.name!r:.80}; a relative path was expected")
        if self.body == "mano" and self.hand is None and self.pose is not None:
            raise self.error("a MANO pose that does not say which hand it is")

    def _check_array(
        self,
        field: str,
        value: np.ndarray,
        shape: tuple[int | str, ...],
        lengths: dict[str, int],  # lengths bound to the letters so far; updated
    ) -> None:
        expected = [lengths.get(size, size) if isinstance(size, str) else size for size in shape]
        fits = value.ndim == len(expected) and all(
            isinstance(want, str) or have == want for have, want in zip(value.shape, expected, strict=True)
        )
        if not fits:
            expected_text = ", ".join(str(want) for want in expected)
            raise self.error(
                f"{field} has shape {value.shape}, expected ({expected_text}{',' if len(expected) == 1 else ''})"
            )
        lengths.update({size: have for size, have in zip(shape, value.shape, strict=True) if isinstance(size, str)})
        if value.dtype.kind not in "biuf":
            raise self.error(f"{field} is of {value.dtype}, numbers were expected; mend the file")
        labelled = self._labelled(field, value)
        if not np.isfinite(labelled).all():
            raise self.error(f"{field} has NaN or infinity in it; leave the row out, or mend the file")
        if (np.abs(labelled) > LARGEST).any():
            raise self.error(f"{field} has {np.abs(labelled).max():.3g} in it, at most {LARGEST:g} is possible")

    def _labelled(self, field: str, value: np.ndarray) -> np.ndarray:
        """The labelled rows: an unlabelled joint may hold any value."""
        mask = {"joints_3d": self.joints_3d_valid, "keypoints_2d": self.keypoints_2d_confidence}.get(field)
        if mask is None or len(np.asarray(mask)) != len(value):
            return value
        return value[np.nan_to_num(np.asarray(mask, np.float64)) > 0]

    def error(self, what: str) -> UserError:
        """A `UserError` about this record."""
        return UserError(f"{self.source}: {what}")


class Reader(Protocol):
    """Reads a data set's original files as records; `hmdiff prepare` checks their announced number."""

    name: str

    @property
    def summary(self) -> list[str]: ...  # for the user: splits, people, what was left out

    def count(self) -> int: ...  # the number of records that `records` yields

    def records(self) -> Iterator[Record]: ...  # in a fixed order; each passes `Record.check`
