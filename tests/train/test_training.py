"""Training loop: it learns, resumes to the same weights after a stop or kill, and several processes equal one."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from small import free_body, people_block, small_config
from torch import Tensor

from hmdiff.build import build_model, build_scheduler
from hmdiff.config import Config
from hmdiff.errors import UserError
from hmdiff.files.locks import claim
from hmdiff.models.prediction import Prediction
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train import checkpoint as checkpoints
from hmdiff.train import loop as training
from hmdiff.train.loop import Trainer
from hmdiff.train.step import Draws, training_losses
from hmdiff.train.stream import TrainingStream

State = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("on_the_processor")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip parts of the evaluation that are tested elsewhere."""
    monkeypatch.setattr(Trainer, "_picture", lambda trainer: None)
    monkeypatch.setattr(training, "mean_mesh_error", lambda *_: 300.0)


def train(values: Config) -> dict[str, Any]:
    return Trainer(values).run()


def config(folder: Path, steps: int, *overrides: str) -> Config:
    checkpoints = (f"training.checkpoint_every={steps}", f"training.evaluate_every={steps}")
    return small_config(folder, f"training.steps={steps}", *checkpoints, *overrides)


def checkpoint(folder: Path, step: int) -> State:
    """Weights, EMA and optimiser state of a checkpoint, as a flat dictionary."""
    place = folder / "checkpoints" / f"step_{step:08d}"
    flat = {f"model.{name}": value for name, value in load_file(place / "model.safetensors").items()}
    flat |= {f"ema.{name}": value for name, value in load_file(place / "ema.safetensors").items()}
    optimizer = torch.load(place / "optimizer.bin", weights_only=True)
    for number, values in optimizer["state"].items():
        flat |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return flat


def assert_same(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} differ: {different[:3]}"


def log_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def in_a_process(work: Callable[[], None], **environment: str) -> multiprocessing.process.BaseProcess:
    """By fork, since importing torch and diffusers takes seconds."""

    def run() -> None:
        os.environ.update(environment)
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


# -- it learns --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_learns_and_leaves_a_pipeline(tmp_path: Path, quick: None) -> None:
    values = config(tmp_path, 60, "training.batch_size=8", "data.block_size=8", "training.log_every=10")
    report = train(values)
    rows = [row for row in log_rows(tmp_path) if row["loss"]]
    assert [int(row["step"]) for row in rows] == list(range(10, 61, 10))
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-2:]) / 2 < 0.6 * losses[0]
    for row in rows:
        assert float(row["points"]) + float(row["camera"]) == pytest.approx(float(row["loss"]), rel=1e-4)
    assert report["errors"]["pve"]["oracle"]["value"] <= report["errors"]["pve"]["first"]["value"]
    last = log_rows(tmp_path)[-1]
    assert float(last["val_pve_mean"]) == pytest.approx(report["errors"]["pve"]["mean"]["value"], rel=1e-4)
    assert float(last["val_pve_of_mean_mesh"]) == 300

    saved = HMDiffPipeline.from_pretrained(tmp_path / "pipeline")
    state = checkpoint(tmp_path, 60)
    for number, (name, value) in enumerate(saved.model.named_parameters()):
        assert torch.equal(value, state[f"ema.{number:04d}"]), name  # the saved pipeline has the EMA weights
    assert any(not torch.equal(value, state[f"model.model.{name}"]) for name, value in saved.model.named_parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ("diffusion.prediction_type=epsilon",),
        ("model.mode=direct", "model.stack=2", "loss.points=euclidean", "loss.edges=0.1"),
        ("model.backbone=conv", "loss.weighting=uniform"),
        pytest.param(("model.inputs=both", "model.backbone=resnet18", "data.image_size=64"), marks=pytest.mark.slow),
        pytest.param(("model.inputs=image", "model.backbone=resnet18", "data.image_size=64"), marks=pytest.mark.slow),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_variant_learns_a_batch(overrides: tuple[str, ...]) -> None:
    """And all its parameters; `test_recorded_numbers` has numbers and gradients of the other variants."""
    values = small_config("unused", *overrides)
    body, mesh = free_body()
    model, scheduler = build_model(values, body, mesh), build_scheduler(values)
    model.upsample_weight.requires_grad_(False)
    people = people_block()
    if values.model.get("inputs", "heatmaps") != "heatmaps":
        people = dataclasses.replace(people.map(lambda tensor: tensor[:2]), image=torch.rand(2, 3, 64, 64))
    edges = mesh.coarse_faces[:, :2] if values.loss.edges else None
    steps = torch.tensor([[20, 199]] * len(people))
    noise = torch.randn(len(people), 2, model.num_points, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        terms = training_losses(model, scheduler, values.loss, people, Draws(steps, noise), edges)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
        assert all(value.isfinite() for value in terms.values())
    assert losses[-1] < losses[0]
    assert ("edges" in terms) == bool(values.loss.edges)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad is not None or name == "upsample_weight", name


def test_losses_say_what_the_noise_level_was_told() -> None:
    """A perfect network has zero loss at any noise level; x_k and its time fraction match the sampler's."""
    values = small_config("unused", "diffusion.num_train_timesteps=100")
    body, mesh = free_body()
    plain, scheduler, people = build_model(values, body, mesh), build_scheduler(values), people_block()
    assert people.coarse_vertices is not None and people.joints_3d is not None and people.camera is not None
    truth = plain.to_points(people.coarse_vertices, people.joints_3d)[:, None]
    steps, noise = torch.tensor([[0, 49, 99]] * 8), torch.randn(8, 3, plain.num_points, 3)
    seen: dict[str, Tensor] = {}

    def knowing(points: Tensor, step: Tensor, *_: Any) -> Prediction:
        seen.update(points=points, step=step)
        assert people.camera is not None
        return Prediction(truth.expand_as(points), people.camera)

    plain.forward = knowing  # type: ignore[method-assign]
    terms = training_losses(plain, scheduler, values.loss, people, Draws(steps, noise))
    assert terms["loss"].item() < 1e-6
    torch.testing.assert_close(seen["step"][0], torch.tensor([0.01, 0.5, 1.0]))
    assert torch.equal(seen["points"][:, 2], noise[:, 2])  # the last step is pure noise
    share = scheduler.alphas_cumprod[49]
    torch.testing.assert_close(seen["points"][:, 1], share.sqrt() * truth[:, 0] + (1 - share).sqrt() * noise[:, 1])


@pytest.mark.slow
def test_bf16_trains(tmp_path: Path, quick: None) -> None:
    train(config(tmp_path, 3, "training.mixed_precision=bf16"))
    assert all(value.dtype == torch.float32 for name, value in checkpoint(tmp_path, 3).items() if "ema" in name)
    losses = [float(row["loss"]) for row in log_rows(tmp_path) if row["loss"]]
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(tmp_path / "exact", 3))
    exact = [float(row["loss"]) for row in log_rows(tmp_path / "exact") if row["loss"]]
    assert losses == pytest.approx(exact, rel=0.05) and losses != exact


# -- its numbers ------------------------------------------------------------------------------------------------------


def test_learning_rate_and_ema(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, 12, "training.warmup_steps=4", "training.ema_decay=0.6"))
    batches = iter(trainer.stream[index] for index in range(12))
    rates, decays = [], []
    name = "camera_token"
    number = [key for key, _ in trainer.plain.named_parameters()].index(name)
    for step in range(12):
        before = trainer.ema.shadow_params[number].clone()
        trainer._one_step(batches)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        after, weight = trainer.ema.shadow_params[number], dict(trainer.plain.named_parameters())[name]
        decay = 0.0 if step == 0 else min(0.6, 1 - (1 + step) ** -0.75)
        torch.testing.assert_close(after, decay * before + (1 - decay) * weight, rtol=1e-5, atol=1e-6)
        decays.append(decay)
        trainer.step += 1
    assert decays[-1] == 0.6 and 0 < decays[1] < 0.6
    cosine = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx([0.003 * factor for factor in (0.25, 0.5, 0.75, 1.0, *cosine)])
    groups = trainer.optimizer.param_groups
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() <= 1 for p in groups[1]["params"])
    assert groups[1]["weight_decay"] == 0 < groups[0]["weight_decay"]


@pytest.mark.slow
def test_a_stream_is_shared_without_overlap(tmp_path: Path) -> None:
    values = config(tmp_path, 4, "training.batch_size=8")
    trainer = Trainer(values)
    whole = trainer.stream
    half = config(tmp_path, 4, "training.batch_size=4")
    parts = [TrainingStream(whole.data, half, rank, 2, trainer.plain) for rank in (0, 1)]
    for index in range(2):
        people, draws = whole[index]
        pieces = [part[index] for part in parts]
        assert people.joints_3d is not None
        assert torch.equal(people.joints_3d, torch.cat([piece[0].joints_3d for piece in pieces]))  # type: ignore[misc]
        assert torch.equal(draws.steps, torch.cat([piece[1].steps for piece in pieces]))
        assert torch.equal(draws.noise, torch.cat([piece[1].noise for piece in pieces]))
        assert {piece[1].shared_seed for piece in pieces} == {draws.shared_seed}
    assert whole[0][1].shared_seed != whole[1][1].shared_seed
    with pytest.raises(UserError, match=r"training.batch_size 6 is not a multiple of data.block_size 4"):
        TrainingStream(whole.data, config(tmp_path, 4, "training.batch_size=6"), 0, 1, trainer.plain)


@pytest.mark.slow
def test_accumulation_equals_a_bigger_batch(tmp_path: Path, quick: None) -> None:
    train(config(tmp_path / "whole", 3, "training.batch_size=8", "training.log_every=1"))
    train(config(tmp_path / "parts", 3, "training.gradient_accumulation=2", "training.log_every=1"))
    compare_runs(tmp_path / "whole", tmp_path / "parts", 3)


def compare_runs(first: Path, second: Path, step: int) -> None:
    """Equal up to the order of summation."""
    losses = [[float(row["loss"]) for row in log_rows(folder) if row["loss"]] for folder in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = checkpoint(first, step), checkpoint(second, step)
    for name, value in one.items():
        if name.startswith("model.") and value.is_floating_point():
            assert_close_but_for_rounding(value, two[name], name)


def assert_close_but_for_rounding(value: Tensor, other: Tensor, name: str) -> None:
    """Adam divides by |gradient|: where the gradient is only rounding, the step's sign is arbitrary."""
    difference = (value.double() - other.double()).abs()
    assert difference.mean() < 1e-4 and (difference > 1e-3).float().mean() < 0.02, name


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("camera", ["0.1", "0.0"])  # without a camera loss some parameters have no gradient
def test_two_processes_equal_twice_the_batch(tmp_path: Path, quick: None, camera: str) -> None:
    shared = ("training.log_every=1", f"loss.camera={camera}")
    train(config(tmp_path / "one", 3, "training.batch_size=8", *shared))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        in_a_process(
            lambda: train(config(tmp_path / "two", 3, *shared)) and None,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE="2",
            **environment,
        )
        for rank in range(2)
    ]
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    compare_runs(tmp_path / "one", tmp_path / "two", 3)
    assert len(list((tmp_path / "two" / "checkpoints" / "step_00000003").glob("random_states_*"))) == 2


def as_if_on_gpus() -> None:
    """accelerate supports FSDP only on accelerators: make these gloo processes report one."""
    real = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **options: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        real(self, *args, **options)

    AcceleratorState.__init__ = init  # type: ignore[method-assign]  # in a separate process


@pytest.mark.slow
@pytest.mark.processes
def test_weights_that_are_shared_out_train_and_resume_the_same(tmp_path: Path, quick: None) -> None:
    """configs/accelerate/fsdp.yaml on two processes: the weights of one process, bit-equal after a resume."""
    launcher = yaml.safe_load((Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp.yaml").read_text())
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    settings = {names.get(name, name.upper()): str(value) for name, value in launcher["fsdp_config"].items()}
    every = ("training.checkpoint_every=2", "training.log_every=1")

    def in_parts() -> None:
        as_if_on_gpus()
        trainer = Trainer(config(tmp_path / "parts", 3, *every))
        assert trainer.shown is not trainer.plain and trainer.accelerator.distributed_type == DistributedType.FSDP
        trainer.run()

    def both() -> None:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        environment |= settings | {"ACCELERATE_USE_FSDP": "true", "LOCAL_WORLD_SIZE": "2"}
        processes = [in_a_process(in_parts, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
        for process in processes:
            process.join(90)
        assert [process.exitcode for process in processes] == [0, 0]

    both()
    averaged = load_file(tmp_path / "parts" / "checkpoints" / "step_00000003" / "ema.safetensors")
    saved = load_file(tmp_path / "parts" / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    train(config(tmp_path / "whole", 3, "training.batch_size=8", *every))
    expected = load_file(tmp_path / "whole" / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert_close_but_for_rounding(value, expected[name], name)
    assert log_rows(tmp_path / "parts")[-1].keys() == log_rows(tmp_path / "whole")[-1].keys()

    for place in ("checkpoints/step_00000003", "pipeline"):
        shutil.rmtree(tmp_path / "parts" / place)
    both()
    assert_same(load_file(tmp_path / "parts" / "checkpoints" / "step_00000003" / "ema.safetensors"), averaged)
    assert_same(load_file(tmp_path / "parts" / "pipeline" / "model" / "diffusion_pytorch_model.safetensors"), saved)


# -- it resumes -------------------------------------------------------------------------------------------------------

STEPS, EVERY = 9, 3
STEADY = (f"training.checkpoint_every={EVERY}", "training.log_every=2", "training.evaluate_every=6")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(Trainer, "_picture", lambda trainer: None)
        patch.setattr(training, "mean_mesh_error", lambda *_: 300.0)
        torch.set_num_threads(1)
        train(config(folder, STEPS, *STEADY))
    return folder


def assert_same_run(folder: Path, reference: Path) -> None:
    assert_same(checkpoint(folder, STEPS), checkpoint(reference, STEPS))
    name = "model/diffusion_pytorch_model.safetensors"
    assert_same(load_file(folder / "pipeline" / name), load_file(reference / "pipeline" / name))
    evaluations = [[row for row in log_rows(place) if row["val_pve_mean"]] for place in (folder, reference)]
    assert evaluations[0][-1]["val_pve_mean"] == evaluations[1][-1]["val_pve_mean"]
    assert [row["step"] for row in evaluations[0]] == ["6", "9"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 5, 9])
def test_stopped_and_started_again(tmp_path: Path, quick: None, uninterrupted: Path, stop_at: int) -> None:
    """SIGTERM at a checkpoint, between two checkpoints, and at the last step."""
    values = config(tmp_path, STEPS, *STEADY)
    trainer = Trainer(values)
    step = trainer._one_step

    def until(batches: Iterator) -> dict[str, Tensor]:
        terms = step(batches)
        if trainer.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms

    trainer._one_step = until  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    trainer.run()
    assert trainer.step == stop_at and signal.getsignal(signal.SIGTERM) is before
    report = train(values)
    assert report["errors"]["pve"]["first"]["value"] > 0
    assert_same(checkpoint(tmp_path, STEPS), checkpoint(uninterrupted, STEPS))
    losses = [row for row in log_rows(tmp_path) if row["loss"]]
    expected = [row for row in log_rows(uninterrupted) if row["loss"]]
    if stop_at != 5:  # else the row's average only covers the steps since the stop
        assert [row["loss"] for row in losses if row["step"] in "89"] == [
            row["loss"] for row in expected if row["step"] in "89"
        ]
    assert [row["step"] for row in losses] == [row["step"] for row in expected] == ["2", "4", "6", "8", "9"]


@pytest.mark.slow
def test_minutes_end_a_call_and_not_the_run(tmp_path: Path, quick: None) -> None:
    values = config(tmp_path, 3, "training.minutes=1e-6")
    for step in (1, 2, 3):  # one call each
        train(values)
        assert max(int(row["step"]) for row in log_rows(tmp_path)) == step
        assert (tmp_path / "checkpoints" / f"step_{step:08d}" / "progress.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(2))
def test_killed_at_any_moment(tmp_path: Path, quick: None, uninterrupted: Path, attempt: int) -> None:
    """SIGKILL at a random time after the first checkpoint; the same command then gives the same weights."""
    values = config(tmp_path, STEPS, *STEADY)
    moment = random.Random(time.time_ns()).uniform(0, 1.5)
    process = in_a_process(lambda: train(values) and None)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "step_00000003").exists() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(moment)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode in (-signal.SIGKILL, 0)
    train(values)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["saving", *(pytest.param(name, marks=pytest.mark.slow) for name in ("saved", "evaluating"))]
)
def test_killed_at_the_worst_moments(
    tmp_path: Path, quick: None, uninterrupted: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last checkpoint is written, and between checkpoint and evaluation."""
    values = config(tmp_path, STEPS, *STEADY)

    class Killed(BaseException):
        pass

    trainer = Trainer(values)

    def killed(*_: Any, **__: Any) -> None:
        if trainer.step == STEPS:
            raise Killed

    if moment == "saving":
        save = trainer.accelerator.save_state

        def half(folder: str, **options: Any) -> None:
            save(folder, **options)
            killed()

        trainer.accelerator.save_state = half  # type: ignore[method-assign]
    elif moment == "saved":
        evaluate = trainer._evaluate
        trainer._evaluate = lambda log: killed() or evaluate(log)  # type: ignore[method-assign]
    else:
        whole = trainer.pipeline.save_pretrained
        trainer.pipeline.save_pretrained = lambda folder: killed() or whole(folder)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(Trainer, "_picture", lambda trainer: None)
    monkeypatch.setattr(training, "mean_mesh_error", lambda *_: 300.0)
    assert train(values)["errors"]["pve"]["first"]["value"] > 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_looking_changes_nothing(tmp_path: Path, quick: None, uninterrupted: Path) -> None:
    """An evaluation swaps the EMA weights in, and must restore the training weights."""
    train(config(tmp_path, STEPS, *STEADY, "training.evaluate_every=100"))
    assert_same(checkpoint(tmp_path, STEPS), checkpoint(uninterrupted, STEPS))


@pytest.mark.slow
def test_another_experiment_in_the_same_folder_is_refused(tmp_path: Path, quick: None, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    for override, part in (("model.width=64", "model"), ("seed=3", "seed"), ("loss.camera=0.5", "loss")):
        with pytest.raises(UserError, match=f"holds a run with another '{part}' section; give output="):
            Trainer(config(tmp_path / "run", STEPS, *STEADY, override))
    Trainer(config(tmp_path / "run", 20, *STEADY))  # more steps: the same experiment


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    values = config(tmp_path, 4, "training.checkpoint_every=2", "training.evaluate_every=4")
    real = checkpoints.save_file
    failures = OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container] write failed")
    for error in failures:

        def full(tensors: State, path: Path, error: Exception = error) -> None:
            if "step_00000004" in str(path):
                Path(path).write_bytes(b"half")
                raise error
            real(tensors, path)

        monkeypatch.setattr(checkpoints, "save_file", full)
        with pytest.raises(UserError, match=r"00004: could not be written .*; earlier checkpoints stand") as caught:
            train(values)
        assert "\n" not in str(caught.value)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    train(values)
    assert (tmp_path / "checkpoints" / "step_00000004" / "progress.json").is_file()


@pytest.mark.slow
def test_old_checkpoints_go_and_damaged_ones_are_named(tmp_path: Path, quick: None) -> None:
    values = config(tmp_path, 4, "training.checkpoint_every=1", "training.keep_checkpoints=2")
    train(values)
    places = sorted((tmp_path / "checkpoints").iterdir())
    assert [place.name for place in places] == ["step_00000003", "step_00000004"]
    (places[-1] / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"model.safetensors: not what was written, .*; remove it to go on"):
        train(values)
    (places[-1] / "checksums.json").unlink()  # as in old checkpoints
    with pytest.raises(UserError, match=r"step_00000004: damaged checkpoint .*; remove it to go on"):
        train(values)
    (places[-1] / "progress.json").unlink()  # incomplete: ignored
    train(values)
    assert json.loads((places[-1] / "progress.json").read_text())["step"] == 4


class Evil:
    """A malicious checkpoint: code that runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_a_second_training_in_the_folder_is_refused(tmp_path: Path, quick: None) -> None:
    values = config(tmp_path, 2)
    first = Trainer(values)
    with claim(first.folder, "wait"):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(UserError, match=rf"another process \(number {os.getpid()}\) works in it; wait for it"):
            train(values)
    # Another run began and ended in between: the folder is checked again.
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(tmp_path, 2, "seed=5"))
    with pytest.raises(UserError, match="holds a run with another 'seed' section"):
        first.run()


@pytest.mark.slow
def test_the_log_goes_on_within_a_row(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of log.csv is the mean over its steps, also if the training was resumed between them."""
    every = ("training.log_every=3", "training.checkpoint_every=2")
    train(config(tmp_path / "whole", 3, *every))
    trainer = Trainer(config(tmp_path / "parts", 3, *every))
    save = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda: (save(), setattr(trainer, "stopping", True)))
    trainer.run()
    train(config(tmp_path / "parts", 3, *every))
    rows = [[row for row in log_rows(tmp_path / name) if row.get("loss")] for name in ("whole", "parts")]
    assert rows[0] and [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


@pytest.mark.slow
def test_nothing_is_unpickled(tmp_path: Path, quick: None) -> None:
    values = config(tmp_path, 2)
    train(values)
    place = tmp_path / "checkpoints" / "step_00000002"
    (place / "checksums.json").unlink()  # else the checksum fails before the file is opened
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    trap = tmp_path / "trap"
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
            for path in place.iterdir():
                path.unlink()
            for file, content in whole.items():
                (place / file).write_bytes(content)
            save(Evil(trap), place / name)
            with contextlib.suppress(UserError):  # accelerate ignores unreadable random states
                train(values)
            assert not trap.exists(), name


@pytest.mark.slow
def test_starting_from_a_saved_pipeline(tmp_path: Path, quick: None, uninterrupted: Path) -> None:
    again = config(tmp_path / "again", 1, *STEADY, f"training.start_from={uninterrupted / 'pipeline'}", "seed=7")
    start = {name: value.clone() for name, value in Trainer(again).plain.state_dict().items()}
    saved = load_file(uninterrupted / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    assert_same(start, saved)
    fresh = Trainer(config(tmp_path / "fresh", 1, *STEADY, "seed=7")).plain.state_dict()
    assert any(not torch.equal(value, saved[name]) for name, value in fresh.items())
    start_from = f"training.start_from={uninterrupted / 'pipeline'}"
    other = config(tmp_path / "other", 1, *STEADY, start_from, "model.width=64")
    with pytest.raises(UserError, match="width 32, this one 64"):
        Trainer(other)


@pytest.mark.slow
def test_a_path_joins_a_saved_pipeline(tmp_path: Path, quick: None, uninterrupted: Path) -> None:
    start_from = f"training.start_from={uninterrupted / 'pipeline'}"
    with_depth = config(tmp_path / "depth", 1, *STEADY, start_from, "seed=7", "model.depth_map=true")
    trainer = Trainer(with_depth)
    saved = load_file(uninterrupted / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    mine = trainer.plain.state_dict()
    assert_same({name: mine[name] for name in saved}, saved)
    assert any(name.startswith("depth_fusion") for name in mine.keys() - saved.keys())
    # Same output: the added module is zero-initialised.
    plain = Trainer(config(tmp_path / "plain", 1, *STEADY, start_from, "seed=7")).plain.eval()
    heatmaps = torch.rand(2, plain.config.num_keypoints, 64, 64)
    valid = torch.ones(2, plain.config.num_keypoints, dtype=torch.bool)
    with torch.no_grad():
        before = plain.encode(heatmaps=heatmaps, heatmap_valid=valid)
        after = trainer.plain.eval().encode(heatmaps=heatmaps, heatmap_valid=valid, depth=torch.rand(2, 64, 64))
    assert torch.equal(before[0].tokens, after[0].tokens) and torch.equal(before[1], after[1])
    trainer.pipeline.save_pretrained(tmp_path / "saved")
    without = config(tmp_path / "without", 1, *STEADY, f"training.start_from={tmp_path / 'saved'}")
    with pytest.raises(UserError, match="depth_map True, this one False"):
        Trainer(without)


@pytest.mark.slow
def test_further_blocks_join_a_saved_pipeline(tmp_path: Path, quick: None, uninterrupted: Path) -> None:
    start_from = f"training.start_from={uninterrupted / 'pipeline'}"
    plain = Trainer(config(tmp_path / "plain", 1, *STEADY, start_from, "seed=7")).plain
    encoder, denoiser = plain.config.encoder_depth, plain.config.depth
    deeper = [f"model.encoder_depth={encoder + 2}", f"model.depth={denoiser + 1}"]
    grown = Trainer(config(tmp_path / "grown", 1, *STEADY, start_from, "seed=7", *deeper)).plain
    assert len(grown.encoder) == encoder + 2 and len(grown.denoisers[0].blocks) == denoiser + 1
    heatmaps = torch.rand(2, plain.config.num_keypoints, 64, 64)
    valid = torch.ones(2, plain.config.num_keypoints, dtype=torch.bool)
    said = []
    for model in (plain, grown):
        conditioning, camera = model.encode(heatmaps=heatmaps, heatmap_valid=valid)
        said.append((camera, model.regress(conditioning)))
    for before, after in zip(*said, strict=True):  # same output at the start
        assert torch.equal(before, after)
    said[1][1].square().mean().backward()
    for block in (*list(grown.encoder)[encoder:],):
        assert block.attention.to_out.weight.grad.abs().max() > 0
        assert block.feed_forward[-1].weight.grad.abs().max() > 0
    assert grown.denoisers[0].blocks[-1].modulation.project.weight.grad.abs().max() > 0
    fewer = config(tmp_path / "fewer", 1, *STEADY, start_from, f"model.encoder_depth={encoder - 1}")
    with pytest.raises(UserError, match=f"encoder_depth {encoder}, this one {encoder - 1}"):
        Trainer(fewer)


# -- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.points=huber", "loss.points 'huber' is not known; choose one of l2"),
        ("loss.weighting=snr", "loss.weighting 'snr' is not known"),
        ("training.mixed_precision=bf61", "training.mixed_precision 'bf61' is not known; choose one of no, bf16"),
        ("training.batch_size=0", "training.batch_size 0: 1 to"),
        ("training.log_every=0", "training.log_every 0: 1 to"),
        ("loss.noise_levels=0", "loss.noise_levels 0: 1 to"),
        ("seed=-1", "seed -1"),
        ("diffusion.sampler=lms", "scheduler 'lms' is not known"),
        ("diffusion.prediction_type=x", "prediction_type 'x' is not known"),
        ("data.kind=h36m", "data.kind 'h36m' is not known"),
        ("data.faults.jiter=1", "no key 'jiter'; did you mean 'jitter'"),
    ],
)
def test_bad_values_are_named_before_training(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(config(tmp_path, 2, override))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, quick: None) -> None:
    trainer = Trainer(config(tmp_path, 2))
    with torch.no_grad():
        trainer.plain.camera_token.fill_(float("nan"))
    with pytest.raises(UserError, match="step 0: the gradient is not finite"):
        trainer.run()
    assert not list((tmp_path / "checkpoints").glob("step_*"))
