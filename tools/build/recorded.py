"""Stand-in for a recorded data set with depth and masks: `python -m tools.build.recorded OUT --people 512`.

Synthetic people in the format of `hmdiff prepare` (a mesh, 2D keypoints, a camera, a depth map corrupted like a
monocular network's, a mask; no image), for experiments on recorded people without a data set:
`data.sources=[{path: OUT, same_body: true}]`, with and without `model.depth_map`. A photo is the crop only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hmdiff.body.body import load_body
from hmdiff.body.skeletons import HALPE26
from hmdiff.build import build_data, build_mesh
from hmdiff.config import load_config
from hmdiff.data.person_maps import encode_depth, encode_mask
from hmdiff.data.record import Record
from hmdiff.data.sample import Sample
from hmdiff.data.shards import ShardWriter
from hmdiff.names import SPLITS

SIDE = 256  # photo size in pixels
_REGION = (0.0, 0.0, float(SIDE), float(SIDE))


def write_recorded(
    folder: Path, people: int, stream: str = "train", seed: int = 0, map_size: int = 64, first: int = 0
) -> None:
    """Write the people of the stream starting at `first`; the earlier ones are reserved for testing.

    Raises `UserError` if the folder holds other people, or cannot be written.
    """
    config = load_config(None, [f"seed={seed}", f"data.map_size={map_size}", "data.block_size=16"])
    body = load_body(config.body)
    data = build_data(config, body, build_mesh(config, body), full_mesh=True)
    settings = {"of": "synthetic people", "stream": stream, "seed": seed, "people": people, "map_size": map_size}
    settings |= {"first": first} if first else {}
    writer = ShardWriter(folder, settings, shard_records=128)
    with tqdm(total=people, initial=writer.records, desc=str(folder), unit="person") as bar:
        for number in range(first + writer.records, first + people):
            if number == first + writer.records or number % data.block_size == 0:
                sample = data.block(stream, number // data.block_size)
            writer.add(*stored(sample, number % data.block_size, f"{stream}/{number:06d}"))
            bar.update(1)
    writer.finish()


def stored(
    sample: Sample, row: int, name: str
) -> tuple[Record, None, tuple[float, float, float, float], bytes | None, bytes]:
    """One person in the form that `ShardWriter.add` takes."""
    assert sample.vertices is not None and sample.pelvis is not None and sample.joints_2d is not None
    assert sample.focal is not None and sample.principal_point is not None and sample.visible is not None
    assert sample.depth_input is not None and sample.silhouette is not None
    half = SIDE / 2
    focal, (x, y) = float(sample.focal[row]) * half, (sample.principal_point[row].double().numpy() + 1) * half
    record = Record(
        name=name,
        source=name,
        center=np.full(2, half),
        side=float(SIDE),
        group=name.split("/")[0],
        body="smpl",
        vertices=(sample.vertices[row] + sample.pelvis[row]).double().numpy(),
        keypoints_2d=(sample.joints_2d[row].double().numpy() + 1) * half,
        keypoints_2d_confidence=sample.visible[row].double().numpy(),
        keypoint_names=HALPE26,
        intrinsics=np.array([[focal, 0, x], [0, focal, y], [0, 0, 1]]),
    ).check()
    size = sample.silhouette.shape[-1]
    depth = encode_depth(sample.depth_input[row].numpy(), (SIDE, SIDE), _REGION, (size, size))
    mask = encode_mask(sample.silhouette[row].numpy() > 0.5, (SIDE, SIDE), _REGION, (size, size))
    return record, None, _REGION, depth, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--people", type=int, default=512)
    parser.add_argument("--stream", choices=("train", *SPLITS), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first person in the stream")
    options = parser.parse_args()
    write_recorded(options.output, options.people, options.stream, options.seed, first=options.first)


if __name__ == "__main__":
    main()
