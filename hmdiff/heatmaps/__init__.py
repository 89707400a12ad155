"""Heatmaps: what a 2D pose estimator knows, as a distribution over the crop for every joint.

`distribution` holds the type and its mathematics, `crop` where in which photo it lies; `keypoints`, the `formats` of
their files and `arrays` are the sources that need no network.
"""

from hmdiff.heatmaps.arrays import load_heatmaps, save_heatmaps
from hmdiff.heatmaps.crop import Crop
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
from hmdiff.heatmaps.formats import read_keypoints
from hmdiff.heatmaps.keypoints import PersonKeypoints, heatmaps_from_keypoints
from hmdiff.heatmaps.photo import PhotoInfo, photo_info

__all__ = [
    "HEATMAP_SIZE",
    "Crop",
    "Heatmaps",
    "PersonKeypoints",
    "PhotoInfo",
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
    "photo_info",
    "read_keypoints",
    "resample_heatmaps",
    "save_heatmaps",
    "soft_argmax",
]
