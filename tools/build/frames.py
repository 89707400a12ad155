"""Draws docs/frames.png, the coordinate frames of the outputs: `python -m tools.build.frames --output docs/frames.png`.

Three panels: the photo camera's frame with a body; the photo with its pixels and a person's rotated crop; the frame of
OBJ, GLB and BVH. The bodies are projected by the documented code, so the figure's signs match it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmdiff.body.body import load_body
from hmdiff.files.storage import atomic_file
from hmdiff.geometry import axis_angle_to_matrix, perspective_projection
from hmdiff.heatmaps import Crop
from hmdiff.viz.export import HALF_TURN

_SIZE, _FOCAL = (480, 360), 600.0  # width, height; pixels
_PLACE = torch.tensor([0.35, 0.1, 3.2])  # metres
_AXES = (("x", "#c0392b"), ("y", "#1e8449"), ("z", "#2456a6"))


def standing() -> np.ndarray:  # (V, 3) metres, camera axes, pelvis at 0, facing the camera
    body = load_body("free")
    rotations = torch.eye(3).repeat(1, body.num_joints, 1, 1)
    rotations[:, 0] = axis_angle_to_matrix(torch.tensor([[np.pi, 0.0, 0.0]]))
    for joint, angle in ((16, -1.0), (17, 1.0)):  # lower the arms
        rotations[:, joint] = axis_angle_to_matrix(torch.tensor([[0.0, 0.0, angle]]))
    posed = body(torch.zeros(1, body.num_betas), rotations)
    found: np.ndarray = (posed.vertices[0] - posed.joints[0, 0]).numpy()
    return found


def _arrows(axes: Any, origin: np.ndarray, length: float, turned: np.ndarray, labels: bool = True) -> None:
    """Draw the axes of a frame whose rows in camera axes are `turned`, plotted as (x, z, -y), so that up is up."""
    for (name, colour), direction in zip(_AXES, turned, strict=True):
        start, step = origin[[0, 2, 1]] * [1, 1, -1], length * direction[[0, 2, 1]] * [1, 1, -1]
        axes.quiver(*start, *step, color=colour, linewidth=2, arrow_length_ratio=0.2)
        if labels:
            axes.text(*(start + 1.18 * step), name, color=colour, fontsize=11, ha="center", va="center")


def _body(axes: Any, vertices: np.ndarray) -> None:
    shown = vertices[::4]
    axes.scatter(shown[:, 0], shown[:, 2], -shown[:, 1], s=0.4, color="#8a93a6", depthshade=False)


def _plain(axes: Any, column: int, title: str) -> None:
    axes.set_axis_off()
    axes.figure.text((2 * column + 1) / 6, 0.98, title, fontsize=9, ha="center", va="top")


def draw(path: str | Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=90)
    vertices, identity = standing(), np.eye(3)
    place = _PLACE.numpy()

    camera = figure.add_subplot(1, 3, 1, projection="3d")
    _body(camera, vertices + place)
    _arrows(camera, np.zeros(3), 0.7, identity)
    _arrows(camera, place, 0.45, identity, labels=False)
    corners = np.array([[u, v] for u, v in ((0, 0), (1, 0), (1, 1), (0, 1))]) * _SIZE
    rays = np.concatenate([(corners - np.array(_SIZE) / 2) / _FOCAL, np.ones((4, 1))], 1) * 1.2
    for ray in rays:
        camera.plot([0, ray[0]], [0, ray[2]], [0, -ray[1]], color="#999999", linewidth=0.7)
    frame = np.concatenate([rays, rays[:1]])
    camera.plot(frame[:, 0], frame[:, 2], -frame[:, 1], color="#555555", linewidth=1)
    camera.text(place[0] + 0.55, place[2], -place[1] - 0.15, "pelvis at\ntranslation", fontsize=8)
    camera.set_box_aspect((1.4, 3.6, 2.0), zoom=1.6)
    camera.view_init(elev=18, azim=-62)
    _plain(camera, 0, "npz: the photo's camera\nx right, y down, z forward; metres")

    photo = figure.add_subplot(1, 3, 2)
    middle = torch.tensor([[_SIZE[0] / 2, _SIZE[1] / 2]])
    pixels = perspective_projection(
        torch.from_numpy(vertices[None, ::4]).float() + _PLACE, torch.tensor([_FOCAL]), middle
    )[0].numpy()
    photo.scatter(pixels[:, 0], pixels[:, 1], s=0.4, color="#8a93a6")
    crop = Crop.of(torch.tensor(pixels.mean(0)[None]), torch.tensor([330.0]), torch.tensor([0.25]), _SIZE, _FOCAL)
    square = crop.to_photo(torch.tensor([[[-1.0, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]]))[0].numpy()
    photo.plot(square[:, 0], square[:, 1], color="#d35400", linewidth=1.2)
    start, right, down = crop.to_photo(torch.tensor([[[0.0, 0], [1, 0], [0, 1]]]))[0].numpy()
    for end, colour in ((right, _AXES[0][1]), (down, _AXES[1][1])):
        photo.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.8})
    photo.text(right[0] + 6, right[1], "(1, 0)", color="#d35400", fontsize=8)
    photo.text(down[0] - 12, down[1] + 14, "(0, 1)", color="#d35400", fontsize=8, ha="right")
    photo.text(square[3, 0] - 6, square[3, 1] - 4, "(-1, 1)", color="#d35400", fontsize=8, ha="right")
    for end, (name, colour) in zip(((90, 0), (0, 90)), _AXES[:2], strict=True):
        photo.annotate("", end, (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
        photo.text(end[0] + 10, end[1] + 14, name, color=colour, fontsize=11)
    photo.text(6, -10, "(0, 0): the outer edge of the first pixel", fontsize=8)
    photo.plot(*middle[0].tolist(), "+", color="#555555")
    photo.text(_SIZE[0] / 2 - 6, _SIZE[1] / 2 - 6, "principal\npoint", fontsize=8, color="#555555", ha="right")
    photo.plot([0, _SIZE[0], _SIZE[0], 0, 0], [0, 0, _SIZE[1], _SIZE[1], 0], color="#555555", linewidth=1)
    photo.set_xlim(-70, _SIZE[0] + 40)
    photo.set_ylim(_SIZE[1] + 60, -40)
    photo.set_aspect("equal")
    _plain(photo, 1, "the photo, pixels as it is shown\na person's crop, -1..1, turned by crop_rotation")

    viewer = figure.add_subplot(1, 3, 3, projection="3d")
    _body(viewer, vertices)
    _arrows(viewer, np.zeros(3), 0.8, np.diag(HALF_TURN))
    viewer.set_box_aspect((1.4, 1.4, 2.0), zoom=1.15)
    for set_limits in (viewer.set_xlim, viewer.set_ylim):
        set_limits(-0.7, 0.7)
    viewer.set_zlim(-1.0, 1.0)
    viewer.view_init(elev=12, azim=-62)
    words = "obj, ply, glb, bvh: y up, z towards the viewer\nthe pelvis at 0; scene and motion: the camera at 0"
    _plain(viewer, 2, words)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.88, wspace=0.04)
    with atomic_file(path) as temporary:
        figure.savefig(temporary)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/frames.png"), help="(default: %(default)s)")
    draw(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
