"""`hmdiff prepare`: data sets as shards, licensed bodies, checkpoints, temperatures and pose estimators."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hmdiff.cli import aggregator_fit, arguments
from hmdiff.data.readers import READERS
from hmdiff.errors import UserError
from hmdiff.names import SPLITS


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "prepare",
        "prepare a data set for training; or a body, a checkpoint to ship, temperatures, a pose estimator",
        "hmdiff prepare 3dpw /data/3DPW prepared/3dpw_train --split train",
    )
    parts = parser.add_subparsers(metavar="WHAT", dest="what", required=True)

    checkpoint = arguments.new_parser(
        parts,
        "checkpoint",
        "a trained pipeline in half precision, to ship",
        "hmdiff prepare checkpoint runs/hmdiff_small --output assets/hmdiff_small",
    )
    checkpoint.add_argument("source", help="a run, or a folder that save_pretrained wrote")
    checkpoint.add_argument("--steps", type=arguments.whole(1), metavar="K", help="denoising steps (default: as saved)")
    _output(checkpoint, "assets/hmdiff_small", "FOLDER")
    checkpoint.set_defaults(run=_run(_checkpoint))

    _add_licensed(parts)
    _add_temperature(parts)
    aggregator_fit.add_parser(parts, _run)

    estimator = arguments.new_parser(
        parts,
        "estimator",
        "a small mmpose pose estimator, trained on synthetic people",
        "hmdiff prepare estimator --output runs/pose_small",
        "Needs the extra mmpose. Killed at any moment, the same command goes on.",
    )
    _output(estimator, "runs/pose_small", "FOLDER")
    estimator.add_argument(
        "--network",
        choices=("hrnet", "resnet18"),
        default="hrnet",
        help="resnet18: its weights also start a mesh model's backbone, model.pretrained=FOLDER/model.safetensors",
    )
    for option, default, words in (
        ("--steps", 2000, "of 16 people in 2 crops each"),
        ("--image-size", 96, "pixels a side that the network reads, a multiple of 32"),
        ("--width", 16, "channels of HRNet's finest branch, and half as many as of ResNet's last deconvolution"),
        ("--people", 512, "of each test split, to measure it"),
    ):
        estimator.add_argument(option, type=arguments.whole(1), default=default, help=words)
    estimator.add_argument("--seed", type=arguments.whole(0), default=0)
    arguments.add_device(estimator)
    estimator.set_defaults(run=_run(_estimator))

    for name in READERS:
        _add_dataset(parts, name)


def _add_licensed(parts: Any) -> None:
    licensed = arguments.new_parser(
        parts,
        "licensed",
        "your own SMPL, SMPL-X and MANO files and their regressors, to npz, once",
        "hmdiff prepare licensed SMPL_python_v.1.1.0.zip --output /data/bodies",
        "Reads chumpy pickles without chumpy. Then: HMDIFF_BODY_DIR=/data/bodies, and hmdiff train body=smpl.",
    )
    licensed.add_argument("source", type=Path, help="a body file, a folder of them, or a zip archive as published")
    licensed.add_argument("--output", type=Path, metavar="FOLDER", help="(default: the folder HMDIFF_BODY_DIR)")
    licensed.set_defaults(run=_run(_licensed))


def _add_temperature(parts: Any) -> None:
    temperature = arguments.new_parser(
        parts,
        "temperature",
        "by what a pipeline's spread is multiplied to be calibrated, fitted on people",
        "hmdiff prepare temperature runs/hmdiff_small --steps 3 10 --guidance dat",
        "It is written into the pipeline's hmdiff.json, one for each number of steps and each guidance; meshes are not "
        "changed by it.",
    )
    arguments.add_rewritten(temperature, "the temperatures")
    temperature.add_argument(
        "--steps", type=arguments.whole(1), nargs="+", metavar="K", help="denoising steps (default: the pipeline's own)"
    )
    temperature.add_argument("--sampler", metavar="NAME", help="another sampler (default: the pipeline's own)")
    temperature.add_argument("--eta", type=arguments.number(0), help="ddim's fresh noise (default: the pipeline's own)")
    arguments.add_guidance(temperature)
    temperature.add_argument(
        "--split",
        default="calibration",
        choices=SPLITS,
        metavar="SPLIT",
        help="synthetic people to fit it on (default: %(default)s, of every kind in turn)",
    )
    for option, least, default, words in (("--people", 8, 320, "of the split"), ("--num-hypotheses", 5, 25, "of each")):
        temperature.add_argument(option, type=arguments.whole(least), default=default, metavar="N", help=words)
    temperature.add_argument("--seed", type=arguments.whole(0), default=0)
    arguments.add_device(temperature)
    temperature.set_defaults(run=_run(_temperature))


def _add_dataset(parts: Any, name: str) -> None:
    dataset = arguments.new_parser(
        parts,
        name,
        f"the data set {name}, from its own files to shards",
        f"hmdiff prepare {name} /data/{name} prepared/{name}",
        f"Stopped at any moment, the same command goes on. Then: data.kind=recorded data.sources=[prepared/{name}].",
    )
    dataset.add_argument("source", type=Path, help="the folder of the data set, as its authors hand it out")
    dataset.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    dataset.add_argument("--split", help="which part of it (default: the reader's first; a wrong one lists them)")
    dataset.add_argument(
        "--resolution",
        type=arguments.whole(32),
        default=384,
        metavar="PIXELS",
        help="of the stored pictures, a person's crop at most so many a side",
    )
    dataset.add_argument(
        "--margin",
        type=arguments.number(1),
        default=1.8,
        help="stored around the crop for augmentation, times its side",
    )
    dataset.add_argument("--quality", type=arguments.whole(1), default=92, help="of the jpgs")
    dataset.add_argument("--shard-records", type=arguments.whole(1), default=1000, help="people a file")
    dataset.add_argument("--workers", type=arguments.whole(1), default=2, help="threads that read photos")
    dataset.add_argument(
        "--depth",
        metavar="SOURCE",
        help="keep depth maps for D2A-HMR: 'files' beside the photos (NAME_depth.npz, .npy or .png), a folder of "
        "STEM.npz, .npy or .png, or estimator:MODEL, a network of transformers by name or folder (default: none)",
    )
    dataset.add_argument(
        "--disparity", action="store_true", help="the files of --depth are larger where it is nearer (default: farther)"
    )
    dataset.add_argument(
        "--masks",
        default="own",
        metavar="SOURCE",
        help="D2A-HMR's silhouettes: own (the data set's, where it has some), none, or also of people without one: "
        "embedded (BlazePose's) or mmseg:MODEL, a config or a name that mmseg lists (default: %(default)s)",
    )
    dataset.add_argument("--masks-checkpoint", metavar="FILE", help="weights of mmseg:MODEL (default: mmseg's own)")
    dataset.set_defaults(run=_run(_dataset))


def _output(parser: argparse.ArgumentParser, default: str, kind: str = "FILE") -> None:
    parser.add_argument("--output", type=Path, default=Path(default), metavar=kind)


def _run(make: Callable[[argparse.Namespace], Mapping[str, Any]]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        started = time.perf_counter()
        print(f"preparing {options.what} ...", flush=True)
        for name, value in make(options).items():
            print(f"  {name:26} {f'{value:.6g}' if isinstance(value, int | float) else value}")
        print(f"written to {options.output} in {time.perf_counter() - started:.0f} s")
        return 0

    return run


def _licensed(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.body.files import body_folder
    from hmdiff.body.licensed import prepare_licensed

    if options.output is None:
        options.output = body_folder()
    written = prepare_licensed(options.source, options.output, lambda line: print(f"  {line}", flush=True))
    return {"files written": len(written)}


def _checkpoint(options: argparse.Namespace) -> Mapping[str, Any]:
    pipeline = arguments.load_pipeline(options.source, "cpu")
    pipeline.num_inference_steps = options.steps or pipeline.num_inference_steps
    pipeline.save_pretrained(options.output, half=True)
    size = sum(path.stat().st_size for path in Path(options.output).rglob("*") if path.is_file())
    return {"parameters": sum(p.numel() for p in pipeline.model.parameters()), "megabytes": size / 1e6}


def _temperature(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.cli.show import progress
    from hmdiff.cli.splits import people_for
    from hmdiff.evaluate.calibration import calibrate, store_temperature

    arguments.check_guidance(options)
    pipeline = arguments.load_rewritten(options)
    chosen = options.steps or [pipeline.num_inference_steps]
    for options.steps in chosen:
        arguments.check_sampling(pipeline, options)
    if Path(options.output).resolve() != arguments.checkpoint_folder(options.source).resolve():
        pipeline.save_pretrained(options.output)
    data = people_for(pipeline)
    found: dict[str, Any] = {}
    for steps in chosen:
        with progress(f"{options.split}, {steps} steps", options.people) as update:
            options.steps = steps
            sampling = arguments.sampling_of(options, pipeline)
            fitted = calibrate(pipeline, data, options.split, options.people, sampling, update)
        store_temperature(options.output, fitted)
        error = [fitted.fitted_on[f"expected_calibration_error_{when}"] for when in ("before", "after")]
        found[str(fitted.sampling)] = f"{fitted.temperature:.3g}, calibration error {error[0]:.3f} -> {error[1]:.3f}"
    return found


def _dataset(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.cli.depth_maps import photo_depth
    from hmdiff.data.prepare import prepare_dataset
    from hmdiff.data.readers import open_reader

    gives = "disparity" if options.disparity else "depth"
    if options.disparity and options.depth is None:
        raise UserError("--disparity says what the maps of --depth are, and none is given; add --depth SOURCE")
    if options.masks_checkpoint is not None and not options.masks.startswith("mmseg:"):
        raise UserError("--masks-checkpoint is of mmseg:MODEL; give --masks mmseg:MODEL with it")
    silhouettes = None
    if options.masks not in ("own", "none"):
        from hmdiff.estimators.silhouettes import load_silhouettes

        silhouettes = load_silhouettes(options.masks, options.masks_checkpoint)
    reader = open_reader(options.what, options.source, options.split)
    for line in reader.summary:
        print(f"  {line}", flush=True)
    return prepare_dataset(
        reader,
        options.output,
        options.margin,
        options.resolution,
        options.quality,
        options.shard_records,
        options.workers,
        options.what,
        options.source,
        options.split or "",
        photo_depth(options.depth, gives),
        "" if options.depth is None else f"{options.depth} ({gives})",
        options.masks != "none",
        silhouettes,
        "" if silhouettes is None else options.masks,
    )


def _estimator(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.train.estimator import EstimatorTraining, prepare_estimator

    values = EstimatorTraining(
        steps=options.steps,
        network=options.network,
        image_size=options.image_size,
        width=options.width,
        seed=options.seed,
    )
    return prepare_estimator(options.output, values, arguments.resolve_device(options.device), options.people)
