"""Human3.6M's splits, and the frame that an image name encodes: shared by the layouts.

p2 = S9 and S11, camera 60457274, every fifth frame; p1 = all cameras; train = S1, S5, S6, S7, S8, all rows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TRAIN_SUBJECTS, TEST_SUBJECTS = (1, 5, 6, 7, 8), (9, 11)
P2_CAMERA = "60457274"
EVERY = 5
_NAME = re.compile(r"S(\d+)_(.+)\.(\d{8})_(\d{6})\.\w+$")


class Frame(NamedTuple):
    subject: int
    action: str
    camera: str
    number: int  # counted from 0


def frame_of(image: str) -> Frame | None:
    """The frame that an image name encodes; None if it is not a Human3.6M name."""
    match = _NAME.search(image)
    return None if match is None else Frame(int(match[1]), match[2], match[3], int(match[4]) - 1)


def in_split(split: str, frame: Frame) -> bool:
    if split == "train":
        return frame.subject in TRAIN_SUBJECTS
    chosen = frame.subject in TEST_SUBJECTS and frame.number % EVERY == 0
    return chosen and (split == "p1" or frame.camera == P2_CAMERA)
