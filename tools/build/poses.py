"""Fits the pose priors to motion capture: `python -m tools.build.poses RECORDINGS --output assets/pose_prior.npz`;
adding `--clips CLIPS.npz --output assets/pose_prior_train.npz` fits the training people's prior, from more recordings.

Recordings (ASF/AMC, and clips of a BVH skeleton) are retargeted, cleaned and thinned to 10 Hz. A mirror-symmetric
Gaussian mixture is fitted by expectation maximisation; the number of components maximises the likelihood of held-out
recordings. Only the mixture's parameters are written, never a recording.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.anatomy import (
    angles_to_rotations,
    clamp_angles,
    joint_limit_violation,
    limit_excess,
    rotations_to_angles,
)
from hmdiff.body.body import load_body
from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.pose_prior import PosePrior, mirror_features, pose_features
from hmdiff.data.synthetic.poses import JointLimitSampler, PoseMixture, sample_orientation
from hmdiff.errors import UserError
from hmdiff.files.storage import atomic_file
from hmdiff.viz.canvas import contact_sheet, save_picture
from hmdiff.viz.overlays import turntable_view
from tools.build.acclaim import read_recordings, world_rotations
from tools.build.bvh_clips import RATE, read_clips
from tools.build.intersection import self_intersection
from tools.build.mocap import MAX_SPEED, MEAN_OFFSETS, bad_frames, direction_error, retarget

CREDIT = (
    "The data used in this project was obtained from mocap.cs.cmu.edu. "
    "The database was created with funding from NSF EIA-0196217."
)
RECORDED, KEPT = 120.0, 10.0  # Hz
HELD_OUT = ("01_04", "01_10", "02_03", "02_06", "03_02")  # whole recordings; the others are used for the fit
COMPONENTS = (8, 16, 24, 32, 48)
FLOOR = 0.04  # radians: standard deviation added to every coordinate, since some joints are hinges or fixed
TOLERANCE = 25.0  # degrees beyond a joint limit above which a frame is a marker error


@dataclasses.dataclass(frozen=True)
class PoseFrames:
    """Cleaned, thinned frames."""

    train: Tensor  # (N, 24, 3, 3) local rotations, the root's in the world
    test: Tensor  # (M, 24, 3, 3) of the held-out recordings
    counts: dict[str, int]  # frames read, jumps dropped, frames thinned, beyond limits dropped
    direction_error: dict[str, float]  # degrees by limb


def read_frames(
    source: str | Path,
    offsets: np.ndarray = MEAN_OFFSETS,  # (24, 3) metres
    clips: str | Path | None = None,  # an archive (`bvh_clips`); clips whose names end in _test are held out
) -> PoseFrames:
    """Recordings as poses of the T-pose body. Raises `UserError` for a source without recordings."""
    kept: dict[str, list[Tensor]] = {"train": [], "test": []}
    counts = {"recordings": 0, "read": 0, "jumps": 0, "thinned": 0, "beyond limits": 0}
    errors: list[dict[str, float]] = []
    tolerated = torch.tensor(["wrist" not in joint for joint in SMPL24])  # wrist markers are unreliable: clamp instead
    recordings = (
        (name, skeleton, world_rotations(skeleton, motion), RECORDED)
        for name, skeleton, motion in read_recordings(source)
    )
    more = () if clips is None else ((*clip, RATE) for clip in read_clips(clips))
    for name, skeleton, world, rate in itertools.chain(recordings, more):
        local = retarget(skeleton, world, offsets)
        if rate == RECORDED:
            errors.append(direction_error(skeleton, world, local, offsets))
        bad = bad_frames(local, MAX_SPEED * RECORDED / rate)
        stride = round(rate / KEPT)
        thin = torch.from_numpy(local[::stride][~bad[::stride]]).float()
        angles = rotations_to_angles(thin)
        inside = limit_excess(angles)[:, tolerated].amax(-1) * (180 / np.pi) <= TOLERANCE
        poses = angles_to_rotations(clamp_angles(angles[inside]))
        poses[:, 0] = thin[inside, 0]
        kept["test" if name in HELD_OUT or name.endswith("_test") else "train"].append(poses)
        for key, value in (
            ("recordings", 1),
            ("read", len(local)),
            ("jumps", int(bad.sum())),
            ("thinned", len(thin)),
            ("beyond limits", int((~inside).sum())),
        ):
            counts[key] += value
    mean_error = {limb: float(np.mean([error[limb] for error in errors])) for limb in errors[0]}
    # Without the usual names, hold out the last tenth.
    train, test = (torch.cat(part) if part else torch.zeros(0, 24, 3, 3) for part in kept.values())
    if not len(test):
        cut = max(1, len(train) // 10)
        train, test = train[:-cut], train[-cut:]
    return PoseFrames(train, test, counts, mean_error)


def fit_mixture(
    features: Tensor,  # (N, F) axis-angles, unmirrored
    components: int,
    iterations: int = 30,
    seed: int = 0,
    floor: float = FLOOR,  # radians
) -> PosePrior:
    """Expectation maximisation of the mirror-symmetric mixture, initialised by k-means++. Deterministic for a seed."""
    both = torch.cat([features, mirror_features(features)]).double()
    generator = torch.Generator().manual_seed(seed)
    identity = torch.eye(both.shape[1], dtype=torch.float64)
    means = _spread_seeds(both, components, generator)
    pooled = torch.cov(both.T) * 0.1 + floor**2 * identity
    prior = PosePrior(
        torch.full((components,), 1 / components, dtype=torch.float64),
        means,
        torch.linalg.cholesky(pooled).repeat(components, 1, 1),
    )
    for _ in range(iterations):
        # A frame and its mirror image share one datum: its 2K responsibilities sum to 1.
        log_joint = _log_components(prior, both).unflatten(1, (2, -1))  # (K, 2, N)
        share = (log_joint - log_joint.logsumexp((0, 1))).exp().flatten(1)  # (K, 2N)
        mass = share.sum(1)
        means = share @ both / mass[:, None]
        pooled = torch.zeros_like(identity)
        covariances = []
        for k in range(components):
            centred = both - means[k]
            scatter = (share[k, :, None] * centred).T @ centred
            covariances.append(scatter)
            pooled = pooled + scatter
        pooled = pooled / mass.sum()
        # Components with few frames are regularised by the covariance within all (an inverse-Wishart prior of 2 F
        # frames).
        strength = 2.0 * both.shape[1]
        factors = torch.stack(
            [
                torch.linalg.cholesky((scatter + strength * pooled) / (m + strength) + floor**2 * identity)
                for scatter, m in zip(covariances, mass, strict=True)
            ]
        )
        prior = PosePrior(mass / mass.sum(), means, factors)
    return PosePrior(prior.weights.float(), prior.means.float(), prior.factors.float())


def _log_components(prior: PosePrior, features: Tensor) -> Tensor:  # (N, F) -> (K, N)
    normals = [
        torch.distributions.MultivariateNormal(mean, scale_tril=factor, validate_args=False).log_prob(features)
        for mean, factor in zip(prior.means, prior.factors, strict=True)
    ]
    return torch.stack(normals) + prior.weights.log()[:, None]


def _spread_seeds(features: Tensor, count: int, generator: torch.Generator) -> Tensor:  # (count, F), k-means++
    chosen = [features[int(torch.randint(len(features), (), generator=generator))]]
    distance = (features - chosen[0]).square().sum(-1)
    while len(chosen) < count:
        chosen.append(features[int(torch.multinomial(distance, 1, generator=generator))])
        distance = torch.minimum(distance, (features - chosen[-1]).square().sum(-1))
    return torch.stack(chosen)


def prepare_poses(
    source: str | Path,  # folder or archive of ASF and AMC files
    output: str | Path,  # .npz
    components: tuple[int, ...] = COMPONENTS,
    clips: str | Path | None = None,  # more recordings, see `read_frames`
) -> dict[str, object]:  # the written metadata
    """Fit the prior and write it.

    Raises:
        UserError: the source cannot be read, holds too few frames, or the output cannot be written.
    """
    frames = read_frames(source, clips=clips)
    train, test = pose_features(frames.train), pose_features(frames.test)
    if len(train) < 2 * max(components):
        raise UserError(f"{source}: {len(train)} usable poses at 10 Hz, too few for a prior; give more recordings")
    candidates = {count: fit_mixture(train, count) for count in components}
    likelihood = {count: float(prior.log_prob(frames.test).mean()) for count, prior in candidates.items()}
    best = max(likelihood, key=lambda count: likelihood[count])
    metadata: dict[str, object] = {
        "credit": CREDIT,
        "counts": frames.counts | {"train": len(train), "test": len(test)},
        "components": best,
        "held_out_log_likelihood": {str(count): round(value, 2) for count, value in likelihood.items()},
        "train_log_likelihood": round(float(candidates[best].log_prob(frames.train).mean()), 2),
        "direction_error_degrees": {limb: round(value, 2) for limb, value in frames.direction_error.items()},
    }
    write_prior(output, candidates[best], metadata)
    return metadata


def write_prior(path: str | Path, prior: PosePrior, metadata: dict[str, object]) -> None:
    """Weights, means and packed Cholesky factors (float16), with the metadata as JSON."""
    rows, columns = np.tril_indices(prior.means.shape[1])
    with atomic_file(path) as temporary:
        np.savez_compressed(
            temporary,
            weights=prior.weights.numpy(),
            means=prior.means.numpy().astype(np.float32),
            factors=prior.factors.numpy()[:, rows, columns].astype(np.float16),
            metadata=np.array(json.dumps(metadata)),
        )


def draw_sheet(path: str | Path, seed: int = 0, columns: int = 8) -> None:
    """A picture of sampled bodies: one row each for the prior, blends, the joint limits and the tail."""
    body = load_body("free")
    assert body.faces is not None
    generator = torch.Generator().manual_seed(seed)
    mixtures = {
        "prior": PoseMixture(1, 0, 0),
        "blend": PoseMixture(0, 0, 1),
        "limits": PoseMixture(0, 1, 0),
        "tail": PoseMixture(0, 1, 0),
    }
    pictures, captions = [], []
    for name, mixture in mixtures.items():
        rotations = mixture.sample(columns, generator, tail=name == "tail")
        rotations[:, 0] = sample_orientation(columns, generator)
        betas = torch.randn(columns, body.num_betas, generator=generator)
        with torch.no_grad():
            vertices = body(betas, rotations).vertices
        pictures += [turntable_view(mesh, body.faces, degrees=0, size=240, extent=1.0) for mesh in vertices]
        captions += [name] * columns
    save_picture(path, contact_sheet(pictures, columns, captions, gap=4))


def intersection_report(
    source: str | Path | None = None,  # recordings for comparison
    count: int = 100,
    seed: int = 0,
) -> dict[str, dict[str, float]]:  # sampler -> percent of the vertices inside the body: mean, 90 % quantile, maximum
    """`self_intersection` of the samplers' bodies with mean shape, and of the held-out recordings if given."""
    body = load_body("free")
    generator = torch.Generator().manual_seed(seed)
    mixture, limits = PoseMixture(), JointLimitSampler()
    poses = {
        "prior": mixture.prior.sample(count, generator),
        "limits": limits.sample(count, generator),
        "mixture": mixture.sample(count, generator),
        "tail": mixture.sample(count, generator, tail=True),
    }
    if source is not None:
        recorded = read_frames(source).test
        poses["recordings"] = recorded[torch.randperm(len(recorded), generator=generator)[:count]]
    report = {}
    for name, rotations in poses.items():
        percent = 100 * self_intersection(body, rotations)
        report[name] = {
            "mean": round(float(percent.mean()), 2),
            "p90": round(float(percent.quantile(0.9)), 2),
            "worst": round(float(percent.max()), 2),
            "beyond limits": round(100 * float((joint_limit_violation(rotations) > 0).float().mean()), 1),
        }
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.build.poses", description="Fit the pose prior.")
    parser.add_argument("source", nargs="?", help="folder or tar archive of ASF and AMC files (mocap.cs.cmu.edu)")
    parser.add_argument("--clips", help="an archive of clips of a BVH skeleton (tools/build/bvh_clips.py)")
    parser.add_argument("--output", help="file to write the prior to, such as assets/pose_prior.npz")
    parser.add_argument("--sheet", help="draw a sheet of 32 sampled bodies to this picture")
    parser.add_argument("--intersections", action="store_true", help="report how far bodies lie in themselves")
    options = parser.parse_args(arguments)
    if options.output is not None and options.source is None:
        parser.error("--output needs the recordings as SOURCE")
    if options.output is not None:
        print(json.dumps(prepare_poses(options.source, options.output, clips=options.clips), indent=2))
    if options.sheet is not None:
        draw_sheet(options.sheet)
    if options.intersections:
        print(json.dumps(intersection_report(options.source), indent=2))


if __name__ == "__main__":
    main()
