"""The training loop, on Accelerate: EMA, learning rate schedule, checkpoints, resume.

All randomness is derived from (seed, step), see `train.stream`: the same command resumes a killed run from its last
checkpoint and gives the same result.

    runs/NAME/config.yaml            the resolved config
    runs/NAME/checkpoints/step_N/    the training state to resume from
    runs/NAME/pipeline/              the EMA weights, for HMDiffPipeline.from_pretrained
    runs/NAME/log.csv, tensorboard/, pictures/
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hmdiff.body.body import load_body
from hmdiff.body.surface import mesh_edges
from hmdiff.build import build_mesh, build_model, build_scheduler, build_source
from hmdiff.config import Config, load_config, save_config
from hmdiff.errors import UserError
from hmdiff.evaluate.mean_mesh import mean_mesh_error
from hmdiff.files.locks import claim
from hmdiff.files.storage import make_folder
from hmdiff.pipeline import HMDiffPipeline
from hmdiff.train import checkpoint
from hmdiff.train.logger import run_log, tracker_options
from hmdiff.train.maps import check_maps
from hmdiff.train.optimizer import build_optimizer, rate_share, set_rates
from hmdiff.train.sharding import fill, shared_out, whole
from hmdiff.train.start import check_names, take_weights
from hmdiff.train.step import TrainingStep, keypoint_map, used_by_no_loss
from hmdiff.train.stopping import stop_signals
from hmdiff.train.stream import TrainingStream
from hmdiff.train.validation import score_test_split, validate, validation_line, validation_row


class Trainer:
    """One training run, from a config to a saved pipeline."""

    def __init__(self, config: Config) -> None:
        self.config = config
        values = config.training
        check_names(config)
        if values.threads:
            torch.set_num_threads(values.threads)
        # find_unused_parameters is set below, once the model is known, before `prepare` reads it.
        self._wrapping = DistributedDataParallelKwargs()
        self.folder = make_folder(config.output)
        self.accelerator = Accelerator(
            mixed_precision=values.mixed_precision,
            kwargs_handlers=[self._wrapping],
            **tracker_options(values.trackers, self.folder),
        )
        self._check_same_run()
        device = self.accelerator.device
        body = load_body(config.body)
        mesh = build_mesh(config, body)
        self.plain = build_model(config, body, mesh)
        if values.start_from:
            take_weights(self.plain, values.start_from)
        # Upsampling is fitted in closed form; training samples have no full mesh to refine it.
        if self.plain.upsample_weight is not None:
            self.plain.upsample_weight.requires_grad_(False)
        self.scheduler = build_scheduler(config)
        # On a GPU without workers, people are drawn on the GPU, whose kernels are queued ahead of the step.
        drawn_on = device if device.type == "cuda" and not config.data.workers else torch.device("cpu")
        data = build_source(config, body, mesh, device=drawn_on)
        for line in check_maps(config, data):
            self.accelerator.print(line)
        self.stream = TrainingStream(
            data, config, self.accelerator.process_index, self.accelerator.num_processes, self.plain
        )
        self.validation = build_source(config, body, mesh, full_mesh=True)
        self.pipeline = HMDiffPipeline(
            self.plain, self.scheduler, body, config.diffusion.num_inference_steps, config.diffusion.eta
        )
        edges = mesh_edges(mesh.coarse_faces)
        if values.gradient_checkpointing:
            self.plain.enable_gradient_checkpointing()

        optimizer = build_optimizer(self.plain, values)
        # Compiling the module would rename its parameters, so only its forward is compiled.
        if values.compile:
            self.plain.forward = torch.compile(self.plain.forward)  # type: ignore[method-assign]
        step = TrainingStep(
            self.plain,
            self.scheduler,
            config.loss,
            edges.to(device) if config.loss.edges else None,
            keypoint_map(config.loss, self.plain, body, device),
        )
        self._wrapping.find_unused_parameters = used_by_no_loss(self.plain, config.loss)
        self._tell_deepspeed()
        self.model, self.optimizer = self.accelerator.prepare(step, optimizer)
        from diffusers.training_utils import EMAModel  # takes seconds: imports all of diffusers' models

        # Not registered with accelerate, which would unpickle its state: `_save` writes it as safetensors.
        self.ema = EMAModel(
            self.plain.parameters(), decay=values.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )
        self.ema.to(device)
        # Evaluation needs unsharded weights (FSDP), so it gets a separate model.
        self.shown = self.plain
        if shared_out(self.plain.parameters()):
            self.shown = self.pipeline.model = build_model(config, body, mesh).to(device).eval()
        self.step = 0
        self.stopping = False
        self._sums: dict[str, float] = {}  # of the losses since the last row of the log
        self._counted = 0  # number of steps in the sums

    def run(self) -> dict[str, Any]:
        """Train from the last checkpoint to the end, or for `training.minutes`. Returns the last evaluation."""
        main = self.accelerator.is_main_process
        mend = "wait for it to end, or give output=ANOTHER_FOLDER"
        with claim(self.folder, mend) if main else contextlib.nullcontext():
            return self._run()

    def _run(self) -> dict[str, Any]:
        values, main = self.config.training, self.accelerator.is_main_process
        self._check_same_run()  # again, now that the folder is locked
        if main:
            save_config(self.config, self.folder / "config.yaml")
        self._resume()
        if main:
            checkpoint.sweep(self.folder / "checkpoints", values.keep_checkpoints)
        started, seen, result = time.monotonic(), 0, {}
        loader = DataLoader(
            self.stream,
            batch_size=None,
            sampler=range(self.step * values.gradient_accumulation, len(self.stream)),
            num_workers=self.config.data.workers,
            prefetch_factor=4 if self.config.data.workers else None,
        )
        bar = tqdm(total=values.steps, initial=self.step, disable=not main, desc=self.config.name, unit="step")
        with (
            stop_signals(self._stop),
            run_log(self.accelerator, self.folder, self.config, self.step, again=self._evaluation_due()) as log,
        ):
            # Started here, so that data workers inherit our Ctrl-C handler; the default one would end them.
            batches = iter(loader)
            if self.step and self._evaluation_due():
                result = self._evaluate(log)  # the run may have been killed between checkpoint and evaluation
            while self.step < values.steps and not self.stopping:
                terms = self._one_step(batches)
                self.step += 1
                seen += values.batch_size * values.gradient_accumulation * self.accelerator.num_processes
                for name, value in terms.items():
                    self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._counted += 1
                bar.update(1)
                if self.step % values.log_every == 0 or self.step == values.steps:
                    rate = seen / (time.monotonic() - started)
                    averages = {name: value / self._counted for name, value in self._sums.items()}
                    self._sums, self._counted = {}, 0
                    bar.set_postfix(loss=f"{averages['loss']:.4f}", samples=f"{rate:.0f}/s")
                    log({"step": self.step, **averages, "learning_rate": self._rate(), "samples_per_second": rate})
                late = values.minutes and time.monotonic() - started > 60 * values.minutes
                self.stopping = self._agreed(self.stopping or bool(late))
                last = self.step == values.steps or self.stopping
                if self.step % values.checkpoint_every == 0 or last:
                    self._save()
                if self._evaluation_due() or last:
                    result = self._evaluate(log)
        bar.close()
        if self.step == values.steps and main and self.config.evaluation.test_people:
            score_test_split(self.folder, self.validation, self.config.evaluation, self.accelerator.device)
        return result

    def _one_step(self, batches: Iterator) -> dict[str, Tensor]:
        values = self.config.training
        device = self.accelerator.device
        set_rates(self.optimizer, values, self.step)
        totals: dict[str, Tensor] = {}
        for micro in range(values.gradient_accumulation):
            people, draws = next(batches)
            people, draws = people.to(device), draws.to(device)
            last = micro == values.gradient_accumulation - 1
            quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            with quiet, self.accelerator.autocast():
                terms = self.model(people, draws)
                # DeepSpeed does this division itself.
                share = 1 if self.accelerator.state.deepspeed_plugin is not None else values.gradient_accumulation
                self.accelerator.backward(terms["loss"] / share)
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / values.gradient_accumulation
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), values.gradient_clip)
        if norm is not None and not math.isfinite(float(whole([torch.as_tensor(norm)])[0])):
            raise UserError(
                f"step {self.step}: the gradient is not finite; start again from {self.folder}/checkpoints with a "
                "lower training.learning_rate, or with training.mixed_precision=no"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.plain.parameters())
        if self.accelerator.num_processes > 1:
            totals = {name: self.accelerator.reduce(value, "mean") for name, value in totals.items()}
        return totals

    def _tell_deepspeed(self) -> None:
        """DeepSpeed accumulates and clips by the launcher's file; override it with the config's values."""
        plugin: Any = self.accelerator.state.deepspeed_plugin
        if plugin is not None:
            plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": self.config.training.batch_size,
                "gradient_accumulation_steps": self.config.training.gradient_accumulation,
                "gradient_clipping": self.config.training.gradient_clip,
            }

    def _rate(self) -> float:
        """The learning rate of the current step."""
        return self.config.training.learning_rate * rate_share(self.config.training, self.step)

    def _evaluation_due(self) -> bool:
        return self.step == self.config.training.steps or self.step % self.config.training.evaluate_every == 0

    def _stop(self) -> None:
        self.stopping = True

    def _agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop. All stop together, or the others would wait for its gradients forever."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _check_same_run(self) -> None:
        """Refuse to mix two experiments in one folder."""
        stored = self.folder / "config.yaml"
        if not stored.is_file() or not any((self.folder / "checkpoints").glob("step_*")):
            return
        before = load_config(stored)
        for part in ("seed", "body", "model", "diffusion", "data", "loss"):
            if getattr(before, part) != getattr(self.config, part):
                raise UserError(
                    f"{self.folder}: holds a run with another {part!r} section; give output=ANOTHER_FOLDER or remove it"
                )

    def _save(self) -> None:
        """Write a checkpoint atomically: into a temporary folder, then renamed."""
        self.accelerator.wait_for_everyone()
        place = self.folder / "checkpoints" / f"step_{self.step:08d}"
        part = place.with_name(f".{place.name}.part")
        if self.accelerator.is_main_process:
            checkpoint.begin(place)
        self.accelerator.wait_for_everyone()
        averaged = whole(self.ema.shadow_params)
        progress = checkpoint.Progress(self.step, self.ema.optimization_step, self._sums, self._counted)
        try:
            self.accelerator.save_state(str(part), safe_serialization=True)
            if self.accelerator.is_main_process:
                checkpoint.write_average(part, averaged)
                checkpoint.write_progress(part, progress)
        except Exception as error:  # on a full disk, OS, torch and safetensors raise different exceptions
            shutil.rmtree(part, ignore_errors=True)
            raise checkpoint.not_written(place, error) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            try:
                checkpoint.finish(part, place, self.config.training.keep_checkpoints)
            except OSError as error:
                raise checkpoint.not_written(place, error) from error
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoint.checkpoints_in(self.folder / "checkpoints")
        if not found:
            return
        place = found[-1]
        progress = checkpoint.read_progress(place)
        if progress.step > self.config.training.steps:
            raise UserError(
                f"{place}: is beyond training.steps={self.config.training.steps}; give more steps, or another output"
            )
        try:
            self.accelerator.load_state(str(place))
            stored = checkpoint.read_average(place, self.ema.shadow_params)
            for mine, value in zip(self.ema.shadow_params, stored, strict=True):
                fill(mine, value)
        except UserError:
            raise
        except Exception as error:  # torch, safetensors and accelerate raise different exceptions
            reason = str(error).split("\n")[0][:160]
            raise UserError(f"{place}: damaged checkpoint ({reason}); {checkpoint.MEND}") from None
        for what, tensors in (
            ("weights", list(self.plain.parameters())),
            ("averaged weights", stored),
            ("moments of the optimiser", list(checkpoint.tensors_in(self.optimizer.state_dict()))),
        ):
            checkpoint.check_finite(place, whole(tensors), what)
        self.step, self.ema.optimization_step = progress.step, progress.ema_steps
        self._sums, self._counted = dict(progress.sums), progress.counted
        if self.accelerator.is_main_process:
            tqdm.write(f"going on from {place}")

    def _evaluate(self, log: Any) -> dict[str, Any]:
        """Evaluate the EMA weights on the validation split and save them as a pipeline."""
        averaged = whole(self.ema.shadow_params)
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return {}
        with self._showing(averaged):
            report = validate(self.pipeline, self.validation, self.config.evaluation)
            self.pipeline.save_pretrained(self.folder / "pipeline")
            if not self.config.training.picture_every or self.step % self.config.training.picture_every == 0:
                self._picture()
        row = validation_row(report)
        people = self.config.evaluation.people
        log({"step": self.step, **row, "val_pve_of_mean_mesh": mean_mesh_error(self.validation, "val", people)})
        tqdm.write(f"step {self.step}: {validation_line(report, row)}")
        self.accelerator.wait_for_everyone()
        return report

    @contextlib.contextmanager
    def _showing(self, averaged: list[Tensor]) -> Iterator[None]:
        """Context in which the pipeline's model has the unsharded EMA weights."""
        if self.shown is not self.plain:
            with torch.no_grad():
                for mine, value in zip(self.shown.parameters(), averaged, strict=True):
                    mine.copy_(value)
                for buffer, value in zip(self.shown.buffers(), self.plain.buffers(), strict=True):
                    buffer.copy_(value)
            yield
            return
        self.ema.store(self.plain.parameters())
        self.ema.copy_to(self.plain.parameters())
        self.plain.eval()
        try:
            yield
        finally:
            self.ema.restore(self.plain.parameters())
            self.plain.train()

    def _picture(self) -> None:
        """Write a picture of a few validation people and their hypotheses."""
        from hmdiff.train.gallery import validation_picture

        validation_picture(self.pipeline, self.validation, self.folder / "pictures" / f"step_{self.step:08d}.png")
