"""A rendered clip of known motion: a motion capture recording on the free body, in front of a static camera.

Pose, shape and the joints in the camera frame are exact. Appearance, shape and position come from one seed and are
constant over the clip; the background is plain. Our choice.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from hmdiff.body.anatomy import angles_to_rotations, clamp_angles, rotations_to_angles
from hmdiff.body.body import Body
from hmdiff.body.mesh_cache import load_mesh
from hmdiff.data.synthetic.appearance import Clothing
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.viz.overlays import overlay
from tools.build.acclaim import read_recordings, world_rotations
from tools.build.mocap import retarget

RECORDED = 120.0  # frames per second
_DRAWN = 3000  # number of drawn vertices


@dataclasses.dataclass(frozen=True)
class KnownMotion:
    rotations: Tensor  # (F, 24, 3, 3) local; the root's in the camera frame
    betas: Tensor  # (1, B)
    place: Tensor  # (3,) metres: the pelvis in the camera frame, constant over the clip
    frame_rate: float

    def joints(self, body: Body) -> Tensor:  # (F, 24, 3) metres, relative to the pelvis
        found = body(self.betas.expand(len(self.rotations), -1), self.rotations).joints
        return found - found[:, :1]


def recorded_motion(
    recordings: str | Path,  # folder or archive of ASF and AMC files
    name: str,  # such as 02_01
    body: Body,
    frames: int,
    frame_rate: float = 30.0,
    first: int = 0,  # first frame of the recording
    seed: int = 0,
    yaw: float = 25.0,  # degrees between the person's initial direction and the camera
    distance: float = 3.5,  # metres
) -> KnownMotion:
    """Load a recording as `KnownMotion`. Raises `UserError` for an unknown name, or a recording that is too short."""
    stride = round(RECORDED / frame_rate)
    for found, skeleton, motion in read_recordings(recordings):
        if found == name:
            local = retarget(skeleton, world_rotations(skeleton, motion))[first::stride][:frames]
            break
    else:
        raise UserError(f"{recordings}: no recording {name!r} in it")
    if len(local) < frames:
        raise UserError(f"{name}: {len(local)} frames at {frame_rate:g} a second, {frames} are wanted")
    rotations = torch.from_numpy(local).float()
    rotations[:, 1:] = angles_to_rotations(clamp_angles(rotations_to_angles(rotations)))[:, 1:]
    ahead = rotations[0, 0, :, 2]
    facing = math.atan2(float(ahead[0]), float(ahead[2]))
    # The recording is y up: rotate by half a turn about x into the camera frame, with the camera looking slightly down.
    turn = torch.tensor([[math.pi + 0.12, 0.0, 0.0], [0.0, math.radians(yaw) - facing, 0.0]])
    around = axis_angle_to_matrix(turn)
    rotations[:, 0] = around[0] @ around[1] @ rotations[:, 0]
    generator = torch.Generator().manual_seed(seed)
    betas = 0.5 * torch.randn(1, body.num_betas, generator=generator).clamp(-1.5, 1.5)
    return KnownMotion(rotations, betas, torch.tensor([0.0, 0.1, distance]), frame_rate)


@torch.no_grad()
def render_clip(
    path: str | Path,  # .mp4
    motion: KnownMotion,
    body: Body,
    size: tuple[int, int] = (384, 384),  # height, width
    seed: int = 0,
) -> None:
    """Draw every frame with the same appearance; the focal length is the diagonal, the pipeline's default."""
    mesh = load_mesh(body, _DRAWN, fitted=False)
    small = body.select(mesh.coarse_ids)
    wardrobe = Clothing(small.v_template, small.lbs_weights, body.joint_names)
    colours = wardrobe.colours(torch.Generator().manual_seed(seed), 1)[0]
    height, width = size
    shade = np.linspace(150, 205, height)[:, None, None] - 12 * np.linspace(-1, 1, width)[None, :, None] ** 2
    behind = np.broadcast_to(shade + np.array([0.0, 3.0, 8.0]), (height, width, 3)).astype(np.uint8)
    lens = math.hypot(*size), np.array([width / 2, height / 2])
    with atomic_file(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), motion.frame_rate, (width, height))
        for rotations in motion.rotations:
            posed = small(motion.betas, rotations[None])
            vertices = posed.vertices[0] - posed.joints[0, :1]
            picture = overlay(behind, vertices, mesh.coarse_faces, motion.place, *lens, colours, 1.0)
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        writer.release()


def pan_clip(
    path: str | Path,  # .mp4
    photo: np.ndarray,  # (H, W, 3) uint8 RGB
    frames: int,
    frame_rate: float = 30.0,
    height: int = 480,  # clip height in pixels; the aspect ratio is the photo's
) -> None:
    """A camera that pans and zooms over a real photo: the people are static, so fast motion is jitter."""
    scale = height / photo.shape[0]
    size = (2 * round(photo.shape[1] * scale / 2), height)
    base = cv2.GaussianBlur(photo, (0, 0), 0.4 / scale) if scale < 0.7 else photo
    middle = np.array([photo.shape[1], photo.shape[0]]) / 2
    with atomic_file(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), frame_rate, size)
        for frame in range(frames):
            phase = 2 * math.pi * frame / (2 * frame_rate)  # one period in two seconds
            zoom = scale * (1.0 - 0.04 * math.cos(phase))
            at = middle * [1 + 0.06 * math.sin(phase), 1 + 0.03 * math.sin(phase)]
            affine = np.array([[zoom, 0, size[0] / 2 - zoom * at[0]], [0, zoom, size[1] / 2 - zoom * at[1]]])
            affine[:, 2] += 0.5 * zoom - 0.5  # OpenCV's origin is the centre of the first pixel, ours its corner
            picture = cv2.warpAffine(base, affine, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        writer.release()
