"""Where training poses come from: the learned prior, the joint-limit sampler, their blends; and the root's orientation.

Poses are (N, 24, 3, 3) local rotations of the SMPL-named joints, the root the identity; `sample_orientation` draws the
root's. Everything is drawn from one torch.Generator, whose device must be the tensors': same seed and count, same
poses. Blends and orientations are our choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hmdiff.body.anatomy import joint_limit_violation, kind, mirror_pose
from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.collision import least_blocked, penalty
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

# Parts that a blend takes from one sampler or the other. The trunk carries neck and head.
_LEG = ("hip", "knee", "ankle", "foot")
_PART_OF_JOINT = torch.tensor(
    [0 if joint == kind(joint) else (1 if kind(joint) in _LEG else 3) + joint.startswith("right_") for joint in SMPL24]
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

    def to(self, device: torch.device | str) -> PoseMixture:
        """The same mixture drawing on a device, from a generator of that device."""
        prior_share, limit_share, blend_share = self.shares.tolist()
        return PoseMixture(prior_share, limit_share, blend_share, self.prior.to(device), self.spread)

    def sample(self, count: int, generator: torch.Generator, tail: bool = False) -> Tensor:  # (count, 24, 3, 3)
        """Poses in the given shares; `tail`: only ones far from the prior, yet inside the limits, hardly colliding."""
        if tail:
            # A collision outweighs any density: of the free poses, the one least likely under the prior is kept.
            return least_blocked(
                lambda number, _: self.extremes.draw(number, generator),
                count,
                lambda poses: self.prior.log_prob(poses) + 1e6 * penalty(poses),
                rounds=4,
                share=0.5,
            )
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

        return least_blocked(draw, count)


def sample_orientation(
    count: int,
    generator: torch.Generator,
    tail: bool = False,  # also lying, upside down, strongly tilted
    leaning: Tensor | None = None,  # (k, 3, 3) the tilts of the first k, such as a posture's
    wide: bool = False,  # any elevation of the camera, and photos that are rolled, up to upside down
) -> Tensor:  # (count, 3, 3) the root's rotation, SMPL's canonical frame -> camera (OpenCV)
    """Root rotations as photos have them: any yaw, the body's tilt, the camera's elevation and roll.

    Yaw has more mass on facing the camera; tilt has the standard deviations of the motion capture's pelvis (18 degrees
    forwards and back, 6 sideways); the camera looks down by -10 to 35 degrees and rolls by 3. `tail`: half of the poses
    are tilted by anything from 40 degrees to upside down about any level axis. `wide`: a quarter of the cameras look
    from -45 to 85 degrees, a tenth of the photos are rolled by 35 degrees and a tenth by anything.
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
    if wide:
        more = torch.rand(count, 4, generator=generator, device=device)
        elevation = torch.where(more[:, 0] < 0.25, (-45 + 130 * more[:, 1]) * degree, elevation)
        rolled = torch.where(more[:, 2] < 0.1, (2 * more[:, 3] - 1) * math.pi, roll * (35 / 3))
        roll = torch.where(more[:, 2] < 0.2, rolled, 1.7 * roll)
    # The body faces the camera when turned by half a turn about x: up becomes -y, its front -z.
    camera = torch.stack([elevation + math.pi, zero, zero], -1)
    turns = axis_angle_to_matrix(
        torch.stack([torch.stack([zero, zero, roll], -1), camera, torch.stack([zero, yaw, zero], -1), tilt])
    )
    lean = turns[3]
    if leaning is not None:
        lean = torch.cat([leaning, lean[len(leaning) :]])
    return turns[0] @ turns[1] @ turns[2] @ lean
