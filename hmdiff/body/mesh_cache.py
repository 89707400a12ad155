"""The coarse mesh of a body: shipped (the free body), from the cache folder, or computed by decimation and fitting.

A cache file is named by a digest of the mesh (triangles and template vertices), so each body and gender has its own,
the same on every machine. It stores which vertices are kept and the blend weights of the others, but no vertex
positions.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.body.decimation import MeshHierarchy, decimate, faces_digest
from hmdiff.body.mesh import (
    MeshSampler,
    TemplateMesh,
    build_mesh_sampler,
    fit_upsampling,
    read_mesh,
    save_mesh,
    stored_sampler,
)
from hmdiff.errors import UserError
from hmdiff.files.reading import read_npz
from hmdiff.files.resources import asset_path
from hmdiff.files.storage import atomic_file
from hmdiff.geometry import axis_angle_to_matrix

ASSET = "body_mesh.npz"  # hierarchy and fitted upsampling of the free body, made by tools/build/mesh.py
FOLDER_VARIABLE = "HMDIFF_CACHE_DIR"
# Levels of METRO (arXiv 2012.09760), by the number of vertices. The default of 432 is divisible into patches.
LEVELS = {6890: (1723, 431), 10475: (2619, 655), 778: (195,)}
FITTED_ON = 320  # number of posed bodies


def load_mesh(
    body: TemplateMesh,
    num_coarse: int = 432,
    fitted: bool = True,
) -> MeshSampler:
    """The sampler of a body: the shipped asset for the free body, else from the cache folder, or computed.

    For the free body, only the asset's number of vertices (432) has fitted weights: at others `fitted_*` equal `up_*`,
    as they do with `fitted` false, and for a template without a pose.

    Raises:
        UserError: the mesh has no level of `num_coarse` vertices, or the body has no faces.
    """
    if body.faces is None:
        raise UserError("this body has no faces, so its mesh cannot be made coarser; load it from a file that has them")
    faces, template = body.faces.cpu(), body.v_template.detach().cpu()
    stored = _read_asset(faces.numpy())
    if stored is None:
        if isinstance(body, Body):
            return cached_mesh(body, num_coarse, fitted)
        hierarchy = decimate(template.numpy(), faces.numpy())
    else:
        hierarchy = MeshHierarchy.from_arrays(stored, faces.numpy())
        if int(stored["num_coarse"]) == num_coarse:
            return stored_sampler(stored, hierarchy)
    try:
        return build_mesh_sampler(template, faces, hierarchy, num_coarse)
    except ValueError as error:
        raise UserError(f"{error}; choose another number of coarse vertices") from None


def _read_asset(
    faces: np.ndarray,  # (F, 3)
) -> dict[str, np.ndarray] | None:
    """The shipped arrays, if they were computed from these faces."""
    try:
        path = asset_path(ASSET)
    except UserError:
        return None
    with np.load(path, allow_pickle=False) as stored:
        if str(stored["faces_digest"]) != faces_digest(faces):
            return None
        return {name: stored[name] for name in stored.files}


def cache_folder() -> Path:
    """HMDIFF_CACHE_DIR, or hmdiff/ in the user's cache folder."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "hmdiff"


def mesh_digest(body: Body) -> str:  # 16 hexadecimal digits
    """Changes with the triangles and with any template vertex."""
    assert body.faces is not None
    template = np.ascontiguousarray(body.v_template.detach().cpu().numpy(), dtype="<f4")
    return hashlib.sha256(faces_digest(body.faces.cpu().numpy()).encode() + template.tobytes()).hexdigest()[:16]


def load_hierarchy(
    body: Body,  # with faces
) -> MeshHierarchy:
    """The body's hierarchy from the cache, or computed (some seconds) and cached."""
    assert body.faces is not None
    faces = body.faces.cpu().numpy()
    path = cache_folder() / f"hierarchy_{mesh_digest(body)}.npz"
    try:
        if path.exists():
            return MeshHierarchy.from_arrays(read_npz(path), faces)
    except Exception as error:  # whatever error the damage causes in the hierarchy
        print(f"{path}: damaged ({error}); making it again", file=sys.stderr)
    hierarchy = decimate(body.v_template.detach().cpu().numpy(), faces)
    try:
        with atomic_file(path) as temporary:
            np.savez_compressed(temporary, **hierarchy.arrays())  # type: ignore[arg-type]
    except UserError as error:
        _tell_not_kept(error)
    return hierarchy


def cached_mesh(
    body: Body,  # with faces
    num_coarse: int,
    fitted: bool = True,  # False: closest point of the coarse surface only; faster, less accurate
) -> MeshSampler:
    """The body's sampler from the cache, or computed (a quarter of a minute if fitted) and cached.

    Raises:
        UserError: the mesh has no level of `num_coarse` vertices.
    """
    assert body.faces is not None
    path = cache_folder() / f"mesh_{mesh_digest(body)}_{num_coarse}.npz"
    if fitted and path.is_file():
        try:
            return read_mesh(path, body.faces.cpu())
        except Exception as error:  # a damaged zip can raise any error
            print(f"{path}: damaged ({error}); making it again", file=sys.stderr)
    hierarchy = load_hierarchy(body)
    try:
        sampler = build_mesh_sampler(body.v_template.detach().cpu(), body.faces.cpu(), hierarchy, num_coarse)
    except ValueError as error:
        raise UserError(f"{error}; choose another number of coarse vertices") from None
    if not fitted:
        return sampler
    print(f"fitting the coarse mesh of body {body.name!r}, once; it is kept in {path}", file=sys.stderr, flush=True)
    meshes = random_bodies(copy.deepcopy(body).cpu(), FITTED_ON, seed=0)
    sampler.fitted_index, sampler.fitted_weight = fit_upsampling(sampler, meshes, min(12, num_coarse))
    try:
        save_mesh(path, hierarchy, sampler)
        return read_mesh(path, body.faces.cpu())  # the same as later calls: weights are stored in half precision
    except UserError as error:
        _tell_not_kept(error)
    return sampler


def _tell_not_kept(error: UserError) -> None:
    print(f"{error}; it will be made again the next time, or name a folder in {FOLDER_VARIABLE}", file=sys.stderr)


@torch.no_grad()
def random_bodies(
    body: Body,
    count: int,
    seed: int,
    spread: float = 0.5,  # radians, standard deviation per axis of every joint
) -> Tensor:  # (count, V, 3) metres, relative to the root joint
    """Bodies in random poses beyond joint limits, elbows and knees bent by up to 2 radians."""
    generator = torch.Generator().manual_seed(seed)
    axis_angle = spread * torch.randn(count, body.num_joints, 3, generator=generator)
    for name, axis, sign in (("left_elbow", 1, -1), ("right_elbow", 1, 1), ("left_knee", 0, 1), ("right_knee", 0, 1)):
        if name in body.joint_names:
            fold = 2 * torch.rand(count, generator=generator)
            axis_angle[:, body.joint_names.index(name), axis] += sign * fold
    betas = torch.randn(count, body.num_betas, generator=generator)
    parts = []
    for beta, rotation in zip(betas.split(16), axis_angle_to_matrix(axis_angle).split(16), strict=True):
        posed = body(beta, rotation)
        parts.append(posed.vertices - posed.joints[:, :1])
    return torch.cat(parts)
