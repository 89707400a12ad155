"""Noisy training labels: the 3D labels of the stream `train` are displaced smoothly over the body. Our choice.

Every joint but the root gets an independent Gaussian displacement; a vertex gets its joints' displacements blended by
its skinning weights. So limbs move almost rigidly, the skin stays smooth and labels stay relative to the pelvis. The
noise level of a person is lognormal: a few are labelled much worse than most, which a likelihood with a learned error
(RLE) is said to tolerate. 2D labels, inputs and all other streams are unchanged. C coarse vertices, K joints, J
keypoints.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from hmdiff.body.body import Body
from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.data.synthetic.people import block_generator
from hmdiff.errors import UserError

_LEVEL_STD = 0.5  # standard deviation of the log noise level over people, the same as of the estimator's jitter
MAX_NOISE = 0.5  # metres: larger noise would leave nothing of the label


class NoisyLabels:
    """A source with displaced training labels. Block i is a function of (the source's block i, seed, i) alone.

    Raises:
        UserError: a noise outside 0 to 0.5 metres; a source with the full mesh, which is for evaluation.
    """

    def __init__(
        self,
        source: PeopleSource,
        body: Body,
        coarse_ids: Tensor,  # (C,)
        noise: float,  # metres: root mean square over people of each coordinate of a joint's displacement
        seed: int,
    ) -> None:
        if not math.isfinite(noise) or not 0 <= noise <= MAX_NOISE:
            raise UserError(f"data.label_noise {noise}: metres from 0 to {MAX_NOISE} are expected, such as 0.05")
        if source.full_mesh:
            raise UserError("data.label_noise is of training labels: these people have the full mesh, for evaluation")
        self.source, self.noise, self.seed = source, noise, seed
        self.block_size, self.full_mesh, self.image_size = source.block_size, False, source.image_size
        self._coarse = body.lbs_weights[coarse_ids.to(body.lbs_weights.device)]  # (C, K)
        self._root = body.parents.index(-1)
        regressor = body.keypoint_regressor
        self._keypoints = None if regressor is None else regressor @ body.lbs_weights  # (J, K)

    def block(self, stream: str, number: int) -> Sample:
        sample = self.source.block(stream, number)
        if stream != "train" or self.noise == 0:
            return sample
        generator = block_generator(self.seed, "label_noise", number)
        displacements = self.displacements(len(sample), generator)
        return dataclasses.replace(
            sample,
            coarse_vertices=_displaced(sample.coarse_vertices, displacements, self._coarse),
            joints_3d=_displaced(sample.joints_3d, displacements, None),
            keypoints_3d=_displaced(sample.keypoints_3d, displacements, self._keypoints),
        )

    def displacements(self, count: int, generator: torch.Generator) -> Tensor:  # (count, K, 3) metres, 0 at the root
        # E[exp(2 (s z - s^2))] = 1, so that the root mean square over people is `noise`.
        level = (_LEVEL_STD * torch.randn(count, 1, 1, generator=generator) - _LEVEL_STD**2).exp()
        displacements = self.noise * level * torch.randn(count, self._coarse.shape[1], 3, generator=generator)
        displacements[:, self._root] = 0
        return displacements


def _displaced(label: Tensor | None, displacements: Tensor, weights: Tensor | None) -> Tensor | None:
    if label is None:
        return None
    displacements = displacements.to(label)
    return label + (displacements if weights is None else weights.to(label) @ displacements)
