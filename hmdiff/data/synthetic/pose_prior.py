"""The learned pose prior: a mixture of Gaussians over axis-angles, symmetric under mirroring.

p(x) = sum_k w_k (N(x; m_k, S_k) + N(Mx; m_k, S_k)) / 2, where x are the axis-angles of the 21 joints between pelvis and
hands and M exchanges left and right. Fitted to motion capture by tools/build/poses.py; the form is our choice.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmdiff.body.anatomy import rotations_to_angles
from hmdiff.body.skeletons import SMPL24, mirror_permutation
from hmdiff.data.synthetic.collision import sample_least_penalised
from hmdiff.errors import UserError
from hmdiff.files.reading import read_npz
from hmdiff.files.resources import asset_path
from hmdiff.geometry import axis_angle_to_matrix, matrix_to_axis_angle

MODELLED = SMPL24[1:22]  # all but the pelvis and the hands
_FEATURES = 3 * len(MODELLED)
_FEATURE_MIRROR = torch.tensor(mirror_permutation(MODELLED))


def mirror_features(
    features: Tensor,  # (..., 63) axis-angles
) -> Tensor:  # (..., 63)
    """`mirror_pose` on axis-angles: left and right exchanged, the y and z components negated."""
    swapped = features.unflatten(-1, (-1, 3))[..., _FEATURE_MIRROR.to(features.device), :]
    return (swapped * features.new_tensor([1.0, -1.0, -1.0])).flatten(-2)


def pose_features(
    rotations: Tensor,  # (N, 24, 3, 3)
) -> Tensor:  # (N, 63)
    """Axis-angles of the modelled joints, concatenated."""
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
        """The shipped prior, or one written by tools/build/poses.py. Raises `UserError` for another file."""
        path = Path(path) if path is not None else asset_path("pose_prior.npz")
        try:
            data = read_npz(path, ("weights", "means", "factors", "metadata"))
            weights, means = (torch.from_numpy(data[key].astype(np.float32)) for key in ("weights", "means"))
            rows, columns = np.tril_indices(_FEATURES)
            factors = np.zeros((len(weights), _FEATURES, _FEATURES), np.float32)
            factors[:, rows, columns] = data["factors"]
            metadata = json.loads(str(data["metadata"]))
        except Exception as error:
            raise UserError(f"{path}: not a pose prior ({error}); tools/build/poses.py makes one") from None
        return cls(weights / weights.sum(), means, torch.from_numpy(factors), metadata)

    def to(self, device: torch.device | str) -> PosePrior:
        return dataclasses.replace(
            self, weights=self.weights.to(device), means=self.means.to(device), factors=self.factors.to(device)
        )

    def draw(self, count: int, generator: torch.Generator, spread: float = 1.0) -> Tensor:  # (count, 24, 3) radians
        """Anatomical angles from the mixture, before clamping to the limits; limbs may collide."""
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
        """Poses of the prior; colliding ones are resampled. `spread` scales the standard deviations."""
        return sample_least_penalised(lambda number, _: self.draw(number, generator, spread), count)

    def log_prob(
        self,
        rotations: Tensor,  # (N, 24, 3, 3); the root and the hands are ignored
    ) -> Tensor:  # (N,) nats, density over axis-angles, ignoring limits and collisions
        """Log density of poses under the mixture."""
        features = pose_features(rotations).to(self.means)
        both = torch.stack([features, mirror_features(features)])  # (2, N, F)
        centred = (both[:, None] - self.means[:, None]).flatten(0, 1)  # (2K, N, F)
        white = torch.linalg.solve_triangular(self.factors.repeat(2, 1, 1), centred.mT, upper=False)
        log_det = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        normal = -0.5 * white.square().sum(1).unflatten(0, (2, -1)) - log_det[:, None]
        normal = normal + (self.weights.log() - 0.5 * _FEATURES * math.log(2 * math.pi) - math.log(2))[:, None]
        return normal.flatten(0, 1).logsumexp(0)
