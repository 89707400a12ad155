"""Where training poses come from: a prior learned from motion capture, a sampler of the joint limits, and their blends.

Poses are (N, 24, 3, 3) local rotations of the SMPL-named joints, the root the identity; `sample_orientation` draws the
root's. Everything is drawn from one torch.Generator, whose device must be the tensors': same seed, same poses.

The prior is a mixture of Gaussians over the axis-angles of the 21 joints between pelvis and hands, tied to its own mirror
image: p(x) = sum_k w_k (N(x; m_k, S_k) + N(Mx; m_k, S_k)) / 2. Blends and styles are our choice.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmdiff.data.anatomy import (
    angles_to_rotations,
    clamp_angles,
    joint_limit_violation,
    kind,
    mirror_pose,
    reach_excess,
    rotations_to_angles,
    scapular_rhythm,
    shoulder_turn_center,
)
from hmdiff.data.collision import capsule_penetration
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle
from hmdiff.resources import asset_path
from hmdiff.skeletons import SMPL24, mirror_permutation

__all__ = [
    "JointLimitSampler", "PoseMixture", "PosePrior", "joint_limit_violation", "mirror_pose", "sample_orientation",
]  # fmt: skip

MODELLED = SMPL24[1:22]  # all but the pelvis and the hands
_FEATURES = 3 * len(MODELLED)
_FEATURE_MIRROR = torch.tensor(mirror_permutation(MODELLED))
ROUNDS = 3  # of drawing: a fifth of the raw draws collide, under a hundredth of what is left


def penalty(
    rotations: Tensor,  # (N, 24, 3, 3)
) -> Tensor:  # (N,) 0 for a pose whose limbs are free and whose joints are inside their limits
    """Metres that capsules lie in each other plus radians that arms point out of reach: what the samplers avoid.

    For poses whose angles were clamped: the limits that are boxes are met already.
    """
    reach = reach_excess(rotations)
    return capsule_penetration(rotations) + torch.where(reach < 1e-4, torch.zeros_like(reach), reach)


def _best_of_rounds(
    draw: Callable[[int, Tensor | None], Tensor],  # (how many, which slots; None: all in order) -> angles
    count: int,
    score: Callable[[Tensor], Tensor] = penalty,
    rounds: int = ROUNDS,
    share: float = 0.25,  # of the slots, the worst, drawn again each round
) -> Tensor:  # (count, 24, 3, 3)
    """Poses drawn, then the worst share of them drawn again and kept where better: a fixed number of draws, no loop on data."""
    poses = angles_to_rotations(clamp_angles(draw(count, None)))
    cost = score(poses)
    again = math.ceil(share * count)
    for _ in range(rounds - 1):
        slots = cost.topk(again).indices
        fresh = angles_to_rotations(clamp_angles(draw(again, slots)))
        fresh_cost = score(fresh)
        better = fresh_cost < cost[slots]
        poses[slots] = torch.where(better[:, None, None, None], fresh, poses[slots])
        cost[slots] = torch.minimum(fresh_cost, cost[slots])
    return poses


def mirror_features(
    features: Tensor,  # (..., 63) axis-angles
) -> Tensor:  # (..., 63)
    """`mirror_pose` on axis-angles: left and right exchanged, the y and z components negated."""
    swapped = features.unflatten(-1, (-1, 3))[..., _FEATURE_MIRROR.to(features.device), :]
    return (swapped * features.new_tensor([1.0, -1.0, -1.0])).flatten(-2)


def pose_features(
    rotations: Tensor,  # (N, 24, 3, 3)
) -> Tensor:  # (N, 63)
    """Axis-angles of the modelled joints, one after the other."""
    return matrix_to_axis_angle(rotations[:, 1:22]).flatten(1)


@dataclasses.dataclass(frozen=True)
class PosePrior:
    """A mirror-symmetric Gaussian mixture of poses. K components over F = 63 axis-angle coordinates."""

    weights: Tensor  # (K,) sum to 1
    means: Tensor  # (K, F)
    factors: Tensor  # (K, F, F) lower Cholesky factors of the covariances
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)  # credit line, counts, held-out likelihood

    @classmethod
    def load(cls, path: str | Path | None = None) -> PosePrior:
        """The shipped prior, or one written by `hmdiff.prepare.poses`. Raises `UserError` for another file."""
        path = Path(path) if path is not None else asset_path("pose_prior.npz")
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {key: file[key] for key in file.files}
            weights, means = (torch.from_numpy(data[key].astype(np.float32)) for key in ("weights", "means"))
            rows, columns = np.tril_indices(_FEATURES)
            factors = np.zeros((len(weights), _FEATURES, _FEATURES), np.float32)
            factors[:, rows, columns] = data["factors"]
            metadata = json.loads(str(data["metadata"]))
        except FileNotFoundError:
            raise UserError(f"{path}: no pose prior there; build it with `hmdiff prepare poses`") from None
        except Exception as error:
            raise UserError(f"{path}: not a pose prior ({error}); build it with `hmdiff prepare poses`") from None
        return cls(weights / weights.sum(), means, torch.from_numpy(factors), metadata)

    def to(self, device: torch.device | str) -> PosePrior:
        return dataclasses.replace(
            self, weights=self.weights.to(device), means=self.means.to(device), factors=self.factors.to(device)
        )

    def draw(self, count: int, generator: torch.Generator, spread: float = 1.0) -> Tensor:  # (count, 24, 3) radians
        """Anatomical angles as the mixture gives them: not yet clamped to the limits, limbs may collide."""
        device = self.means.device
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, _FEATURES, 1, generator=generator, device=device)
        features = self.means[component] + spread * (self.factors[component] @ noise)[..., 0]
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
        features = torch.where(mirrored, mirror_features(features), features)
        rotations = torch.eye(3, device=device).repeat(count, 24, 1, 1)
        rotations[:, 1:22] = axis_angle_to_matrix(features.unflatten(-1, (-1, 3)))
        return rotations_to_angles(rotations)

    def sample(self, count: int, generator: torch.Generator, spread: float = 1.0) -> Tensor:  # (count, 24, 3, 3)
        """Poses of the prior, the colliding ones drawn again. `spread` scales the standard deviations."""
        return _best_of_rounds(lambda number, _: self.draw(number, generator, spread), count)

    def log_prob(
        self,
        rotations: Tensor,  # (N, 24, 3, 3); the root and the hands do not count
    ) -> Tensor:  # (N,) nats, of the density over axis-angles, before limits and collisions are cut off
        """Log density of poses under the mixture."""
        features = pose_features(rotations).to(self.means)
        both = torch.stack([features, mirror_features(features)])  # (2, N, F)
        centred = (both[:, None] - self.means[:, None]).flatten(0, 1)  # (2K, N, F)
        white = torch.linalg.solve_triangular(self.factors.repeat(2, 1, 1), centred.mT, upper=False)
        log_det = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        normal = -0.5 * white.square().sum(1).unflatten(0, (2, -1)) - log_det[:, None]
        normal = normal + (self.weights.log() - 0.5 * _FEATURES * math.log(2 * math.pi) - math.log(2))[:, None]
        return normal.flatten(0, 1).logsumexp(0)


# Styles of a leg, degrees: hip flexion (-), abduction, turn; knee; each as low, high. Weights: ordinary, extreme.
_LEGS: dict[str, tuple[tuple[int, ...], float, float]] = {
    "stand": ((-20, 10, -3, 12, -10, 20, 0, 20), 0.24, 0.0),
    "behind": ((5, 32, -3, 15, -10, 25, 5, 90), 0.10, 0.10),
    "step": ((-90, -30, -5, 20, -10, 20, 10, 100), 0.14, 0.05),
    "wide": ((-30, 5, 15, 55, -5, 45, 0, 50), 0.12, 0.15),
    "squat": ((-125, -70, 3, 40, -5, 40, 80, 148), 0.10, 0.20),
    "sit": ((-105, -65, -3, 25, -20, 25, 40, 115), 0.12, 0.05),
    "kick": ((-120, -55, -3, 35, -10, 35, 0, 35), 0.06, 0.20),
    "aside": ((-80, 0, 35, 62, -10, 50, 0, 100), 0.04, 0.20),
    "kneel": ((-35, 15, -3, 20, -20, 20, 85, 150), 0.08, 0.05),
}
# Styles of an arm, degrees: azimuth, elevation; turn in half widths of its range; elbow.
_ARMS: dict[str, tuple[tuple[float, ...], float, float]] = {
    "hang": ((-20, 90, -85, -60, -0.5, 0.5, 0, 80), 0.22, 0.0),
    "akimbo": ((-25, 25, -65, -40, 0.2, 0.9, 60, 125), 0.08, 0.05),
    "before": ((30, 115, -65, 15, -0.6, 0.8, 10, 135), 0.22, 0.05),
    "aside": ((-30, 50, -40, 35, -0.8, 0.8, 0, 120), 0.16, 0.15),
    "up": ((-15, 90, 20, 88, -0.8, 0.8, 0, 110), 0.18, 0.40),
    "behind": ((-95, -40, -80, -30, -0.5, 0.8, 0, 100), 0.06, 0.20),
    "across": ((100, 140, -40, 30, -0.5, 0.8, 30, 125), 0.08, 0.15),
}  # fmt: skip
_INDEX = {name: index for index, name in enumerate(SMPL24)}


def _style_table(styles: dict[str, tuple[tuple[float, ...], float, float]]) -> tuple[Tensor, Tensor]:
    ranges = torch.tensor([values for values, _, _ in styles.values()], dtype=torch.float32)
    return ranges.unflatten(-1, (-1, 2)), torch.tensor([[a for _, a, _ in styles.values()], [b for *_, b in styles.values()]])


_LEG_RANGES, _LEG_WEIGHTS = _style_table(_LEGS)  # (S, 4, 2), (2, S)
_ARM_RANGES, _ARM_WEIGHTS = _style_table(_ARMS)


class JointLimitSampler:
    """Poses from what joints can do, not from what people were recorded doing: crouches, kicks, bends, raised arms.

    Hips, knees, shoulders and elbows are uniform inside a style drawn for each limb (a third of the poses use one style
    and one draw for both sides); spine and neck bend as a chain. `extreme` leaves the ordinary styles out.
    """

    def __init__(self, extreme: bool = False) -> None:
        self.extreme = extreme

    def draw(self, count: int, generator: torch.Generator) -> Tensor:  # (count, 24, 3) radians
        """Anatomical angles: not yet clamped to the limits, limbs may collide."""
        device = generator.device
        normal = torch.randn(count, 40, generator=generator, device=device)
        uniform = torch.rand(count, 20, generator=generator, device=device)
        angles = torch.zeros(count, 24, 3, device=device)
        self._trunk(angles, normal[:, :20], uniform[:, :4])
        symmetric = (uniform[:, 4:6] < 1 / 3).T  # (2, count): legs, arms
        legs = self._limbs(_LEG_RANGES, _LEG_WEIGHTS, count, symmetric[0], generator)  # (count, 2, 4)
        arms = self._limbs(_ARM_RANGES, _ARM_WEIGHTS, count, symmetric[1], generator)
        for side, name in enumerate(("left", "right")):
            noise = normal[:, 20 + 10 * side : 30 + 10 * side]
            self._leg(angles, name, legs[:, side], noise[:, :4])
            self._arm(angles, name, arms[:, side], noise[:, 4:])
        return angles * (math.pi / 180)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:  # (count, 24, 3, 3)
        """Poses inside the limits, the colliding ones drawn again."""
        return _best_of_rounds(lambda number, _: self.draw(number, generator), count)

    def _limbs(
        self, ranges: Tensor, weights: Tensor, count: int, symmetric: Tensor, generator: torch.Generator
    ) -> Tensor:  # (count, 2, 4) degrees
        device = generator.device
        weight = weights[int(self.extreme)].to(device)
        style = torch.multinomial(weight, 2 * count, replacement=True, generator=generator).view(count, 2)
        position = torch.rand(count, 2, 4, generator=generator, device=device)
        style = torch.where(symmetric[:, None], style[:, :1], style)
        position = torch.where(symmetric[:, None, None], position[:, :1], position)
        low, high = ranges.to(device)[style].unbind(-1)
        return low + (high - low) * position

    def _trunk(self, angles: Tensor, normal: Tensor, uniform: Tensor) -> None:
        scale = 1.5 if self.extreme else 1.0
        # A third bend far, the rest stand about upright: forwards reaches further than back.
        far = uniform[:, 0] < (0.6 if self.extreme else 0.3)
        bend = torch.where(far, -25 + 115 * uniform[:, 1], 8 + 12 * normal[:, 0])
        spine = torch.stack([bend, 12 * scale * normal[:, 1], 14 * scale * normal[:, 2]], -1)  # (count, 3)
        # The head stays level when the trunk bends, most of the time and in part.
        level = -0.4 * uniform[:, 2] * bend
        head = torch.stack([level + 14 * normal[:, 3], 10 * normal[:, 4], 24 * normal[:, 5]], -1)
        jitter = 2.5 * normal[:, 6:18].unflatten(-1, (4, 3))
        for position, (joint, share) in enumerate((("spine1", 0.45), ("spine2", 0.33), ("spine3", 0.22))):
            angles[:, _INDEX[joint]] = share * spine + jitter[:, position]
        angles[:, _INDEX["neck"]] = 0.5 * head + jitter[:, 3]
        angles[:, _INDEX["head"]] = 0.5 * head - jitter[:, 3]

    def _leg(self, angles: Tensor, side: str, leg: Tensor, noise: Tensor) -> None:
        angles[:, _INDEX[f"{side}_hip"]] = leg[:, :3]
        angles[:, _INDEX[f"{side}_knee"], 0] = leg[:, 3]
        angles[:, _INDEX[f"{side}_ankle"]] = noise[:, :3] * noise.new_tensor([16.0, 7.0, 7.0])
        angles[:, _INDEX[f"{side}_foot"], 0] = 8 * noise[:, 3]

    def _arm(self, angles: Tensor, side: str, arm: Tensor, noise: Tensor) -> None:
        azimuth, elevation = arm[:, 0], arm[:, 1]
        a, b = azimuth * (math.pi / 180), elevation * (math.pi / 180)
        direction = torch.stack([b.cos() * a.cos(), b.sin(), b.cos() * a.sin()], -1)
        center, width = shoulder_turn_center(direction)
        turn = (center + arm[:, 2] * width) * (180 / math.pi)
        angles[:, _INDEX[f"{side}_shoulder"]] = torch.stack([azimuth, elevation, turn], -1)
        rhythm = scapular_rhythm(direction) * (180 / math.pi)
        angles[:, _INDEX[f"{side}_collar"], :2] = rhythm + 3 * noise[:, :2]
        angles[:, _INDEX[f"{side}_elbow"], 0] = arm[:, 3]
        angles[:, _INDEX[f"{side}_elbow"], 2] = 8 + 22 * noise[:, 2]
        angles[:, _INDEX[f"{side}_wrist"]] = noise[:, 3:6] * noise.new_tensor([10.0, 18.0, 14.0])


# Parts that a blend takes from one sampler or the other. The trunk carries neck and head.
_PART_OF_JOINT = torch.tensor(
    [
        {"hip": 1, "knee": 1, "ankle": 1, "foot": 1}.get(kind(joint), 0 if joint == kind(joint) else 3) + joint.startswith("right_")
        for joint in SMPL24
    ]
)  # (24,) 0 trunk, 1 and 2 legs, 3 and 4 arms; left first


class PoseMixture:
    """Poses of the prior, of the limits, and blends: some limbs of one and the rest of the other, as gestures are."""

    def __init__(
        self,
        prior_share: float = 0.4,
        limit_share: float = 0.2,
        blend_share: float = 0.4,
        prior: PosePrior | None = None,  # None: the shipped one
        spread: float = 1.0,
    ) -> None:
        shares = torch.tensor([prior_share, limit_share, blend_share])
        if not bool((shares >= 0).all()) or not float(shares.sum()) > 0:
            raise UserError(f"pose shares {shares.tolist()}: expected three numbers >= 0, not all 0")
        self.shares = shares / shares.sum()
        self.prior = prior if prior is not None else PosePrior.load()
        self.spread = spread
        self.limits, self.extremes = JointLimitSampler(), JointLimitSampler(extreme=True)

    def sample(self, count: int, generator: torch.Generator, tail: bool = False) -> Tensor:  # (count, 24, 3, 3)
        """Poses in the given shares; `tail`: only ones far from the prior, yet inside the limits and without collisions."""
        if tail:
            # A collision outweighs any density: of the free poses, the one least likely under the prior is kept.
            return _best_of_rounds(
                lambda number, _: self.extremes.draw(number, generator), count,
                lambda poses: self.prior.log_prob(poses) + 1e6 * penalty(poses), rounds=4, share=0.5,
            )  # fmt: skip
        device = generator.device
        source = torch.multinomial(self.shares.to(device), count, replacement=True, generator=generator)
        coin = torch.rand(count, 7, generator=generator, device=device)
        # A blend takes the arms from the limits half of the time, the legs a quarter, else each part as its coin falls.
        which, parts = coin[:, :1], coin[:, 1:6] < 0.4
        arms = torch.tensor([False, False, False, True, True], device=device)
        legs = torch.tensor([False, True, True, False, False], device=device)
        parts = torch.where(which < 0.5, arms, torch.where(which < 0.7, legs, parts))
        limit = torch.where(source[:, None] == 2, parts, source[:, None] == 1)[:, _PART_OF_JOINT.to(device)]

        def draw(number: int, slots: Tensor | None) -> Tensor:
            from_prior = self.prior.draw(number, generator, self.spread)
            from_limits = self.limits.draw(number, generator)
            chosen = limit if slots is None else limit[slots]  # a slot keeps its kind, so the shares are exact
            return torch.where(chosen[..., None], from_limits, from_prior)

        return _best_of_rounds(draw, count)


def sample_orientation(
    count: int,
    generator: torch.Generator,
    tail: bool = False,  # also lying, upside down, strongly tilted
) -> Tensor:  # (count, 3, 3) the root's rotation, SMPL's canonical frame -> camera (OpenCV)
    """Root rotations as photos have them: any yaw, the body's tilt, the camera's elevation and roll.

    Yaw has more mass on facing the camera; tilt has the standard deviations of the motion capture's pelvis (degrees,
    18 forwards and back, 6 sideways); the camera looks down by -10 to 35 degrees and rolls by a few. `tail`: half of the
    poses are tilted by anything up to upside down about any axis.
    """
    device = generator.device
    normal = torch.randn(count, 4, generator=generator, device=device)
    uniform = torch.rand(count, 6, generator=generator, device=device)
    facing = uniform[:, 0] < 0.35
    yaw = torch.where(facing, 0.7 * normal[:, 0], (2 * uniform[:, 1] - 1) * math.pi)
    degree = math.pi / 180
    zero = torch.zeros_like(yaw)
    tilt = torch.stack([18 * degree * normal[:, 1], zero, 6 * degree * normal[:, 2]], -1)
    # Low elevations are the commoner: people are photographed from eye height.
    elevation = (-10 + 45 * uniform[:, 2] ** 1.5) * degree
    roll = 3 * degree * normal[:, 3]
    if tail:
        about = 2 * math.pi * uniform[:, 3]
        amount = (40 + 140 * uniform[:, 4]) * degree
        lying = torch.stack([amount * about.cos(), zero, amount * about.sin()], -1)
        tilt = torch.where((uniform[:, 5] < 0.5)[:, None], lying, tilt)
    # The body faces the camera when turned by half a turn about x: up becomes -y, its front -z.
    camera = torch.stack([elevation + math.pi, zero, zero], -1)
    turns = axis_angle_to_matrix(torch.stack([torch.stack([zero, zero, roll], -1), camera,
                                              torch.stack([zero, yaw, zero], -1), tilt]))  # fmt: skip
    return turns[0] @ turns[1] @ turns[2] @ turns[3]
