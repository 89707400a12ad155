"""Heatmaps: what a 2D pose estimator knows, as a distribution over the crop for every joint.

`distribution` holds the type and its mathematics; `keypoints` and `arrays` are the sources that need no network,
`mmpose_source` runs one of mmpose's. The latter is imported from its own module, so that mmpose stays optional.
"""

from hmdiff.heatmaps.arrays import load_heatmaps, save_heatmaps
from hmdiff.heatmaps.distribution import (
    HEATMAP_SIZE,
    Heatmaps,
    concatenate_heatmaps,
    crop_from_box,
    crop_from_keypoints,
    draw_samples,
    gaussian_heatmaps,
    heatmap_peaks,
    heatmaps_from_values,
    normalised,
    resample_heatmaps,
    soft_argmax,
)
from hmdiff.heatmaps.keypoints import PersonKeypoints, heatmaps_from_keypoints, read_keypoints

__all__ = [
    "HEATMAP_SIZE",
    "Heatmaps",
    "PersonKeypoints",
    "concatenate_heatmaps",
    "crop_from_box",
    "crop_from_keypoints",
    "draw_samples",
    "gaussian_heatmaps",
    "heatmap_peaks",
    "heatmaps_from_keypoints",
    "heatmaps_from_values",
    "load_heatmaps",
    "normalised",
    "read_keypoints",
    "resample_heatmaps",
    "save_heatmaps",
    "soft_argmax",
]
