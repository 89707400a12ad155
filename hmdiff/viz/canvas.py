"""Images as arrays: reading, saving, captions, contact sheets; keypoints and heat colours. Meshes are drawn elsewhere.

An image is a numpy array (H, W, 3) of uint8, RGB; pixel j of a row has its centre at j + 0.5. Colours are RGB 0..1.
Visual design is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from hmdiff.body.skeletons import COCO17
from hmdiff.errors import UserError
from hmdiff.files.images import open_image
from hmdiff.files.storage import atomic_file

_WARM, _COOL, _MIDLINE, _DARK = (255, 140, 66), (66, 156, 255), (250, 250, 250), (25, 25, 30)
HEAT = np.array([[0.80, 0.84, 0.92], [0.99, 0.90, 0.55], [0.98, 0.62, 0.30], [0.85, 0.22, 0.27], [0.42, 0.05, 0.25]])
_INK = (60, 64, 72)
_LIMBS = (
    ("ankle", "knee"),
    ("knee", "hip"),
    ("wrist", "elbow"),
    ("elbow", "shoulder"),
    ("hip", "shoulder"),
    ("eye", "ear"),
    ("ankle", "big_toe"),
    ("ankle", "heel"),
    ("big_toe", "small_toe"),
)
_CROSS_LIMBS = (
    ("left_shoulder", "right_shoulder"),
    ("left_hip", "right_hip"),
    ("nose", "left_eye"),
    ("nose", "right_eye"),
    ("nose", "neck"),
    ("neck", "top_head"),
)


def read_picture(
    path: str | Path,
) -> np.ndarray:  # (H, W, 3) uint8 RGB
    """A photo in display form: EXIF orientation applied, transparency on white, 16 bits converted to 8.

    Cameras store 10, 12 or 14 bits in 16-bit files: the smallest depth that holds the brightest pixel is assumed.

    Raises:
        UserError: the file is missing, empty, truncated, or not an image.
    """
    path = Path(path)
    with open_image(path) as opened:
        opened.load()
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):
            return np.repeat(_eight_bits(np.asarray(picture))[..., None], 3, axis=2)
        if picture.mode == "RGB" and _is_deep(opened, path):
            deep = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)  # Pillow keeps only the upper 8 bits
            if deep is not None and deep.dtype == np.uint16 and deep.shape[:2] == (picture.height, picture.width):
                return np.ascontiguousarray(_eight_bits(deep)[..., ::-1])
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _is_deep(opened: Image.Image, path: Path) -> bool:
    """Whether a channel has more than 8 bits, from the file header, since Pillow does not report it."""
    if opened.format == "PNG":
        with open(path, "rb") as handle:
            return handle.read(25)[24:] == b"\x10"
    return opened.format == "TIFF" and max(getattr(opened, "tag_v2", {}).get(258, (8,))) > 8


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Convert integers of up to 16 bits to 8."""
    brightest = int(values.max(initial=0))
    bits = next((count for count in (8, 10, 12, 14) if brightest < 1 << count), 16)
    return (np.clip(values, 0, None) * (255 / ((1 << bits) - 1)) + 0.5).clip(0, 255).astype(np.uint8)


def save_picture(
    path: str | Path,
    image: np.ndarray,  # (H, W, 3) uint8 RGB
) -> None:
    """Write a png or jpg, by suffix, atomically.

    Raises:
        UserError: another suffix, or the location is not writable.
    """
    path = Path(path)
    formats: dict[str, dict[str, Any]] = {
        ".png": {"format": "PNG", "compress_level": 3},
        ".jpg": {"format": "JPEG", "quality": 92},
        ".jpeg": {"format": "JPEG", "quality": 92},
    }
    if path.suffix.lower() not in formats:
        raise UserError(f"{path}: pictures are saved as .png or .jpg; change the suffix")
    with atomic_file(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, **formats[path.suffix.lower()])


def as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """Any array as a detached tensor on the CPU."""
    return torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).detach().cpu()


def to_bytes(values: np.ndarray) -> np.ndarray:
    """0..1 to uint8, rounded."""
    return (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def contact_sheet(
    images: Sequence[np.ndarray],  # each (H, W, 3) uint8; smaller ones are centred in cells of the largest size
    columns: int,
    captions: Sequence[str] | None = None,  # one per image
    gap: int = 10,  # pixels
    footer: str = "",  # text below all images
) -> np.ndarray:  # uint8
    """Images in a grid on white, each with its caption below."""
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    height, width = max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    font = max(11, min(18, width // 16))
    line = int(font * 1.7) if captions is not None else 0
    rows = -(-len(images) // columns)
    foot = int(font * 1.9) if footer else 0
    sheet = np.full((rows * (height + line + gap) + gap + foot, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        y, x = gap + row * (height + line + gap), gap + column * (width + gap)
        down, right = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        sheet[y + down : y + down + image.shape[0], x + right : x + right + image.shape[1]] = image
    if captions is not None:
        places = [divmod(index, columns) for index in range(len(images))]
        x = [gap + column * (width + gap) + width // 2 for _, column in places]
        y = [gap + row * (height + line + gap) + height + line // 2 for row, _ in places]
        sheet = _write(sheet, list(zip(captions, x, y, strict=True)), font)
    if footer:
        sheet = _write(sheet, [(footer, sheet.shape[1] // 2, sheet.shape[0] - foot // 2 - gap // 2)], font)
    return sheet


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _write(
    image: np.ndarray,
    texts: Sequence[tuple[str, int, int]],  # text, and the x and y of its centre
    size: int,
) -> np.ndarray:
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    for text, x, y in texts:
        draw.text((x, y), text, fill=_INK, font=_font(size), anchor="mm")
    return np.array(canvas)


def heat_colours(
    values: ArrayLike | Tensor,  # (...) e.g. the spread of a vertex in millimetres
    lowest: float,
    highest: float,
) -> np.ndarray:  # (..., 3) RGB 0..1
    """Pale blue (lowest or less) through yellow and red to dark (highest or more); lightness falls monotonically."""
    share = (np.asarray(as_tensor(values), np.float64) - lowest) / max(highest - lowest, 1e-12)
    position = np.nan_to_num(share).clip(0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(position, np.arange(len(HEAT)), HEAT[:, channel]) for channel in range(3)], -1)


def colour_bar(
    lowest: float,
    highest: float,
    label: str = "mm",
    size: tuple[int, int] = (320, 90),  # H, W
) -> np.ndarray:  # (H, W, 3) uint8
    """The legend of `heat_colours`."""
    height, width = size
    bar = np.full((height, width, 3), 255, np.uint8)
    margin = 24
    ramp = heat_colours(np.linspace(1, 0, height - 2 * margin), 0, 1)
    bar[margin:-margin, 12:34] = to_bytes(ramp)[:, None]
    font = 13
    middle = (34 + width) // 2
    return _write(
        bar,
        [
            (f"{highest:g}+", middle, margin + font // 2),
            (label, middle, height // 2),
            (f"{lowest:g}", middle, height - margin - font // 2),
        ],
        font,
    )


def draw_keypoints(
    photo: np.ndarray,  # (H, W, 3) uint8
    keypoints: ArrayLike | Tensor,  # (J, 3) pixels and confidence
    names: Sequence[str] = COCO17,  # J names
    threshold: float = 0.1,  # minimum confidence of drawn keypoints
) -> np.ndarray:  # (H, W, 3) uint8
    """Draw joints and limbs: the person's left in warm colours, the right in cool ones, the midline white."""
    points = np.asarray(as_tensor(keypoints), np.float64)
    if len(points) != len(names):
        raise ValueError(f"{len(points)} keypoints for {len(names)} names")
    sure = np.isfinite(points).all(1) & (points[:, 2] > threshold)
    good = {name: point for name, point, there in zip(names, points, sure, strict=True) if there}
    image = np.ascontiguousarray(photo.copy())
    if not good:
        return image
    spread = np.ptp(np.array([point[:2] for point in good.values()]), axis=0).max()
    radius = float(np.clip(spread / 80, 1.5, 12))
    limbs = [(f"{side}_{a}", f"{side}_{b}") for side in ("left", "right") for a, b in _LIMBS]
    limbs = [pair for pair in (*limbs, *_CROSS_LIMBS) if pair[0] in good and pair[1] in good]

    def tint(name: str) -> tuple[int, int, int]:
        return _WARM if name.startswith("left") else _COOL if name.startswith("right") else _MIDLINE

    def at(name: str) -> tuple[int, int]:
        # OpenCV's fixed-point format: 4 fractional bits, origin at the centre of the first pixel.
        x, y = ((good[name][:2] - 0.5) * 16).round().clip(-1e6, 1e6)
        return int(x), int(y)

    # Dark outline first, then the colour: readable on any photo.
    for dark in (True, False):
        for a, b in limbs:
            same = a.split("_")[0] == b.split("_")[0]
            ink = _DARK if dark else tint(a) if same else _MIDLINE
            thick = max(1, round(radius * 0.8)) + (2 if dark else 0)
            cv2.line(image, at(a), at(b), ink, thick, cv2.LINE_AA, shift=4)
    for name in good:
        cv2.circle(image, at(name), int((radius + 1) * 16), _DARK, -1, cv2.LINE_AA, shift=4)
        cv2.circle(image, at(name), int(radius * 16), tint(name), -1, cv2.LINE_AA, shift=4)
    return image
