"""Dry-run checks of the training data: how many people, with which labels."""

from __future__ import annotations

from collections.abc import Sized

import torch

from hmdiff.body.body import Body
from hmdiff.body.mesh import MeshSampler
from hmdiff.build import build_source
from hmdiff.config import Config
from hmdiff.data.mixture import PERIOD, Mixture, NamedSplits
from hmdiff.data.sample import PeopleSource, Sample

CAREFUL = "care"
Found = str | tuple[str, str]  # text, or (state, text) if the state is not fine


def describe_source(
    config: Config,
    body: Body,
    mesh: MeshSampler,
    name: str,
    records: list[int] | None = None,  # the number of records is appended
) -> Found:
    """Describe one source. Reads a block at its start and one in its middle."""
    source = build_source(config, body, mesh)
    held = held_by(source)
    sample = source.block("train", 0)
    text = name
    if held is not None:
        text += f": {held:,} records"
        if records is not None:
            records.append(held)
        far = held // (2 * source.block_size)
        if far:
            source.block("train", far)
    labels = _labels(sample)
    text += f"; of {len(sample)} people read: {labels or 'no label'}"
    if source.image_size is not None:
        text += f"; pictures of {source.image_size} px"
    if not labels:
        return CAREFUL, f"{text}: nobody of them teaches anything"
    return text


def describe_mixture(config: Config, body: Body, mesh: MeshSampler) -> str:
    """The share of blocks that each source of a mixture contributes."""
    source = build_source(config, body, mesh)
    while not isinstance(source, Mixture):
        source = source.train if isinstance(source, NamedSplits) else source.source  # type: ignore[attr-defined]
    turns = [source.source_of(number)[0] for number in range(PERIOD)]
    shares = [turns.count(number) / PERIOD for number in range(len(source.sources))]
    return "shares of the blocks: " + ", ".join(f"{share:.1%}" for share in shares)


def describe_splits(config: Config, body: Body, mesh: MeshSampler) -> str:
    """Describe the validation and test splits. Reads a block of each with the full mesh."""
    source = build_source(config, body, mesh, full_mesh=True)
    words = []
    for name, people in (("val", config.evaluation.people), ("test", config.evaluation.test_people)):
        if not people:
            words.append(f"{name}: none")
            continue
        sample = source.block(name, 0)
        held = held_by(source.splits[name] if isinstance(source, NamedSplits) else source)
        words.append(f"{name}: {people} synthetic people" if held is None else f"{name}: {people} of {held:,} records")
        assert sample.vertices is not None
    return "; ".join(words)


def held_by(source: PeopleSource) -> int | None:
    """Number of people in a source; None for synthetic people, which are unlimited."""
    while isinstance(source, NamedSplits | Mixture):
        source = source.train if isinstance(source, NamedSplits) else source.sources[0]
    return len(source) if isinstance(source, Sized) else None


def _labels(sample: Sample) -> str:
    """How many people have each label."""
    counted = {
        "mesh": _count(sample.coarse_vertices, sample.has_vertices),
        "3D joints": _count(sample.joints_3d, sample.has_joints_3d),
        "2D keypoints": _count(sample.joints_2d, sample.joints_2d_confidence),
        "camera": _count(sample.pelvis, sample.has_perspective),
    }
    return ", ".join(f"{name} {count}" for name, count in counted.items() if count)


def _count(value: torch.Tensor | None, mask: torch.Tensor | None) -> int:
    if value is None:
        return 0
    return len(value) if mask is None else int((mask > 0).reshape(len(mask), -1).any(-1).sum())
