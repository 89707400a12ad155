"""Jitter and error on a rendered clip of known motion, with and without temporal consistency of the hypotheses.

`python -m tools.build.jitter RECORDINGS`; or `... --photo FILE` for a camera panning over a real photo with static
people; or `... --video FILE` for a real video without ground truth, whose acceleration includes the motion. The clip
passes through the whole pipeline: video frames, embedded pose estimator, tracker, recovery. Three rows: independent
noise per frame; noise shared along the track; shared noise and smoothing. Acceleration is that of the root-relative
joints, from second differences (mm/s^2, mean over joints and frames): the field's 'Accel' in SI units. The ground
truth's acceleration is printed beside it. Frames without a detection count with their interpolation. F frames, N
hypotheses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.video.reading import clip_info, read_frames
from hmdiff.video.recover import recover_video
from hmdiff.video.smoothing import SIGMA
from hmdiff.video.tracks import VideoTrack
from hmdiff.viz.canvas import read_picture
from tools.build.known_clip import pan_clip, recorded_motion, render_clip

COLUMNS = ("mean: Accel", "accel error", "error mm", "one hypothesis: Accel", "error mm")


def acceleration(
    joints: Tensor,  # (..., F, K, 3) metres
    frame_rate: float,
) -> Tensor:  # (..., F - 2, K, 3) mm/s^2
    return 1000 * frame_rate**2 * (joints[..., 2:, :, :] - 2 * joints[..., 1:-1, :, :] + joints[..., :-2, :, :])


def posed_joints(body: Body, track: VideoTrack) -> Tensor:  # (N, F, K, 3) metres, relative to the pelvis
    found = []
    for pose, betas in zip(track.pose, track.betas, strict=True):
        joints = body(betas, axis_angle_to_matrix(pose)).joints
        found.append(joints - joints[:, :1])
    return torch.stack(found)


def row(
    estimated: Tensor,  # (N, F, K, 3) metres
    truth: Tensor,  # (F, K, 3) ground truth; NaN: known only to be static
    frame_rate: float,
) -> list[float]:  # in the order of COLUMNS
    mean, known = acceleration(estimated.mean(0), frame_rate), acceleration(truth, frame_rate)
    return [
        float(mean.norm(dim=-1).mean()),
        float((mean - known).norm(dim=-1).mean()),
        1000 * float((estimated.mean(0) - truth).norm(dim=-1).mean()),
        float(acceleration(estimated, frame_rate).norm(dim=-1).mean()),
        1000 * float((estimated - truth).norm(dim=-1).mean()),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recordings", nargs="?", type=Path, help="folder or archive of ASF and AMC files")
    parser.add_argument("--photo", type=Path, help="in place of a recording")
    parser.add_argument("--video", type=Path, help="a real one, in place of a recording; all of its frames")
    parser.add_argument("--recording", default="02_01", help="name (default: %(default)s, walking)")
    parser.add_argument("--first", type=int, default=0, help="frame of the recording, 120 a second")
    parser.add_argument("--frames", type=int, default=30, help="at 30 a second (default: %(default)s)")
    parser.add_argument("--num-hypotheses", type=int, default=8)
    parser.add_argument("--checkpoint", default="hmdiff_small")
    parser.add_argument("--seed", type=int, default=3, help="of looks and shape (default: %(default)s)")
    parser.add_argument(
        "--noise-seeds", type=int, nargs="+", default=[0, 1, 2], help="figures are means over them (default: 0 1 2)"
    )
    parser.add_argument("--smoothing", type=float, nargs="+", default=[SIGMA], help="seconds (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="where the clip is kept (default: nowhere)")
    options = parser.parse_args(arguments)
    pipe = HMDiffPipeline.from_pretrained(options.checkpoint)
    body = pipe.body
    if sum(each is not None for each in (options.photo, options.recordings, options.video)) != 1:
        parser.error("give recordings, or --photo, or --video")
    with tempfile.TemporaryDirectory() as temporary:
        clip = Path(temporary) / "clip.mp4" if options.keep is None else options.keep
        if options.video is not None:
            clip, info = options.video, clip_info(options.video)
            options.frames = info.frames or len(list(read_frames(info)))
            truth, rate, name = torch.full((options.frames, 24, 3), torch.nan), info.frame_rate, clip.stem
        elif options.photo is not None:
            truth, rate, name = torch.full((options.frames, 24, 3), torch.nan), 30.0, options.photo.stem
            if not clip.exists():
                pan_clip(clip, read_picture(options.photo), options.frames, rate)
        else:
            motion = recorded_motion(
                options.recordings, options.recording, body, options.frames, first=options.first, seed=options.seed
            )
            truth, rate, name = motion.joints(body), motion.frame_rate, options.recording
            if not clip.exists():
                render_clip(clip, motion, body, seed=options.seed)
        own = float(acceleration(truth, rate).norm(dim=-1).mean()) if options.recordings is not None else 0.0
        known = f"{own:.0f} mm/s^2" if options.video is None else "not known"
        runs = [("other noise in every frame", False, [0.0]), ("shared noise", True, [0.0, *options.smoothing])]
        print(
            f"{name}, {options.frames} frames at {rate:g}/s, {options.num_hypotheses} hypotheses; the truth's Accel "
            f"{known}"
        )
        print(" | ".join(("", *COLUMNS)))
        for kind, shared, smoothings in runs:
            for smoothing in smoothings:
                rows, seen = [], []
                for seed in options.noise_seeds:
                    kept = Path(temporary) / f"chunks_{shared}_{seed}"  # a second smoothing reuses the recovered chunks
                    found = recover_video(
                        pipe, clip, options.num_hypotheses, seed, smoothing, folder=kept, share_noise=shared
                    )
                    track = max(found.tracks, key=lambda each: int(each.seen.sum()))
                    part = slice(int(track.frames[0]), int(track.frames[-1]) + 1)
                    rows.append(row(posed_joints(body, track), truth[part], rate))
                    seen.append(int(track.seen.sum()))
                label = kind if smoothing == 0 else f"{kind}, smoothed {smoothing:g} s"
                values = torch.tensor(rows).mean(0).tolist()
                print(
                    " | ".join((label, *(f"{value:.0f}" for value in values))),
                    f"  (seen in {min(seen)} frames or more)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
