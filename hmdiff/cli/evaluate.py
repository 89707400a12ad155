"""`hmdiff evaluate`: checkpoints and the mean mesh on the synthetic splits; finished results are reused.

With --protocol: checkpoints or predictions of other methods on a data set by a named protocol (`protocol_run`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments, splits
from hmdiff.cli.show import progress
from hmdiff.cli.splits import PEOPLE
from hmdiff.errors import UserError
from hmdiff.names import SPLITS

if TYPE_CHECKING:
    from hmdiff.data.synthetic.people import SyntheticHumans
    from hmdiff.diffusion.temperature import Temperature

MEAN_MESH = "mean mesh"


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "evaluate",
        "errors of checkpoints on the synthetic splits, or of anybody's predictions by a named protocol",
        "hmdiff evaluate --checkpoint hmdiff_small direct_small --split test test_ood\n"
        "  hmdiff evaluate --split test_occluded --bands\n"
        "  hmdiff evaluate --split test --guidance dat --steps 3\n"
        "  hmdiff evaluate --protocol min_of_n --data test --people 100 --num-hypotheses 100\n"
        "  hmdiff evaluate --protocol spin jotr --data prepared/3dpw --checkpoint runs/smpl\n"
        "  hmdiff evaluate --protocol spin --data 3dpw --predictions their_results",
        "PVE, MPJPE, PA-MPJPE and PA-PVE in mm, of the first hypothesis, of the mean of all, and of the best (oracle), "
        "with 95 % bootstrap intervals over people; the mean mesh beside. A JSON for each checkpoint and split: one "
        "that is there with the same settings and the same model is not computed again. With --protocol the numbers "
        "are those of the protocol, which is printed with them, and what papers published by it stands beside; several "
        "processes (torchrun --nproc_per_node 2 tools/evaluate.py ...) share the people.",
    )
    arguments.add_checkpoint(parser, several=True)
    parser.add_argument(
        "--split",
        nargs="+",
        default=["test"],
        choices=SPLITS,
        metavar="SPLIT",
        help=f"of {', '.join(SPLITS)} (default: test)",
    )
    parser.add_argument(
        "--people", type=arguments.whole(2), help=f"first people of the split (default: {PEOPLE}; of a data set all)"
    )
    parser.add_argument(
        "--bands",
        action="store_true",
        help="also errors and spread by how much of a person is visible (over 80, 60-80, 40-60, under 40 %%), and the "
        "spread and error of hidden against visible vertices (default: no)",
    )
    parser.add_argument(
        "--surface",
        choices=("body", "vertices"),
        default="body",
        help="of every hypothesis: the nearest body's skin, or the predicted vertices",
    )
    parser.add_argument(
        "--as-is", action="store_true", help="keep the crops of people who lie or are upside down (default: turn them)"
    )
    parser.add_argument(
        "--reliability",
        action="store_true",
        help="instead: how often the confidence is right, the conformal intervals' coverage, and their diagram; best "
        "with --split test test_occluded test_guessed test_ood (default: no)",
    )
    add_protocol(parser)
    arguments.add_sampling(parser, eta=False)
    arguments.add_guidance(parser, "none")
    arguments.add_device(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"), metavar="FOLDER")
    parser.set_defaults(run=run)


def add_protocol(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("by a protocol")
    group.add_argument(
        "--protocol",
        nargs="+",
        metavar="NAME",
        help="spin, metro, jotr, humaniflow, emdb, freihand, synthetic, min_of_n or biggs (default: none)",
    )
    group.add_argument(
        "--data",
        metavar="NAME",
        help="a folder that hmdiff prepare wrote, its name in the folder HMDIFF_DATA_DIR, or a synthetic split "
        "(default: none; --protocol needs it)",
    )
    group.add_argument(
        "--predictions",
        type=Path,
        metavar="FOLDER",
        help="npz files of names, vertices or joints, in place of a checkpoint; the layout is in "
        "hmdiff/evaluate/predictions.py (default: none)",
    )
    group.add_argument(
        "--base",
        metavar="NAME",
        help="the protocol of one hypothesis in min_of_n and biggs (default: spin on SMPL, freihand on MANO, else "
        "synthetic)",
    )
    group.add_argument(
        "--body",
        metavar="NAME",
        help="of --predictions (default: what the protocol is about; free for a synthetic split)",
    )
    group.add_argument(
        "--group", nargs="+", metavar="NAME", help="only these sequences of the data set, * for anything (default: all)"
    )
    group.add_argument(
        "--heatmaps",
        default="labels",
        metavar="WHAT",
        help="what the model sees of a data set: labels (its 2D keypoints), none, or a folder of NAME.npz",
    )
    group.add_argument(
        "--same-body",
        action="store_true",
        help="the data set's labels are about the model's own body, whatever they say (default: they are not)",
    )


def run(options: argparse.Namespace) -> int:
    from hmdiff.cli.protocol_run import run_protocols
    from hmdiff.evaluate.evaluation import evaluate, sampling_settings
    from hmdiff.evaluate.split_tables import split_tables, visibility_tables
    from hmdiff.evaluate.store import guided_by, save_report, stored, suffix
    from hmdiff.files.storage import make_folder

    arguments.check_guidance(options)
    if options.protocol:
        if options.bands:
            raise UserError("--bands is about the synthetic splits, and --protocol about others; leave one of them out")
        return run_protocols(options)
    for name in ("data", "predictions", "base", "body", "group"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} goes with --protocol; name one, such as --protocol spin")
    options.people = options.people or PEOPLE
    if options.reliability:
        from hmdiff.cli.reliability_run import run_reliability

        return run_reliability(options)
    folder = make_folder(options.output)
    checkpoints = arguments.load_checkpoints(options, options.checkpoint)
    for pipeline, _ in checkpoints.values():
        arguments.check_sampling(pipeline, options)
    reports: list[dict[str, Any]] = []
    for split in dict.fromkeys(options.split):
        for label, (pipeline, model) in checkpoints.items():
            sampling = arguments.sampling_of(options, pipeline)
            guided = guided_by(sampling.guidance)
            settings = {
                "checkpoint": label if guided is None else f"{label} with {options.guidance}",
                "model": model,
                "split": split,
                "people": options.people,
                **sampling_settings(pipeline, sampling),
                "guided_by": guided,
                "temperature": _calibration_key(pipeline.calibration(sampling)),
            }
            raw = ("" if options.surface == "body" else "_vertices") + ("_as_is" if options.as_is else "")
            path = folder / f"{label}_{split}{suffix(guided)}{raw}.json"
            found = stored(path, settings)
            if found is None or (options.bands and "bands" not in found):
                people = splits.people_for(pipeline, maps=options.bands)  # built only when something must be computed
                with progress(f"{label} {split}", options.people) as update:
                    found = evaluate(
                        pipeline, people, split, options.people, sampling, update, visibility_bins=options.bands
                    )
                    found |= settings
                save_report(found, path)
            reports.append(found)
        settings = {"checkpoint": MEAN_MESH, "split": split, "people": options.people}
        body = next(iter(checkpoints.values())).pipeline.body
        path = folder / f"mean_mesh_{split}.json"
        reports.append(
            stored(path, settings | {"body": body.name}) or _mean_mesh(splits.test_people(body), settings, path)
        )
    save_report({"reports": reports}, folder / "all.json")
    for table, notes in split_tables(reports):
        table.print()
        for line in notes:
            print(line)
    if options.bands:
        for table in visibility_tables(reports):
            table.print()
    print(f"written: {folder}/all.json, and a JSON for each checkpoint and split")
    return 0


def _mean_mesh(data: SyntheticHumans, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    from hmdiff.evaluate.mean_mesh import mean_mesh_errors
    from hmdiff.evaluate.store import save_report

    with progress(f"{MEAN_MESH} {settings['split']}", 0):
        errors = mean_mesh_errors(data, settings["split"], settings["people"])
    report = settings | {
        "body": data.body.name,
        "errors": {metric: {"mean": value} for metric, value in errors.items()},
    }
    save_report(report, path)
    return report


def _calibration_key(fitted: Temperature | None) -> dict[str, Any] | None:
    """The part of the calibration that affects the results."""
    if fitted is None:
        return None
    return {key: value for key, value in fitted.as_json().items() if key in ("temperature", "evidence")}
