"""Stand-ins for a recorded data set: photos of coloured dots, and people of the free body labelled in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from small import free_body

from hmdiff.body.skeletons import HALPE26
from hmdiff.data.record import Record
from hmdiff.data.synthetic.poses import PoseMixture, sample_orientation
from hmdiff.geometry import matrix_to_axis_angle

INTRINSICS = np.array([[600.0, 0, 330], [0, 600.0, 235], [0, 0, 1]])
WIDTH, HEIGHT = 640, 480
MARKED = HALPE26.index("left_wrist")


class ListReader:
    """A `Reader` of records that are there already."""

    def __init__(self, records: Sequence[Record], promised: int | None = None, stop_at: int | None = None) -> None:
        self.name, self.list, self.stop_at = "standin", list(records), stop_at
        self.promised = len(self.list) if promised is None else promised
        self.summary = [f"standin: {len(self.list)} people"]

    def count(self) -> int:
        return self.promised

    def records(self) -> Iterator[Record]:
        for number, record in enumerate(self.list):
            if number == self.stop_at:
                raise KeyboardInterrupt
            yield record.check()


def make_records(folder: Path, count: int = 6, photos: bool = True, **changed: Any) -> list[Record]:
    """Bodies with all labels, each in a photo of its own: grey, with a red dot at the left wrist."""
    body, _ = free_body()
    generator = torch.Generator().manual_seed(3)
    rotations = PoseMixture().sample(count, generator).clone()
    rotations[:, 0] = sample_orientation(count, generator)
    betas = torch.randn(count, body.num_betas, generator=generator)
    place = torch.tensor([0.3, -0.1, 4.0]) + 0.3 * torch.randn(count, 3, generator=generator)
    output = body(betas, rotations)
    root = output.joints[:, 0]
    keypoints = (body.keypoints(output.vertices) - root[:, None] + place[:, None]).double().numpy()
    records = []
    for row in range(count):
        points = keypoints[row] @ INTRINSICS.T
        points = points[:, :2] / points[:, 2:]
        low, high = points.min(0), points.max(0)
        image = None
        if photos:
            image = folder / f"image_{row:03d}.jpg"
            draw_photo(image, points[MARKED])
        values: dict[str, Any] = {
            "name": f"standin/{row // 2}/{row:03d}",
            "group": f"sequence_{row // 2}",
            "source": f"labels.npz row {row}",
            "image": image,
            "center": (low + high) / 2,
            "side": float(1.2 * (high - low).max()),
            "body": "smpl",
            "pose": matrix_to_axis_angle(rotations[row]).double().numpy(),
            "betas": betas[row].double().numpy(),
            "translation": (place[row] - root[row]).double().numpy(),
            "keypoints_2d": points,
            "keypoints_2d_confidence": np.ones(len(points)),
            "keypoint_names": HALPE26,
            "intrinsics": INTRINSICS,
        }
        records.append(Record(**{**values, **changed}))
    return records


def draw_photo(path: Path, dot: np.ndarray, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    picture = np.full((size[1], size[0], 3), 128, np.uint8)
    x, y = ((dot - 0.5) * 16).round().astype(int)
    cv2.circle(picture, (int(x), int(y)), 6 * 16, (0, 0, 255), -1, cv2.LINE_AA, shift=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])


def red_place(image: np.ndarray) -> np.ndarray:  # (S, S, 3) RGB -> (2,) crop coordinates of the red dot's middle
    red = (image[..., 0].astype(float) - image[..., 2]).clip(0)
    red[red < 0.3 * red.max()] = 0
    rows, columns = np.indices(red.shape)
    middle = np.array([(red * columns).sum(), (red * rows).sum()]) / red.sum()
    return (middle + 0.5) * (2 / len(image)) - 1
