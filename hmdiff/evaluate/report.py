"""Scoring a data set by a protocol: blocks of people are distributed over processes and gathered by index.

Every person must be scored exactly once; the report does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hmdiff.errors import UserError
from hmdiff.evaluate.hypothesis_rows import score_hypotheses
from hmdiff.evaluate.measured import interval
from hmdiff.evaluate.metrics import calibration_error, calibration_levels
from hmdiff.evaluate.protocols import Protocol as ScoringProtocol
from hmdiff.evaluate.published import published_rows
from hmdiff.evaluate.scored_people import ScoringBatch
from hmdiff.evaluate.store import save_report
from hmdiff.files.storage import atomic_file

_INDEX, _INSIDE = "index", "inside"


class ScoredPeople(Protocol):
    """People to score, see `hmdiff.evaluate.scored_people`."""

    people: int
    block_size: int

    def batches(self, number: int) -> Iterator[ScoringBatch]: ...  # of one block


class Processes:
    """The processes started by torchrun or `accelerate launch`; otherwise only this one."""

    def __init__(self, cpu: bool = True) -> None:  # cpu: use gloo
        self.number, self.count = 0, 1
        self._device: torch.device | None = None
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1:
            from accelerate import PartialState

            # Long timeout: finished processes wait for the slowest.
            state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=2))
            self.number, self.count, self._device = state.process_index, state.num_processes, state.device
            if self.count != world_size:  # accelerate may silently run each process as if it were the only one
                raise UserError(
                    f"{world_size} processes were started and {self.count} found each other; start them with torchrun, "
                    "and on processors with --device cpu"
                )

    @property
    def first(self) -> bool:
        return self.number == 0

    def device(self, wanted: torch.device) -> torch.device:
        """The device of this process; with several processes, each has its own GPU."""
        mine = self._device
        return mine if mine is not None and mine.type == wanted.type and wanted.index is None else wanted

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order."""
        if self.count == 1:
            return items
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]


@dataclasses.dataclass(frozen=True)
class PersonScores:
    """Scores of P people, in their order."""

    rows: dict[str, dict[str, Tensor]]  # row -> metric -> (P,) float64
    inside: Tensor | None  # (P, Q, J) for the calibration error, only for min_of_n


def score_people(
    protocol: ScoringProtocol,
    people: ScoredPeople,
    regressors: Mapping[str, Tensor],
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,  # called with the number of people this process has done
) -> PersonScores:
    """Score all people. Raises `UserError` if a person is missing or scored twice."""
    processes = processes or Processes()
    blocks = range((people.people + people.block_size - 1) // people.block_size)
    blocks_of_process = []
    for number in blocks[processes.number :: processes.count]:
        blocks_of_process.append(_score_block(protocol, people, number, regressors))
        if progress is not None:
            progress(len(blocks_of_process[-1][_INDEX]))
    return _merge_blocks(processes.gather(blocks_of_process), people.people)


def _score_block(
    protocol: ScoringProtocol, people: ScoredPeople, number: int, regressors: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """The index, and one column per row and metric."""
    columns: dict[str, list[np.ndarray]] = {}
    for batch in people.batches(number):
        points = next(t for t in (batch.predicted.vertices, batch.predicted.joints) if t is not None)
        regressors_on_device = {name: regressor.to(points.device) for name, regressor in regressors.items()}
        scores = score_hypotheses(
            protocol, batch.predicted, batch.target, regressors_on_device, batch.choose, batch.aggregated
        )
        columns_of_batch = {f"{row}|{metric}": v for row, errors in scores.rows.items() for metric, v in errors.items()}
        columns_of_batch |= {_INDEX: batch.index} | ({} if scores.inside is None else {_INSIDE: scores.inside})
        for name, values in columns_of_batch.items():
            converted = values.long() if name == _INDEX else values.bool() if name == _INSIDE else values.double()
            columns.setdefault(name, []).append(converted.cpu().numpy())
    return {name: np.concatenate(values) for name, values in columns.items()}


def _merge_blocks(blocks: list[dict[str, np.ndarray]], people: int) -> PersonScores:
    """Concatenate blocks and sort by index; each person must occur once."""
    index = np.concatenate([block[_INDEX] for block in blocks])
    times_scored = np.bincount(index, minlength=people)
    invalid = np.flatnonzero(times_scored != 1)
    if len(times_scored) != people or len(invalid):
        person, times = (invalid[0], times_scored[invalid[0]]) if len(invalid) else (people, 1)
        raise UserError(f"person {person} was scored {times} times, once is expected")
    names = {name for block in blocks for name in block}
    for block in blocks:
        if names - set(block):
            missing = min(names - set(block))
            raise UserError(f"the people from {block[_INDEX][0]} on have no {missing}, others have; score them apart")
    order = np.argsort(index)
    joined = {name: torch.from_numpy(np.concatenate([block[name] for block in blocks])[order]) for name in blocks[0]}
    rows: dict[str, dict[str, Tensor]] = {}
    for name, values in joined.items():
        if "|" in name:
            row, _, metric = name.partition("|")
            rows.setdefault(row, {})[metric] = values
    return PersonScores(rows, joined.get(_INSIDE))


def report_of(
    protocol: ScoringProtocol,
    scores: PersonScores,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """report["errors"]["spin/mpjpe"][row] = {value, low, high}: the mean and its 95 % interval over people."""
    statement = {key: getattr(protocol, key) for key in ("citation", "ground_truth", "joints", "root", "alignment")}
    errors: dict[str, dict[str, Any]] = {}
    for row, metrics in scores.rows.items():
        for metric, values in metrics.items():
            errors.setdefault(f"{protocol.title}/{metric}", {})[row] = interval(values)
    report: dict[str, Any] = {
        **settings,
        "protocol": {"name": protocol.title, **statement},
        "units": {f"{protocol.title}/{metric}": m.unit for metric, m in protocol.metrics.items()},
        "errors": errors,
    }
    if scores.inside is not None:
        frequency = scores.inside.double().mean(0)
        levels = calibration_levels(frequency, len(frequency))
        report[f"{protocol.title}/ece"] = calibration_error(frequency, levels).item()
    report["published"] = [{**row._asdict(), "published": True} for row in published_rows(protocol.name)]
    return report


def save_scores(
    protocol: ScoringProtocol,
    scores: PersonScores,
    names: list[str],  # P
    report: Mapping[str, Any],
    path: Path,  # NAME.json; per-person values go to NAME.npz
) -> None:
    """Write values and report. The report is written last: if it exists, both are complete."""
    values = {
        f"{protocol.title}/{metric}/{row}": errors.numpy()
        for row, metrics in scores.rows.items()
        for metric, errors in metrics.items()
    }
    with atomic_file(path.with_suffix(".npz")) as temporary:
        np.savez(temporary, names=np.array(names), **values)  # type: ignore[arg-type]
    save_report(dict(report), path)
