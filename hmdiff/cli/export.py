"""`hmdiff export`: results as animations for Blender, Unity and others: GLB, BVH, SMPL parameters."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from hmdiff.body.body import Body
    from hmdiff.viz.animation import Clip

FORMATS = ("glb", "bvh", "smpl")
SECONDS = 1.0  # from the mean pose to a hypothesis


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "export",
        "a result as an animation: GLB with skeleton and skin, BVH, npz of SMPL parameters",
        "hmdiff export outputs/photo.npz --to glb bvh",
        "One result: NAME_animated.glb has a clip for every hypothesis, from the mean pose to it in a second; BVH and "
        "npz have the mean and the hypotheses as frames. Several results are the frames of one person's motion, in "
        "the order given: one clip of their means. Files are y up, with the camera at the origin.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="NAME.npz", help="what hmdiff sample wrote")
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=FORMATS, help="(default: all)")
    parser.add_argument(
        "--fps", type=arguments.number(0, above=True), default=30.0, metavar="N", help="of a motion (default: 30)"
    )
    parser.add_argument(
        "--body",
        metavar="FILE",
        help="fit another body's parameters, such as your SMPL_NEUTRAL.npz's (default: the result's body)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: beside the first result)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    from hmdiff.body.body import load_body
    from hmdiff.body.retarget import retarget
    from hmdiff.files.storage import make_folder
    from hmdiff.viz.animation import Clip, save_animated_glb, save_bvh, save_smpl_npz
    from hmdiff.viz.viewer import read_result

    results = [read_result(path) for path in options.results]
    body = load_body(_body_of(results, options.results))
    clips, betas, away = clips_of(body, results, options.fps)
    print(f"{len(clips)} clips of one shape, {away:.0f} mm from the results' meshes in the mean of the vertices")
    if options.body is not None:
        target = load_body(options.body)
        found = {name: retarget(body, target, clip.pose, betas, clip.translation) for name, clip in clips.items()}
        clips = {name: Clip(each.pose, each.translation, clips[name].frame_rate) for name, each in found.items()}
        betas = next(iter(found.values())).betas
        error = float(torch.cat([each.error_mm for each in found.values()]).mean())
        print(f"parameters of {target.name}: its joints are {error:.0f} mm from those of {body.name!r}, in the mean")
        body = target
    folder = options.results[0].parent if options.output is None else options.output
    make_folder(folder)
    stem = options.results[0].stem
    written = []
    for kind in options.to:
        started = time.perf_counter()
        path = folder / (stem + {"glb": "_animated.glb", "bvh": ".bvh", "smpl": "_smpl.npz"}[kind])
        if kind == "glb":
            save_animated_glb(path, body, clips, betas)
        else:
            frames = next(iter(clips.values())) if len(results) > 1 else mean_and_ends(clips)
            (save_bvh if kind == "bvh" else save_smpl_npz)(path, body, frames, betas)
        seconds = time.perf_counter() - started
        written.append(f"{path} ({path.stat().st_size / 1e6:.2f} MB, {seconds:.2f} s)")
    print("\n".join(written))
    return 0


def clips_of(
    body: Body,
    results: Sequence[Mapping[str, np.ndarray]],  # from `read_result`
    frame_rate: float,
) -> tuple[dict[str, Clip], Any, float]:  # clips by name; shared betas (B,); mm to the original meshes
    """One motion through the means of several results; for one result, a clip from the mean to each hypothesis."""
    import torch

    from hmdiff.geometry import axis_angle_to_matrix
    from hmdiff.viz.animation import Clip, shared_shape

    found = [_parameters(body, result, len(results) == 1) for result in results]
    meshes, poses, betas, places = zip(*found, strict=True)
    every = torch.cat(betas)
    # The mean of widely spread hypotheses is thinner than a body: for one result, the shape comes from the hypotheses.
    shape = every[1 if len(results) == 1 else 0 :].mean(0)
    clip = shared_shape(body, Clip(torch.cat(poses), torch.cat(places), frame_rate), every, shape)
    posed = body(shape, axis_angle_to_matrix(clip.pose), clip.translation).vertices
    away = 1000 * float((posed - torch.cat(meshes)).norm(dim=-1).mean())
    if len(results) > 1:
        return {"motion": clip}, shape, away
    mean = [clip.pose[:1], clip.translation[:1]]
    return (
        {
            f"hypothesis_{number:02d}": Clip(
                torch.cat([mean[0], clip.pose[number + 1 : number + 2]]),
                torch.cat([mean[1], clip.translation[number + 1 : number + 2]]),
                1 / SECONDS,
            )
            for number in range(len(clip.pose) - 1)
        },
        shape,
        away,
    )


def _parameters(body: Body, result: Mapping[str, Any], hypotheses: bool) -> tuple[Any, Any, Any, Any]:
    """Mesh, pose, betas and translation in the camera frame: of the mean and, if requested, of the hypotheses."""
    import torch

    vertices = torch.from_numpy(result["vertices"])
    shifts = torch.from_numpy(result["translation"]).expand(len(vertices), 3)
    meshes, places = vertices.mean(0, keepdim=True), shifts.mean(0, keepdim=True)
    if hypotheses:
        meshes, places = torch.cat([meshes, vertices]), torch.cat([places, shifts])
    pose, betas, translation = _stored(body, result, len(meshes)) or _fitted(body, meshes)
    return meshes + places[:, None], pose, betas, translation + places


def _stored(body: Body, result: Mapping[str, Any], count: int) -> tuple[Any, Any, Any] | None:
    """Parameters stored in the result, the mean's first; None if incomplete or for another body."""
    import torch

    shapes = {"pose": (body.num_joints, 3), "betas": (body.num_betas,), "pose_translation": (3,)}
    found = []
    for name, shape in shapes.items():
        if name not in result or f"mean_{name}" not in result:
            return None
        mean, every = torch.from_numpy(result[f"mean_{name}"]), torch.from_numpy(result[name])
        if mean.shape != shape or every.shape != (len(result["vertices"]), *shape):
            return None
        found.append(torch.cat([mean[None], every])[:count].float())
    return found[0], found[1], found[2]


def _fitted(body: Body, meshes: Any) -> tuple[Any, Any, Any]:
    from hmdiff.body.fitting import fit_parameters

    fitted = fit_parameters(body, meshes)
    return fitted.pose, fitted.betas, fitted.translation


def mean_and_ends(clips: Mapping[str, Clip]) -> Clip:
    """The mean and the last frame of every clip as one clip: one hypothesis per second."""
    import torch

    from hmdiff.viz.animation import Clip

    first = next(iter(clips.values()))
    ends = [(clip.pose[-1:], clip.translation[-1:]) for clip in clips.values()]
    return Clip(
        torch.cat([first.pose[:1], *(pose for pose, _ in ends)]),
        torch.cat([first.translation[:1], *(place for _, place in ends)]),
        1 / SECONDS,
    )


def _body_of(results: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> str:
    names = [str(result["body"]) if "body" in result else "free" for result in results]
    for name, path in zip(names, paths, strict=True):
        if name != names[0]:
            raise UserError(f"{path}: of body {name!r}, the first is of {names[0]!r}; a motion has one body")
    return names[0]
