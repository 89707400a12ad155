"""`hmdiff prepare aggregator`: train the MLP that combines N hypotheses into one mesh; add it to a saved pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from hmdiff.cli import arguments
from hmdiff.cli.show import progress

Run = Callable[[Callable[[argparse.Namespace], Mapping[str, Any]]], Callable[[argparse.Namespace], int]]

DATA_KEYS = ("inputs", "backbone", "image_size", "num_coarse", "depth_map", "depth_size")


def add_parser(parts: Any, run: Run) -> None:
    parser = arguments.new_parser(
        parts,
        "aggregator",
        "train the MLP from N hypotheses to one mesh, as HMDiff ends, into a pipeline",
        "hmdiff prepare aggregator hmdiff_small --people 4096 --output runs/with_mlp",
        "Synthetic people of the training's kind, val to choose the epoch. hmdiff evaluate then has a row more.",
    )
    arguments.add_rewritten(parser, "the MLP")
    parser.add_argument("--steps", type=arguments.whole(1), metavar="K", help="denoising steps (default: as saved)")
    for option, least, default, words in (
        ("--people", 8, 4096, "to train on"),
        ("--val-people", 8, 256, "of val, to choose the epoch by"),
        ("--num-hypotheses", 2, 25, "of each"),
        ("--epochs", 1, 30, "of the MLP"),
        ("--hidden", 8, 256, "width of the MLP"),
    ):
        parser.add_argument(option, type=arguments.whole(least), default=default, metavar="N", help=words)
    parser.add_argument("--seed", type=arguments.whole(0), default=0, help="other people")
    arguments.add_device(parser)
    parser.set_defaults(run=run(_aggregator), sampler=None)


def _aggregator(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.build import build_data, build_mesh
    from hmdiff.config import load_config
    from hmdiff.train.aggregator import SEED, check_model, draw_hypotheses, train_aggregator

    pipeline = arguments.load_rewritten(options)
    check_model(pipeline)
    arguments.check_sampling(pipeline, options)
    steps = options.steps or pipeline.num_inference_steps
    config = load_config(None, [f"seed={SEED + options.seed}"])
    config.model = {name: pipeline.model.config[name] for name in DATA_KEYS}  # determines which inputs are generated
    data = build_data(config, pipeline.body, build_mesh(config, pipeline.body))
    drawn = []
    for stream, people in (("train", options.people), ("val", options.val_people)):
        with progress(f"hypotheses of {stream}, {steps} steps", people) as update:
            drawn.append(
                draw_hypotheses(pipeline, data, stream, people, options.num_hypotheses, steps, options.seed, update)
            )
    with progress("MLP", options.epochs) as update:
        found = train_aggregator(pipeline, drawn[0], drawn[1], options.epochs, options.hidden, options.seed, update)
    assert pipeline.aggregator is not None
    pipeline.aggregator.fitted_on["num_inference_steps"] = steps
    pipeline.save_pretrained(options.output)
    return {
        "people": found["people"],
        "best epoch": f"{found['best_epoch']} of {found['epochs']}",
        "val, mean of all, mm": found["val_mean_mm"],
        "val, by the MLP, mm": found["val_aggregated_mm"],
    }
