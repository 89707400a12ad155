"""Whole-body postures missing from recordings, with the body's orientation to gravity: sitting, lying, kneeling, ...

A posture gives ranges for each leg and arm (those of `limit_sampler` or additional ones), the bend of the trunk and the
tilt of the pelvis. The motion capture has walking, running and playing; photos also show people on chairs, floors,
beds, walls and bars. All figures are our choice, in degrees, in the conventions of `hmdiff/body/anatomy.py`. Contact is
by construction (level thighs on a seat, knees and hands on a floor), not solved for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hmdiff.body.skeletons import SMPL24
from hmdiff.data.synthetic.collision import sample_least_penalised
from hmdiff.data.synthetic.limit_sampler import ARM_STYLES, LEG_STYLES, JointLimitSampler
from hmdiff.geometry import axis_angle_to_matrix

_INDEX = {name: index for index, name in enumerate(SMPL24)}
_SPINE = (("spine1", 0.45), ("spine2", 0.33), ("spine3", 0.22))

# Legs, degrees: hip flexion (-), abduction, rotation; knee; each as low, high.
_LEGS = {
    "stand": LEG_STYLES["stand"][0],
    "step": LEG_STYLES["step"][0],
    "squat": LEG_STYLES["squat"][0],
    "chair": (-100, -75, -2, 20, -15, 20, 60, 105),
    "chair_long": (-85, -55, -2, 20, -15, 20, 10, 60),
    "crossed_over": (-105, -80, -12, 0, 0, 30, 60, 100),  # one thigh over the other
    "long_sit": (-95, -60, -2, 30, -15, 25, 0, 35),
    "tailor": (-100, -75, 25, 60, 20, 58, 100, 145),  # cross-legged
    "knee_up": (-125, -85, -2, 25, -15, 20, 90, 140),
    "side_sit": (-90, -55, -5, 20, -45, -15, 95, 140),
    "heel_sit": (-75, -45, -2, 15, -15, 15, 125, 152),
    "kneel": (-20, 12, -2, 18, -15, 15, 80, 110),
    "all_fours": (-105, -75, -2, 20, -12, 12, 75, 110),
    "lie": (-20, 12, -2, 20, -15, 30, 0, 30),
    "lie_bent": (-70, -25, -2, 25, -15, 30, 50, 110),
    "fetal": (-125, -80, -2, 15, -12, 15, 80, 140),
    "bend": (-60, -5, -3, 25, -10, 20, 0, 40),
    "lunge_back": (0, 30, -3, 12, -10, 20, 0, 80),
    "raised": (-90, -60, -3, 25, -15, 25, 0, 40),  # a leg held up while lying
    "hang": (-30, 25, -3, 18, -12, 20, 0, 60),
    "climb": (-120, -60, 5, 50, -10, 50, 50, 125),
    "split": (-110, -75, -3, 30, -15, 30, 0, 15),
}
# Arms, degrees: azimuth, elevation; rotation in half widths of its range; elbow.
_ARMS = {
    **{name: values for name, (values, *_) in ARM_STYLES.items()},
    "support_front": (70, 110, -35, 5, -0.4, 0.4, 0, 25),  # hands on the floor under the shoulders
    "support_back": (-60, -25, -70, -45, -0.4, 0.6, 0, 35),
    "lap": (45, 110, -75, -45, -0.3, 0.5, 40, 100),
    "desk": (55, 115, -50, -15, -0.3, 0.6, 60, 120),
    "overhead": (10, 90, 60, 88, -0.6, 0.6, 0, 40),
    "pillow": (10, 80, 20, 70, -0.4, 0.8, 80, 135),
    "spread": (-25, 30, -20, 40, -0.6, 0.6, 0, 60),
    "rest": (-20, 60, -85, -55, -0.5, 0.5, 0, 70),
}


class _Posture(NamedTuple):
    share: float
    legs: tuple[tuple[str, str], ...]  # pairs of styles for (one, the other) leg
    arms: tuple[str, ...]  # choices for each arm
    bend: tuple[float, float]  # forward bend of the spine
    pitch: tuple[float, float]  # forward pitch of the pelvis: 90 is prone, -90 supine
    roll: tuple[float, float] = (-6, 6)  # sideways roll of the pelvis


_FREE = ("hang", "akimbo", "before", "aside", "up", "across")
_POSTURES: dict[str, _Posture] = {
    "on a chair": _Posture(
        0.17,
        (("chair", "chair"), ("chair", "chair_long"), ("chair_long", "chair_long"), ("chair", "crossed_over")),
        ("lap", "desk", "before", "rest", "akimbo", "across"),
        (-8, 40),
        (-22, 15),
    ),
    "on the floor": _Posture(
        0.13,
        (
            ("long_sit", "long_sit"),
            ("tailor", "tailor"),
            ("knee_up", "knee_up"),
            ("knee_up", "long_sit"),
            ("knee_up", "tailor"),
            ("side_sit", "tailor"),
        ),
        ("lap", "support_back", "before", "rest", "across"),
        (-5, 45),
        (-25, 12),
    ),
    "on the heels": _Posture(0.05, (("heel_sit", "heel_sit"),), ("lap", "before", "rest", "up"), (-5, 40), (-10, 20)),
    "kneeling": _Posture(
        0.06, (("kneel", "kneel"), ("kneel", "squat"), ("kneel", "chair")), _FREE, (-10, 40), (-15, 25)
    ),
    "squatting": _Posture(
        0.06, (("squat", "squat"), ("squat", "kneel")), ("lap", "before", "rest", "across", "desk"), (0, 50), (0, 45)
    ),
    "on all fours": _Posture(
        0.08,
        (("all_fours", "all_fours"), ("all_fours", "lunge_back")),
        ("support_front", "support_front", "support_front", "before"),
        (-15, 25),
        (65, 100),
    ),
    "plank": _Posture(0.04, (("lie", "lie"), ("lie", "all_fours")), ("support_front", "desk"), (-15, 10), (60, 95)),
    "supine": _Posture(
        0.09,
        (("lie", "lie"), ("lie_bent", "lie_bent"), ("lie", "lie_bent"), ("lie", "raised"), ("raised", "raised")),
        ("rest", "spread", "pillow", "overhead", "lap"),
        (-8, 15),
        (-100, -75),
        (-15, 15),
    ),
    "prone": _Posture(
        0.06,
        (("lie", "lie"), ("lie", "lie_bent")),
        ("rest", "pillow", "overhead", "spread"),
        (-15, 8),
        (78, 102),
        (-15, 15),
    ),
    "on a side": _Posture(
        0.06,
        (("lie", "lie_bent"), ("lie_bent", "lie_bent"), ("fetal", "fetal"), ("lie", "lie")),
        ("before", "pillow", "rest", "across", "lap"),
        (-5, 35),
        (-15, 15),
        (70, 110),
    ),
    "bending": _Posture(
        0.08,
        (("bend", "bend"), ("bend", "step")),
        ("before", "hang", "support_front", "aside", "behind"),
        (10, 75),
        (15, 80),
    ),
    "lunging": _Posture(
        0.05, (("climb", "lunge_back"), ("split", "lunge_back"), ("squat", "lunge_back")), _FREE, (-15, 35), (-5, 35)
    ),
    "hanging": _Posture(
        0.03, (("hang", "hang"), ("fetal", "fetal"), ("hang", "climb")), ("overhead",), (-15, 25), (-25, 25)
    ),
    "climbing": _Posture(
        0.04,
        (("climb", "stand"), ("climb", "hang"), ("climb", "climb")),
        ("overhead", "up", "before", "aside"),
        (-15, 30),
        (-20, 30),
        (-20, 20),
    ),
}


def _tables() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights (P,); legs (P, L, 2, 4, 2) with counts; arms (P, A, 4, 2) with counts: padded with the first entry."""
    legs, arms = [], []
    most_legs = max(len(p.legs) for p in _POSTURES.values())
    most_arms = max(len(p.arms) for p in _POSTURES.values())
    for posture in _POSTURES.values():
        pairs = [[_LEGS[a], _LEGS[b]] for a, b in posture.legs]
        legs.append(pairs + pairs[:1] * (most_legs - len(pairs)))
        styles = [_ARMS[name] for name in posture.arms]
        arms.append(styles + styles[:1] * (most_arms - len(styles)))
    weights = torch.tensor([p.share for p in _POSTURES.values()])
    counts = torch.tensor([[len(p.legs), len(p.arms)] for p in _POSTURES.values()])
    lean = torch.tensor([[p.bend, p.pitch, p.roll] for p in _POSTURES.values()], dtype=torch.float32)
    return (
        weights,
        torch.tensor(legs, dtype=torch.float32).unflatten(-1, (4, 2)),
        torch.tensor(arms, dtype=torch.float32).unflatten(-1, (4, 2)),
        counts,
        lean,
    )


_WEIGHTS, _LEG_RANGES, _ARM_RANGES, _COUNTS, _LEAN = _tables()


class PostureSampler:
    """Samples poses with the tilt that belongs to them."""

    def sample(
        self,
        count: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # poses (count, 24, 3, 3), tilts (count, 3, 3) of the upright body
        """Postures by their shares; colliding ones are resampled within their posture."""
        device = generator.device
        which = torch.multinomial(_WEIGHTS.to(device), count, replacement=True, generator=generator)

        def draw(number: int, slots: Tensor | None) -> Tensor:
            return self._angles(which if slots is None else which[slots], generator)

        poses = sample_least_penalised(draw, count)
        low, high = _LEAN.to(device)[which][:, 1:].unbind(-1)
        tilt = (low + (high - low) * torch.rand(count, 2, generator=generator, device=device)) * (math.pi / 180)
        side = torch.where(torch.rand(count, generator=generator, device=device) < 0.5, -1.0, 1.0)
        zero = torch.zeros_like(side)
        pitch = axis_angle_to_matrix(torch.stack([tilt[:, 0], zero, zero], -1))
        roll = axis_angle_to_matrix(torch.stack([zero, zero, side * tilt[:, 1]], -1))
        return poses, roll @ pitch

    def _angles(self, which: Tensor, generator: torch.Generator) -> Tensor:  # (n,) -> (n, 24, 3) radians
        n, device = len(which), generator.device
        uniform = torch.rand(n, 24, generator=generator, device=device)
        normal = torch.randn(n, 40, generator=generator, device=device)
        counts = _COUNTS.to(device)[which]
        pair = (uniform[:, 0] * counts[:, 0]).long()
        legs = _LEG_RANGES.to(device)[which, pair]  # (n, 2, 4, 2)
        swapped = uniform[:, 1] < 0.5
        legs = torch.where(swapped[:, None, None, None], legs.flip(1), legs)
        one, other = ((uniform[:, 2 + k] * counts[:, 1]).long() for k in (0, 1))
        other = torch.where(uniform[:, 4] < 0.5, one, other)  # in half of the cases both arms have the same style
        arms = _ARM_RANGES.to(device)[which[:, None], torch.stack([one, other], 1)]
        fraction = uniform[:, 8:24].unflatten(-1, (4, 4))
        alike = (uniform[:, 5] < 0.4)[:, None]
        fraction[:, 1] = torch.where(alike, fraction[:, 0], fraction[:, 1])
        fraction[:, 3] = torch.where(alike, fraction[:, 2], fraction[:, 3])
        limbs = torch.cat([legs, arms], 1)
        limbs = limbs[..., 0] + (limbs[..., 1] - limbs[..., 0]) * fraction  # (n, 4, 4)
        bend = _LEAN.to(device)[which][:, 0]
        bend = bend[:, 0] + (bend[:, 1] - bend[:, 0]) * uniform[:, 6]
        angles = torch.zeros(n, 24, 3, device=device)
        spine = torch.stack([bend, 8 * normal[:, 0], 10 * normal[:, 1]], -1)
        for position, (joint, share) in enumerate(_SPINE):
            angles[:, _INDEX[joint]] = share * spine + 2.5 * normal[:, 6 + 3 * position : 9 + 3 * position]
        # The head partly compensates the trunk's bend, and turns.
        head = torch.stack([-0.5 * uniform[:, 7] * bend + 14 * normal[:, 2], 9 * normal[:, 3], 22 * normal[:, 4]], -1)
        angles[:, _INDEX["neck"]] = angles[:, _INDEX["head"]] = 0.5 * head
        sampler = JointLimitSampler()
        for side, name in enumerate(("left", "right")):
            noise = normal[:, 16 + 12 * side : 28 + 12 * side]
            sampler.set_leg(angles, name, limbs[:, side], noise[:, :4])
            sampler.set_arm(angles, name, limbs[:, 2 + side], noise[:, 4:10])
        return angles * (math.pi / 180)
