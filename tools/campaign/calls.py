"""Many calls of one pipeline: `python -m tools.campaign.calls --count 1000 --output FOLDER`.

Memory: after warm-up the process must not grow. Threads: concurrent calls on one shared pipeline, with different
samplers, step counts, seeds and etas, must give the same results as sequential calls.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hmdiff.build import build_pipeline
from hmdiff.config import load_config
from hmdiff.diffusion.schedule import SCHEDULER_NAMES
from hmdiff.heatmaps import Heatmaps
from hmdiff.heatmaps.crop import Crop
from hmdiff.pipeline import HMDiffPipeline
from tools.campaign.family import SMALL

_WARM = 20  # warm-up calls before memory is measured
_GROWS = 32.0  # MB of growth over all calls above which the check fails


def people(count: int = 1) -> Heatmaps:
    values = torch.rand(count, 26, 64, 64, generator=torch.Generator().manual_seed(0))
    crop = Crop.of(torch.full((count, 2), 200.0), torch.full((count,), 180.0))
    return Heatmaps(values, torch.ones(count, 26, dtype=torch.bool), crop)


def call(pipeline: HMDiffPipeline, number: int) -> torch.Tensor:
    """Call `number`, which determines sampler, steps, seed and eta."""
    name = SCHEDULER_NAMES[number % len(SCHEDULER_NAMES)]
    steps, eta = 2 + number % 4, (number % 3) / 2
    output = pipeline(
        heatmaps=people(), num_hypotheses=2, num_inference_steps=steps, scheduler=name, eta=eta, seed=number
    )
    return output.vertices


def memory() -> float:
    """Current memory of the process in megabytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def run(count: int, threads: int, output: Path, progress: bool = True) -> dict[str, Any]:
    torch.set_num_threads(1)
    pipeline = build_pipeline(load_config(None, SMALL))
    for number in range(min(_WARM, count)):
        call(pipeline, number)
    held = [memory()]
    for number in tqdm(range(count), "calls", disable=not progress):
        call(pipeline, number)
        if number % max(1, count // 10) == 0:
            held.append(memory())
    held.append(memory())
    tried = min(count, 4 * len(SCHEDULER_NAMES))
    serial = [call(pipeline, number) for number in range(tried)]
    with ThreadPoolExecutor(threads) as pool:
        at_once = list(pool.map(lambda number: call(pipeline, number), range(tried)))
    different = [n for n, (a, b) in enumerate(zip(serial, at_once, strict=True)) if not torch.equal(a, b)]
    result = {
        "calls": count,
        "megabytes": [round(value, 1) for value in held],
        "grew": round(held[-1] - held[0], 1),
        "flat": held[-1] - held[0] < _GROWS,
        "threads": threads,
        "calls_in_threads": tried,
        "different": different,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "calls.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    found = run(options.count, options.threads, options.output)
    print(json.dumps(found, indent=1))
    return 0 if found["flat"] and not found["different"] else 1


if __name__ == "__main__":
    sys.exit(main())
