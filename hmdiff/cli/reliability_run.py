"""`hmdiff evaluate --reliability`: how well the confidence of checkpoints is calibrated on the synthetic splits."""

from __future__ import annotations

import argparse
from typing import Any

from hmdiff.cli import arguments
from hmdiff.cli.show import progress
from hmdiff.cli.splits import people_for
from hmdiff.errors import UserError


def run_reliability(options: argparse.Namespace) -> int:
    """A table for each checkpoint, and reliability_NAME.json and .png in the output folder."""
    from hmdiff.diffusion.temperature import Sampling
    from hmdiff.evaluate.reliability import COLUMNS, measure_spread, plot_reliability, reliability, reliability_rows
    from hmdiff.evaluate.store import save_report
    from hmdiff.evaluate.table import Table
    from hmdiff.files.storage import make_folder

    folder = make_folder(options.output)
    for label, (pipeline, _) in arguments.load_checkpoints(options, options.checkpoint).items():
        arguments.check_sampling(pipeline, options)
        sampling = arguments.sampling_of(options, pipeline)
        fitted = pipeline.calibration(sampling)
        if fitted is None or fitted.confidence is None:
            way = Sampling.of(pipeline.resolved(sampling))
            raise UserError(
                f"{label}: no confidence was fitted for {way}; run hmdiff prepare temperature with these settings"
            )
        reports: dict[str, Any] = {}
        for split in dict.fromkeys(options.split):
            with progress(f"{label} {split}", options.people) as update:
                _, spread = measure_spread(pipeline, people_for(pipeline), split, options.people, sampling, update)
            reports[split] = reliability(spread.scaled_by(fitted), fitted.confidence)
        rows = [row for split, report in reports.items() for row in reliability_rows(split, report)]
        Table(f"{label}: {options.people} people of each split", COLUMNS, rows).print()
        save_report(reports, folder / f"reliability_{label}.json")
        plot_reliability(reports, folder / f"reliability_{label}.png")
        print(f"written: {folder}/reliability_{label}.json and .png")
    return 0
