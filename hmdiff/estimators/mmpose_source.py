"""Any top-down mmpose model as a heatmap source: a photo and boxes in, `Heatmaps` over our square crop out.

P people, K joints of the model. Heatmap and SimCC heads are supported, coordinate regression heads are refused;
`mmpose_codecs` resamples the output to our crop. Names and batch sizes are our choice.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26, shared_joints
from hmdiff.errors import UserError
from hmdiff.estimators.mmpose_codecs import heatmaps_from_codec, heatmaps_from_simcc
from hmdiff.estimators.openmmlab import (
    find_checkpoint,
    find_model,
    import_openmmlab,
    load_weights,
    quiet,
    read_config,
)
from hmdiff.estimators.source import check_boxes
from hmdiff.heatmaps.distribution import (
    Heatmaps,
    concatenate_heatmaps,
    crop_from_box,
)

PEOPLE_AT_ONCE = 16  # bounds the memory; does not change results
CODECS = ("MSRAHeatmap", "UDPHeatmap", "SimCCLabel")
# mmpose's names of canonical joints. "head" means its top in some sets only; MPII's upper neck has no counterpart.
_NAMES = {
    "halpe": {"head": "top_head", "hip": "mid_hip"},
    "mpii": {"head_top": "top_head", "thorax": "neck", "pelvis": "mid_hip"},
    "aic": {"head_top": "top_head"},
    "coco": {"head_top": "top_head"},
    "humanart": {"head_top": "top_head"},
}


class MMPoseEstimator:
    """A top-down mmpose model with its weights.

    Args:
        config: a config file, an alias such as "human" or "rtmpose-l", a shipped config's name, or a `Config`.
        checkpoint: .pth or .safetensors, a file or a URL; None: downloaded, if mmpose lists the weights.
        untrained: keep random weights; for tests.

    Raises:
        UserError: mmpose is not installed; an unknown model; a model without heatmaps; missing or mismatched weights; a
            data set whose joints are unknown or do not match the model's.
    """

    def __init__(
        self,
        config: str | Path | Any,
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        untrained: bool = False,
    ) -> None:
        apis = import_openmmlab("mmpose.apis")
        weights = None
        if isinstance(config, (str, Path)):
            self.name = str(config)
            path, weights = find_model(config, "mmpose")
            config = read_config(path)
        else:
            self.name, config = "config", copy.deepcopy(config)
        _check_kind(self.name, config)
        meta = _dataset_meta(config, apis)
        with quiet():
            self.model = _build(self.name, config, apis)
        if not untrained:  # last, since it may download
            file = find_checkpoint(self.name, checkpoint, weights, "mmpose")
            stored = load_weights(self.model, file).get("dataset_meta")
            meta = stored if isinstance(stored, dict) and "keypoint_id2name" in stored else meta
        self.model.dataset_meta = _checked_meta(self.name, meta, self.model.head.out_channels)
        self._simcc = type(self.model.head.decoder).__name__ == "SimCCLabel"
        self.model.test_cfg = {**(self.model.test_cfg or {}), "output_heatmaps": not self._simcc}
        self.model.to(device).eval()
        self.use_udp = _warps_by_udp(self.name, config)
        names = joint_names(self.model.dataset_meta)
        chosen = self.model.test_cfg.get("output_keypoint_indices")
        self._chosen = list(range(len(names))) if chosen is None else list(chosen)
        self.names = tuple(names[index] for index in self._chosen)

    def heatmaps(
        self,
        photo: np.ndarray,  # (H, W, 3) uint8 RGB
        boxes: Tensor | np.ndarray | Sequence[Sequence[float]],  # (P, 4) x1, y1, x2, y2, photo pixels
    ) -> Heatmaps:  # P people, in the order of the boxes
        """The model's heatmaps over the crop of `crop_from_box`, on the CPU.

        Raises:
            UserError: no boxes; a box that is invalid or outside the photo; NaN or only zeros from the model.
        """
        valid_boxes = check_boxes(boxes, photo.shape[1], photo.shape[0])
        batches = (
            self._heatmaps_of_batch(photo, valid_boxes[i : i + PEOPLE_AT_ONCE])
            for i in range(0, len(valid_boxes), PEOPLE_AT_ONCE)
        )
        try:
            return concatenate_heatmaps(list(batches))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    @torch.no_grad()
    def _heatmaps_of_batch(self, photo: np.ndarray, boxes: Tensor) -> Heatmaps:
        from mmpose.apis import inference_topdown

        head, simcc = self.model.head, _SimCCOutput(self.model.head)
        with quiet(), simcc if self._simcc else contextlib.nullcontext():
            results = inference_topdown(self.model, np.ascontiguousarray(photo[..., ::-1]), boxes.numpy())
        center, scale = (
            torch.from_numpy(np.stack([result.metainfo[key] for result in results])).double()
            for key in ("input_center", "input_scale")
        )
        crop = (self.names, head.decoder, center, scale, self.use_udp, *crop_from_box(boxes))
        if self._simcc:
            x, y, scores = (part[:, self._chosen] for part in simcc.distributions())
            return heatmaps_from_simcc(x, y, scores, *crop)
        return heatmaps_from_codec(
            torch.stack([result.pred_fields.heatmaps for result in results]).cpu().float(), *crop
        )


class _SimCCOutput:
    """Captures a SimCC head's output, averaged with its flip, before decoding.

    mmpose's own heatmaps of these heads are the bins scaled to a peak of 1, independent of the loss.
    """

    def __init__(self, head: Any) -> None:
        self.head = head

    def __enter__(self) -> None:
        decode = self.head.decode

        def capture(outputs: tuple[Tensor, Tensor]) -> Any:
            self.raw = outputs
            return decode(outputs)

        self.head.decode = capture

    def __exit__(self, *error: object) -> None:
        del self.head.decode  # restores the class's method

    def distributions(self) -> tuple[Tensor, Tensor, Tensor]:  # (P, K, bins) twice, >= 0; (P, K) confidence
        """The distributions that the loss trained: the label itself, or logits."""
        raw = [part.detach().cpu().float() for part in self.raw]
        loss, codec = self.head.loss_module, self.head.decoder
        if getattr(loss, "label_softmax", True):
            x, y = (part.clamp_min(0) for part in raw)
            return x, y, torch.minimum(x.amax(-1), y.amax(-1))
        x, y = ((part * getattr(loss, "beta", 1.0)).softmax(-1) for part in raw)
        # 1 if the distribution is as narrow as its label.
        peaks = [
            1 / (sigma * math.sqrt(2 * math.pi)) if codec.smoothing_type == "gaussian" else 1.0 for sigma in codec.sigma
        ]
        return x, y, torch.minimum(x.amax(-1) / peaks[0], y.amax(-1) / peaks[1])


# ---- configs ----


def joint_names(
    meta: dict[str, Any],  # mmpose's data set metadata, parsed
) -> tuple[str, ...]:
    """The model's joint names, in its order, as canonical names where they differ."""
    renamed = {}
    for dataset, names in _NAMES.items():
        if str(meta.get("dataset_name", "")).lower().startswith(dataset):
            renamed = names
    by_index = {int(index): str(name) for index, name in meta["keypoint_id2name"].items()}
    return tuple(renamed.get(by_index[index], by_index[index]) for index in sorted(by_index))


def _check_kind(name: str, config: Any) -> None:
    """Refuse models without per-person heatmaps, before anything is built or downloaded."""
    model = config.get("model")
    kind = _type(model)
    if kind != "TopdownPoseEstimator":
        raise UserError(f"{name}: a {kind or 'config without model'}; a TopdownPoseEstimator with heatmaps is expected")
    head = _type(model.get("head"))
    codec = (model.get("head") or {}).get("decoder") or {}
    if "Reg" in head or head in ("RLEHead", "DSNTHead") or _type(codec) == "RegressionLabel":
        raise UserError(
            f"{name}: its head {head} regresses coordinates and gives no heatmaps; take a heatmap or SimCC model, such "
            "as td-hm_hrnet-w32_8xb64-210e_coco-256x192 or rtmpose-l"
        )
    kind = _type(codec)
    if kind not in CODECS or codec.get("heatmap_type", "gaussian") != "gaussian":
        kind += f" {codec.get('heatmap_type')!r}" if "heatmap_type" in codec else ""
        raise UserError(f"{name}: the codec {kind or 'of its head'} is not supported; {', '.join(CODECS)} are")


def _type(config: Any) -> str:
    kind = config.get("type", "") if isinstance(config, dict) else ""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _steps(config: Any) -> Iterator[Any]:
    try:
        yield from config.test_dataloader.dataset.pipeline
    except AttributeError:
        return


def _warps_by_udp(name: str, config: Any) -> bool:
    for step in _steps(config):
        if _type(step) == "TopdownAffine":
            return bool(step.get("use_udp", False))
    raise UserError(f"{name}: no TopdownAffine in `test_dataloader.dataset.pipeline`; give a complete config of mmpose")


def _dataset_meta(config: Any, apis: Any) -> dict[str, Any] | None:
    for mode in ("train", "val", "test"):
        info = config.get(f"{mode}_dataloader", {}).get("dataset", {}).get("metainfo")
        if isinstance(info, dict) and "keypoint_info" in info:  # JSON has string keys
            info["keypoint_info"] = {int(index): joint for index, joint in info["keypoint_info"].items()}
        with quiet():
            meta: dict[str, Any] | None = apis.inference.dataset_meta_from_config(config, mode)
        if meta is not None:
            return meta
    return None


def _build(name: str, config: Any, apis: Any) -> Any:
    if "mmpretrain." in str(config.model):  # ViTPose's backbone; its import needs the operators too
        import_openmmlab("mmpretrain.models")
    try:
        return apis.init_model(config, None, "cpu")
    except UserError:
        raise
    except Exception as error:  # registries, torch and the modules raise various types
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{name}: the model cannot be built ({reason}); give a config of mmpose 1.x") from None


def _checked_meta(name: str, meta: dict[str, Any] | None, channels: int) -> dict[str, Any]:
    if meta is None:
        raise UserError(f"{name}: neither config nor checkpoint names the joints; give the data set's `metainfo`")
    names = joint_names(meta)
    if len(names) != channels:
        raise UserError(
            f"{name}: the model gives {channels} heatmaps but its data set {meta.get('dataset_name')!r} names "
            f"{len(names)} joints; give the config that the weights were trained with"
        )
    if not shared_joints(names, HALPE26)[0]:
        raise UserError(f"{name}: none of its joints ({names[0]}, ...) is a body's; take a model of human bodies")
    return meta
