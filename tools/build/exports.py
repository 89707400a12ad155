"""Size and processor time of every file of one person: `python -m tools.build.exports PHOTO`.

What `hmdiff sample` writes, kind by kind, then what `hmdiff export` makes of it; medians of a few writings. The npz is
written with every kind, so its own time is taken off the others'. Only on one thread are times a processor's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hmdiff.body.body import load_body
from hmdiff.cli.export import clips_of, mean_and_ends
from hmdiff.estimators.people import people_in
from hmdiff.names import SAVED
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.viz.animation import save_animated_glb, save_bvh, save_smpl_npz
from hmdiff.viz.person_files import Scene, write_person
from hmdiff.viz.viewer import read_result


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median of the processor's time, after a first call."""
    action()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("--checkpoint", default="hmdiff_small")
    parser.add_argument("--num-hypotheses", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    pipe = HMDiffPipeline.from_pretrained(options.checkpoint)
    photo = people_in(options.photo, pipe.source)
    output = pipe(options.photo, num_hypotheses=options.num_hypotheses)
    print("| file | MB | ms |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        stem = Path(temporary) / "NAME"

        def row(action: Callable[[], object], paid: float = 0.0) -> float:
            """One line of the files that are new; the seconds of the action."""
            before = set(stem.parent.iterdir())
            taken = seconds(action, options.repeats)
            files = sorted(set(stem.parent.iterdir()) - before)
            size = sum(file.stat().st_size for file in files) / 1e6
            names = " and ".join(f"`{file.name.removeprefix('NAME')}`" for file in files)
            print(f"| {names} | {size:.2f} | {1000 * max(taken - paid, 0):.0f} |", flush=True)
            return taken

        def write(kind: str) -> Callable[[], object]:
            return lambda: write_person(output, 0, photo, 0, stem, pipe.body, kinds=(kind,))

        npz = row(write("npz"))
        for kind in SAVED:
            if kind != "npz":
                row(write(kind), npz)
        scene = Scene()
        scene.add(output, 0, 0)
        row(lambda: scene.save(stem.with_name("NAME_scene.glb")))
        body = load_body(str(pipe.body.name))
        clips, betas, _ = clips_of(body, [read_result(stem.with_suffix(".npz"))], 30.0)
        frames = mean_and_ends(clips)
        row(lambda: save_animated_glb(stem.with_name("NAME_animated.glb"), body, clips, betas))
        row(lambda: save_bvh(stem.with_suffix(".bvh"), body, frames, betas))
        row(lambda: save_smpl_npz(stem.with_name("NAME_smpl.npz"), body, frames, betas))


if __name__ == "__main__":
    main()
