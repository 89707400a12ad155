"""`hmdiff card`: the model card of a checkpoint with its measured results, and upload to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hmdiff.cli import arguments


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "card",
        "the model card of a checkpoint with its measured figures; --push puts both on the Hugging Face Hub",
        "hmdiff card runs/mine\n  hmdiff card runs/mine --push somebody/mine",
        "Figures come from the files that hmdiff evaluate --checkpoint CHECKPOINT wrote; only those of these very "
        "weights are taken.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a shipped checkpoint, a run or a saved pipeline")
    parser.add_argument(
        "--evaluation",
        type=Path,
        default=Path("outputs/evaluation"),
        metavar="FOLDER",
        help="where hmdiff evaluate wrote all.json, and reliability_NAME.json if there is one",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/card"), metavar="FOLDER", help="of README.md")
    parser.add_argument("--push", metavar="OWNER/NAME", help="put card and checkpoint there (default: nowhere)")
    parser.add_argument("--private", action="store_true", help="a new repository is private (default: public)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from hmdiff.evaluate.model_card import model_card, read_reports
    from hmdiff.evaluate.store import model_hash
    from hmdiff.files.reading import read_json
    from hmdiff.files.storage import atomic_file, make_folder

    folder = arguments.checkpoint_folder(options.checkpoint)
    pipeline = arguments.load_pipeline(options.checkpoint)
    reports = read_reports(options.evaluation / "all.json", model_hash(folder))
    label = arguments.labels([options.checkpoint])[0]
    reliability = options.evaluation / f"reliability_{label}.json"
    card = model_card(
        options.push or label, pipeline, reports, read_json(reliability) if reliability.exists() else None
    )
    path = make_folder(options.output) / "README.md"
    with atomic_file(path) as temporary:
        temporary.write_text(card)
    print(f"written: {path}")
    if options.push:
        print(f"pushed: {pipeline.push_to_hub(options.push, options.private, card)}")
    return 0
