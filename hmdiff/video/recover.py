"""A video in, a track of bodies for every person out: `pipe.video("clip.mp4")`.

The noise of a hypothesis depends only on (seed, track, hypothesis), so it is the same in all frames of a track:
hypothesis 7 changes between frames because of the input, not by chance (`diffusion.sampling`). The remaining jitter is
smoothed (`smoothing`). P people in a frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.estimators.people import crops, peaks
from hmdiff.estimators.source import PoseSource, frame_estimator
from hmdiff.heatmaps import Heatmaps, PhotoInfo, concatenate_heatmaps
from hmdiff.heatmaps.cameras import PhotoCamera
from hmdiff.output import keypoint_distance
from hmdiff.video.reading import ClipInfo, Frame, clip_info, read_frames
from hmdiff.video.sightings import COLUMNS, PER_CHUNK, Kept, Rows, joined
from hmdiff.video.smoothing import SIGMA
from hmdiff.video.tracking import Tracker, same_person
from hmdiff.video.tracks import VideoTrack, assemble

FRAMES_AT_ONCE = 16  # per chunk: the most that a kill can lose
PEOPLE_AT_ONCE = 16  # bounds the memory of the meshes; does not change results
_FAINT = 0.1  # minimum confidence of a keypoint inside a box
FLICKER = 3  # minimum sightings of a track; shorter ones are dropped, unless the video is short


@dataclasses.dataclass(frozen=True)
class Video:
    """Everybody in a video."""

    info: ClipInfo
    tracks: tuple[VideoTrack, ...]
    notes: tuple[str, ...]  # omissions: undecodable frames, frames without people, short tracks
    source: str

    def save(self, folder: str | Path, name: str | None = None, overlay: bool = True) -> list[Path]:
        """Write NAME_track_0.npz, ... with _animated.glb and .bvh, and NAME_overlay.mp4; returns the npz paths."""
        from hmdiff.files.storage import make_folder
        from hmdiff.video.drawing import draw_video

        name = self.info.path.stem if name is None else name
        folder = make_folder(folder)
        written = []
        for track in self.tracks:
            track.save(folder / f"{name}_track_{track.number}", {"clip": str(self.info.path), "source": self.source})
            written.append(folder / f"{name}_track_{track.number}.npz")
        if overlay:
            draw_video(folder / f"{name}_overlay.mp4", self.info, self.tracks)
        return written


@torch.no_grad()
def recover_video(
    pipe: Any,  # an `HMDiffPipeline`, which calls this in a method: importing the type would be circular
    clip: str | Path,
    num_hypotheses: int = 25,
    seed: int = 0,
    smoothing: float = SIGMA,  # seconds, see `smoothing`; 0: no smoothing
    camera: PhotoCamera | None = None,  # camera of all frames; None: the focal length is the frame's diagonal
    source: PoseSource | None = None,  # None: the pipeline's
    folder: Path | None = None,  # folder of the chunks, for resuming; None: keep no files
    progress: Callable[[int, int], None] | None = None,  # called with the frames done and their total (0: unknown)
    share_noise: bool = True,  # False: independent noise per frame, for comparison
    **sampling: Any,  # num_inference_steps, scheduler, eta, guidance of the pipeline
) -> Video:
    """Raises `UserError` if the file is not a video, or nobody is detected."""
    info = clip_info(clip)
    if pipe.model.config.depth_map:
        raise UserError("this checkpoint reads depth maps, which a video has none of; take one without")
    source = pipe.source if source is None else source
    sampling = {"guidance": pipe.default_guidance(), **sampling}
    stat = info.path.stat()
    settings = {
        "clip": str(info.path),
        "bytes": stat.st_size,
        "changed": stat.st_mtime,
        "seed": seed,
        "num_hypotheses": num_hypotheses,
        "source": source.name,
        "camera": camera,
        "columns": COLUMNS,
        **sampling,
    }
    kept, tracker = Kept(folder, settings), Tracker()
    chunks = kept.read()
    for chunk in chunks:  # replay finished chunks through the tracker
        for frame in np.unique(chunk.get("frame", np.zeros(0))):
            here = chunk["frame"] == frame
            tracker.replay(float(chunk["time"][here][0]), chunk["points"][here], chunk["track"][here].tolist())
    done = sum(len(chunk["frame_times"]) for chunk in chunks)
    if progress is not None and done:
        progress(done, info.frames)
    look = _Look(source, PhotoInfo(info.width, info.height), PhotoCamera() if camera is None else camera)
    for frames in _groups(read_frames(info, done), FRAMES_AT_ONCE, done):
        chunk = _chunk(pipe, frames, look, tracker, num_hypotheses, seed, share_noise, sampling)
        kept.write(len(chunks), chunk)
        chunks.append(chunk)
        if progress is not None:
            progress(len(frames), info.frames)
    rows = joined(chunks)
    if "frame" not in rows:
        raise UserError(f"{info.path}: nobody was found in any of its {len(rows['frame_times'])} frames")
    tracks, short, jumped = [], 0, 0
    for number in np.unique(rows["track"]):
        mine = rows["track"] == number
        if mine.sum() < min(FLICKER, len(rows["frame_times"])):
            short += 1
            continue
        own = {name: values[mine] for name, values in rows.items() if name not in PER_CHUNK}
        tracks.append(assemble(pipe.body, int(number), own, rows["frame_times"], smoothing))
        jumped += int(mine.sum() - tracks[-1].seen.sum())
    return Video(info, tuple(tracks), tuple(_notes(info, rows, short, jumped)), source.name)


def _groups(frames: Iterator[Frame], size: int, first: int) -> Iterator[list[Frame]]:
    frames = (frame for frame in frames if frame.number >= first)
    while group := list(islice(frames, size)):
        yield group


@dataclasses.dataclass
class _Look:
    """Detection and tracking of the people in a frame, with the video's camera."""

    source: PoseSource
    info: PhotoInfo
    camera: PhotoCamera

    def __call__(
        self,
        frame: Frame,
        tracker: Tracker,
    ) -> list[tuple[int, Heatmaps, np.ndarray]]:  # track number, one person's heatmaps, points (J, 3)
        """Detect and track people. People that the detector missed are searched at their predicted positions."""
        assert frame.picture is not None
        found = self._people(frame.picture, None)
        numbers = tracker.update(frame.time, np.array([points for _, points in found]))
        for predicted in tracker.missed(frame.time):
            sure = predicted[predicted[:, 2] > _FAINT]
            box = (*sure[:, :2].min(0), *sure[:, :2].max(0)) if len(sure) else (0.0, 0.0, 0.0, 0.0)
            again = [
                (maps, points)
                for maps, points in self._people(frame.picture, box)
                if points[:, 2].mean() > 0.5 * predicted[:, 2].mean()
                and not any(same_person(points, other) for _, other in found)
            ]
            numbers += tracker.update(frame.time, np.array([points for _, points in again]))
            found += again
        return [(number, *each) for number, each in zip(numbers, found, strict=True)]

    def _people(
        self, picture: np.ndarray, box: tuple[float, ...] | None
    ) -> list[tuple[Heatmaps, np.ndarray]]:  # empty if nobody is detected
        try:
            maps = frame_estimator(self.source)(picture, None if box is None else [box]).heatmaps
        except UserError:
            return []
        maps = dataclasses.replace(maps, crop=self.camera.applied(maps.crop, self.info))
        return [(maps[[row]], points.numpy()) for row, (points, _) in enumerate(peaks(maps))]


def _chunk(
    pipe: Any,
    frames: Sequence[Frame],
    look: _Look,
    tracker: Tracker,
    num_hypotheses: int,
    seed: int,
    share_noise: bool,
    sampling: dict[str, Any],
) -> Rows:
    """Recover everybody in a chunk of frames, in batches."""
    people: list[tuple[Frame, int, Heatmaps, np.ndarray, Tensor | None]] = []
    reads_pictures = pipe.model.config.inputs != "heatmaps"
    for frame in frames:
        for number, maps, points in look(frame, tracker):
            assert frame.picture is not None
            crop = crops(frame.picture, maps, pipe.model.config.image_size) if reads_pictures else None
            people.append((frame, number, maps, points, crop))
    rows: list[Rows] = []
    for first in range(0, len(people), PEOPLE_AT_ONCE):
        batch = people[first : first + PEOPLE_AT_ONCE]
        maps = concatenate_heatmaps([heatmaps for _, _, heatmaps, _, _ in batch])
        images = torch.cat([crop for *_, crop in batch if crop is not None]) if reads_pictures else None
        numbers = [number if share_noise else 1000 * frame.number + number for frame, number, *_ in batch]
        output = pipe(images, maps, num_hypotheses=num_hypotheses, seed=seed, people=numbers, **sampling)
        rows.append(_rows(output, maps, batch))
    about = {
        "frame_times": np.array([frame.time for frame in frames]),
        "lost": np.repeat([frame.number for frame in frames], [frame.lost for frame in frames]),
    }
    return {**joined(rows), **about} if rows else about


def _rows(output: Any, maps: Heatmaps, batch: Sequence[tuple[Frame, int, Heatmaps, np.ndarray, Any]]) -> Rows:
    distance = output.translation[..., 0] * 0 if output.keypoints is None else keypoint_distance(output, maps)
    within = output.within(100)
    likelihood = torch.zeros_like(distance) if output.log_likelihood is None else output.log_likelihood
    columns = {
        "pose": output.fitted.pose,
        "betas": output.fitted.betas,
        "root": output.translation,
        "joints": output.joints - output.joints[:, :, :1],
        "log_likelihood": likelihood,
        "distance": distance.mean(1),
        "side": maps.side,
        "spread_mm": output.spread.mean(-1),
        "confidence": torch.full_like(output.focal, torch.nan) if within is None else within.person,
        "focal": output.focal,
        "principal_point": output.principal_point,
    }
    found = {name: values.detach().cpu().float().numpy() for name, values in columns.items()}
    return found | {
        "frame": np.array([frame.number for frame, *_ in batch]),
        "time": np.array([frame.time for frame, *_ in batch]),
        "track": np.array([number for _, number, *_ in batch]),
        "points": np.stack([points for _, _, _, points, _ in batch]),
    }


def _notes(info: ClipInfo, rows: Rows, short: int, jumped: int) -> Iterator[str]:
    total = len(rows["frame_times"])
    missing = max(len(rows["lost"]), info.frames - total)
    if missing:
        first = int(rows["lost"][0]) if len(rows["lost"]) else total
        yield f"{info.path}: {missing} frames could not be decoded, the first before frame {first}; left out"
    without = total - len(np.unique(rows["frame"]))
    if without:
        yield f"{info.path}: nobody was found in {without} of {total} frames"
    if short:
        yield f"{info.path}: {short} people were seen in fewer than {FLICKER} frames and left out"
    if jumped:
        yield f"{info.path}: keypoints jumped for one frame, {jumped} times; filled in (--smoothing 0 keeps them)"
