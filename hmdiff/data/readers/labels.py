"""Small arithmetic on labels that several readers share: rotations of the root, genders, keypoints of two sources."""

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
    place: str,  # file, row and, where it is known, field
) -> contextlib.AbstractContextManager[None]:
    """Whatever damaged labels raise in the block, as a `UserError` that names the place."""
    return reading.naming(place, "download it again")


class RowReader:
    """A `Reader` over a list of rows and a function that makes the record of one."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Any],
        make: Callable[[Any], Record],
        notes: Sequence[str] = (),  # for the user: what was left out, and why
        *,
        place: Callable[[Any], str],  # of a row: its file and number, for messages
    ) -> None:
        self.name, self.rows, self.make, self.notes, self.place = name, rows, make, notes, place

    @property
    def summary(self) -> list[str]:
        return [f"{self.name}: {len(self.rows)} people", *self.notes]

    def count(self) -> int:
        return len(self.rows)

    def records(self) -> Iterator[Record]:
        for row in self.rows:
            with naming(self.place(row)):
                record = self.make(row).check()
            yield record


def turned_root(
    pose: np.ndarray,  # (J, 3) axis-angle
    rotation: np.ndarray,  # (3, 3)
) -> np.ndarray:  # (J, 3)
    """The pose with its root turned by a rotation, such as a camera's: R_ext R."""
    turned = np.array(pose, np.float64)
    if not (np.isfinite(turned[0]).all() and np.isfinite(rotation).all()):
        turned[0] = np.nan  # `Record.check` names the row; scipy would only say that a matrix is bad
        return turned
    turned[0] = (Rotation.from_matrix(rotation) * Rotation.from_rotvec(pose[0])).as_rotvec()
    return turned


def moved_translation(
    translation: np.ndarray,  # (3,) of the body model, in the world
    root: np.ndarray,  # (3,) the root joint of the shaped body at rest
    extrinsics: np.ndarray,  # (>= 3, 4) world to camera
) -> np.ndarray:  # (3,)
    """The translation that goes with `turned_root`: a body model turns about its root joint, not about the origin."""
    return extrinsics[:3, :3] @ (root + translation) + extrinsics[:3, 3] - root


def body_if_there(kind: str, gender: str) -> Body | None:
    """A licensed body, or None where its file is not installed: readers need it for a root joint at rest alone."""
    try:
        return load_body(kind, gender)
    except UserError:
        return None


def root_at_rest(
    body: Body,
    betas: np.ndarray,  # (B,); what the body has not is left out
) -> np.ndarray:  # (3,) metres
    """The root joint of the shaped body, about which its root rotation turns it."""
    shift = body.joint_shapedirs[0].double().numpy()
    count = min(len(betas), shift.shape[-1])
    return body.joint_template[0].double().numpy() + shift[:, :count] @ betas[:count]


def plain_text(value: object) -> str:
    """Text from a string, bytes, or numpy's array of one of them."""
    item: object = np.asarray(value).reshape(-1)[0]
    return item.decode("latin1") if isinstance(item, bytes) else str(item)


def gender_word(value: object) -> str:
    """neutral, male or female from any spelling; any other word as it is, for `Record.check` to name."""
    text = plain_text(value)
    return _GENDERS.get(text[:1].lower(), text)


def merged_points(
    *sources: tuple[np.ndarray, Sequence[str]],  # (J, D + 1) points with a confidence, and their names; the best first
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:  # (P, D), confidence (P,) 0..1, P names
    """Points of several joint sets by name; a name that is in two sets is taken from the first that has it labelled."""
    chosen: dict[str, np.ndarray] = {}
    for points, names in sources:
        for point, name in zip(np.asarray(points, np.float64), names, strict=True):
            # NaN is neither labelled nor unlabelled: it stays, for `Record.check` to find.
            if name not in chosen or (chosen[name][-1] <= 0 and not point[-1] <= 0):
                chosen[name] = point
    together = np.stack(list(chosen.values()))
    confidence = together[:, -1].clip(0, 1)
    return np.where(confidence[:, None] == 0, 0, together[:, :-1]), confidence, tuple(chosen)
