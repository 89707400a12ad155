"""`VideoTrack`: one person over the frames of a video, as N temporally consistent hypotheses; and its output files.

Each hypothesis has one shape, the mean of its betas over the track. Frames between two sightings are interpolated and
marked. Everything is in the camera frame (x right, y down, z forward; metres), so the camera's own motion is included.
F frames, N hypotheses, K joints, B betas, V vertices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.diffusion.hypotheses import select
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle, perspective_projection
from hmdiff.video.sightings import Rows
from hmdiff.video.smoothing import DELTA, SIGMA, filled, filled_rotations, kernel, mean_rotations
from hmdiff.video.tracking import jumps

_AT_ONCE = 32  # frames whose meshes are in memory


@dataclasses.dataclass(frozen=True)
class VideoTrack:
    number: int  # from 0, in order of first appearance
    frames: np.ndarray  # (F,) consecutive frame numbers
    times: np.ndarray  # (F,) seconds
    seen: np.ndarray  # (F,) bool: False for interpolated frames
    pose: Tensor  # (N, F, K, 3) axis-angles
    betas: Tensor  # (N, B)
    translation: Tensor  # (N, F, 3) metres, for `Body.forward`
    selected: int  # the hypothesis to show if only one is shown
    points: np.ndarray  # (F, J, 3) keypoints of the source, photo pixels and confidence; 0 if not seen
    spread_mm: np.ndarray  # (F,) mean over the surface, before smoothing; NaN if not seen
    # (F,) 0..1, the fraction of the mean body's surface expected within 100 mm of the ground truth, root-relative and
    # before smoothing; NaN if not seen, or if the sampling settings are uncalibrated
    confidence: np.ndarray
    side: np.ndarray  # (F,) pixels, side of the crop; NaN if not seen
    focal: float  # pixels
    principal_point: np.ndarray  # (2,)
    body: Body

    @property
    def frame_rate(self) -> float:
        """Mean frames per second."""
        return (len(self.times) - 1) / float(self.times[-1] - self.times[0]) if len(self.times) > 1 else 30.0

    @property
    def mean(self) -> tuple[Tensor, Tensor, Tensor]:  # pose (F, K, 3), betas (B,), translation (F, 3)
        """The mean body: chordal means of the hypotheses' rotations, mean shape and mean position."""
        rotations = axis_angle_to_matrix(self.pose).cpu().numpy()
        count = len(rotations)
        mean = mean_rotations(rotations.reshape(count, -1, 3, 3), np.full((1, count), 1 / count))[0]
        pose = matrix_to_axis_angle(torch.from_numpy(mean).to(self.pose)).reshape(self.pose.shape[1:])
        return pose, self.betas.mean(0), self.translation.mean(0)

    def parameters(self, hypothesis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pose (F, K, 3), betas (B,) and translation (F, 3) of a hypothesis; None: the mean body."""
        if hypothesis is None:
            return self.mean
        return self.pose[hypothesis], self.betas[hypothesis], self.translation[hypothesis]

    def vertices(
        self,
        hypothesis: int | None = None,  # None: the mean body
        body: Body | None = None,  # e.g. with a subset of the vertices; None: the whole body
    ) -> Tensor:  # (F, V, 3) metres, camera frame
        pose, betas, translation = self.parameters(hypothesis)
        body = self.body if body is None else body
        parts = [
            body(betas, axis_angle_to_matrix(some), place).vertices
            for some, place in zip(pose.split(_AT_ONCE), translation.split(_AT_ONCE), strict=True)
        ]
        return torch.cat(parts)

    def keypoint_distance(self) -> np.ndarray:  # (F,) pixels; NaN if not seen
        """Distance of the mean body's keypoints to the detected ones."""
        found = np.full(len(self.frames), np.nan)
        if self.body.keypoint_regressor is None:
            return found
        focal, point = torch.tensor([self.focal]), torch.from_numpy(self.principal_point)[None].float()
        keypoints = self.body.keypoints(self.vertices()).cpu()
        pixels = perspective_projection(keypoints, focal, point).numpy()
        away = np.linalg.norm(pixels - self.points[..., :2], axis=-1)
        sure = self.points[..., 2] >= 0.1
        there = sure.any(1) & self.seen
        found[there] = (away * sure).sum(1)[there] / sure.sum(1)[there]
        return found

    def arrays(self) -> dict[str, Any]:
        """The contents of the npz of `hmdiff sample clip.mp4`."""
        pose, betas, translation = self.mean
        return {
            "frames": self.frames,
            "times": self.times,
            "seen": self.seen,
            "pose": self.pose,
            "betas": self.betas,
            "translation": self.translation,
            "mean_pose": pose,
            "mean_betas": betas,
            "mean_translation": translation,
            "selected": self.selected,
            "keypoints_seen": self.points,
            "spread_mm": self.spread_mm,
            "confidence": self.confidence,
            "focal": self.focal,
            "principal_point": self.principal_point,
            "track": self.number,
            "body": self.body.name,
            "joint_names": np.array(self.body.joint_names),
            "frame": "x right, y down, z forward; metres; the camera at 0",
        }

    def save(self, stem: str | Path, more: dict[str, Any] | None = None) -> None:
        """Write STEM.npz (parameters), STEM_animated.glb (clips of mean and hypotheses), STEM.bvh (the mean)."""
        from hmdiff.viz.animation import Clip, save_animated_glb, save_bvh, shared_shape
        from hmdiff.viz.export import save_npz

        stem = Path(stem)
        rate = self.frame_rate
        pose, shape, place = self.mean
        clips = {"mean": Clip(pose, place, rate)}
        for number in range(len(self.pose)):
            clip = Clip(self.pose[number], self.translation[number], rate)
            clips[f"hypothesis_{number:02d}"] = shared_shape(
                self.body, clip, self.betas[number].expand(len(self.frames), -1), shape
            )
        save_npz(stem.with_name(f"{stem.name}.npz"), **self.arrays(), **(more or {}))
        save_animated_glb(stem.with_name(f"{stem.name}_animated.glb"), self.body, clips, shape)
        save_bvh(stem.with_name(f"{stem.name}.bvh"), self.body, clips["mean"], shape)


def assemble(
    body: Body,
    number: int,
    rows: Rows,  # of this track, in temporal order
    frame_times: np.ndarray,  # (frames,) seconds of all frames of the video
    sigma: float = SIGMA,  # seconds; 0: no smoothing
    delta: float = DELTA,  # metres
) -> VideoTrack:
    """Interpolate, fix each hypothesis's shape, smooth; a single-frame jump of the estimator counts as not seen."""
    if sigma > 0:
        sighted = ~jumps(rows["time"], rows["points"])
        rows = {name: values[sighted] for name, values in rows.items()}
    at = rows["frame"].astype(int)
    frames = np.arange(at[0], at[-1] + 1)
    times = frame_times[frames]
    place = {frame: index for index, frame in enumerate(at.tolist())}
    seen = np.array([frame in place for frame in frames.tolist()])
    rotations = axis_angle_to_matrix(torch.from_numpy(rows["pose"])).numpy()
    poses, roots = [], []
    for hypothesis in range(rotations.shape[1]):
        turned = filled_rotations(at, rotations[:, hypothesis], frames)
        root = filled(at, rows["root"][:, hypothesis], frames)
        if sigma > 0:
            joints = filled(at, rows["joints"][:, hypothesis], frames)
            turned = mean_rotations(turned, kernel(times, joints, sigma, delta))
            root = kernel(times, None, sigma) @ root
        poses.append(turned)
        roots.append(root)
    pose = matrix_to_axis_angle(torch.from_numpy(np.stack(poses))).float()
    betas = torch.from_numpy(rows["betas"].mean(0)).float()
    with torch.no_grad():  # the root joint's position depends on the shape only
        first = body.joint_template[0].cpu() + betas @ body.joint_shapedirs[0].cpu().mT
    translation = torch.from_numpy(np.stack(roots)).float() - first[:, None]
    every = torch.from_numpy(rows["joints"]).transpose(0, 1).flatten(1, 2)[None]  # (1, N, F K, 3)
    chosen = select(every, torch.zeros(1, len(pose), 3), torch.from_numpy(rows["log_likelihood"]).sum(0)[None])
    points = np.zeros((len(frames), *rows["points"].shape[1:]), np.float32)
    points[seen] = rows["points"]
    return VideoTrack(
        number,
        frames,
        times,
        seen,
        pose.to(body.v_template),
        betas.to(body.v_template),
        translation.to(body.v_template),
        int(chosen[0]),
        points,
        _where(seen, rows["spread_mm"]),
        _where(seen, rows["confidence"]),
        _where(seen, rows["side"]),
        float(rows["focal"][0]),
        rows["principal_point"][0].astype(np.float32),
        body,
    )


def _where(seen: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.full(len(seen), np.nan, np.float32)
    found[seen] = values
    return found
