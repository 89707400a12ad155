"""The last step of guidance: surface and keypoints move to confident peaks, in the image plane, and not beyond."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small import people_block, small_pipeline
from torch import Tensor

from hmdiff.body.skeletons import HALPE26
from hmdiff.diffusion.guidance import PAPER, Guidance
from hmdiff.diffusion.hypotheses import keypoint_nearness
from hmdiff.errors import UserError
from hmdiff.evaluate.evaluation import as_heatmaps, camera_arguments
from hmdiff.geometry import perspective_projection
from hmdiff.heatmaps import Crop
from hmdiff.pipeline.image_plane import FARTHEST, REACH, moved_to_peaks

FOCAL, SIDE = 500.0, 200.0


def scene() -> tuple[Tensor, Tensor, Crop]:
    """Two distant keypoints, at depths of 5 m and 5.5 m, with a surface point at each."""
    keypoints = torch.tensor([[[[0.0, -0.8, 0.0], [0.0, 0.8, 0.5]]]])
    translation = torch.tensor([[[0.2, 0.0, 5.0]]])
    crop = Crop.of(torch.tensor([[320.0, 240.0]]), torch.tensor([SIDE])).with_camera(
        torch.tensor([[640.0, 480.0]]), torch.tensor([FOCAL])
    )
    return keypoints, translation, crop


def seen(keypoints: Tensor, translation: Tensor, crop: Crop) -> Tensor:  # (1, 2, 2) pixels
    placed = keypoints + translation[:, :, None]
    return perspective_projection(placed, crop.focal[:, None], crop.principal_point[:, None])[:, 0]


def moved(way: list[list[float]], confidence: list[float], share: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    keypoints, translation, crop = scene()
    peaks = seen(keypoints, translation, crop) + torch.tensor([way])
    nearness = keypoint_nearness(keypoints[0, 0], keypoints[0, 0], REACH)
    found = moved_to_peaks(keypoints, keypoints, translation, peaks, torch.tensor([confidence]), crop, nearness, share)
    return found, seen(found, translation, crop), peaks


def test_certain_keypoints_are_seen_at_their_peaks_and_keep_their_depth() -> None:
    found, now, peaks = moved([[6.0, -4.0], [-3.0, 5.0]], [1.0, 1.0])
    torch.testing.assert_close(now, peaks, atol=1e-2, rtol=0)
    assert torch.equal(found[..., 2], scene()[0][..., 2])


def test_a_keypoint_goes_by_its_confidence_and_by_the_share() -> None:
    before = seen(*scene())
    _, now, peaks = moved([[6.0, -4.0], [-3.0, 5.0]], [0.25, 0.0], share=0.6)
    expected = before + 0.6 * torch.tensor([0.5, 0.0])[:, None] * (peaks - before)
    torch.testing.assert_close(now, expected, atol=1e-2, rtol=0)


def test_a_peak_that_is_far_off_moves_nothing() -> None:
    reach = FARTHEST * SIDE
    before = seen(*scene())
    _, now, peaks = moved([[reach * 1.01, 0.0], [reach * 0.99, 0.0]], [1.0, 1.0])
    torch.testing.assert_close(now[0, 0], before[0, 0], atol=1e-2, rtol=0)
    torch.testing.assert_close(now[0, 1], peaks[0, 1], atol=1e-2, rtol=0)


@pytest.mark.slow
def test_the_pipeline_does_it_after_dat_alone() -> None:
    pipe, block = small_pipeline(), people_block()
    maps = as_heatmaps(block)
    options = {"num_hypotheses": 3, "num_inference_steps": 2, "surface": "vertices", **camera_arguments(block)}

    def distance(guidance: Guidance) -> Tensor:
        output = pipe(heatmaps=maps, guidance=guidance, **options)
        assert output.reprojection is not None
        error = output.reprojection.error
        near = error < FARTHEST
        return (error * near).sum() / near.sum()

    assert distance(Guidance()) < 0.8 * distance(Guidance(peaks=0.0))
    for mode in ("none", "disrupted"):
        without, with_it = (
            pipe(heatmaps=maps, guidance=Guidance(mode=mode, peaks=peaks), **options).vertices for peaks in (0.0, 1.0)
        )
        assert torch.equal(without, with_it)
    assert PAPER.peaks == 0
    with pytest.raises(UserError, match=r"guidance peaks -1\.0: a number from 0 on"):
        dataclasses.replace(Guidance(), peaks=-1.0)


def test_joints_without_weight_pull_at_nothing() -> None:
    pipe, block = small_pipeline(), people_block()
    legs = [float(name.endswith(("knee", "ankle", "heel", "toe"))) for name in HALPE26]
    options = {"num_hypotheses": 2, "num_inference_steps": 2, "surface": "vertices", **camera_arguments(block)}

    def vertices(peaks: float) -> Tensor:
        guidance = Guidance(joint_weights=tuple(legs), peaks=peaks, fall_back=False)
        return pipe(heatmaps=as_heatmaps(block), guidance=guidance, **options).vertices

    moved = (vertices(1.0) - vertices(0.0)).norm(dim=-1).amax((0, 1))
    height = pipe.body.v_template[:, 1]
    assert moved[height < height.min() + 0.6].max() > 1e-3 > 1e-4 > moved[height > height.max() - 0.2].max()
