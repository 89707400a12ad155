"""`hmdiff evaluate --reliability`: how often the confidence of checkpoints is right on the synthetic splits."""

from __future__ import annotations

import argparse
from typing import Any

from hmdiff.cli import arguments
from hmdiff.cli.show import progress
from hmdiff.cli.splits import MAP_SIZE, test_people
from hmdiff.errors import UserError


def run_reliability(options: argparse.Namespace) -> int:
    """A table for each checkpoint, and reliability_NAME.json and .png in the output's folder."""
    from hmdiff.diffusion.temperature import Sampling
    from hmdiff.evaluate.reliability import COLUMNS, observe, reliability, reliability_picture, reliability_rows
    from hmdiff.evaluate.store import save_report
    from hmdiff.evaluate.table import Table
    from hmdiff.files.storage import make_folder

    folder, device = make_folder(options.output), arguments.resolve_device(options.device)
    for name, label in zip(options.checkpoint, arguments.labels(options.checkpoint), strict=True):
        pipeline = arguments.load_pipeline(name, device)
        arguments.check_sampling(pipeline, options)
        sampling, model = arguments.sampling_of(options, pipeline), pipeline.model.config
        fitted = pipeline.calibration(sampling)
        if fitted is None or fitted.confidence is None:
            way = Sampling.of(pipeline.resolved(sampling))
            raise UserError(
                f"{label}: no confidence was fitted for {way}; run hmdiff prepare temperature with these settings"
            )
        data = test_people(
            pipeline.body, None if model.inputs == "heatmaps" else model.image_size, MAP_SIZE if model.depth_map else 0
        )
        reports: dict[str, Any] = {}
        for split in dict.fromkeys(options.split):
            with progress(f"{label} {split}", options.people) as update:
                observed = observe(
                    pipeline,
                    data,
                    split,
                    options.people,
                    options.num_hypotheses,
                    options.steps,
                    options.sampler,
                    options.seed,
                    sampling.guidance,
                    update,
                )
            reports[split] = reliability(observed.tempered(fitted), fitted.confidence)
        rows = [row for split, report in reports.items() for row in reliability_rows(split, report)]
        Table(f"{label}: {options.people} people of each split", COLUMNS, rows).print()
        save_report(reports, folder / f"reliability_{label}.json")
        reliability_picture(reports, folder / f"reliability_{label}.png")
        print(f"written: {folder}/reliability_{label}.json and .png")
    return 0
