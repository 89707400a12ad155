"""`hmdiff evaluate --protocol`: checkpoints or predictions by a named protocol, beside published results."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments, splits
from hmdiff.cli.show import progress
from hmdiff.cli.splits import PEOPLE
from hmdiff.errors import UserError
from hmdiff.names import SPLITS

if TYPE_CHECKING:
    import torch

    from hmdiff.body.body import Body
    from hmdiff.data.shards import PreparedShards
    from hmdiff.evaluate.protocols import Protocol
    from hmdiff.evaluate.report import Processes, ScoredPeople
    from hmdiff.evaluate.scored_people import Targets
    from hmdiff.pipeline import HMDiffPipeline

DATA_VARIABLE = "HMDIFF_DATA_DIR"
SYNTHETIC = "synthetic split"


class Scored:
    """What is evaluated: a checkpoint, or a folder of predictions."""

    def __init__(self, label: str, body: Body, identity: dict[str, Any], pipeline: HMDiffPipeline | None) -> None:
        self.label, self.body, self.identity, self.pipeline = label, body, identity, pipeline


def run_protocols(options: argparse.Namespace) -> int:
    from hmdiff.evaluate.ground_truth import body_kind, check_body, protocol_regressors
    from hmdiff.evaluate.protocol_table import print_protocol
    from hmdiff.evaluate.protocols import get_protocol
    from hmdiff.evaluate.report import Processes, report_of, save_scores, score_people
    from hmdiff.evaluate.store import stored, suffix
    from hmdiff.files.storage import make_folder

    if options.data is None:
        raise UserError("--protocol needs --data: a prepared folder, its name in HMDIFF_DATA_DIR, or a synthetic split")
    for name in options.protocol:
        get_protocol(name, None if options.base is None or name not in ("min_of_n", "biggs") else options.base)
    data = Data(options)
    folder = make_folder(options.output)
    device = arguments.resolve_device(options.device)
    processes = Processes(cpu=device.type == "cpu")
    reports = []
    for scored in everyone(options, processes.device(device)):
        for name in dict.fromkeys(options.protocol):
            base = options.base if name in ("min_of_n", "biggs") else None
            protocol = get_protocol(name, base, body_kind(scored.body))
            check_body(protocol, scored.body, options.same_body)
            regressors = protocol_regressors(protocol, scored.body)
            people, names, settings = data.people(options, scored, protocol)
            settings |= {"protocol_name": protocol.title, "scored": scored.label, **scored.identity}
            file = f"{scored.label}_{protocol.title.replace('/', '-')}_{data.label}{suffix(settings.get('guided_by'))}"
            path = folder / f"{file}.json"
            report = stored(path, settings)
            if report is None:
                title = f"{scored.label} {protocol.title} {data.label}"
                with bar(title, people, processes) as update:
                    scores = score_people(protocol, people, regressors, processes, update)
                report = report_of(protocol, scores, settings)
                if processes.first:
                    save_scores(protocol, scores, names(), report, path)
                processes.wait()
            reports.append((protocol, path, report))
    if processes.first:
        for protocol in {protocol.title: protocol for protocol, _, _ in reports}.values():
            mine = [report for p, _, report in reports if p.title == protocol.title]
            print_protocol(protocol, data.words, data.split is not None, mine)
        print("written: " + ", ".join(str(path) for _, path, _ in reports) + ", and everybody's values beside, as npz")
    return 0


def everyone(options: argparse.Namespace, device: torch.device) -> list[Scored]:
    """The checkpoints, or the folder of predictions."""
    from hmdiff.body.body import load_body
    from hmdiff.evaluate.protocols import get_protocol

    if options.predictions is not None and options.guidance != "none":
        raise UserError("--guidance steers a checkpoint's sampling, and --predictions are there already")
    if options.predictions is None:
        if options.body is not None:
            raise UserError("--body goes with --predictions; a checkpoint has its own")
        found = []
        for label, (pipeline, model) in arguments.load_checkpoints(options, options.checkpoint).items():
            arguments.check_sampling(pipeline, options)
            found.append(Scored(label, pipeline.body, {"model": model}, pipeline.to(device)))
        return found
    kinds = {
        get_protocol(name, options.base if name in ("min_of_n", "biggs") else None, "smpl").kind
        for name in options.protocol
    }
    name = options.body or ("free" if options.data in SPLITS else "mano_right" if kinds == {"mano"} else "smpl")
    return [Scored(options.predictions.resolve().name, load_body(name), {"body": name}, None)]


class Data:
    """`--data`: a synthetic split, or a prepared data set."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.split: str | None = options.data if options.data in SPLITS else None
        self.store: PreparedShards | None = None
        self.label, self.numbers = options.data, None
        if self.split is not None:
            if options.group:
                raise UserError(f"--group chooses sequences of a data set, and {options.data} is a synthetic split")
            self.words = f"{SYNTHETIC} {options.data}"
            return
        from hmdiff.data.shards import PreparedShards

        folder = data_folder(options.data)
        self.store, self.label = PreparedShards(folder), folder.resolve().name
        self.words = f"{self.label} ({self.store.index['settings'].get('reader') or 'prepared'})"
        if options.group:
            self.numbers = self.store.select_groups(options.group)
            self.words += f", groups {' '.join(options.group)}"

    def people(
        self, options: argparse.Namespace, scored: Scored, protocol: Protocol
    ) -> tuple[ScoredPeople, Any, dict[str, Any]]:  # people, a function that names them, settings
        """The people to score for one checkpoint (or folder of predictions) and one protocol."""
        from hmdiff.evaluate.predictions import PredictionFiles
        from hmdiff.evaluate.scored_people import FilePredictions, PipelinePredictions

        targets, count, settings = self._targets(options, scored, protocol)
        if options.predictions is not None:
            files = PredictionFiles(options.predictions, scored.body.num_vertices)
            predicted = FilePredictions(files, targets, count)
            return predicted, lambda: predicted.names, settings | {"predictions": files.fingerprint()}
        from hmdiff.evaluate.evaluation import sampling_settings
        from hmdiff.evaluate.ground_truth import raw_placement
        from hmdiff.evaluate.store import guided_by

        pipeline = scored.pipeline
        assert pipeline is not None
        source, split = self._source(options, pipeline), self.split or self.label
        sampling = arguments.sampling_of(options, pipeline)
        found = sampling_settings(pipeline, sampling)
        settings |= {name: found[name] for name in ("num_hypotheses", "num_inference_steps", "sampler", "seed")}
        if guided := guided_by(sampling.guidance):
            settings |= {"guided_by": guided}
        placement = None if protocol.centre else raw_placement(protocol, scored.body)
        people = PipelinePredictions(pipeline, source, split, targets, count, sampling, placement)
        return people, lambda: targets.names()[:count], settings

    def _targets(
        self, options: argparse.Namespace, scored: Scored, protocol: Protocol
    ) -> tuple[Targets, int, dict[str, Any]]:
        from hmdiff.evaluate.ground_truth import GroundTruth
        from hmdiff.evaluate.scored_people import RecordTargets, SampleTargets

        if self.split is not None:
            if not protocol.centre:
                raise UserError(
                    f"protocol {protocol.title} compares SMPL's raw output, which synthetic people have not; give a "
                    "prepared data set"
                )
            count = options.people or PEOPLE
            targets = SampleTargets(splits.test_people(scored.body), self.split, count)
            return targets, count, {"data": self.split, "people": count}
        assert self.store is not None
        numbers = None if self.numbers is None else self.numbers.tolist()
        recorded = RecordTargets(self.store, GroundTruth(protocol, scored.body, options.same_body), numbers)
        total = len(recorded.numbers)
        count = options.people or total
        if count > total:
            raise UserError(f"--people {count}: {self.words} has {total}; give fewer, or leave it out for all")
        settings = {
            "data": self.label,
            "people": count,
            "of": total,
            "groups": options.group or "all",
            "heatmaps": "none" if options.predictions else options.heatmaps,
            "same_body": options.same_body,
            "checksums": [shard["sha256"][:16] for shard in self.store.index["shards"]],
        }
        return recorded, count, settings

    def _source(self, options: argparse.Namespace, pipeline: HMDiffPipeline) -> Any:
        import torch

        from hmdiff.data.recorded import RecordedPeople

        model = pipeline.model.config
        size = None if model.inputs == "heatmaps" else model.image_size
        if self.split is not None:
            return splits.people_for(pipeline)
        assert self.store is not None
        return RecordedPeople(
            self.store,
            pipeline.body,
            torch.zeros(1, dtype=torch.long),
            image_size=size,
            heatmaps=options.heatmaps,
            same_body=options.same_body,
            numbers=self.numbers,
        )


def data_folder(name: str) -> Path:
    """A prepared folder by path, or by name in HMDIFF_DATA_DIR."""
    place, root = Path(name), os.environ.get(DATA_VARIABLE)
    if place.is_dir():
        return place
    if root and (Path(root) / name).is_dir():
        return Path(root) / name
    where = f"nor in {root} ({DATA_VARIABLE})" if root else f"and {DATA_VARIABLE} is not set"
    raise UserError(f"--data {name}: no such folder here {where}; hmdiff prepare writes one, or give a synthetic split")


def bar(title: str, people: ScoredPeople, processes: Processes) -> Any:
    """A progress bar in the first process, over its own part."""
    import contextlib

    if not processes.first:
        return contextlib.nullcontext(lambda done: None)
    blocks = range(0, (people.people + people.block_size - 1) // people.block_size, processes.count)
    share = sum(min(people.block_size, people.people - block * people.block_size) for block in blocks)
    return progress(title, share)
