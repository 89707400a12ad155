"""`hmdiff train`: train a config; run the same command again to resume."""

from __future__ import annotations

import argparse
from typing import Any

from hmdiff.cli import arguments


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "train",
        "train a model; run the same command again to go on after a stop",
        "hmdiff train --config quickstart training.steps=1000\n"
        "  accelerate launch --num_processes 2 tools/train.py --config configs/hmdiff_small.yaml\n"
        "  hmdiff train --config hmdiff_3dpw --dry-run",
        "Ctrl-C stops after the current step, with a checkpoint.",
    )
    parser.add_argument(
        "--config",
        default="quickstart",
        metavar="FILE",
        help="a YAML file, or the name of a shipped one such as hmdiff_small",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, body, data, disk, memory and speed by a few real steps, and write nothing (default: no)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values over the config's, such as training.batch_size=32"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = arguments.read_config(options.config, options.overrides)
    if options.dry_run:
        from rich.console import Console

        from hmdiff.train.check import dry_run, print_dry_run

        with Console(stderr=True).status("dry run") as status:
            result = dry_run(config, lambda name: status.update(f"dry run: {name}"))
        print_dry_run(result)
        return 0
    from hmdiff.train.loop import Trainer

    trainer = Trainer(config)
    trainer.run()
    if trainer.accelerator.is_main_process:
        done = trainer.step >= config.training.steps
        reached = f"stopped at step {trainer.step} of {config.training.steps}: the same command goes on"
        state = "trained" if done else reached
        saved = (trainer.folder / "pipeline").is_dir()  # missing if stopped before the first step
        model = f"the model is in {config.output}/pipeline" if saved else "no model was saved yet"
        print(f"{state}; {model}, the losses are in {config.output}/log.csv")
        if done and saved:
            print(f"next: hmdiff evaluate --checkpoint {config.output}/pipeline")
    return 0
