"""Training batches: people, noise levels and noise of step s are a function of (seed, s) only.

A block of people gets the same noise on any process.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from hmdiff.config import Config
from hmdiff.data.sample import PeopleSource, Sample, concatenate
from hmdiff.data.synthetic.people import block_generator
from hmdiff.diffusion.noising import draw_steps
from hmdiff.errors import UserError
from hmdiff.models.masking import draw_token_mask
from hmdiff.models.recovery import MeshRecoveryModel
from hmdiff.train.step import Draws


class TrainingStream(Dataset):
    """Micro-batches of one process: item i holds people and random numbers, a function of (seed, i) only."""

    def __init__(self, data: PeopleSource, config: Config, rank: int, processes: int, model: MeshRecoveryModel) -> None:
        training, loss = config.training, config.loss
        self.data, self.seed = data, config.seed
        self.points, self.tokens, self.masked = model.num_points, model.num_tokens, model.config.masked
        self.levels = loss.noise_levels
        self.blocks = training.batch_size // data.block_size
        if self.blocks * data.block_size != training.batch_size:
            raise UserError(
                f"training.batch_size {training.batch_size} is not a multiple of data.block_size {data.block_size}"
            )
        self.rank, self.processes = rank, processes
        self.length = training.steps * training.gradient_accumulation
        self.total, self.terminal = config.diffusion.num_train_timesteps, loss.terminal_share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Sample, Draws]:
        first = (index * self.processes + self.rank) * self.blocks
        people, steps, noise, token_mask = [], [], [], []
        for number in range(first, first + self.blocks):
            people.append(self.data.block("train", number))
            generator = block_generator(self.seed, "noise", number)
            shape = (self.data.block_size, self.levels)
            steps.append(draw_steps(shape, self.total, self.terminal, generator))
            noise.append(torch.randn(*shape, self.points, 3, generator=generator))
            if self.masked:
                token_mask.append(draw_token_mask((*shape, self.tokens), self.masked, generator))
        draws = Draws(
            torch.cat(steps), torch.cat(noise), torch.cat(token_mask) if token_mask else None, self._seed(index)
        )
        return concatenate(people), draws

    def _seed(self, index: int) -> int:
        """Seed of the random numbers that all processes share."""
        return int(block_generator(self.seed, "contrast", index).initial_seed())
