"""Arguments shared by several commands: definition, validation and conversion. Our choice."""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hmdiff.errors import UserError
from hmdiff.files.hub import checkpoint_folder
from hmdiff.names import SAMPLERS

if TYPE_CHECKING:
    import torch

    from hmdiff.config import Config
    from hmdiff.diffusion.guidance import Guidance
    from hmdiff.diffusion.sampling_config import SamplingConfig
    from hmdiff.pipeline import HMDiffPipeline

DEFAULT_CHECKPOINT = "hmdiff_small"


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r:.60}: a whole number of at least {least} is expected")
        return value

    return read


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of at least `least`, or greater than it with `above`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            kind = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"{text!r:.60}: a number {kind} {least:g} is expected")
        return value

    return read


def box(text: str) -> tuple[float, float, float, float]:
    """An argparse type: x1,y1,x2,y2 in photo pixels."""
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        x1 = math.nan
    if not math.isfinite(x1) or not all(map(math.isfinite, (y1, x2, y2))) or x2 <= x1 or y2 <= y1:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60}: x1,y1,x2,y2 in photo pixels with x1 < x2 and y1 < y2 is expected"
        )
    return x1, y1, x2, y2


def pair(text: str) -> tuple[float, float]:
    """An argparse type: x,y in photo pixels."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: x,y in photo pixels is expected, such as 320,240")
    return x, y


class _Help(argparse.RawDescriptionHelpFormatter):
    """Appends the default to an option's help unless the text already has it."""

    def add_argument(self, action: argparse.Action) -> None:
        none = any(action.default is each for each in (None, False, argparse.SUPPRESS))  # `==` would drop the default 0
        said = none or "(default" in (action.help or "")
        if action.option_strings and not said:
            action.help = f"{action.help or ''} (default: %(default)s)".strip()
        super().add_argument(action)


def new_parser(subparsers: Any, name: str, summary: str, example: str, details: str = "") -> argparse.ArgumentParser:
    """A command's parser: summary, arguments with their defaults, an example."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {details}".strip(), 80),
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
    )
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1")


def add_checkpoint(parser: argparse.ArgumentParser, several: bool = False) -> None:
    if several:
        text = f"shipped checkpoints, or folders of trainings or of save_pretrained (default: {DEFAULT_CHECKPOINT})"
        parser.add_argument("--checkpoint", nargs="+", default=[DEFAULT_CHECKPOINT], metavar="NAME", help=text)
        return
    text = "a shipped checkpoint, or the folder of a training or of save_pretrained"
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="NAME", help=text)


def add_sampling(parser: argparse.ArgumentParser, eta: bool = True) -> None:
    """Number of hypotheses, steps, sampler, seed."""
    parser.add_argument("--num-hypotheses", type=whole(1), default=25, metavar="N", help="bodies a person")
    parser.add_argument("--steps", type=whole(1), metavar="K", help="denoising steps (default: the checkpoint's own)")
    parser.add_argument(
        "--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)} (default: the checkpoint's own, mostly ddim)"
    )
    if eta:
        parser.add_argument(
            "--eta", type=number(0), help="ddim's share of fresh noise, 0 none, 1 as ddpm (default: the checkpoint's)"
        )
    parser.add_argument("--seed", type=whole(0), default=0, help="other seed, other hypotheses")


LAST = "guide in the last share of the steps alone (default: 0.5; 1: in all but the first)"


def add_guidance(parser: argparse.ArgumentParser, default: str = "dat") -> None:
    """Guidance by the heatmaps."""
    parser.add_argument(
        "--guidance",
        choices=("dat", "disrupted", "none"),
        default=default,
        help="steer the sampling by the heatmaps: the paper's DAT, its disrupted comparison, or none",
    )
    parser.add_argument(
        "--strength", type=number(0), metavar="S", help="of the guidance, 0 is none (default: DAT's own)"
    )
    parser.add_argument("--last", type=number(0), metavar="Q", help=LAST)
    add_preset(parser)


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=("ours", "paper"),
        default="ours",
        help="what else DAT is: ours, which measures best, or as HMDiff's paper has it; its sampling is --steps 40 "
        "--num-hypotheses 25",
    )


def check_guidance(options: argparse.Namespace) -> None:
    """Raises `UserError` for guidance options without guidance."""
    for name in ("strength", "last"):
        if getattr(options, name) is not None and options.guidance == "none":
            raise UserError(f"--{name} is of a guidance: add --guidance dat (or disrupted)")
    if options.preset != "ours" and options.guidance == "none":
        raise UserError("--preset is of a guidance: add --guidance dat (or disrupted)")


def guidance_of(options: argparse.Namespace, pipeline: HMDiffPipeline) -> Guidance | None:
    """None if guidance is off or impossible: a model without diffusion, a body without keypoints."""
    from hmdiff.diffusion.guidance import PRESETS

    if pipeline.model.config.mode == "direct" or pipeline.body.keypoint_regressor is None:
        return None
    asked = {"strength": options.strength, "last": options.last}
    asked = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(PRESETS[options.preset], mode=options.guidance, **asked)


def sampling_of(options: argparse.Namespace, pipeline: HMDiffPipeline) -> SamplingConfig:
    """The `SamplingConfig` from the options of `add_sampling` and, if the command has them, of `add_guidance`."""
    from hmdiff.diffusion.sampling_config import SamplingConfig

    return SamplingConfig(
        options.num_hypotheses,
        options.steps,
        options.seed,
        options.sampler,
        getattr(options, "eta", None),
        guidance_of(options, pipeline) if hasattr(options, "guidance") else None,
        getattr(options, "surface", "body"),
        not getattr(options, "as_is", False),
    )


def resolve_device(name: str) -> torch.device:
    """`auto`, or a torch device name. Raises `UserError` for an unknown or unavailable device."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device; give auto, cpu, cuda or cuda:1") from None
    try:
        float(torch.zeros(1, device=device))  # read back: "meta" has no values
    except Exception:  # torch raises different types, depending on the device
        raise UserError(f"--device {name!r}: torch finds no such device here; give --device cpu or auto") from None
    return device


def labels(names: list[str]) -> list[str]:
    """A short label for each checkpoint: its folder's name, or the parent's if that is just 'pipeline'."""
    result: list[str] = []
    for name in names:
        path = Path(name).resolve()
        base = path.parent.name if path.name == "pipeline" else path.name
        label, copy = base, 2
        while label in result:
            label, copy = f"{base}-{copy}", copy + 1
        result.append(label)
    return result


def load_pipeline(name: str, device: torch.device | str = "cpu") -> HMDiffPipeline:
    from hmdiff.pipeline import HMDiffPipeline

    return HMDiffPipeline.from_pretrained(checkpoint_folder(name), device)


class Checkpoint(NamedTuple):
    pipeline: HMDiffPipeline
    model_hash: str  # hash of its files


def load_checkpoints(options: argparse.Namespace, names: list[str]) -> dict[str, Checkpoint]:  # by label
    """Load the checkpoints onto the requested device."""
    from hmdiff.evaluate.store import model_hash

    device = resolve_device(options.device)
    return {
        label: Checkpoint(load_pipeline(name, device), model_hash(checkpoint_folder(name)))
        for name, label in zip(names, labels(names), strict=True)
    }


def add_rewritten(parser: argparse.ArgumentParser, what: str) -> None:
    """Options of commands that add something to a saved pipeline, in place or in a copy."""
    parser.add_argument("source", metavar="PIPELINE", help="a run, or a folder that save_pretrained wrote")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"a copy of the pipeline that gets {what}, needed for an installed one (default: PIPELINE)",
    )


def load_rewritten(options: argparse.Namespace) -> HMDiffPipeline:
    """The pipeline of `add_rewritten`; sets `options.output` to the target folder. Installed ones are refused."""
    folder = checkpoint_folder(options.source)
    if not Path(options.source).exists() and options.output is None:
        raise UserError(
            f"{options.source}: is installed with hmdiff and stays as it is; give --output FOLDER for a copy of it"
        )
    options.output = options.output or folder
    return load_pipeline(options.source, resolve_device(options.device))


def check_sampling(pipeline: HMDiffPipeline, options: argparse.Namespace) -> None:
    """Check sampler and steps before any work. Also for the direct baseline, which uses neither."""
    from hmdiff.diffusion.schedule import change_scheduler

    if options.sampler is not None:
        change_scheduler(pipeline.scheduler, options.sampler)  # type: ignore[arg-type]
    total = pipeline.scheduler.config.num_train_timesteps
    if options.steps is not None and options.steps > total:
        raise UserError(f"--steps {options.steps}: the model was trained with {total} steps; give 1 to {total}")


def read_config(name: str, overrides: list[str]) -> Config:
    """A YAML file, or the name of a shipped config such as quickstart, with key=value overrides."""
    from hmdiff.config import load_config
    from hmdiff.files.resources import config_path

    return load_config(config_path(name), overrides)
