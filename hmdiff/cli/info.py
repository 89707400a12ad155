"""`hmdiff info`: properties of a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from hmdiff.cli import arguments


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers, "info", "what a checkpoint is: sizes, parameters, configuration", "hmdiff info hmdiff_small"
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=arguments.DEFAULT_CHECKPOINT,
        metavar="CHECKPOINT",
        help="a shipped checkpoint, or the folder of a training or of save_pretrained",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from hmdiff.train.memory import parameters

    folder = arguments.checkpoint_folder(options.checkpoint)
    pipeline = arguments.load_pipeline(options.checkpoint)
    model, scheduler = pipeline.model, pipeline.scheduler
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    config = model.config
    print(f"folder       {folder}  ({size / 1e6:.1f} MB)")
    print(f"parameters   {parameters(model, False):,}")
    for name, part in model.named_children():
        print(f"  {name:22} {parameters(part, False):>12,}")
    if model.upsample_weight is not None:
        print(f"  {'upsample_weight':22} {model.upsample_weight.numel():>12,}")
    print(f"body         {config.body!r}: {config.num_vertices} vertices, {config.num_joints} joints")
    print(f"reads        {config.inputs} ({config.backbone})")
    if config.tokens == "parts":
        print(f"tokens       {config.num_joints} body parts")
    else:
        patches = config.num_coarse // config.patch_size
        print(f"tokens       {patches} patches of {config.patch_size} coarse vertices, {config.num_joints} joints")
    diffusion = scheduler.config
    print(
        f"diffusion    {type(scheduler).__name__}, {diffusion.num_train_timesteps} steps trained, "
        f"{pipeline.num_inference_steps} sampled, eta {pipeline.eta:g}, predicts {diffusion.prediction_type}"
    )
    print("model        " + ", ".join(f"{key}={value!r}" for key, value in config.items() if not key.startswith("_")))
    return 0
