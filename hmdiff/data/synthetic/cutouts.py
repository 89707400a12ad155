"""Cut-outs: images of objects with transparent surroundings, from a user's folder, pasted in front of people.

Like the Pascal VOC objects commonly pasted in the field (Sarandi et al., arXiv 1808.09316); none are shipped. M
cut-outs, A pixels a side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.files.images import open_image

SIZE = 96  # A: stored resolution, small so that thousands fit in memory
SUFFIXES = (".png", ".webp", ".tif", ".tiff")
_MIN_ALPHA = 16  # of 255: fainter pixels do not count as the object


class Cutouts:
    """The cut-outs of a folder, each cropped to its object and fitted into a square.

    Raises:
        UserError: no such folder; no image with transparency in it; one that is damaged, opaque or empty.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"data.augment.cutouts {str(folder)!r}: no such folder; give one of RGBA pictures, as png")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise UserError(
                f"data.augment.cutouts {str(folder)!r}: no picture in it; RGBA pictures ({', '.join(SUFFIXES)}) are "
                "expected, transparent about the thing"
            )
        self.folder, self.files = folder, files
        self.pictures = torch.stack([_read(path) for path in files])  # (M, 4, A, A) uint8, premultiplied alpha

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(
        self,
        index: Tensor,  # (n,) cut-out, 0 .. M - 1
        points: Tensor,  # (n, P, 2) coordinates in the cut-out, -1..1 over the square
    ) -> Tensor:  # (n, 4, P) premultiplied RGB and alpha, 0..1; 0 outside
        chosen = self.pictures.to(points.device)[index].float() / 255
        return F.grid_sample(chosen, points[:, None].float(), padding_mode="zeros", align_corners=False)[:, :, 0]


def _read(path: Path) -> Tensor:  # (4, A, A) uint8
    with open_image(path) as opened:
        transparent = opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info
        picture = np.asarray(opened.convert("RGBA"))
    if not transparent or picture[..., 3].min() == 255:
        raise UserError(f"{path}: a cut-out without transparency; RGBA is expected, transparent about the thing")
    rows, columns = (np.nonzero((picture[..., 3] >= _MIN_ALPHA).any(axis))[0] for axis in (1, 0))
    if not len(rows):
        raise UserError(f"{path}: a cut-out that is transparent everywhere; take it out of the folder")
    values = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    values[..., :3] *= values[..., 3:] / 255  # premultiplied, so that transparent pixels' colours do not bleed in
    height, width = values.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, 4), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = values
    tensor = torch.from_numpy(square).permute(2, 0, 1)[None]
    small = F.interpolate(tensor, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)
