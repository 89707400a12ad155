"""Poses sampled from joint limits instead of recorded motion. Styles and figures are our choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hmdiff.body.anatomy import scapular_rhythm, shoulder_turn_center, upper_arm_direction
from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.collision import sample_least_penalised

_Styles = dict[str, tuple[tuple[float, ...], float, float]]

# Leg styles, degrees: hip flexion (-), abduction, rotation; knee; each as low, high. Weights: ordinary, extreme.
LEG_STYLES: _Styles = {
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
# Arm styles, degrees: azimuth, elevation; rotation in half widths of its range; elbow.
ARM_STYLES: _Styles = {
    "hang": ((-20, 90, -85, -60, -0.5, 0.5, 0, 80), 0.22, 0.0),
    "akimbo": ((-25, 25, -65, -40, 0.2, 0.9, 60, 125), 0.08, 0.05),
    "before": ((30, 115, -65, 15, -0.6, 0.8, 10, 135), 0.22, 0.05),
    "aside": ((-30, 50, -40, 35, -0.8, 0.8, 0, 120), 0.16, 0.15),
    "up": ((-15, 90, 20, 88, -0.8, 0.8, 0, 110), 0.18, 0.40),
    "behind": ((-80, -40, -80, -42, -0.5, 0.8, 0, 100), 0.06, 0.20),
    "across": ((100, 140, -40, 30, -0.5, 0.8, 30, 125), 0.08, 0.15),
}
_INDEX = {name: index for index, name in enumerate(SMPL24)}


def _style_table(styles: _Styles) -> tuple[Tensor, Tensor]:
    ranges = torch.tensor([values for values, _, _ in styles.values()], dtype=torch.float32)
    weights = torch.tensor([[ordinary, extreme] for _, ordinary, extreme in styles.values()])
    return ranges.unflatten(-1, (-1, 2)), weights.T


_LEG_RANGES, _LEG_WEIGHTS = _style_table(LEG_STYLES)  # (S, 4, 2), (2, S)
_ARM_RANGES, _ARM_WEIGHTS = _style_table(ARM_STYLES)


class JointLimitSampler:
    """Crouches, kicks, bends, raised arms: poses that are rare in recordings of walking.

    Hips, knees, shoulders and elbows are uniform within a style drawn per limb (a third of the poses use the same style
    and values on both sides); spine and neck bend as a chain. `extreme` drops the ordinary styles.
    """

    def __init__(self, extreme: bool = False) -> None:
        self.extreme = extreme

    def draw(self, count: int, generator: torch.Generator) -> Tensor:  # (count, 24, 3) radians
        """Anatomical angles, before clamping to the limits; limbs may collide."""
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
            self.set_leg(angles, name, legs[:, side], noise[:, :4])
            self.set_arm(angles, name, arms[:, side], noise[:, 4:])
        return angles * (math.pi / 180)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:  # (count, 24, 3, 3)
        """Poses inside the limits; colliding ones are resampled."""
        return sample_least_penalised(lambda number, _: self.draw(number, generator), count)

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
        # A third bend far, the others are almost upright; forward bends reach further than backward ones.
        far = uniform[:, 0] < (0.6 if self.extreme else 0.3)
        bend = torch.where(far, -25 + 115 * uniform[:, 1], 8 + 12 * normal[:, 0])
        spine = torch.stack([bend, 12 * scale * normal[:, 1], 14 * scale * normal[:, 2]], -1)  # (count, 3)
        # The head often stays partly level when the trunk bends.
        level = -0.4 * uniform[:, 2] * bend
        head = torch.stack([level + 14 * normal[:, 3], 10 * normal[:, 4], 24 * normal[:, 5]], -1)
        jitter = 2.5 * normal[:, 6:18].unflatten(-1, (4, 3))
        for position, (joint, share) in enumerate((("spine1", 0.45), ("spine2", 0.33), ("spine3", 0.22))):
            angles[:, _INDEX[joint]] = share * spine + jitter[:, position]
        angles[:, _INDEX["neck"]] = 0.5 * head + jitter[:, 3]
        angles[:, _INDEX["head"]] = 0.5 * head - jitter[:, 3]

    def set_leg(self, angles: Tensor, side: str, leg: Tensor, noise: Tensor) -> None:
        angles[:, _INDEX[f"{side}_hip"]] = leg[:, :3]
        angles[:, _INDEX[f"{side}_knee"], 0] = leg[:, 3]
        angles[:, _INDEX[f"{side}_ankle"]] = noise[:, :3] * noise.new_tensor([16.0, 7.0, 7.0])
        angles[:, _INDEX[f"{side}_foot"], 0] = 8 * noise[:, 3]

    def set_arm(self, angles: Tensor, side: str, arm: Tensor, noise: Tensor) -> None:
        azimuth, elevation = arm[:, 0], arm[:, 1]
        a, b = azimuth * (math.pi / 180), elevation * (math.pi / 180)
        direction = upper_arm_direction(a, b)
        center, width = shoulder_turn_center(direction)
        turn = (center + arm[:, 2] * width) * (180 / math.pi)
        angles[:, _INDEX[f"{side}_shoulder"]] = torch.stack([azimuth, elevation, turn], -1)
        rhythm = scapular_rhythm(direction) * (180 / math.pi)
        angles[:, _INDEX[f"{side}_collar"], :2] = rhythm + 3 * noise[:, :2]
        angles[:, _INDEX[f"{side}_elbow"], 0] = arm[:, 3]
        angles[:, _INDEX[f"{side}_elbow"], 2] = 8 + 22 * noise[:, 2]
        angles[:, _INDEX[f"{side}_wrist"]] = noise[:, 3:6] * noise.new_tensor([10.0, 18.0, 14.0])
