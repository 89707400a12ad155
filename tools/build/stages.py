"""Time per stage for a photo without annotations: `python -m tools.build.stages PHOTO`.

`hmdiff sample` runs in this process under Python's profiler, and the fraction of CPU time per stage is printed, which
does not depend on other load. Files are written sequentially, not in parallel with sampling. Imports are excluded.
Profiling slows down small calls, so the fractions are accurate to a few per cent.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any
from unittest import mock

from hmdiff.cli.main import main as hmdiff

# Function name and end of its file's name; a stage's time excludes calls from an earlier stage in the list.
STAGES = (
    ("loading the checkpoint", "load_pipeline", "arguments.py"),
    ("reading the photo", "read_picture", "canvas.py"),
    ("pose estimator: networks loaded", "__init__", "landmarks.py"),
    ("pose estimator: detector, landmarks, crops", "estimate", "landmarks.py"),
    ("encoder", "encode", "recovery.py"),
    ("denoising with DAT", "draw_hypotheses", "reverse.py"),
    ("bodies fitted to the hypotheses", "fit_coarse", "fitting.py"),
    ("body fitted to the mean mesh", "fit_parameters", "fitting.py"),
    ("npz", "save_npz", "export.py"),
    ("page for the browser", "save_viewer", "viewer.py"),
    ("GLB of hypotheses and scene", "save_glb", "export.py"),
    ("picture of the hypotheses", "hypotheses_sheet", "sheets.py"),
    ("picture of the spread", "spread_sheet", "spread.py"),
)


class Inline(Executor):
    """Runs submitted tasks immediately, because the profiler sees only one thread."""

    def __init__(self, max_workers: int | None = None) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def shares(stats: pstats.Stats) -> list[tuple[str, float]]:
    """Fractions of CPU time; the rest belongs to no stage."""
    total: float = stats.total_tt  # type: ignore[attr-defined]
    found = []
    for name, function, file in STAGES:
        cumulative = sum(
            values[3]
            for (place, _, called), values in stats.stats.items()  # type: ignore[attr-defined]
            if called == function and place.endswith(f"/{file}") and "hmdiff" in place
        )
        found.append((name, cumulative / total))
    return [*found, ("the rest", 1 - sum(share for _, share in found))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("--num-hypotheses", default="25")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        command = ["sample", str(options.photo), "--num-hypotheses", options.num_hypotheses, "--output"]
        if hmdiff([*command, f"{folder}/first"]):  # warm-up: imports, caches
            raise SystemExit(2)
        profile = cProfile.Profile(time.process_time)
        with mock.patch("concurrent.futures.ThreadPoolExecutor", Inline):
            profile.runcall(hmdiff, [*command, f"{folder}/second"])
    for name, share in shares(pstats.Stats(profile)):
        print(f"| {name} | {share:.0%} |")


if __name__ == "__main__":
    main()
