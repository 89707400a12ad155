"""Training poses from the learned prior, the joint-limit sampler and their blends; and the root's orientation.

Poses are (N, 24, 3, 3) local rotations of the SMPL joints with an identity root; `sample_orientation` draws the root's
rotation. All draws come from one torch.Generator on the tensors' device: same seed and count, same poses. Blends and
orientations are our choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hmdiff.body.anatomy import joint_limit_violation, kind, mirror_pose
from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.collision import penalty, sample_least_penalised
from hmdiff.data.synthetic.limit_sampler import JointLimitSampler
from hmdiff.data.synthetic.pose_prior import PosePrior
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix

__all__ = [
    "JointLimitSampler",
    "PoseMixture",
    "PosePrior",
    "joint_limit_violation",
    "mirror_pose",
    "sample_orientation",
]

# Body parts that a blend takes from one sampler or the other. The trunk includes neck and head.
_LEG = ("hip", "knee", "ankle", "foot")
_PART_OF_JOINT = torch.tensor(
    [0 if joint == kind(joint) else (1 if kind(joint) in _LEG else 3) + joint.startswith("right_") for joint in SMPL24]
)  # (24,) 0 trunk, 1 and 2 legs, 3 and 4 arms; left first


class PoseMixture:
    """Poses from the prior, from the joint limits, and blends: some limbs from one and the rest from the other."""

    def __init__(
        self,
        prior_share: float = 0.4,
        limit_share: float = 0.2,
        blend_share: float = 0.4,
        prior: PosePrior | None = None,  # None: the shipped prior
        spread: float = 1.0,
    ) -> None:
        shares = torch.tensor([prior_share, limit_share, blend_share])
        if not bool((shares >= 0).all()) or not float(shares.sum()) > 0:
            raise UserError(f"pose shares {shares.tolist()}: expected three numbers >= 0, not all 0")
        self.shares = shares / shares.sum()
        self.prior = prior if prior is not None else PosePrior.load()
        self.spread = spread
        self.limits, self.extremes = JointLimitSampler(), JointLimitSampler(extreme=True)

    def to(self, device: torch.device | str) -> PoseMixture:
        """The same mixture on another device; its generator must be on that device."""
        prior_share, limit_share, blend_share = self.shares.tolist()
        return PoseMixture(prior_share, limit_share, blend_share, self.prior.to(device), self.spread)

    def sample(self, count: int, generator: torch.Generator, tail: bool = False) -> Tensor:  # (count, 24, 3, 3)
        """Poses in the given shares; `tail`: only poses far from the prior, inside the limits, with few collisions."""
        if tail:
            # Collisions dominate the score: among collision-free poses, the least likely under the prior is kept.
            return sample_least_penalised(
                lambda number, _: self.extremes.draw(number, generator),
                count,
                lambda poses: self.prior.log_prob(poses) + 1e6 * penalty(poses),
                rounds=4,
                share=0.5,
            )
        device = generator.device
        source = torch.multinomial(self.shares.to(device), count, replacement=True, generator=generator)
        coin = torch.rand(count, 7, generator=generator, device=device)
        # Blends take the arms from the limits in half of the cases, the legs in a fifth, else random parts.
        which, parts = coin[:, :1], coin[:, 1:6] < 0.4
        arms = torch.tensor([False, False, False, True, True], device=device)
        legs = torch.tensor([False, True, True, False, False], device=device)
        parts = torch.where(which < 0.5, arms, torch.where(which < 0.7, legs, parts))
        limit = torch.where(source[:, None] == 2, parts, source[:, None] == 1)[:, _PART_OF_JOINT.to(device)]

        def draw(number: int, slots: Tensor | None) -> Tensor:
            from_prior = self.prior.draw(number, generator, self.spread)
            from_limits = self.limits.draw(number, generator)
            chosen = limit if slots is None else limit[slots]  # a slot keeps its source, so the shares are exact
            return torch.where(chosen[..., None], from_limits, from_prior)

        return sample_least_penalised(draw, count)


def sample_orientation(
    count: int,
    generator: torch.Generator,
    tail: bool = False,  # also lying, upside down, strongly tilted
    leaning: Tensor | None = None,  # (k, 3, 3) given tilts of the first k, such as a posture's
    wide: bool = False,  # any camera elevation, and rolled photos, up to upside down
) -> Tensor:  # (count, 3, 3) the root's rotation, SMPL's canonical frame -> camera (OpenCV)
    """Root rotations as in photos: any yaw, the body's tilt, the camera's elevation and roll.

    Facing the camera is more frequent; tilt has the standard deviations of the motion capture's pelvis (18 degrees
    forwards and back, 6 sideways); the camera looks down by -10 to 35 degrees and rolls by 3. `tail`: half of the poses
    are tilted by 40 degrees to upside down about any level axis. `wide`: a quarter of the cameras look from -45 to 85
    degrees, a tenth of the photos are rolled by 35 degrees and a tenth by any angle.
    """
    device = generator.device
    normal = torch.randn(count, 4, generator=generator, device=device)
    uniform = torch.rand(count, 6, generator=generator, device=device)
    facing = uniform[:, 0] < 0.35
    yaw = torch.where(facing, 0.7 * normal[:, 0], (2 * uniform[:, 1] - 1) * math.pi)
    degree = math.pi / 180
    zero = torch.zeros_like(yaw)
    tilt = torch.stack([18 * degree * normal[:, 1], zero, 6 * degree * normal[:, 2]], -1)
    # Low elevations are more frequent: most people are photographed from eye height.
    elevation = (-10 + 45 * uniform[:, 2] ** 1.5) * degree
    roll = 3 * degree * normal[:, 3]
    if tail:
        about = 2 * math.pi * uniform[:, 3]
        amount = (40 + 140 * uniform[:, 4]) * degree
        lying = torch.stack([amount * about.cos(), zero, amount * about.sin()], -1)
        tilt = torch.where((uniform[:, 5] < 0.5)[:, None], lying, tilt)
    if wide:
        more = torch.rand(count, 4, generator=generator, device=device)
        elevation = torch.where(more[:, 0] < 0.25, (-45 + 130 * more[:, 1]) * degree, elevation)
        rolled = torch.where(more[:, 2] < 0.1, (2 * more[:, 3] - 1) * math.pi, roll * (35 / 3))
        roll = torch.where(more[:, 2] < 0.2, rolled, 1.7 * roll)
    # A half turn about x makes the body face the camera: up becomes -y, its front -z.
    camera = torch.stack([elevation + math.pi, zero, zero], -1)
    turns = axis_angle_to_matrix(
        torch.stack([torch.stack([zero, zero, roll], -1), camera, torch.stack([zero, yaw, zero], -1), tilt])
    )
    lean = turns[3]
    if leaning is not None:
        lean = torch.cat([leaning, lean[len(leaning) :]])
    return turns[0] @ turns[1] @ turns[2] @ lean
