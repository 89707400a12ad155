"""The people of a photo: from keypoints or heatmaps found beside it or given, or from a pose estimator.

J drawn keypoints of a person, P people of a photo. Files found beside NAME.jpg: NAME.json, OpenPose's
NAME_keypoints.json, NAME.jpg.json, and NAME_heatmaps.npz (our choice of names).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hmdiff.estimators.source import Box, DetectedPeople, PoseSource
    from hmdiff.heatmaps import Heatmaps, PersonKeypoints
    from hmdiff.heatmaps.cameras import PhotoCamera
    from hmdiff.heatmaps.photo import PhotoInfo

Photo = Any  # str | Path | PIL.Image.Image | numpy array (H, W, 3) uint8 RGB
FAINT = 0.1  # warn if the highest confidence is below this, since the heatmaps then hardly guide the result


@dataclasses.dataclass(frozen=True)
class PhotoPeople:
    """One photo, the pipeline's input for its people, and the points to draw."""

    photo: Path
    size: tuple[int, int]  # width, height in pixels
    heatmaps: Heatmaps  # P people; the crops carry the photo's size and camera
    points: list[tuple[Tensor, tuple[str, ...]]]  # per person: (J, 3) photo pixels and confidence, J names
    source: str  # description for the user
    depth: Tensor | None = None  # (h, w) of the whole photo, larger = farther, NaN = unknown
    identities: tuple[dict[str, str], ...] = ()  # per person: annotation, track, ... in the file
    notes: tuple[str, ...] = ()  # corrections and omissions
    focal_from: str = ""
    picture: np.ndarray | None = None  # (H, W, 3) uint8 RGB, for a photo without a file

    def pixels(self) -> np.ndarray:  # (H, W, 3) uint8 RGB
        """The photo's pixels; the last photo is cached, since every person's files need it."""
        if self.picture is not None:
            return self.picture
        return _pixels(self.photo, self.photo.stat().st_mtime_ns if self.photo.exists() else 0)

    def identity(self, person: int) -> dict[str, str]:
        return self.identities[person] if person < len(self.identities) else {}


@functools.lru_cache(maxsize=1)
def _pixels(photo: Path, changed: int) -> np.ndarray:
    from hmdiff.viz import canvas

    picture = canvas.read_picture(photo)
    picture.flags.writeable = False
    return picture


def people_in(photo: Photo, source: PoseSource) -> PhotoPeople:
    """Everybody in a photo: from files beside it, else from the source.

    Raises:
        UserError: not a photo, nobody detected, or damaged files beside it.
    """
    import numpy as np

    if isinstance(photo, str | Path):
        return read_people(Path(photo), source=source)
    mode = getattr(photo, "mode", None)
    if mode is not None:
        from PIL import Image, ImageOps

        assert isinstance(photo, Image.Image)
        photo = np.array(ImageOps.exif_transpose(photo).convert("RGB"))
    picture = np.asarray(photo)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise UserError(
            f"photo: {picture.dtype} of shape {picture.shape} found; a path, a PIL image, or uint8 RGB of shape "
            "(H, W, 3) is expected"
        )
    from hmdiff.heatmaps.cameras import PhotoCamera
    from hmdiff.heatmaps.photo import PhotoInfo

    info = PhotoInfo(picture.shape[1], picture.shape[0])
    detected, camera = source.estimate(picture), PhotoCamera()
    maps = detected.heatmaps
    maps = dataclasses.replace(maps, crop=camera.applied(maps.crop, info))
    description = f"heatmaps of the {source.name}"
    return PhotoPeople(
        Path("photo"),
        info.size,
        maps,
        peaks(maps),
        description,
        notes=tuple(_skipped_note("photo", detected)),
        focal_from=camera.described(info),
        picture=picture,
    )


def pair_files(kind: str, files: Sequence[Path], photos: Sequence[Path]) -> list[Path | None]:
    """The file of each photo, in order; a single file serves all photos if it covers several."""
    if not files:
        return [None] * len(photos)
    if len(files) == len(photos):
        return list(files)
    if len(files) == 1:
        from hmdiff.heatmaps.formats import about_many

        if files[0].suffix.lower() == ".json" and about_many(files[0]):
            return [files[0]] * len(photos)
    raise UserError(f"{kind}: {len(files)} files for {len(photos)} photos; give one for each photo, in their order")


def keypoints_beside(photo: Path) -> Path | None:
    names = (f"{photo.stem}.json", f"{photo.stem}_keypoints.json", f"{photo.name}.json")
    return next((found for name in names if (found := photo.with_name(name)).is_file()), None)


def heatmaps_beside(photo: Path) -> Path:
    return photo.with_name(f"{photo.stem}_heatmaps.npz")


def read_people(
    photo: Path,
    keypoints: Path | None = None,  # None: searched beside the photo
    heatmaps: Path | None = None,
    box: Box | None = None,
    source: PoseSource | None = None,  # pose source for a photo without files
    boxes: list[Box] | None = None,  # people to estimate; None: detected
    camera: PhotoCamera | None = None,  # None: EXIF's focal length, else the diagonal
) -> PhotoPeople:
    """The people of a photo.

    Heatmaps take precedence over keypoints, which are then only drawn; without either, `source` estimates heatmaps.
    Raises `UserError` if there is no input, or if it is damaged or belongs to another photo.
    """
    from hmdiff.heatmaps.cameras import PhotoCamera
    from hmdiff.heatmaps.photo import photo_info
    from hmdiff.viz.canvas import read_picture

    picture = read_picture(photo)
    info = photo_info(photo)
    given = keypoints is not None
    notes: list[str] = []
    if keypoints is None:
        keypoints = keypoints_beside(photo)
    if heatmaps is None and not given and heatmaps_beside(photo).is_file():
        heatmaps = heatmaps_beside(photo)
    if heatmaps is not None:
        people = _from_heatmaps(photo, info, heatmaps, keypoints, given, box, notes)
    else:
        has_keypoints = keypoints is not None and (given or _has_keypoints(keypoints))
        if source is not None and not has_keypoints:
            if keypoints is not None and _json_box(keypoints) is None:
                notes.append(f"{keypoints}: no keypoints in it, so it was not used")
            detected = source.estimate(picture, boxes or _json_box(keypoints))
            maps = detected.heatmaps
            notes += _skipped_note(str(photo), detected)
            people = PhotoPeople(photo, info.size, maps, peaks(maps), f"heatmaps of the {source.name}")
        else:
            people = _from_keypoints(photo, info, keypoints, box, boxes, notes)
    camera = PhotoCamera() if camera is None else camera
    maps = dataclasses.replace(people.heatmaps, crop=camera.applied(people.heatmaps.crop, info))
    highest = float(maps.values.amax())
    if highest < FAINT:
        notes.append(
            f"all confidences are below {FAINT:g} (at most {highest:.2g}): hardly anything is known of the pose"
        )
    return dataclasses.replace(people, heatmaps=maps, notes=(*people.notes, *notes), focal_from=camera.described(info))


def _skipped_note(photo: str, detected: DetectedPeople) -> list[str]:
    if not detected.num_skipped:
        return []
    num_taken = len(detected.heatmaps)
    return [f"{photo}: more people may be in it than the {num_taken} that were taken; --max-people N takes more"]


def _from_heatmaps(
    photo: Path, info: PhotoInfo, heatmaps: Path, keypoints: Path | None, given: bool, box: Box | None, notes: list[str]
) -> PhotoPeople:
    from hmdiff.heatmaps import load_heatmaps

    if box is not None:
        raise UserError(f"{heatmaps}: heatmaps hold their crop, so --box says nothing; leave it out")
    maps = load_heatmaps(heatmaps)
    _check_crops(heatmaps, maps, info.size)
    persons: list[PersonKeypoints] = []
    if keypoints is not None:
        try:
            persons = read_keypoints_of(keypoints, photo, info, notes)
        except UserError:
            if given:
                raise
    drawn = [(person.points, person.names) for person in persons]
    identities = tuple(person.identity for person in persons)
    if len(drawn) != len(maps):
        drawn, identities = peaks(maps), ()
    return PhotoPeople(photo, info.size, maps, drawn, f"heatmaps of {heatmaps}", identities=identities)


def _from_keypoints(
    photo: Path, info: PhotoInfo, keypoints: Path | None, box: Box | None, boxes: list[Box] | None, notes: list[str]
) -> PhotoPeople:
    from hmdiff.heatmaps import crop_from_box, heatmaps_from_keypoints

    if keypoints is None:
        raise UserError(
            f"{photo}: nothing is known of the people in it; give --keypoints FILE (COCO or OpenPose JSON) or "
            f"--heatmaps FILE.npz, or put {photo.stem}.json, {photo.stem}_keypoints.json or "
            f"{heatmaps_beside(photo).name} beside it, or run a pose estimator by --pose embedded"
        )
    if boxes is not None and len(boxes) > 1:
        raise UserError(f"{keypoints}: {len(boxes)} boxes, but keypoints take one, their person's; leave them out")
    persons = read_keypoints_of(keypoints, photo, info, notes)
    center = side = None
    if box is not None:
        import torch

        if len(persons) != 1:
            raise UserError(f"{keypoints}: {len(persons)} people, but --box is about one; leave it out, or keep one")
        if not (box[0] < info.width and box[1] < info.height and box[2] > 0 and box[3] > 0):
            corners = ",".join(f"{number:g}" for number in box)
            raise UserError(
                f"--box {corners}: lies outside the {info.width} x {info.height} photo; give it in its pixels"
            )
        center, side = crop_from_box(torch.tensor([box]))
    try:
        maps = heatmaps_from_keypoints(persons, center, side, photo=info, turned=box is None)
    except UserError as error:
        raise UserError(f"{keypoints}: {error}") from None
    drawn = [(person.points, person.names) for person in persons]
    identities = tuple(person.identity for person in persons)
    return PhotoPeople(photo, info.size, maps, drawn, f"keypoints of {keypoints}", identities=identities)


def _check_crops(path: Path, heatmaps: Heatmaps, size: tuple[int, int]) -> None:
    """Raises `UserError` for a crop outside the photo, which belongs to another photo."""
    for index, ((x, y), side) in enumerate(zip(heatmaps.center.tolist(), heatmaps.side.tolist(), strict=True)):
        if not (-side / 2 < x < size[0] + side / 2 and -side / 2 < y < size[1] + side / 2):
            raise UserError(
                f"{path}: the crop of person {index}, {side:.0f} pixels about ({x:.0f}, {y:.0f}), lies outside the "
                f"{size[0]} x {size[1]} photo; give the heatmaps that were made of this photo at this size"
            )


def read_keypoints_of(path: Path, photo: Path, info: PhotoInfo, notes: list[str]) -> list[PersonKeypoints]:
    from hmdiff.heatmaps.formats import read_people_of

    try:
        persons, said = read_people_of(path, photo, info)
    except UserError:
        if _json_box(path) is not None and not _has_keypoints(path):
            raise UserError(
                f"{path}: a box but no keypoints, and a box is not enough; add COCO or OpenPose keypoints to it, "
                "give --heatmaps FILE.npz, or run a pose estimator by --pose embedded"
            ) from None
        raise
    notes += said
    return persons


def _has_keypoints(path: Path) -> bool:
    """Also True for a damaged file, which is then refused by name instead of being replaced by an estimate."""
    from hmdiff.heatmaps.formats import has_keypoints

    try:
        return has_keypoints(path)
    except UserError:
        return True


def _json_box(path: Path | None) -> list[Box] | None:
    """The box of a JSON file without keypoints; None if it has none, so that the detector runs."""
    from hmdiff.heatmaps.formats.document import load_document

    try:
        box = load_document(path).data["box_xyxy"] if path is not None else ()
        x1, y1, x2, y2 = (float(number) for number in box)
    except (KeyError, TypeError, ValueError, UserError):
        return None
    return [(x1, y1, x2, y2)]


def peaks(heatmaps: Heatmaps) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Per person, the peak positions in photo pixels with confidence (J, 3), and the J names."""
    import torch

    from hmdiff.body.skeletons import HALPE26
    from hmdiff.heatmaps import heatmap_peaks

    positions, confidence = heatmap_peaks(heatmaps.values)
    positions = heatmaps.crop.to_photo(positions)
    points = torch.cat([positions, (confidence * heatmaps.valid).clamp(0, 1)[..., None]], -1)
    return [(person, HALPE26) for person in points]


def crops(
    picture: np.ndarray,  # (H, W, 3) uint8
    heatmaps: Heatmaps,  # P people with their crops
    size: int,
) -> Tensor:  # (P, 3, size, size) RGB 0..1
    """The square crops of a photo, for a model that reads images; black outside the photo."""
    import cv2
    import numpy as np
    import torch

    result = []
    for index, side in enumerate(heatmaps.side.tolist()):
        scale = size / side
        affine = np.array(heatmaps.crop.affine(index, size))
        # OpenCV's origin is the centre of the first pixel, ours its corner.
        affine[:, 2] += affine[:, :2] @ [0.5, 0.5] - 0.5
        # Smooth before downsampling, against aliasing.
        base = picture if scale >= 0.7 else cv2.GaussianBlur(picture, (0, 0), 0.4 / scale)
        result.append(cv2.warpAffine(base, affine, (size, size), flags=cv2.INTER_LINEAR))
    return torch.from_numpy(np.stack(result)).permute(0, 3, 1, 2).float() / 255
