"""`hmdiff train`: train a config; the same command again goes on where it stopped."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.commands import arguments

if TYPE_CHECKING:
    from hmdiff.config import Config


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "train",
        "train a model; run the same command again to go on after a stop",
        "hmdiff train --config quickstart training.steps=1000\n"
        "  accelerate launch --num_processes 2 tools/train.py --config configs/hmdiff_small.yaml",
        "Ctrl-C stops after the current step, with a checkpoint.",
    )
    parser.add_argument(
        "--config", default="quickstart", metavar="FILE",
        help="a YAML file, or the name of a shipped one such as hmdiff_small (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, make one step, print the sizes, write nothing"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values over the config's, such as training.batch_size=32"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = arguments.read_config(options.config, options.overrides)
    if options.dry_run:
        dry_run(config)
        return 0
    from hmdiff.training import Trainer

    trainer = Trainer(config)
    trainer.run()
    if trainer.accelerator.is_main_process:
        done = trainer.step >= config.training.steps
        reached = f"stopped at step {trainer.step} of {config.training.steps}: the same command goes on"
        state = "trained" if done else reached
        print(f"{state}; the model is in {config.output}/pipeline, the losses in {config.output}/log.csv")
        if done:
            print(f"next: hmdiff evaluate --checkpoint {config.output}/pipeline")
    return 0


def dry_run(config: Config) -> None:
    """One step of the real loop in a folder that is thrown away."""
    from torch.utils.data import DataLoader

    from hmdiff.training import Trainer

    wanted = config.output
    with tempfile.TemporaryDirectory(prefix="hmdiff-dry-run-") as folder:
        config.output = str(Path(folder) / "run")
        config.training.compile = False  # compiling takes minutes and changes no size
        started = time.perf_counter()
        trainer = Trainer(config)
        built = time.perf_counter()
        batches = iter(DataLoader(trainer.stream, batch_size=None, sampler=range(len(trainer.stream))))
        terms = trainer._one_step(batches)
        stepped = time.perf_counter()
    values = config.training
    people = values.batch_size * values.gradient_accumulation * trainer.accelerator.num_processes
    model = trainer.plain
    sizes = model.config
    print(f"config      {config.name}, would write to {wanted}/")
    print(f"parameters  {parameters(model):,} trained, {parameters(model, False):,} in all")
    print(f"points      {sizes.num_coarse} coarse vertices + {sizes.num_joints} joints of {config.body!r}")
    print(f"tokens      {sizes.num_coarse // sizes.patch_size} patches + {sizes.num_joints} joints")
    print(f"step        {people} people x {config.loss.noise_levels} noise levels; {values.steps} steps in all")
    print(f"loss        {float(terms['loss']):.4f}")
    print(f"time        {built - started:.1f} s to build, {stepped - built:.1f} s the first step (without compiling)")
    print(f"memory      {memory_text(trainer.accelerator.device)}")
    print("nothing was written")


def parameters(model: Any, trained: bool = True) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def memory_text(device: Any) -> str:
    """Peak of the process, and of the GPU where one is used."""
    gigabytes = peak_gigabytes()
    text = "unknown on this system" if gigabytes is None else f"{gigabytes:.2f} GB at the peak of the process"
    if device.type == "cuda":
        import torch

        text += f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of the GPU"
    return text


def peak_gigabytes() -> float | None:
    """The most memory that this process has held so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
