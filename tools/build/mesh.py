"""Builds `assets/body_mesh.npz`: the mesh hierarchy of a body and the upsampling fitted at 432 vertices.

`python -m tools.build.mesh --output assets/body_mesh.npz`. The upsampling is fitted on poses with a deliberately larger
range than real ones (our choice): every joint rotates about every axis, elbows and knees also flex, shapes vary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from hmdiff.body.body import load_body
from hmdiff.body.decimation import decimate
from hmdiff.body.mesh import build_mesh_sampler, fit_upsampling, save_mesh
from hmdiff.body.mesh_cache import random_bodies
from hmdiff.body.surface import partition_patches, surface_distances
from hmdiff.errors import UserError

NUM_COARSE = 432  # the METRO lineage has 431; 432 divides into patches of 2, 3, 4, 6, 8, 9 and 12


def prepare_mesh(
    body_path: str | Path,  # "free", or the path of a body file
    output: str | Path,  # .npz
    num_coarse: int = NUM_COARSE,
    seed: int = 0,
) -> dict[str, float]:
    """Decimate the body's mesh, fit the upsampling and write both; takes about 15 s. Returns errors on unseen poses.

    Raises:
        UserError: the body cannot be read or has no faces; the output cannot be written.
    """
    body = load_body(body_path)
    if body.faces is None:
        raise UserError(f"{body_path}: a body without faces has no mesh to make coarser")
    hierarchy = decimate(body.v_template.numpy(), body.faces.numpy())
    sampler = build_mesh_sampler(body.v_template, body.faces, hierarchy, num_coarse)
    sampler.fitted_index, sampler.fitted_weight = fit_upsampling(sampler, random_bodies(body, 320, seed))
    save_mesh(output, hierarchy, sampler)

    unseen = random_bodies(body, 64, seed + 1)
    coarse = sampler.downsample(unseen)
    rest = sampler.downsample(body.v_template)
    patches = (
        partition_patches(rest, sampler.coarse_faces, 4) if num_coarse % 4 == 0 else torch.arange(num_coarse)[:, None]
    )
    by_chance = torch.randperm(num_coarse, generator=torch.Generator().manual_seed(seed)).view_as(patches)
    distance = torch.from_numpy(surface_distances(rest, sampler.coarse_faces))
    return {
        "upsampling_mm": _mean_mm(sampler.upsample(coarse), unseen),
        "fitted_upsampling_mm": _mean_mm(sampler.upsample_fitted(coarse), unseen),
        "patch_diameter_mm": _diameter_mm(patches, distance),
        "random_patch_diameter_mm": _diameter_mm(by_chance, distance),
        "kilobytes": Path(output).stat().st_size / 1000,
    }


def _mean_mm(
    found: Tensor,  # (S, V, 3) metres
    expected: Tensor,  # (S, V, 3)
) -> float:
    return 1000 * (found - expected).norm(dim=-1).mean().item()


def _diameter_mm(
    patches: Tensor,  # (P, p)
    distance: Tensor,  # (C, C) metres
) -> float:
    """Mean over the patches of the largest geodesic distance between two of their vertices."""
    return 1000 * distance[patches[:, :, None], patches[:, None, :]].amax((1, 2)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--body", default="free")
    parser.add_argument("--output", type=Path, default=Path("assets/body_mesh.npz"))
    parser.add_argument("--num-coarse", type=int, default=NUM_COARSE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, value in prepare_mesh(options.body, options.output, options.num_coarse, options.seed).items():
        print(f"{name:25} {value:.4g}")


if __name__ == "__main__":
    main()
