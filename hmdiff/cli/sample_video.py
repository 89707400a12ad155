"""`hmdiff sample clip.mp4`: a track, an animation and an overlay of every person in a video."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError

if TYPE_CHECKING:
    from hmdiff.cli.estimation import Estimation
    from hmdiff.heatmaps.cameras import PhotoCamera
    from hmdiff.pipeline import HMDiffPipeline
    from hmdiff.video.recover import Video
    from hmdiff.video.tracks import VideoTrack

SMOOTHING = 0.06  # seconds; same as `hmdiff.video.smoothing.SIGMA`, without the import that would slow down --help


def add_smoothing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoothing",
        type=arguments.number(0),
        default=SMOOTHING,
        metavar="S",
        help="of a video: standard deviation in seconds of the kernel over time, 0 is none (default: %(default)s)",
    )


def check_clips(options: argparse.Namespace, clips: Sequence[Path]) -> None:
    """Raises `UserError` for options that apply only to photos, and for a video without a pose estimator."""
    for name in ("keypoints", "heatmaps", "box", "depth"):
        if clips and getattr(options, name, None):
            raise UserError(f"--{name} is about photos, {clips[0]} is a video; leave it out, or sample them apart")
    if clips and options.pose == "none":
        raise UserError(f"{clips[0]}: a video needs a pose estimator; leave out --pose none")


def sample_clips(
    options: argparse.Namespace,
    clips: Sequence[tuple[Path, str]],  # paths and names of the results
    source: Estimation,
    camera_of: Callable[[Path], PhotoCamera],
    settings: dict[str, Any],
) -> list[str]:
    """Recover the videos in turn; a failure does not stop the rest. Returns error messages."""
    from hmdiff.cli.photo_list import Results

    results = Results.open(options.output, {**settings, "pose": options.pose, "smoothing": options.smoothing})
    pipeline, failures = None, []
    for clip, name in clips:
        if results.done(clip) and (options.output / f"{name}_overlay.mp4").is_file():
            print(f"{clip}: done before with these settings (see {results.path})", flush=True)
            continue
        if pipeline is None:
            pipeline = arguments.load_pipeline(options.checkpoint, arguments.resolve_device(options.device))
            arguments.check_sampling(pipeline, options)
        try:
            _sample(options, pipeline, clip, name, source, camera_of(clip), results)
        except UserError as error:
            failures.append(str(error) if str(clip) in str(error) else f"{clip}: {error}")
    return failures


def _sample(
    options: argparse.Namespace,
    pipeline: HMDiffPipeline,
    clip: Path,
    name: str,
    source: Estimation,
    camera: PhotoCamera,
    results: Any,
) -> None:
    from tqdm import tqdm

    from hmdiff.cli.main import warn
    from hmdiff.video.drawing import draw_video
    from hmdiff.video.reading import clip_info
    from hmdiff.video.recover import recover_video
    from hmdiff.video.sightings import remove_chunks
    from hmdiff.video.writing import H264, INSTALL

    folder = options.output / f"{name}_frames"
    total = clip_info(clip).frames or None
    with tqdm(total=total, unit="frame", desc=f"sampling {clip.name}", disable=None, leave=False) as bar:
        video = recover_video(
            pipeline,
            clip,
            options.num_hypotheses,
            options.seed,
            options.smoothing,
            camera,
            source,
            folder,
            lambda done, _: bar.update(done),
            num_inference_steps=options.steps,
            scheduler=options.sampler,
            eta=options.eta,
            guidance=arguments.guidance_of(options, pipeline),
        )
    for note in video.notes:
        warn(note)
    results.restart([clip])
    more = {
        "clip": str(clip),
        "seed": options.seed,
        "checkpoint": options.checkpoint,
        "source": video.source,
        "smoothing_s": options.smoothing,
    }
    for track in video.tracks:
        stem = options.output / f"{name}_track_{track.number}"
        away, spread, sure = _figures(track)
        track.save(stem, {**more, "keypoint_distance_px": away})
        results.add(
            clip,
            person=track.number,
            people=len(video.tracks),
            npz=f"{stem.name}.npz",
            frames=len(track.frames),
            seen=int(track.seen.sum()),
            first_frame=int(track.frames[0]),
            selected=track.selected,
            keypoint_distance_px=None if away != away else round(away, 2),
            spread_mm=round(spread, 1),
            confidence=None if sure is None else round(sure, 3),
        )
        print(_line(video, track, stem, away, spread, sure))
    with tqdm(total=total, unit="frame", desc=f"drawing {name}_overlay.mp4", disable=None, leave=False) as bar:
        codec = draw_video(options.output / f"{name}_overlay.mp4", video.info, video.tracks, bar.update)
    remove_chunks(folder)
    other = "" if codec == H264 else f" (the overlay as {codec}; as {H264}, which browsers play: {INSTALL})"
    print(f"{len(video.tracks)} people of {clip}, written to {options.output}/{other}")


def _figures(track: VideoTrack) -> tuple[float, float, float | None]:
    """Mean distance in pixels between the smoothed mean body's keypoints and the detected ones (NaN: no keypoints),
    spread in mm, and confidence (None: uncalibrated): means over the frames in which the person was detected."""
    import numpy as np

    away, sure = track.keypoint_distance(), track.confidence
    return (
        float(np.nanmean(away)) if np.isfinite(away).any() else float("nan"),
        float(np.nanmean(track.spread_mm)),
        float(np.nanmean(sure)) if np.isfinite(sure).any() else None,
    )


def _line(video: Video, track: VideoTrack, stem: Path, away: float, spread: float, sure: float | None) -> str:
    import numpy as np

    first, last = track.times[0], track.times[-1]
    side = float(np.nanmean(track.side))
    share = " (uncalibrated)" if sure is None else f", {sure:.0%} of the surface expected within 100 mm"
    fits = "" if away != away else f"keypoints fit within {away:.1f} px ({100 * away / side:.1f} % of the crop), "
    return (
        f"{video.info.path}, track {track.number} -> {stem}.npz\n    seen in {int(track.seen.sum())} of "
        f"{len(track.frames)} frames, {first:.2f} to {last:.2f} s; {fits}hypotheses spread {spread:.0f} mm{share}; "
        f"from the {video.source}"
    )
