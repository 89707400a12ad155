"""Masks of people of whom a data set has none, for D2A-HMR's silhouette (arXiv 2403.09063), by a network.

BlazePose's landmark network gives a person's silhouette beside its heatmaps; a network of mmseg the pixels of the class
`person`, of which those in the person's box are taken: where two people overlap, both. Which networks: our choice.
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
_PEOPLE = ("person", "rider")  # of Cityscapes, ADE20K, COCO-Stuff and VOC


class SilhouetteSource(Protocol):
    """A photo and a person's box in, their mask out."""

    name: str

    def __call__(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        path: Path,  # of the photo: people of one photo follow each other
        box: Box,  # x1, y1, x2, y2 photo pixels
    ) -> np.ndarray | None: ...  # (H, W) bool; None: nobody is seen there


def load_silhouettes(
    name: str,  # embedded, embedded:FOLDER, or mmseg:MODEL
    checkpoint: str | None = None,  # of mmseg's model: a file or an address; None: where mmseg lists it
    device: torch.device | str = "cpu",
) -> SilhouetteSource:
    """Raises `UserError` for another name, and where what the source needs is not installed."""
    if name == EMBEDDED or name.startswith(f"{EMBEDDED}:"):
        return EmbeddedSilhouettes(name.removeprefix(EMBEDDED).removeprefix(":") or None)
    if name.startswith(MMSEG) and name != MMSEG:
        return SegmentedPeople(name.removeprefix(MMSEG), checkpoint, device)
    raise UserError(f"masks {name!r}: give own (the data set's), none, embedded (BlazePose) or mmseg:MODEL")


class EmbeddedSilhouettes:
    """Of the embedded pose estimator, which looks at each box. One at a time: its interpreter has one state."""

    name = "BlazePose"

    def __init__(self, place: str | Path | None = None) -> None:
        from hmdiff.estimators.landmarks import LandmarkEstimator

        self._estimator, self._lock = LandmarkEstimator(place), threading.Lock()

    def __call__(self, photo: np.ndarray, path: Path, box: Box) -> np.ndarray | None:
        with self._lock:
            try:
                seen = self._estimator.see(photo, [box])
            except UserError:  # nobody is seen in the box
                return None
        mask: np.ndarray = seen.silhouettes[0]() > 0.5
        return mask if mask.any() else None


class SegmentedPeople:
    """The class `person` of a semantic segmentation network of mmseg, within the box.

    Raises:
        UserError: mmseg is not installed; an unknown model; missing or foreign weights; no class `person`.
    """

    def __init__(
        self,
        config: str | Path | Any,  # a config file, a name that mmseg lists, or a `Config`
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        untrained: bool = False,  # leave the weights random; for tests
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
            except Exception as error:  # registries, torch and the modules raise their own
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
                    found = self._inference(self.model, np.ascontiguousarray(photo[..., ::-1]))
                self._last = (path, np.isin(found.pred_sem_seg.data[0].cpu().numpy(), self.people))
            everybody = self._last[1]
        x1, y1, x2, y2 = (max(0, round(value)) for value in box)
        mask = np.zeros_like(everybody)
        mask[y1:y2, x1:x2] = everybody[y1:y2, x1:x2]
        return mask if mask.any() else None


def _person_classes(name: str, meta: dict[str, Any], config: Any) -> list[int]:
    """The labels of people: by the checkpoint's classes, else by the config's."""
    known = meta.get("dataset_meta", meta)
    known = known if isinstance(known, dict) else {}
    classes: Sequence[str] | None = known.get("classes", known.get("CLASSES"))
    if classes is None:
        classes = config.get("test_dataloader", {}).get("dataset", {}).get("metainfo", {}).get("classes", ())
    found = [number for number, kind in enumerate(classes or ()) if str(kind).lower() in _PEOPLE]
    if not found:
        raise UserError(f"{name}: no class 'person' is named by its weights or its config; take a network that has one")
    return found
