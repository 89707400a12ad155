"""Heatmaps: the output of a 2D pose estimator as a distribution over the crop for each joint.

`distribution` has the type and its operations, `crop` the crop's place in the photo; `keypoints`, the file `formats`
and `arrays` are the sources that need no network.
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
