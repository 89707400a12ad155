"""People to score, block by block: a pipeline's output or predictions from files, with their ground truth.

A block is the unit of work. Its people and batches do not depend on the number of processes, so neither do the results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hmdiff.data.record import Record
from hmdiff.data.sample import PeopleSource
from hmdiff.data.shards import RecordStore
from hmdiff.diffusion.sampling_config import SamplingConfig
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import MESHES_AT_ONCE, predict_batches
from hmdiff.evaluate.ground_truth import GroundTruth
from hmdiff.evaluate.hypothesis_rows import Choose, no_selection
from hmdiff.evaluate.predictions import PredictionFiles
from hmdiff.evaluate.protocol_errors import Bodies
from hmdiff.pipeline import HMDiffPipeline


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
    """A batch of people: predictions and ground truth."""

    index: Tensor  # (B,) among all scored people
    predicted: Bodies  # (B, N, ...)
    target: Bodies  # (B, ...)
    choose: Choose = no_selection
    aggregated: Bodies | None = None  # (B, ...) one body from all hypotheses, by the pipeline's aggregation MLP


class Targets(Protocol):
    """The ground truth bodies of a data set, by position."""

    def names(self) -> list[str]: ...  # of all people

    def take(self, positions: Sequence[int]) -> Bodies: ...  # (B, ...)


class RecordTargets:
    """Ground truth of records: prepared shards, or a part of them."""

    def __init__(
        self,
        store: RecordStore,
        ground_truth: GroundTruth,
        numbers: Sequence[int] | None = None,  # which records; None: all
    ) -> None:
        self.store, self.ground_truth = store, ground_truth
        self.numbers = list(range(len(store))) if numbers is None else [int(number) for number in numbers]

    def names(self) -> list[str]:
        return [self._record(position).name for position in range(len(self.numbers))]

    def take(self, positions: Sequence[int]) -> Bodies:
        return self.ground_truth([self._record(position) for position in positions])

    def _record(self, position: int) -> Record:
        return self.store[self.numbers[position]].record


class SampleTargets:
    """Ground truth of synthetic people, on the model's own body; named SPLIT/000000."""

    def __init__(self, data: PeopleSource, split: str, people: int) -> None:
        self.data, self.split, self.people = data, split, people
        self._block = functools.lru_cache(maxsize=1)(functools.partial(data.block, split))

    def names(self) -> list[str]:
        return [f"{self.split}/{position:06d}" for position in range(self.people)]

    def take(self, positions: Sequence[int]) -> Bodies:
        meshes = []
        for position in positions:
            number, row = divmod(position, self.data.block_size)
            vertices = self._block(number).vertices
            if vertices is None:
                raise UserError("scoring needs the full mesh of its people: build the data with full_mesh=True")
            meshes.append(vertices[row])
        return Bodies(torch.stack(meshes))


class FilePredictions:
    """Predictions from files."""

    def __init__(self, files: PredictionFiles, targets: Targets, people: int, block_size: int = 32) -> None:
        known = targets.names()
        self.names = known[:people]
        files.check_names(self.names, known)
        self.files, self.targets, self.people, self.block_size = files, targets, people, block_size

    def batches(self, number: int) -> Iterator[ScoringBatch]:
        positions = range(number * self.block_size, min((number + 1) * self.block_size, self.people))
        size = max(1, min(self.block_size, MESHES_AT_ONCE // self.files.num_hypotheses))
        for first in range(positions.start, positions.stop, size):
            chosen = list(range(first, min(first + size, positions.stop)))
            predictions = self.files.take([self.names[position] for position in chosen])
            yield ScoringBatch(
                torch.tensor(chosen),
                predictions.bodies,
                self.targets.take(chosen),
                _choice(predictions.selected, self.files.num_hypotheses),
            )


class PipelinePredictions:
    """A pipeline's output for the people of a data set."""

    def __init__(
        self,
        pipeline: HMDiffPipeline,
        data: PeopleSource,
        split: str,
        targets: Targets,
        people: int,
        sampling: SamplingConfig,
        placement: Tensor | None = None,  # (3,) added to every mesh, see `ground_truth.raw_placement`
    ) -> None:
        self.pipeline, self.data, self.split, self.targets, self.people = pipeline, data, split, targets, people
        self.sampling, self.placement, self.block_size = sampling, placement, data.block_size

    def batches(self, number: int) -> Iterator[ScoringBatch]:
        first_of_block = number * self.block_size
        count = min(self.block_size, self.people - first_of_block)
        block = self.data.block(self.split, number).map(lambda tensor: tensor[:count])
        done = first_of_block
        for batch in predict_batches(self.pipeline, [block], self.sampling):
            positions = list(range(done, done + len(batch.sample)))
            done += len(positions)
            vertices = batch.output.vertices
            predicted, aggregated_vertices = self._placed(vertices), batch.output.aggregated_vertices
            target = self.targets.take(positions).map(lambda tensor: tensor.to(vertices.device))  # noqa: B023
            aggregated = None if aggregated_vertices is None else self._placed(aggregated_vertices)
            yield ScoringBatch(torch.tensor(positions), predicted, target, batch.select, aggregated)

    def _placed(self, vertices: Tensor) -> Bodies:
        return Bodies(vertices if self.placement is None else vertices + self.placement.to(vertices))


def _choice(chosen: Tensor | None, total: int) -> Choose:
    """A file selects among all hypotheses, so there is no selection for smaller counts."""
    return lambda count: chosen if count == total else None
