"""Sample everybody in a set of photos in batches, and write their files in parallel."""

from __future__ import annotations

import argparse
import errno
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmdiff.cli import arguments
from hmdiff.errors import UserError
from hmdiff.names import SAVED

if TYPE_CHECKING:
    from torch import Tensor

    from hmdiff.cli.photo_list import Results
    from hmdiff.estimators.people import PhotoPeople
    from hmdiff.pipeline import HMDiffPipeline, MeshOutput

PEOPLE_AT_ONCE = 16  # bounds the memory of the meshes; does not change results


def one_photo_s(error: UserError | OSError) -> UserError:
    """An error of one photo, after which the others continue. A full disk affects all photos and is raised."""
    from hmdiff.files.reading import read_failure

    if isinstance(error, UserError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    return read_failure(str(error.filename or "a file"), error)


def about(photo: Path, error: UserError) -> str:
    return str(error) if str(photo) in str(error) else f"{photo}: {error}"


def sample_people(
    pipeline: HMDiffPipeline,
    people: Sequence[PhotoPeople],
    options: argparse.Namespace,
    results: Results | None = None,
    bases: Mapping[Path, str] | None = None,  # names of the photos, unique in the run
) -> list[str]:
    """Sample everyone in batches; returns an error message for each photo that could not be written.

    A second thread writes each batch while the next one is sampled.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    from tqdm import tqdm

    from hmdiff.cli.main import warn
    from hmdiff.files.outputs import output_names
    from hmdiff.viz.person_files import Report, Scene, write_person

    everyone = [(number, person) for number, photo in enumerate(people) for person in range(len(photo.heatmaps))]
    names = output_names(
        [photo.photo for photo in people],
        [len(photo.heatmaps) for photo in people],
        None if bases is None else [bases[photo.photo] for photo in people],
        () if results is None else results.names,
    )
    scenes = [Scene() for _ in people]
    failures: dict[Path, str] = {}
    settings = {
        "seed": options.seed,
        "checkpoint": options.checkpoint,
        "guidance_mode": options.guidance,
        "steps": options.steps or pipeline.num_inference_steps,
    }
    kinds = getattr(options, "save", SAVED)
    started = time.perf_counter()
    total = len(everyone) * options.num_hypotheses
    bar = tqdm(total=total, unit="body", desc="sampling", disable=None, leave=False)
    written = 0

    def write(output: MeshOutput, distance: Tensor | None, row: int, number: int, person: int) -> Report:
        photo, stem = people[number], Path(options.output) / names[number, person]
        said = write_person(output, row, photo, person, stem, pipeline.body, distance, settings, kinds)
        if "glb" in kinds:
            scenes[number].add(output, row, person)
            if person == len(photo.heatmaps) - 1:
                base = photo.photo.stem if bases is None else bases[photo.photo]
                scenes[number].save(Path(options.output) / f"{base}_scene.glb")
        return said

    def finish(jobs: Sequence[tuple[int, int, Future[Report]]]) -> None:
        nonlocal written
        for number, person, job in jobs:
            photo, name = people[number], names[number, person]
            bar.set_description(f"writing {name}")
            try:
                said = job.result()
            except (UserError, OSError) as error:
                failures[photo.photo] = about(photo.photo, one_photo_s(error))
                continue
            written += 1
            if results is not None:
                results.add(photo.photo, person=person, people=len(photo.heatmaps), npz=f"{name}.npz", **said.values)
            tqdm.write(said.line)
            if said.warning:
                warn(f"{photo.photo}: the result does not fit its evidence: {said.warning}")
        bar.set_description("sampling")

    with ThreadPoolExecutor(1) as writer:
        jobs: list[tuple[int, int, Future[Report]]] = []
        for first in range(0, len(everyone), PEOPLE_AT_ONCE):
            batch = everyone[first : first + PEOPLE_AT_ONCE]
            output = sample_batch(pipeline, people, batch, options, bar.update)
            distance = _distance(output, people, batch)
            following = [
                (number, person, writer.submit(write, output, distance, row, number, person))
                for row, (number, person) in enumerate(batch)
            ]
            finish(jobs)
            jobs = following
        finish(jobs)
    bar.close()
    seconds = time.perf_counter() - started
    what = f"{written} of {len(everyone)} people, {options.num_hypotheses} hypotheses each"
    print(f"{what}, written to {options.output}/ in {seconds:.1f} s")
    return list(failures.values())


def sample_batch(
    pipeline: HMDiffPipeline,
    people: Sequence[PhotoPeople],
    batch: Sequence[tuple[int, int]],  # (photo index, person index)
    options: argparse.Namespace,
    progress: Any = None,
) -> MeshOutput:
    """One pipeline call. The seed depends on a person's index in the photo, not on the rest of the batch."""
    import torch

    from hmdiff.cli.depth_maps import depth_crops
    from hmdiff.estimators.people import crops
    from hmdiff.heatmaps import concatenate_heatmaps

    images = None
    if pipeline.model.config.inputs != "heatmaps":
        pictures = {number: people[number].pixels() for number in {number for number, _ in batch}}
        size = pipeline.model.config.image_size
        images = torch.cat([crops(pictures[n], people[n].heatmaps[person], size) for n, person in batch])
    output: MeshOutput = pipeline(
        images,
        concatenate_heatmaps([people[number].heatmaps[person] for number, person in batch]),
        arguments.sampling_of(options, pipeline),
        people=[person for _, person in batch],
        progress=progress,
        depth=depth_crops(people, batch) if pipeline.model.config.depth_map else None,
    )
    return output


def _distance(output: MeshOutput, people: Sequence[PhotoPeople], batch: Sequence[tuple[int, int]]) -> Tensor | None:
    """Distance of the hypotheses' keypoints to the heatmap peaks (B, N), pixels; None for a body without keypoints."""
    from hmdiff.heatmaps import concatenate_heatmaps
    from hmdiff.pipeline import keypoint_distance

    if output.keypoints is None:
        return None
    return keypoint_distance(output, concatenate_heatmaps([people[n].heatmaps[person] for n, person in batch]))
