"""Person masks by a network, for data sets without masks, for D2A-HMR's silhouette loss (arXiv 2403.09063).

Either the silhouette of BlazePose's landmark network, or the `person` pixels of an mmseg network inside the person's
box, which include other people who overlap. The choice of networks is ours.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hmdiff.errors import UserError
from hmdiff.estimators.openmmlab import find_checkpoint, find_model, import_openmmlab, load_weights, quiet, read_config
from hmdiff.estimators.source import Box

EMBEDDED = "embedded"
MMSEG = "mmseg:"
_PEOPLE = ("person", "rider")  # class names in Cityscapes, ADE20K, COCO-Stuff and VOC


class SilhouetteSource(Protocol):
    """Maps a photo and a person's box to a mask."""

    name: str

    def __call__(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        path: Path,  # photo path; a photo's people come in sequence
        box: Box,  # x1, y1, x2, y2 photo pixels
    ) -> np.ndarray | None: ...  # (H, W) bool; None: nobody detected


def load_silhouettes(
    name: str,  # embedded, embedded:FOLDER, or mmseg:MODEL
    checkpoint: str | None = None,  # mmseg weights: a file or a URL; None: the URL that mmseg lists
    device: torch.device | str = "cpu",
) -> SilhouetteSource:
    """Raises `UserError` for another name, or missing dependencies of the source."""
    if name == EMBEDDED or name.startswith(f"{EMBEDDED}:"):
        return EmbeddedSilhouettes(name.removeprefix(EMBEDDED).removeprefix(":") or None)
    if name.startswith(MMSEG) and name != MMSEG:
        return SegmentedPeople(name.removeprefix(MMSEG), checkpoint, device)
    raise UserError(f"masks {name!r}: give own (the data set's), none, embedded (BlazePose) or mmseg:MODEL")


class EmbeddedSilhouettes:
    """Silhouettes of the embedded pose estimator for given boxes. One at a time, since its interpreter is stateful."""

    name = "BlazePose"

    def __init__(self, networks: str | Path | None = None) -> None:
        from hmdiff.estimators.landmarks import LandmarkEstimator

        self._estimator, self._lock = LandmarkEstimator(networks), threading.Lock()

    def __call__(self, photo: np.ndarray, path: Path, box: Box) -> np.ndarray | None:
        with self._lock:
            try:
                detected = self._estimator.estimate(photo, [box])
            except UserError:  # nobody detected in the box
                return None
        mask: np.ndarray = detected.silhouettes[0]() > 0.5
        return mask if mask.any() else None


class SegmentedPeople:
    """The `person` pixels of an mmseg semantic segmentation network, within the box.

    Raises:
        UserError: mmseg is not installed; an unknown model; missing or mismatched weights; no class `person`.
    """

    def __init__(
        self,
        config: str | Path | Any,  # a config file, an mmseg model name, or a `Config`
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        untrained: bool = False,  # keep random weights; for tests
    ) -> None:
        apis, weights = import_openmmlab("mmseg.apis"), None
        self.name = "mmseg"
        if isinstance(config, (str, Path)):
            self.name = f"mmseg {config}"
            path, weights = find_model(config, "mmseg")
            config = read_config(path)
        file = None if untrained else find_checkpoint(self.name, checkpoint, weights, "mmseg")
        with quiet():
            try:
                self.model = apis.init_model(config, None, device="cpu")
            except UserError:
                raise
            except Exception as error:  # registries, torch and the modules raise various types
                reason = str(error).strip().split("\n")[0][:200]
                raise UserError(f"{self.name}: cannot be built ({reason}); give a config of mmseg") from None
        stored = {} if file is None else load_weights(self.model, file)
        self.people = _person_classes(self.name, stored, config)
        self.model.to(device).eval()
        self._inference, self._lock = apis.inference_model, threading.Lock()
        self._last: tuple[Path, np.ndarray] | None = None

    def __call__(self, photo: np.ndarray, path: Path, box: Box) -> np.ndarray | None:
        with self._lock:
            if self._last is None or self._last[0] != path:
                with quiet(), torch.no_grad():
                    instances = self._inference(self.model, np.ascontiguousarray(photo[..., ::-1]))
                self._last = (path, np.isin(instances.pred_sem_seg.data[0].cpu().numpy(), self.people))
            person_pixels = self._last[1]
        x1, y1, x2, y2 = (max(0, round(value)) for value in box)
        mask = np.zeros_like(person_pixels)
        mask[y1:y2, x1:x2] = person_pixels[y1:y2, x1:x2]
        return mask if mask.any() else None


def _person_classes(name: str, meta: dict[str, Any], config: Any) -> list[int]:
    """The class indices of people: from the checkpoint's classes, else the config's."""
    known = meta.get("dataset_meta", meta)
    known = known if isinstance(known, dict) else {}
    classes: Sequence[str] | None = known.get("classes", known.get("CLASSES"))
    if classes is None:
        classes = config.get("test_dataloader", {}).get("dataset", {}).get("metainfo", {}).get("classes", ())
    person_indices = [number for number, kind in enumerate(classes or ()) if str(kind).lower() in _PEOPLE]
    if not person_indices:
        raise UserError(f"{name}: no class 'person' is named by its weights or its config; take a network that has one")
    return person_indices
