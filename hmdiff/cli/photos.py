"""Photos and what is known of the people in them: keypoints or heatmaps found beside a photo or named by the user.

J keypoints of a person to draw, P people of a photo. Our choice of file names: NAME.json, NAME_heatmaps.npz.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hmdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hmdiff.heatmaps import Heatmaps, PersonKeypoints

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 photo pixels


@dataclasses.dataclass(frozen=True)
class PhotoPeople:
    """One photo, the pipeline's input for its people, and the points to draw for them."""

    photo: Path
    size: tuple[int, int]  # width, height in pixels
    heatmaps: Heatmaps  # of P people
    points: list[tuple[Tensor, tuple[str, ...]]]  # of each: (J, 3) photo pixels and confidence, J names
    source: str  # what the user is told
    depth: Tensor | None = None  # (h, w) of the whole photo, larger = farther, NaN = not known


def pair_files(kind: str, files: Sequence[Path], photos: Sequence[Path]) -> list[Path | None]:
    """The file of every photo: one each, in order; a single file serves all photos where it is about many."""
    if not files:
        return [None] * len(photos)
    if len(files) == len(photos):
        return list(files)
    if len(files) == 1 and _about_many(files[0]):
        return [files[0]] * len(photos)
    raise UserError(f"{kind}: {len(files)} files for {len(photos)} photos; give one for each photo, in their order")


def _about_many(path: Path) -> bool:
    """COCO's annotations and lists of results name the photo that each person is in."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if isinstance(data, dict):
        return isinstance(data.get("images"), list) and "annotations" in data
    return isinstance(data, list) and len({str(r.get("image_id")) for r in data if isinstance(r, dict)}) > 1


def read_people(
    photo: Path,
    keypoints: Path | None = None,  # None: looked for beside the photo
    heatmaps: Path | None = None,
    box: Box | None = None,
    estimate: Callable[[np.ndarray, list[Box] | None], tuple[Heatmaps, Tensor]] | None = None,
    boxes: list[Box] | None = None,  # of the people to estimate; None: found
) -> PhotoPeople:
    """The people of a photo.

    Heatmaps win over keypoints, which are then only drawn; `estimate` makes heatmaps where there is neither. Raises
    `UserError` when nothing is known, or what is known is damaged or about another photo.
    """
    from hmdiff.heatmaps import crop_from_box, heatmaps_from_keypoints, load_heatmaps
    from hmdiff.viz.canvas import read_picture

    picture = read_picture(photo)
    height, width = picture.shape[:2]
    given = keypoints is not None
    if keypoints is None and photo.with_suffix(".json").is_file():
        keypoints = photo.with_suffix(".json")
    beside = photo.with_name(f"{photo.stem}_heatmaps.npz")
    if heatmaps is None and not given and beside.is_file():
        heatmaps = beside

    if heatmaps is not None:
        if box is not None:
            raise UserError(f"{heatmaps}: heatmaps hold their crop, so --box says nothing; leave it out")
        maps = load_heatmaps(heatmaps)
        _check_crops(heatmaps, maps, (width, height))
        persons = []
        if keypoints is not None:
            try:
                persons = read_keypoints_of(keypoints, photo, (width, height))
            except UserError:
                if given:
                    raise
        drawn = [(person.points, person.names) for person in persons]
        if len(drawn) != len(maps):
            drawn = peaks(maps)
        return PhotoPeople(photo, (width, height), maps, drawn, f"heatmaps of {heatmaps}")
    if estimate is not None and (keypoints is None or (not given and _box_alone(keypoints))):
        maps, _ = estimate(picture, boxes or _json_boxes(keypoints))
        return PhotoPeople(photo, (width, height), maps, peaks(maps), "heatmaps of the pose estimator")
    if keypoints is None:
        raise UserError(
            f"{photo}: nothing is known of the people in it; give --keypoints FILE (COCO or OpenPose JSON) or "
            f"--heatmaps FILE.npz, or put {photo.stem}.json or {beside.name} beside it, or run a pose estimator by "
            "--pose MODEL"
        )
    if boxes is not None and len(boxes) > 1:
        raise UserError(f"{keypoints}: {len(boxes)} boxes, but keypoints take one, their person's; leave them out")
    persons = read_keypoints_of(keypoints, photo, (width, height))
    center = side = None
    if box is not None:
        import torch

        if len(persons) != 1:
            raise UserError(f"{keypoints}: {len(persons)} people, but --box is about one; leave it out, or keep one")
        if not (box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0):
            corners = ",".join(f"{number:g}" for number in box)
            raise UserError(f"--box {corners}: lies outside the {width} x {height} photo; give it in its pixels")
        center, side = crop_from_box(torch.tensor([box]))
    try:
        maps = heatmaps_from_keypoints(persons, center, side)
    except UserError as error:
        raise UserError(f"{keypoints}: {error}") from None
    drawn = [(person.points, person.names) for person in persons]
    return PhotoPeople(photo, (width, height), maps, drawn, f"keypoints of {keypoints}")


def _check_crops(path: Path, heatmaps: Heatmaps, size: tuple[int, int]) -> None:
    """A crop that does not touch the photo is another photo's."""
    for index, ((x, y), side) in enumerate(zip(heatmaps.center.tolist(), heatmaps.side.tolist(), strict=True)):
        if not (-side / 2 < x < size[0] + side / 2 and -side / 2 < y < size[1] + side / 2):
            raise UserError(
                f"{path}: the crop of person {index}, {side:.0f} pixels about ({x:.0f}, {y:.0f}), lies outside the "
                f"{size[0]} x {size[1]} photo; give the heatmaps that were made of this photo at this size"
            )


def read_keypoints_of(path: Path, photo: Path, size: tuple[int, int]) -> list[PersonKeypoints]:
    from hmdiff.heatmaps import read_keypoints

    try:
        return read_keypoints(path, photo, size)
    except UserError:
        if _box_alone(path):
            raise UserError(
                f"{path}: a box but no keypoints, and a box is not enough; add COCO or OpenPose keypoints to it, "
                "give --heatmaps FILE.npz, or run a pose estimator by --pose MODEL"
            ) from None
        raise


def _box_alone(path: Path) -> bool:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(data, dict) or any("keypoints" in key for key in data):
        return False
    return any("box" in key for key in data)


def _json_boxes(path: Path | None) -> list[Box] | None:
    """The box of a JSON without keypoints; None where it is none, and for the detector to find."""
    try:
        box = json.loads(path.read_bytes())["box_xyxy"] if path is not None else ()
        x1, y1, x2, y2 = (float(number) for number in box)
    except (KeyError, TypeError, ValueError):
        return None
    return [(x1, y1, x2, y2)]


def peaks(heatmaps: Heatmaps) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Of each person the places of the peaks, photo pixels, with the confidence (J, 3), and the J names."""
    import torch

    from hmdiff.body.skeletons import HALPE26
    from hmdiff.geometry import crop_to_photo
    from hmdiff.heatmaps import heatmap_peaks

    places, confidence = heatmap_peaks(heatmaps.values)
    places = crop_to_photo(places, heatmaps.center, heatmaps.side)
    points = torch.cat([places, (confidence * heatmaps.valid).clamp(0, 1)[..., None]], -1)
    return [(person, HALPE26) for person in points]


def crops(
    picture: np.ndarray,  # (H, W, 3) uint8
    heatmaps: Heatmaps,  # of P people: their crops
    size: int,
) -> Tensor:  # (P, 3, size, size) RGB 0..1
    """The square crops of a photo, for a model that reads pictures; black outside the photo."""
    import cv2
    import numpy as np
    import torch

    result = []
    for center, side in zip(heatmaps.center.tolist(), heatmaps.side.tolist(), strict=True):
        scale = size / side
        affine = np.array([[scale, 0, (side / 2 - center[0]) * scale], [0, scale, (side / 2 - center[1]) * scale]])
        affine[:, 2] += 0.5 * scale - 0.5  # OpenCV counts from the centre of the first pixel, we from its corner
        # Smoothed first where the crop is coarser than the photo, so that nothing aliases.
        base = picture if scale >= 0.7 else cv2.GaussianBlur(picture, (0, 0), 0.4 / scale)
        result.append(cv2.warpAffine(base, affine, (size, size), flags=cv2.INTER_LINEAR))
    return torch.from_numpy(np.stack(result)).permute(0, 3, 1, 2).float() / 255
