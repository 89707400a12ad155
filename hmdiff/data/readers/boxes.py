"""Square crops from boxes and keypoints, in photo pixels, by the field's convention: side = padding x longest side.

Pixel coordinates are used as each data set gives them. Most do not state whether a pixel's centre is at 0 or at 0.5,
and half a pixel is below their labels' accuracy.
"""

from __future__ import annotations

import numpy as np

PADDING = 1.2  # SPIN's value, used throughout the field
PIXELS_PER_SCALE = 200.0  # HMR and its successors store `scale` = crop side / 200 pixels


def square_of_box(
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    padding: float = PADDING,
) -> tuple[np.ndarray, float]:  # centre (2,), side
    """The square around a box. A box without size gives side 0, which `Record.check` rejects."""
    return np.array([(x0 + x1) / 2, (y0 + y1) / 2]), padding * max(x1 - x0, y1 - y0)


def square_of_points(
    points: np.ndarray,  # (P, 2)
    labelled: np.ndarray,  # (P,) bool, at least one
    padding: float = PADDING,
) -> tuple[np.ndarray, float]:  # centre (2,), side
    """The square around the labelled points. NaN points are ignored unless there are no others."""
    valid = labelled & np.isfinite(points).all(1)
    if not valid.any():
        return np.full(2, np.nan), float("nan")
    low, high = points[valid].min(0), points[valid].max(0)
    return square_of_box(low[0], low[1], high[0], high[1], padding)
