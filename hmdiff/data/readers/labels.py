"""Label handling shared by several readers: rotations of the root, genders, keypoints from two sources."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hmdiff.body.body import Body, load_body
from hmdiff.data.record import Record
from hmdiff.errors import UserError
from hmdiff.files import reading

_GENDERS = {"m": "male", "f": "female", "n": "neutral"}


def naming(
    location: str,  # file, row and, if known, field
) -> contextlib.AbstractContextManager[None]:
    """Re-raise any error from damaged labels in the block as a `UserError` that names the place."""
    return reading.naming(location, "download it again")


class RowReader:
    """A `Reader` over a list of rows and a function that makes one record from a row."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Any],
        make: Callable[[Any], Record],
        notes: Sequence[str] = (),  # for the user: what was left out and why
        *,
        location: Callable[[Any], str],  # file and number of a row, for messages
    ) -> None:
        self.name, self.rows, self.make, self.notes, self.location = name, rows, make, notes, location

    @property
    def summary(self) -> list[str]:
        return [f"{self.name}: {len(self.rows)} people", *self.notes]

    def count(self) -> int:
        return len(self.rows)

    def records(self) -> Iterator[Record]:
        for row in self.rows:
            with naming(self.location(row)):
                record = self.make(row).check()
            yield record


def rotate_root(
    pose: np.ndarray,  # (J, 3) axis-angle
    rotation: np.ndarray,  # (3, 3)
) -> np.ndarray:  # (J, 3)
    """The pose with its root multiplied by a rotation, such as a camera's: R_ext R."""
    turned = np.array(pose, np.float64)
    if not (np.isfinite(turned[0]).all() and np.isfinite(rotation).all()):
        turned[0] = np.nan  # so that `Record.check` names the row; scipy's error would not
        return turned
    turned[0] = (Rotation.from_matrix(rotation) * Rotation.from_rotvec(pose[0])).as_rotvec()
    return turned


def rotate_translation(
    translation: np.ndarray,  # (3,) of the body model, in the world
    root: np.ndarray,  # (3,) the root joint of the shaped body at rest
    extrinsics: np.ndarray,  # (>= 3, 4) world to camera
) -> np.ndarray:  # (3,)
    """The translation matching `rotate_root`: a body model turns about its root joint, not about the origin."""
    return extrinsics[:3, :3] @ (root + translation) + extrinsics[:3, 3] - root


def load_body_if_installed(kind: str, gender: str) -> Body | None:
    """A licensed body, or None if its file is not installed: readers need only its root joint in the rest pose."""
    try:
        return load_body(kind, gender)
    except UserError:
        return None


def rest_pose_root(
    body: Body,
    betas: np.ndarray,  # (B,); those beyond the body's number are dropped
) -> np.ndarray:  # (3,) metres
    """The root joint of the shaped body in the rest pose: the centre of its root rotation."""
    shift = body.joint_shapedirs[0].double().numpy()
    count = min(len(betas), shift.shape[-1])
    return body.joint_template[0].double().numpy() + shift[:, :count] @ betas[:count]


def first_text(value: object) -> str:
    """Text from a string, bytes, or a numpy array of one of them."""
    while isinstance(value, list | tuple) and value:  # not by numpy, which pads each text to the longest
        value = value[0]
    item: object = np.asarray(value).reshape(-1)[0]
    return item.decode("latin1") if isinstance(item, bytes) else str(item)


def parse_gender(value: object) -> str:
    """neutral, male or female from any spelling; other words unchanged, for `Record.check` to report."""
    text = first_text(value)
    return _GENDERS.get(text[:1].lower(), text)


def merge_keypoints(
    *sources: tuple[np.ndarray, Sequence[str]],  # points (J, D + 1) with confidence, and names; best source first
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:  # (P, D), confidence (P,) 0..1, P names
    """Merge points of several joint sets by name; of duplicates, the first source that has it labelled counts."""
    chosen: dict[str, np.ndarray] = {}
    for points, names in sources:
        for point, name in zip(np.asarray(points, np.float64), names, strict=True):
            # NaN confidence is kept, so that `Record.check` reports it.
            if name not in chosen or (chosen[name][-1] <= 0 and not point[-1] <= 0):
                chosen[name] = point
    together = np.stack(list(chosen.values()))
    confidence = together[:, -1].clip(0, 1)
    return np.where(confidence[:, None] == 0, 0, together[:, :-1]), confidence, tuple(chosen)
