"""A contact sheet of a split's people: the ground truth in grey, beside it the selected hypothesis.

python -m tools.build.people_sheet --checkpoint hmdiff_small --split test_ood --people 32 --output sheet.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hmdiff.build import build_data, build_mesh
from hmdiff.config import Config
from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments, split_batches
from hmdiff.names import SPLITS
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.viz.canvas import contact_sheet, save_picture
from hmdiff.viz.overlays import turntable_view

TRUTH = (0.72, 0.72, 0.74)


def people_sheet(
    pipeline: HMDiffPipeline,
    split: str,
    people: int,
    output: Path,
    num_hypotheses: int = 25,
    pairs: int = 8,  # per row
    size: int = 150,
) -> None:
    """Draw the first people of a split from the camera, sampled without guidance."""
    config = Config()
    data = build_data(config, pipeline.body, build_mesh(config, pipeline.body), full_mesh=True)
    cells = []
    for sample in split_batches(data, split, people):
        assert sample.index is not None and sample.vertices is not None
        found = pipeline(
            heatmaps=as_heatmaps(sample),
            num_hypotheses=num_hypotheses,
            people=sample.index.tolist(),
            **camera_arguments(sample),
        )
        for truth, chosen in zip(sample.vertices, found.selected_vertices, strict=True):
            cells += [
                turntable_view(truth, found.faces, 0, size, TRUTH, extent=1.1),
                turntable_view(chosen, found.faces, 0, size, extent=1.1),
            ]
    save_picture(output, contact_sheet(cells, columns=2 * pairs, gap=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="hmdiff_small")
    parser.add_argument("--split", default="test_ood", choices=SPLITS)
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    people_sheet(HMDiffPipeline.from_pretrained(options.checkpoint), options.split, options.people, options.output)


if __name__ == "__main__":
    main()
