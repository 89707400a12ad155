"""`hmdiff bench`: runtime of each pipeline stage; or parameters, memory and time of a configuration, and more."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError
from hmdiff.names import SAMPLERS, SAVED

if TYPE_CHECKING:
    from hmdiff.config import Config


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "bench",
        "where the time of a result goes, stage by stage, beside a direct regressor; or what a config costs",
        "hmdiff bench --checkpoint hmdiff_small --output bench.json",
        "Each stage has its median, spread, FLOPs, the share of a matrix product's rate, and the share of one pass of "
        "a paper-size direct regressor (HRNet-W64 and two transformers, random weights), which is timed in the same "
        "run. With --config instead: parameters, memory and time of a training step and of sampling, random weights.",
    )
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--config", metavar="FILE", help="instead: time a config, a YAML file or a shipped name (default: none)"
    )
    parser.add_argument(
        "--batch-size", type=arguments.whole(1), metavar="B", help="people (default: 1; of --fit, 64 meshes)"
    )
    parser.add_argument("--num-hypotheses", type=arguments.whole(1), default=25, metavar="N", help="bodies each")
    parser.add_argument(
        "--steps", type=arguments.whole(1), metavar="K", help="denoising steps (default: the checkpoint's or config's)"
    )
    parser.add_argument(
        "--sampler", metavar="NAME", help=f"of --config: one of {', '.join(SAMPLERS)} (default: the config's)"
    )
    parser.add_argument("--repeats", type=arguments.whole(1), help="of each timing (default: 3; of --config, 5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the networks")
    parser.add_argument("--compile", action="store_true", help="encode and denoise by torch.compile: minutes at first")
    parser.add_argument(
        "--counts", type=_numbers, default=(1, 5, 25), metavar="N,N", help="curve over hypotheses (default: 1,5,25)"
    )
    parser.add_argument(
        "--lengths", type=_numbers, default=(1, 3, 10), metavar="K,K", help="curve over steps (default: 1,3,10)"
    )
    parser.add_argument(
        "--batches", type=_numbers, default=(1, 4), metavar="B,B", help="curve over people at once (default: 1,4)"
    )
    parser.add_argument("--quick", action="store_true", help="without the imports, the direct regressor and the files")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the same as JSON (default: none)")
    parser.add_argument("--no-sampling", action="store_true", help="of --config: the training step alone")
    parser.add_argument(
        "--data", action="store_true", help="of --config: does the data keep up with the training, at its batch"
    )
    parser.add_argument(
        "--shards",
        metavar="FOLDER",
        help="instead: images a second from a prepared data set, with 0, 1 and 2 workers (default: none)",
    )
    parser.add_argument("--raw", metavar="FOLDER", help="beside --shards: its own files (default: where it came from)")
    parser.add_argument(
        "--fit",
        type=arguments.whole(1),
        nargs="?",
        const=500,
        metavar="BODIES",
        help="instead: error and time of fitting pose and shape to random bodies (default: none; alone: 500)",
    )
    parser.add_argument(
        "--learning",
        type=float,
        metavar="MINUTES",
        help="instead: train from nothing for so many minutes of one core, and print error against time (default: no)",
    )
    arguments.add_device(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the config's")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    from hmdiff.body.body import load_body
    from hmdiff.build import build_mesh, build_model, build_scheduler, build_source
    from hmdiff.evaluate.evaluation import as_heatmaps
    from hmdiff.lab.stages import Bench, Options
    from hmdiff.pipeline import HMDiffPipeline
    from hmdiff.train.memory import memory_text, parameters, peak_gigabytes
    from hmdiff.train.step import Draws, keypoint_map, training_losses
    from hmdiff.train.timing import timings

    alone = options.config is None and not (options.data or options.shards or options.fit or options.learning)
    if alone and not options.overrides and not options.no_sampling:
        return _stages(options)
    config = arguments.read_config(options.config or "hmdiff_small", options.overrides)
    options.repeats = options.repeats or 5
    if options.shards is not None:
        return _loading(options, config.data.image_size)
    device = arguments.resolve_device(options.device)
    if options.fit is not None:
        return _fitting(options, config.body, device)
    options.batch_size = options.batch_size or 1
    if options.learning is not None:
        return _learning(options.learning, config)
    if options.data:
        from hmdiff.lab.throughput import measure_throughput

        for name, value in measure_throughput(config, device, options.repeats).items():
            print(f"{name:24} {f'{value:.4g}' if isinstance(value, float) else value}")
        return 0
    config.model["pretrained"] = False  # no download for timing only
    config.data.block_size = options.batch_size
    body = load_body(config.body)
    mesh = build_mesh(config, body)
    source = build_source(config, body, mesh)
    sample = source.block("train", 0)
    before = peak_gigabytes()
    model = build_model(config, body, mesh).to(device)
    pipeline = HMDiffPipeline(
        model, build_scheduler(config), body, config.diffusion.num_inference_steps, config.diffusion.eta
    ).to(device)
    arguments.check_sampling(pipeline, options)
    people = options.batch_size
    print(f"{config.name}: {parameters(model, False):,} parameters, on {device}, {torch.get_num_threads()} threads")

    generator = torch.Generator().manual_seed(0)
    moved = sample.to(device)
    levels = config.loss.noise_levels
    steps = torch.randint(config.diffusion.num_train_timesteps, (people, levels), generator=generator).to(device)
    noise = torch.randn(people, levels, model.num_points, 3, generator=generator).to(device)

    keypoints = keypoint_map(config.loss, model, body)

    def train_step() -> None:
        draws = Draws(steps, noise)
        loss = training_losses(model, pipeline.scheduler, config.loss, moved, draws, None, keypoints)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    model.train()
    bench = Bench(Options(people, repeats=options.repeats), device)
    row = bench.row("forward and backward", train_step, count=True)
    print(
        f"forward and backward of {people} people x {levels} noise levels: {1000 * row.seconds:.0f} ms of "
        f"{bench.clock_name} (the first {1000 * row.first:.0f} ms)"
    )
    print(
        f"{(row.flops or 0) / 1e9:.1f} GFLOP of products and convolutions, at {row.of_peak or 0:.0%} of a matrix "
        f"product's rate on this machine ({bench.peak / 1e9:.0f} GFLOP/s)"
    )
    print(f"memory: {memory_text(device)}" + ("" if before is None else f", {before:.2f} GB before the model"))
    if options.no_sampling:
        return 0
    model.eval()
    if sample.peaks is not None:  # training reads peaks instead of heatmaps; sampling needs heatmaps
        sample = source.block("val", 0)
    heatmaps = None if model.config.inputs == "image" else as_heatmaps(sample)

    def sampling() -> None:
        pipeline(
            sample.image,
            heatmaps,
            num_hypotheses=options.num_hypotheses,
            num_inference_steps=options.steps,
            scheduler=options.sampler,
        )

    seconds = statistics.median(timings(sampling, 1 + options.repeats, device)[1:]) / people
    count = options.steps or config.diffusion.num_inference_steps
    print(f"sampling {options.num_hypotheses} hypotheses in {count} steps: {1000 * seconds:.0f} ms an image")
    return 0


def _stages(options: argparse.Namespace) -> int:
    import torch

    from hmdiff.files.storage import atomic_file
    from hmdiff.lab.stages import REGRESSOR, Options, Row, stage_rows, start_rows, summary

    asked = Options(
        options.batch_size or 1,
        options.num_hypotheses,
        options.steps,
        options.repeats or 3,
        getattr(torch, options.dtype),
        options.compile,
        not options.quick,
        not options.quick,
        () if options.quick else SAVED,
        options.counts,
        options.lengths,
        options.batches,
    )
    device = arguments.resolve_device(options.device)
    bench, found = stage_rows(arguments.checkpoint_folder(options.checkpoint), device, asked)
    print(
        f"{options.checkpoint}: {asked.people} people x {asked.hypotheses} hypotheses, {options.dtype}, on {device}, "
        f"{torch.get_num_threads()} threads; {bench.clock_name}, median of {asked.repeats} after a first call; "
        f"a matrix product reaches {bench.peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'stage':44}{'ms':>9}{'+-':>8}{'first':>9}{'MFLOP':>9}{'of peak':>9}", flush=True)
    rows: list[Row] = []
    for row in (each for part in (start_rows(asked.repeats) if asked.start else (), found) for each in part):
        rows.append(row)
        flops = "" if row.flops is None else f"{row.flops / 1e6:.1f}"
        share = "" if row.of_peak is None else f"{row.of_peak:.0%}"
        times = "".join(
            f"{1000 * seconds:{width}.1f}" for seconds, width in ((row.seconds, 9), (row.spread, 8), (row.first, 9))
        )
        print(f"{row.stage:44}{times}{flops:>9}{share:>9}", flush=True)
    peer = next((row.seconds for row in rows if row.stage == REGRESSOR), None)
    if peer is not None:
        for row in rows:
            if row.stage.startswith(("all of it", "estimator")):
                print(f"{row.stage}: {row.seconds / peer:.2f} of one pass of the direct regressor")
    held = next((row.peak_gigabytes for row in reversed(rows) if row.stage.startswith("all of it")), None)
    if held is not None:
        print(f"memory of the process until all of it was done: {held:.2f} GB")
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            temporary.write_text(json.dumps(summary(bench, rows, asked), indent=2) + "\n", encoding="utf-8")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers above 0 are expected, such as 1,5,25")
    return found


def _learning(minutes: float, config: Config) -> int:
    from hmdiff.lab.learning import learning_curve

    if not 0 < minutes < 1e6:
        raise UserError(f"--learning {minutes}: minutes above 0 are expected")
    print("core-minutes    people  people/s     val mm     ood mm", flush=True)
    for point in learning_curve(config, minutes):
        rate = point.people / point.minutes / 60
        print(
            f"{point.minutes:12.2f}{point.people:10,}{rate:10.0f}{point.errors['val']:11.1f}"
            f"{point.errors['test_ood']:11.1f}",
            flush=True,
        )
    return 0


def _loading(options: argparse.Namespace, image_size: int) -> int:
    from hmdiff.lab.loading import compare_loading

    print(f"{options.shards}: augmented crops of {image_size} pixels, in batches of 32")
    for row in compare_loading(options.shards, options.raw, image_size, 32):
        print(
            f"{row['store']:10} {row['workers']} workers {row['images_per_second']:8.0f} images/s, peak memory of a "
            f"loading process {row['peak_gigabytes']:.2f} GB",
            flush=True,
        )
    return 0


def _fitting(options: argparse.Namespace, name: str, device: Any) -> int:
    import torch

    from hmdiff.body.body import load_body
    from hmdiff.lab.fit_figures import fit_figures

    body, batch = load_body(name).to(device), options.batch_size or 64
    threads = f"{torch.get_num_threads()} threads"
    print(f"body {body.name}, {options.fit} random bodies in batches of {batch}, on {device}, {threads}", flush=True)
    for row in fit_figures(body, options.fit, batch):
        print(
            f"noise {row['noise_mm']:.0f} mm: error to the body {row['mean_mm']:.2f} mm (95 % below "
            f"{row['p95_mm']:.2f}, worst {row['worst_mm']:.2f}), {row['wall_ms']:.1f} ms a mesh, "
            f"{row['process_ms']:.1f} ms of processor time",
            flush=True,
        )
    return 0
