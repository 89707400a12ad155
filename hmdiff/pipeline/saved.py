"""A saved pipeline: a folder of JSON and safetensors, without pickles and without licensed body models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hmdiff.body.body import Body, load_named_body
from hmdiff.body.lbs_basis import lbs_basis
from hmdiff.diffusion.schedule import load_scheduler, sampler_name
from hmdiff.diffusion.temperature import Temperature
from hmdiff.errors import UserError
from hmdiff.files.checksums import folder_checksums, verify_checksums
from hmdiff.files.diffusers_parts import Scheduler
from hmdiff.files.hub import checkpoint_folder, upload
from hmdiff.files.reading import read_json
from hmdiff.files.storage import atomic_folder
from hmdiff.models.aggregation import HypothesisAggregator, load_aggregator, save_aggregator
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.models.saved import WEIGHTS, load_model

if TYPE_CHECKING:
    from typing import Self

FORMAT = 1
ABOUT = "hmdiff.json"
AGGREGATOR = "aggregator"  # folder of the optional aggregation MLP


class SavedPipeline:
    """Mixin of `HMDiffPipeline`: saving and loading."""

    model: MeshRecoveryModel
    scheduler: Scheduler
    num_inference_steps: int
    eta: float
    temperatures: dict[Any, Temperature]
    aggregator: HypothesisAggregator | None

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write the pipeline atomically: an existing one at `folder` is only replaced once the new one is complete.

        A reloaded pipeline gives bit-equal results, unless `half` rounds the weights to float16.
        """
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary / "model", safe_serialization=True)
            if half:
                _halve(temporary / "model" / WEIGHTS)
            self.scheduler.save_pretrained(temporary / "scheduler")
            if self.aggregator is not None:
                save_aggregator(self.aggregator, temporary / AGGREGATOR)
            about = {**self._about(), "checksums": folder_checksums(temporary)}
            (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n")

    def push_to_hub(self, repository: str, private: bool = False, card: str = "") -> str:
        """Upload the pipeline and a model card (see `hmdiff card`) to OWNER/NAME on the Hugging Face Hub.

        Returns its URL. Raises `UserError` if the upload fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "pipeline")
            if card:
                (Path(folder) / "pipeline" / "README.md").write_text(card)
            return upload(Path(folder) / "pipeline", repository, private)

    def _about(self) -> dict[str, Any]:
        about = {
            "format": FORMAT,
            "body": self.model.config.body,
            "sampler": sampler_name(self.scheduler),
            "num_inference_steps": self.num_inference_steps,
            "eta": self.eta,
        }
        if self.temperatures:
            about["temperatures"] = [fitted.as_json() for fitted in self.temperatures.values()]
        return about

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,  # of `save_pretrained`, name of a shipped pipeline, or OWNER/NAME on the Hugging Face Hub
        device: torch.device | str = "cpu",
        body: Body | None = None,  # None: the body named in the checkpoint
        revision: str | None = None,  # branch, tag or commit of a Hub repository
        torch_dtype: torch.dtype = torch.float32,  # compute dtype, see `to`
    ) -> Self:
        """Load a saved pipeline. Raises `UserError` for a folder that is not one, or that is damaged."""
        place = checkpoint_folder(str(folder), revision)
        if not (place / ABOUT).is_file():
            raise UserError(
                f"{folder}: not a saved hmdiff pipeline (it has no hmdiff.json); give the folder that save_pretrained "
                "or training wrote, such as runs/NAME/pipeline"
            )
        about = _read_about(place / ABOUT)
        try:
            temperatures = [Temperature.from_json(each) for each in about.get("temperatures", ())]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, UserError) as error:
            raise UserError(f"{place / ABOUT}: damaged ({error!r:.160}); save the pipeline again") from None
        if "checksums" in about:  # older pipelines have none
            verify_checksums(place, about["checksums"], "save or copy the checkpoint again")
        model = load_model(place / "model")
        scheduler = load_scheduler(place / "scheduler" / "scheduler_config.json", about["sampler"])
        if body is None:
            body = load_named_body(about["body"])
        pipeline: Any = cls(model, scheduler, body, about["num_inference_steps"], float(about["eta"]))  # type: ignore[call-arg]
        for fitted in temperatures:
            pipeline.set_temperature(fitted)
        if (place / AGGREGATOR).is_dir():
            pipeline.aggregator = load_aggregator(place / AGGREGATOR, model.num_points, model.config.num_joints)
            pipeline.aggregator.set_basis(lbs_basis(body, model.coarse_ids).points)
        return pipeline.to(device, torch_dtype)


def _halve(path: Path) -> None:
    """Convert weights to float16 and indices to int32; loading converts both back."""
    from safetensors.torch import load_file, save_file

    narrow = {torch.float32: torch.float16, torch.int64: torch.int32}
    state = {name: value.to(narrow.get(value.dtype, value.dtype)) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def _read_about(path: Path) -> dict[str, Any]:
    """Read hmdiff.json and check the types of its fields."""
    about = read_json(path, 1 << 24, "save the pipeline again")
    if not isinstance(about, dict):
        raise UserError(f"{path}: damaged (a {type(about).__name__}, a mapping was expected); save the pipeline again")
    if "format" not in about:
        raise UserError(f"{path}: damaged (it has no format); save the pipeline again")
    if about["format"] != FORMAT:
        raise UserError(f"{path}: format {about['format']!r:.40}, this hmdiff reads {FORMAT}; update hmdiff")
    checks: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "body": (str, lambda value: True),
        "sampler": (str, lambda value: True),
        "num_inference_steps": (int, lambda value: value >= 1),
        "eta": (int | float, lambda value: 0 <= value <= 1),
        "temperatures": (list, lambda value: True),
    }
    for name, (kind, fits) in checks.items():
        value = about.get(name, [] if name == "temperatures" else None)
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise UserError(f"{path}: damaged ({name} is {value!r:.60}); save the pipeline again")
    return about
