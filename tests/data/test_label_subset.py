"""Sources that keep only keypoint labels: which are removed, which stay, and the config option."""

from __future__ import annotations

import pytest
import torch
from small import free_body, people, small_config

from hmdiff.build import build_source
from hmdiff.data.label_subset import LabelSubset
from hmdiff.data.sample import Sample
from hmdiff.errors import UserError
from hmdiff.evaluate.mean_mesh import mean_mesh_errors


def first(labels: str, **more: object) -> Sample:
    words = {"kind": "synthetic", "labels": labels, **more}
    entry = "{" + ", ".join(f"{key}: {value}" for key, value in words.items()) + "}"
    config = small_config("unused", "data.kind=mixture", f"data.sources=[{entry}]")
    return build_source(config, *free_body()).block("train", 0)


def test_what_is_kept() -> None:
    whole, both, flat = (first(labels) for labels in ("all", "keypoints", "keypoints_2d"))
    assert whole.has_vertices is None or whole.has_vertices.all()
    for sample in (both, flat):
        for name in ("has_vertices", "has_joints_3d", "has_camera", "has_perspective"):
            assert not getattr(sample, name).any(), name
        assert torch.equal(sample.joints_2d, whole.joints_2d) and torch.equal(sample.heatmaps, whole.heatmaps)
        assert (sample.joints_2d_confidence > 0).any()
    assert both.has_keypoints_3d is None or both.has_keypoints_3d.all()
    assert not flat.has_keypoints_3d.any()
    zero_unlabelled = flat.zero_unlabelled()
    assert (zero_unlabelled.coarse_vertices == 0).all() and (zero_unlabelled.keypoints_3d == 0).all()


def test_a_seed_of_its_own_and_splits_that_stay() -> None:
    assert torch.equal(first("keypoints_2d").joints_2d, first("all").joints_2d)
    assert not torch.equal(first("keypoints_2d", seed=7).joints_2d, first("all").joints_2d)
    source = LabelSubset(people(), "keypoints_2d")  # evaluation uses all labels
    assert torch.equal(
        source.block("val", 0).zero_unlabelled().coarse_vertices, people().block("val", 0).coarse_vertices
    )


def test_a_training_on_keypoints_alone_is_evaluated() -> None:
    """Without meshes in training there is no mean mesh to compare with."""
    assert 50 < mean_mesh_errors(LabelSubset(people(True, 4), "keypoints_2d"), "val", 4, 8)["pve"]["value"] < 2000


def test_bad_words() -> None:
    with pytest.raises(UserError, match="labels 'mesh' of a source are not known; choose one of all, keypoints"):
        first("mesh")
    with pytest.raises(UserError, match=r"seed -1; a whole number from 0 on"):
        first("all", seed=-1)
