"""The embedded estimator compared with given labels: `python -m tools.build.estimated_and_given PHOTOS`.

PHOTOS is a folder of photos with keypoints (`NAME.json`) or heatmaps (`NAME_heatmaps.npz`; the highest peak of a joint
is its label) beside them. Two tables. Per photo: the distance of the estimator's peaks to the labels, and the distance
between the recovered bodies. Per joint type: the statistics behind the synthetic corruption
(`hmdiff/data/synthetic/corruption.py`): `jitter` is a Gaussian's standard deviation along an axis and sigma the width
of a peak (`narrowest` and `widest`). `--recordings` adds a rendered clip of known motion, with exact labels, to the
second table. The labels of photos come from an annotator or another network and have errors of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.estimators.choose import load_source
from hmdiff.estimators.people import keypoints_beside, peaks, read_people
from hmdiff.estimators.source import PoseSource
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Heatmaps, heatmap_peaks
from hmdiff.heatmaps.formats import has_keypoints
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.viz.canvas import read_picture

KINDS = ("nose", "eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle", "heel", "toe")
_SURE = 0.1  # minimum confidence of a labelled keypoint
_FAR = 0.15  # crop half-sides: counts as a wrong location rather than jitter
_CUT = 0.777  # measured standard deviation of a unit Gaussian that is truncated at a tenth of its peak
_MEDIAN = 1.1774  # median distance of a 2D Gaussian, in standard deviations
_WINDOW = 6  # half-size in heatmap pixels of the window around a peak for its width


def widths(heatmaps: Heatmaps) -> Tensor:  # (P, J) heatmap pixels: standard deviation of a peak along an axis
    """From the second moments of the values above a tenth of the peak, within the window."""
    values, size = heatmaps.values, heatmaps.values.shape[-1]
    places, height = heatmap_peaks(values)
    grid = torch.arange(size) + 0.5
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    at = (places + 1) * (size / 2)
    far = torch.stack([x, y], -1) - at[:, :, None, None]  # (P, J, S, S, 2)
    weight = (values - 0.1 * height[..., None, None]).clamp_min(0) * (far.abs().amax(-1) <= _WINDOW)
    square = (weight[..., None] * far.square()).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-9)[..., None]
    return square.mean(-1).sqrt() / _CUT


def compared(
    heatmaps: Heatmaps,  # estimated, one person
    given: Tensor,  # (26, 3) photo pixels and confidence
) -> dict[str, Tensor]:  # joints present in both: joint, pixels, half_sides, confidence, width
    ((points, _),) = peaks(heatmaps)
    both = (given[:, 2] >= _SURE) & heatmaps.valid[0]
    pixels = (points[:, :2] - given[:, :2]).norm(dim=-1)
    found = {
        "joint": torch.arange(len(HALPE26)),
        "pixels": pixels,
        "half_sides": pixels / (heatmaps.side[0] / 2),
        "confidence": points[:, 2],
        "width": widths(heatmaps)[0],
    }
    return {name: values[both] for name, values in found.items()}


def of_photo(
    pipe: HMDiffPipeline, source: PoseSource, photo: Path, hypotheses: int
) -> tuple[list[str], dict[str, Tensor]]:  # row of the first table; rows of the second
    beside = keypoints_beside(photo)
    known = read_people(photo, beside if beside is not None and has_keypoints(beside) else None)
    box = peaks(known.heatmaps[0])[0][0]
    sure = box[box[:, 2] >= _SURE, :2]
    margin = 0.1 * float((sure.amax(0) - sure.amin(0)).max())
    low, high = sure.amin(0) - margin, sure.amax(0) + margin
    seen = source.estimate(
        read_picture(photo), [(float(low[0]), float(low[1]), float(high[0]), float(high[1]))]
    ).heatmaps
    crop = known.heatmaps.crop
    seen = Heatmaps(seen.values, seen.valid, seen.crop.with_camera(crop.photo_size[:1], crop.focal[:1]))
    rows = compared(seen, box)
    outputs = [
        pipe(heatmaps=maps, num_hypotheses=hypotheses, guidance=pipe.default_guidance())
        for maps in (known.heatmaps[0], seen)
    ]
    joints = [output.mean_joints[0] - output.mean_joints[0, :1] for output in outputs]
    apart = 1000 * float((joints[0] - joints[1]).norm(dim=-1).mean())
    spread = [1000 * float((o.joints - o.joints.mean(1, keepdim=True)).norm(dim=-1).mean()) for o in outputs]
    pixels, share = rows["pixels"], 50 * rows["half_sides"]
    text = [
        photo.stem,
        f"{len(pixels)}",
        f"{float(pixels.quantile(0.5)):.1f}",
        f"{float(share.quantile(0.5)):.1f}",
        f"{float(pixels.max()):.0f} ({HALPE26[int(rows['joint'][pixels.argmax()])]})",
        f"{apart:.0f}",
        f"{spread[0]:.0f}",
        f"{spread[1]:.0f}",
    ]
    return text, rows


def of_clip(pipe: HMDiffPipeline, source: PoseSource, recordings: Path, clip: Path) -> list[dict[str, Tensor]]:
    """The rendered walk of `tools.build.jitter`: labels are projections of the known body."""
    from hmdiff.errors import UserError
    from hmdiff.video.reading import clip_info, read_frames
    from tools.build.known_clip import recorded_motion, render_clip

    body, frames = pipe.body, 30
    motion = recorded_motion(recordings, "02_01", body, frames, seed=3)
    if not clip.exists():
        render_clip(clip, motion, body, seed=3)
    info, rows = clip_info(clip), []
    focal = torch.tensor([float(info.width**2 + info.height**2) ** 0.5])
    middle = torch.tensor([[info.width / 2, info.height / 2]])
    for frame in read_frames(info):
        assert frame.picture is not None
        try:
            seen = source.estimate(frame.picture).heatmaps[0]
        except UserError:
            continue
        posed = body(motion.betas, motion.rotations[frame.number : frame.number + 1])
        points = body.keypoints(posed.vertices - posed.joints[:, :1] + motion.place)
        pixels = perspective_projection(points, focal, middle)[0]
        rows.append(compared(seen, torch.cat([pixels, torch.ones(len(pixels), 1)], 1)))
    return rows


def by_kind(rows: Sequence[dict[str, Tensor]]) -> list[list[str]]:
    every = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    table = []
    for kind in (*KINDS, "all"):
        mine = torch.tensor([kind == "all" or HALPE26[int(joint)].endswith(kind) for joint in every["joint"]])
        if not mine.any():
            continue
        off, sure, wide = (every[name][mine] for name in ("half_sides", "confidence", "width"))
        table.append(
            [
                kind,
                f"{int(mine.sum())}",
                f"{float(off.quantile(0.5)):.3f}",
                f"{float(off.quantile(0.5)) / _MEDIAN:.3f}",
                f"{float(off.quantile(0.9)):.3f}",
                f"{float((off > _FAR).float().mean()):.2f}",
                f"{float(sure.quantile(0.5)):.2f}",
                f"{float(sure.quantile(0.1)):.2f}",
                f"{float(wide.quantile(0.5)):.2f}",
            ]
        )
    return table


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


FIRST = ("photo", "joints", "px", "% of the crop", "most, px", "bodies apart, mm", "spread given", "estimated")
SECOND = ("joint", "n", "off, median", "jitter", "90 %", "beyond 0.15", "confidence", "10 %", "sigma, px")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of photos with keypoints or heatmaps beside them")
    parser.add_argument("--num-hypotheses", type=int, default=8)
    parser.add_argument("--checkpoint", default="hmdiff_small")
    parser.add_argument("--recordings", type=Path, help="folder or archive of ASF and AMC files, for the clip")
    parser.add_argument("--clip", type=Path, default=Path("walk.mp4"), help="kept there (default: %(default)s)")
    options = parser.parse_args(arguments)
    pipe, source = HMDiffPipeline.from_pretrained(options.checkpoint), load_source()
    photos = sorted(path for path in options.photos.iterdir() if path.suffix in (".jpg", ".png"))
    found = [of_photo(pipe, source, photo, options.num_hypotheses) for photo in photos]
    show(FIRST, [text for text, _ in found])
    print("Photos; distances in crop half-sides, sigma in pixels of a 64 x 64 heatmap:\n")
    show(SECOND, by_kind([rows for _, rows in found]))
    if options.recordings is not None:
        print("The rendered clip, exact labels:\n")
        show(SECOND, by_kind(of_clip(pipe, source, options.recordings, options.clip)))


if __name__ == "__main__":
    main()
