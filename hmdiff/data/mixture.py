"""A weighted mixture of data sets, and a training stream with separate splits: both are sources of blocks themselves.

Each block comes from one source, in a fixed order that spreads the sources evenly and keeps their exact weights. So a
mixture's block is a function of its number, and each source gives its blocks in sequence without gaps: its epochs stay
complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hmdiff.data.sample import PeopleSource, Sample
from hmdiff.errors import UserError

PERIOD = 1000  # blocks after which the order repeats: weights are resolved to 0.1 %


class Mixture:
    """Several sources as one, by weight. `sample.concatenate` masks the labels that a source lacks."""

    def __init__(
        self,
        sources: Sequence[PeopleSource],
        weights: Sequence[float],  # > 0; only their ratios count
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise UserError(f"a mixture of {len(sources)} sources with {len(weights)} weights; each needs one")
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise UserError(f"weights {list(weights)}: numbers above 0 are expected; leave a source out to weigh it 0")
        for name in ("block_size", "image_size"):
            values = {getattr(source, name) for source in sources}
            if len(values) > 1:
                raise UserError(f"the sources of a mixture differ in {name}: {sorted(map(str, values))}")
        self.sources = list(sources)
        self.block_size, self.image_size = sources[0].block_size, sources[0].image_size
        self.full_mesh = all(source.full_mesh for source in sources)
        self._order = schedule(weights)
        counts = np.zeros((len(sources), PERIOD), np.int64)
        counts[self._order, np.arange(PERIOD)] = 1
        self._blocks_per_period = counts.sum(1)
        self._before = counts.cumsum(1) - counts  # blocks of each source before each place of the period

    def block(self, stream: str, number: int) -> Sample:
        source, source_block = self.source_of(number)
        return self.sources[source].block(stream, source_block)

    def source_of(self, number: int) -> tuple[int, int]:
        """The index of the source that gives this block, and the block's number in that source."""
        period, position = divmod(number, PERIOD)
        source = int(self._order[position])
        return source, int(period * self._blocks_per_period[source] + self._before[source, position])


def schedule(weights: Sequence[float]) -> np.ndarray:  # (PERIOD,) int
    """Source index of each block: always the source furthest behind its weight. Each source occurs at least once."""
    share = np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.maximum(1, np.floor(share * PERIOD).astype(np.int64))
    while counts.sum() != PERIOD:  # the rest goes to the sources with the largest rounding error
        step = 1 if counts.sum() < PERIOD else -1
        deficit = step * (share * PERIOD - counts)
        deficit[counts + step < 1] = -np.inf
        counts[int(np.argmax(deficit))] += step
    assigned = np.zeros(len(counts))
    order = np.zeros(PERIOD, np.int64)
    for position in range(PERIOD):
        source = int(np.argmax(counts * (position + 1) / PERIOD - assigned))
        order[position] = source
        assigned[source] += 1
    return order


class NamedSplits:
    """A source for the stream `train`, and one for each named split."""

    def __init__(self, train: PeopleSource, splits: Mapping[str, PeopleSource]) -> None:
        self.train, self.splits = train, dict(splits)
        self.block_size, self.image_size, self.full_mesh = train.block_size, train.image_size, train.full_mesh

    def block(self, stream: str, number: int) -> Sample:
        """Raises `UserError` for an unknown split."""
        if stream == "train":
            return self.train.block(stream, number)
        if stream not in self.splits:
            raise UserError(
                f"split {stream!r} is not there ({', '.join(self.splits) or 'none is'}); give data.splits.{stream}, "
                "a prepared folder or synthetic"
            )
        return self.splits[stream].block(stream, number)
