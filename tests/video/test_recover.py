"""From a clip to tracks: tracking, shared noise, gaps, resuming, files."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pygltflib
import pytest
import torch
from clips import HEIGHT, WIDTH, Walkers, write_clip
from small import small_pipeline

from hmdiff.cli import arguments
from hmdiff.cli.main import main
from hmdiff.cli.sample_video import SMOOTHING
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.video import recover
from hmdiff.video.reading import clip_info, read_frames
from hmdiff.video.recover import Video
from hmdiff.video.smoothing import SIGMA


@functools.cache
def pipe() -> HMDiffPipeline:
    return small_pipeline()


def run(clip: Path, source: Walkers | None = None, **options: object) -> Video:
    options = {"num_inference_steps": 2, "guidance": None, "num_hypotheses": 2, **options}
    return pipe().video(clip, source=Walkers() if source is None else source, **options)


def test_two_people_are_two_tracks(tmp_path: Path) -> None:
    """The source's order of people changes; their positions, read from the tracks, do not."""
    found = run(write_clip(tmp_path / "clip.mp4", 5), smoothing=0.0)
    assert [track.number for track in found.tracks] == [0, 1] and not found.notes
    for track in found.tracks:
        middle = track.points[:, :, 0].mean(1)
        assert np.abs(np.diff(middle)) == pytest.approx(5.0, abs=0.2), "one who changes sides moves by 70 pixels"
        assert track.seen.all() and track.pose.shape == (2, 5, 24, 3) and track.times[4] == pytest.approx(4 / 25)


def test_a_hypothesis_keeps_its_noise(tmp_path: Path) -> None:
    """The source returns the same in all frames, so with shared noise nothing moves relative to the pelvis."""
    clip = write_clip(tmp_path / "clip.mp4", 4)
    shared, apart = (run(clip, smoothing=0.0, share_noise=share).tracks[0] for share in (True, False))

    def moves(track: recover.VideoTrack) -> float:
        turned = axis_angle_to_matrix(track.pose[:, :, 1:])  # not the root: it turns with the photo position
        return float((turned[:, 1:] - turned[:, :-1]).abs().mean())

    assert moves(shared) < 0.2 * moves(apart)


@pytest.mark.slow
def test_smoothing_keeps_still_what_stands_still(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 8)
    # Shared noise: with independent noise the untrained model's bodies differ too much for the kernel.
    rough, smooth = (run(clip, smoothing=sigma).tracks[0] for sigma in (0.0, 0.2))

    def jitter(track: recover.VideoTrack) -> float:
        joints = track.body(track.betas[0], axis_angle_to_matrix(track.pose[0])).joints
        return float((joints - joints[:, :1]).diff(2, dim=0).norm(dim=-1).mean())

    assert jitter(smooth) < 0.5 * jitter(rough)
    assert (rough.betas == smooth.betas).all() and rough.betas.shape == (2, pipe().body.num_betas)


def test_a_gap_is_filled_and_marked_and_a_flicker_left_out(tmp_path: Path) -> None:
    def hidden(frame: int, person: int) -> bool:
        return frame not in (2, 3) if person else frame == 3

    found = run(write_clip(tmp_path / "clip.mp4", 8), Walkers(hidden), smoothing=0.0)
    (track,) = found.tracks
    assert track.seen.tolist() == [True] * 3 + [False] + [True] * 4
    assert found.notes == (f"{found.info.path}: 1 people were seen in fewer than 3 frames and left out",)
    root = track.translation.mean(0)
    assert root[3].numpy() == pytest.approx(((root[2] + root[4]) / 2).numpy(), abs=1e-5)
    assert np.isnan(track.spread_mm[3]) and np.isfinite(track.spread_mm[[2, 4]]).all()


def test_a_lone_jump_is_filled_in_and_said(tmp_path: Path) -> None:
    """A frame far from both neighbours is excluded from the track; without smoothing it is kept."""
    clip, still = write_clip(tmp_path / "clip.mp4", 7), Walkers()
    still.place = lambda frame, person: (60.0, 50.0)  # type: ignore[method-assign]
    still.hidden = lambda frame, person: person == 1
    jumping = Walkers(still.hidden)
    jumping.place = lambda frame, person: (60.0, 50.0) if frame != 3 else (70.0, 50.0)  # type: ignore[method-assign]
    (expected,), (rough,) = run(clip, still).tracks, run(clip, jumping, smoothing=0.0).tracks
    found = run(clip, jumping)
    (track,) = found.tracks
    assert rough.seen.all() and np.flatnonzero(~track.seen).tolist() == [3]
    assert found.notes == (
        f"{found.info.path}: keypoints jumped for one frame, 1 times; filled in (--smoothing 0 keeps them)",
    )
    assert float((track.translation - expected.translation).abs().max()) < 0.02
    assert float((rough.translation - expected.translation).abs().max()) > 0.1


@pytest.mark.slow
def test_a_damaged_frame_is_one_note(tmp_path: Path) -> None:
    found = run(write_clip(tmp_path / "clip.avi", 10, "MJPG", damaged=4))
    assert found.notes == (f"{found.info.path}: 1 frames could not be decoded, the first before frame 4; left out",)
    assert all(len(track.frames) == 9 for track in found.tracks)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "FRAMES_AT_ONCE", 3)
    clip, kept = write_clip(tmp_path / "clip.mp4", 8), tmp_path / "frames"
    whole = run(clip)

    class Killed(Walkers):
        def estimate(self, photo: np.ndarray, boxes: object = None) -> object:  # type: ignore[override]
            if len(self.asked) == 7:
                raise KeyboardInterrupt
            return super().estimate(photo, boxes)

    with pytest.raises(KeyboardInterrupt):
        run(clip, Killed(), folder=kept)
    assert sorted(path.name for path in kept.glob("*.npz")) == ["00000.npz", "00001.npz"]
    source = Walkers()
    again = run(clip, source, folder=kept)
    assert source.asked == [6, 7]
    for one, other in zip(whole.tracks, again.tracks, strict=True):
        assert torch.allclose(one.pose, other.pose, atol=1e-5) and (one.seen == other.seen).all()
    other = Walkers()
    run(clip, other, folder=kept, seed=5)
    assert other.asked == list(range(8)), "chunks of another seed are no part of this run"


def test_a_calibrated_model_says_how_far_to_trust_a_track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Calibration:
        """A confidence of one hundredth per millimetre of spread, at the radius of a person's confidence."""

        def within(self, radius: int, joints: torch.Tensor, surface: torch.Tensor) -> object:
            assert radius == 100
            person = surface.mean(-1) / (1 + surface.mean(-1))
            return type("Within", (), {"person": person, "vertices": surface, "joints": joints})()

    original = HMDiffPipeline.__call__

    def called(self: HMDiffPipeline, *arguments: object, **named: object) -> object:
        return dataclasses.replace(original(self, *arguments, **named), calibration=Calibration())

    monkeypatch.setattr(HMDiffPipeline, "__call__", called)
    track = run(write_clip(tmp_path / "clip.mp4", 4), smoothing=0.0).tracks[0]
    assert track.confidence == pytest.approx(track.spread_mm / (1 + track.spread_mm), rel=1e-5)
    assert (track.arrays()["confidence"] == track.confidence).all()


def test_nobody_in_a_clip(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip\.mp4: nobody was found in any of its 4 frames"):
        run(write_clip(tmp_path / "clip.mp4", 4), Walkers(lambda frame, person: True))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(arguments, "load_pipeline", lambda name, device: pipe())
    monkeypatch.setattr("hmdiff.estimators.choose.load_source", lambda *arguments: Walkers())
    write_clip(tmp_path / "clip.mp4", 4)
    settings = ["--num-hypotheses", "2", "--steps", "2", "--guidance", "none"]
    return ["sample", str(tmp_path / "clip.mp4"), *settings, "--output", str(tmp_path / "out")]


@pytest.mark.slow
def test_the_command(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "clip.mp4, track 1" in said and "seen in 4 of 4 frames" in said
    out = tmp_path / "out"
    wanted = {f"clip_track_{n}{end}" for n in (0, 1) for end in (".npz", "_animated.glb", ".bvh")}
    assert {path.name for path in out.iterdir()} == wanted | {"clip_overlay.mp4", "results.jsonl"}
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["person"], line["people"], line["seen"]) for line in lines] == [(0, 2, 4), (1, 2, 4)]
    glb = pygltflib.GLTF2().load(str(out / "clip_track_0_animated.glb"))
    assert [each.name for each in glb.animations] == ["mean", "hypothesis_00", "hypothesis_01"]
    assert "Frames: 4" in (out / "clip_track_1.bvh").read_text()
    info = clip_info(out / "clip_overlay.mp4")
    assert info.size == (WIDTH, HEIGHT) and len(list(read_frames(info))) == 4
    with np.load(out / "clip_track_0.npz") as data:
        assert np.isnan(data["confidence"]).all() and lines[0]["confidence"] is None  # an untrained model has none
        assert data["pose"].shape == (2, 4, 24, 3) and data["seed"] == 0 and data["smoothing_s"] == SIGMA == SMOOTHING
    assert main(command) == 0
    assert "done before with these settings" in capsys.readouterr().out


def test_refusals(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip_overlay.mp4").write_bytes(b"of another program")
    assert main(command) == 2
    assert "clip_overlay.mp4: is there already and was not written by hmdiff" in capsys.readouterr().err
    assert main([*command, "--box", "1,1,9,9"]) == 2
    assert "--box is about photos" in capsys.readouterr().err
    assert main([*command, "--pose", "none"]) == 2
    assert "a video needs a pose estimator" in capsys.readouterr().err
