"""Square crops from boxes and keypoints, in photo pixels, as the field cuts them: centre, and side = padding x longest.

Pixel coordinates are taken as each data set gives them. Whether a pixel's centre is at 0 or at 0.5 is not stated by
most of them, and half a pixel is below what any of them is labelled to.
"""

from __future__ import annotations

import numpy as np

PADDING = 1.2  # SPIN's, and with it the field's
PIXELS_PER_SCALE = 200.0  # a `scale` of HMR's lineage is the crop's side over 200 pixels


def square_of_box(
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    padding: float = PADDING,
) -> tuple[np.ndarray, float]:  # centre (2,), side
    """The square about a box. A box without size gives side 0, which `Record.check` refuses."""
    return np.array([(x0 + x1) / 2, (y0 + y1) / 2]), padding * max(x1 - x0, y1 - y0)


def square_of_points(
    points: np.ndarray,  # (P, 2)
    labelled: np.ndarray,  # (P,) bool, at least one
    padding: float = PADDING,
) -> tuple[np.ndarray, float]:  # centre (2,), side
    """The square about the labelled points; a NaN among them is not the box's to tell, unless there is nothing else."""
    kept = labelled & np.isfinite(points).all(1)
    if not kept.any():
        return np.full(2, np.nan), float("nan")
    low, high = points[kept].min(0), points[kept].max(0)
    return square_of_box(low[0], low[1], high[0], high[1], padding)
